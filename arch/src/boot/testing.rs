//! Tiny kernels for tests.

use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::{BootConfig, KernelSource, RamMap};

pub(super) const RAM: RamMap = RamMap { low: 16 << 20, high: 0 };

pub(super) fn ram() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM.low as usize)]).unwrap()
}

pub(super) fn image(bytes: &[u8]) -> BootConfig<'_> {
    BootConfig {
        kernel: KernelSource::Image { name: "test image", bytes },
        initrd: None,
        cmdline: "",
        ram: RAM,
        acpi: None,
    }
}

/// A `bzImage` whose 64-bit entry is `code`.
pub(super) fn bzimage(code: &[u8]) -> Vec<u8> {
    const SETUP_SECTORS: usize = 2;
    let mut file = vec![0; (SETUP_SECTORS + 1) * 512 + 0x200];
    file.extend_from_slice(code);
    file.resize(file.len().next_multiple_of(16), 0);
    let payload = (file.len() - (SETUP_SECTORS + 1) * 512) as u32;
    let mut put = |offset: usize, bytes: &[u8]| {
        file[offset..offset + bytes.len()].copy_from_slice(bytes);
    };
    put(0x1f1, &[SETUP_SECTORS as u8]);
    put(0x1f4, &(payload / 16).to_le_bytes());
    put(0x1fe, &[0x55, 0xaa, 0xeb, 0x66]);
    put(0x202, b"HdrS");
    put(0x206, &[0x0f, 0x02]);
    put(0x211, &[1]);
    put(0x22c, &0x7fff_ffffu32.to_le_bytes());
    put(0x236, &[1]);
    put(0x238, &2047u32.to_le_bytes());
    put(0x258, &0x10_0000u64.to_le_bytes());
    put(0x260, &0x1_0000u32.to_le_bytes());
    file
}

/// Where [`pvh_elf`] is loaded and entered.
pub(super) const ELF_BASE: u64 = 0x20_0000;
/// Offset of the PT_LOAD header in [`pvh_elf`].
pub(super) const LOAD: usize = 64;
/// Offset of the note's descriptor, the entry address, in [`pvh_elf`].
pub(super) const NOTE_DESC: usize = 64 + 2 * 56 + 16;

/// An ELF file with a PVH note that loads `code` at [`ELF_BASE`], in a segment of 4 KiB.
pub(super) fn pvh_elf(code: &[u8]) -> Vec<u8> {
    let code = if code.is_empty() { &[0xf4] } else { code };
    let code_offset = NOTE_DESC as u64 + 4;
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    let mut put = |bytes: &[u8]| file.extend_from_slice(bytes);
    put(&[2, 0, 62, 0, 1, 0, 0, 0]);
    for value in [ELF_BASE, 64, 0] {
        put(&value.to_le_bytes());
    }
    put(&[0, 0, 0, 0, 64, 0, 56, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
    put(&[1, 0, 0, 0, 7, 0, 0, 0]);
    for value in [code_offset, ELF_BASE, ELF_BASE, code.len() as u64, 0x1000, 4] {
        put(&value.to_le_bytes());
    }
    put(&[4, 0, 0, 0, 4, 0, 0, 0]);
    for value in [NOTE_DESC as u64 - 16, 0, 0, 20, 20, 4] {
        put(&value.to_le_bytes());
    }
    put(&[4, 0, 0, 0, 4, 0, 0, 0, 18, 0, 0, 0]);
    put(b"Xen\0");
    put(&(ELF_BASE as u32).to_le_bytes());
    put(code);
    file
}
