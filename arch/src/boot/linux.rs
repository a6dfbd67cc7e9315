//! Linux `bzImage`, entered by the 64-bit boot protocol.
//!
//! Source of all offsets and rules: the Linux kernel's own documentation,
//! `Documentation/arch/x86/boot.rst` ("The Linux/x86 Boot Protocol").

use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use linux_loader::loader::{BzImage, KernelLoader};
use vm_memory::{GuestAddress, GuestMemoryBackend};

use super::memory_map::MemoryMap;
use super::{
    BootConfig, BootError, Entry, Kernel, Protocol, Source, at, load_cmdline, load_initrd,
};

/// First protocol version with `xloadflags`, which says whether there is a 64-bit entry.
const VERSION_WITH_XLOADFLAGS: u16 = 0x020c;
/// `loadflags`: the protected-mode part is loaded at 1 MiB.
const LOADED_HIGH: u8 = 1 << 0;
/// `loadflags`: print nothing early. Left as it is; listed because `CAN_USE_HEAP` stands beside it.
const CAN_USE_HEAP: u8 = 1 << 7;
/// `xloadflags`: there is a 64-bit entry point at 0x200.
const XLF_KERNEL_64: u16 = 1 << 0;
/// From the protected-mode part's start to its 64-bit entry.
const ENTRY_64: u64 = 0x200;
/// `type_of_loader`: a loader without a number of its own.
const LOADER_UNDEFINED: u8 = 0xff;
/// Header end of protocol 2.12 (`init_size` and `handover_offset` included).
const HEADER_END: u64 = 0x268;

pub(super) fn load<M: GuestMemoryBackend, F: Source>(
    mem: &M,
    config: &BootConfig<'_>,
    map: &MemoryMap,
    mut kernel: Kernel<'_, F>,
) -> Result<Entry, BootError> {
    let header = read_header(&mut kernel)?;
    let start = at::HIGH_MEMORY;
    // What the kernel takes while it unpacks itself, from the address it prefers.
    let loaded_end = start.saturating_add(header.payload_len);
    let needed_end = header.pref_address.saturating_add(header.init_size).max(loaded_end);
    if !map.holds(start, needed_end) {
        return Err(BootError::KernelTooBig {
            name: kernel.name.into(),
            start,
            end: needed_end,
            ram_end: config.ram.low,
        });
    }
    let initrd = load_initrd(mem, config, map, needed_end, header.initrd_max.saturating_add(1))?;
    load_cmdline(mem, config.cmdline, header.cmdline_max)?;

    let loaded = BzImage::load(mem, Some(GuestAddress(start)), &mut kernel.file, None)
        .map_err(|source| BootError::Loader { name: kernel.name.into(), source })?;

    let mut params =
        boot_params { hdr: loaded.setup_header.unwrap_or_default(), ..Default::default() };
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.loadflags &= !CAN_USE_HEAP;
    // Both lie below 4 GiB: the first is a constant, the second is bound by a 32-bit limit.
    params.hdr.cmd_line_ptr = at::CMDLINE as u32;
    if let Some(initrd) = initrd {
        params.hdr.ramdisk_image = initrd.address as u32;
        params.hdr.ramdisk_size = initrd.size as u32;
    }
    params.acpi_rsdp_addr = config.acpi.map_or(0, |acpi| acpi.rsdp);
    let mut count = 0u8;
    for (slot, piece) in params.e820_table.iter_mut().zip(map.pieces()) {
        *slot = boot_e820_entry {
            addr: piece.start,
            size: piece.end - piece.start,
            r#type: piece.kind as u32,
        };
        count += 1;
    }
    params.e820_entries = count;
    LinuxBootConfigurator::write_bootparams(
        &BootParams::new(&params, GuestAddress(at::ZERO_PAGE)),
        mem,
    )?;
    super::cpu::write_long_mode_tables(mem)?;
    Ok(Entry {
        protocol: Protocol::Linux64,
        rip: start + ENTRY_64,
        boot_info: at::ZERO_PAGE,
        kernel_end: needed_end,
    })
}

/// What matters of a setup header that has been found sound.
struct Header {
    payload_len: u64,
    pref_address: u64,
    init_size: u64,
    initrd_max: u64,
    cmdline_max: u64,
}

fn read_header<F: Source>(kernel: &mut Kernel<'_, F>) -> Result<Header, BootError> {
    let mut start = Vec::new();
    kernel.rewind_and_read(HEADER_END, &mut start)?;
    let field = |offset: usize, size: usize| -> u64 {
        let bytes = start.get(offset..offset + size).unwrap_or_default();
        bytes.iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte))
    };
    if (start.len() as u64) < HEADER_END {
        let expected = format!("at least {HEADER_END} bytes");
        return Err(kernel.corrupt("the file's length", expected, kernel.len));
    }
    let boot_flag = field(0x1fe, 2);
    if boot_flag != 0xaa55 {
        return Err(kernel.corrupt("the boot flag", "0xaa55".into(), boot_flag));
    }
    let no_entry = |missing| BootError::NoEntry { name: kernel.name.into(), missing };
    if field(0x206, 2) < u64::from(VERSION_WITH_XLOADFLAGS) {
        return Err(no_entry("boot protocol of version 2.12 or later (Linux 3.8)"));
    }
    if field(0x211, 1) & u64::from(LOADED_HIGH) == 0 {
        return Err(no_entry("part that is loaded at 1 MiB (it is a zImage)"));
    }
    if field(0x236, 2) & u64::from(XLF_KERNEL_64) == 0 {
        return Err(no_entry("64-bit entry point (it is a 32-bit kernel)"));
    }
    // 0 means 4, for the sake of ancient kernels.
    let setup_sectors = if field(0x1f1, 1) == 0 { 4 } else { field(0x1f1, 1) };
    let setup_len = (setup_sectors + 1) * 512;
    // In units of 16 bytes. A file may be longer (a signature follows), never shorter.
    let payload_len = field(0x1f4, 4) * 16;
    if payload_len == 0 {
        return Err(kernel.corrupt("the kernel's size (syssize)", "more than 0".into(), 0));
    }
    // The last unit of 16 bytes may not be full.
    let whole = setup_len + payload_len - 15;
    if kernel.len < whole {
        let expected = format!("at least {whole} bytes, as its header says (cut short?)");
        return Err(kernel.corrupt("the file's length", expected, kernel.len));
    }
    Ok(Header {
        payload_len: kernel.len - setup_len,
        pref_address: field(0x258, 8),
        init_size: field(0x260, 4),
        initrd_max: field(0x22c, 4),
        cmdline_max: field(0x238, 4),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vm_memory::Bytes;

    use super::super::testing::*;
    use super::super::{AcpiArea, load};
    use super::*;

    #[test]
    fn a_bzimage_lands_at_one_mib_with_its_zero_page() {
        let kernel = bzimage(&[0xf4; 100]);
        let acpi = Some(AcpiArea { rsdp: 0xf_0000, start: 0xf_0000, size: 0x1_0000 });
        let config = BootConfig { cmdline: "console=ttyS0", acpi, ..image(&kernel) };
        let mem = ram();
        let entry = load(&mem, &config).unwrap();
        assert_eq!((entry.protocol, entry.rip), (Protocol::Linux64, 0x10_0200));
        let byte: u8 = mem.read_obj(GuestAddress(entry.rip)).unwrap();
        assert_eq!(byte, 0xf4);
        let zero_page = |offset: u64| GuestAddress(entry.boot_info + offset);
        assert_eq!(mem.read_obj::<u64>(zero_page(0x70)).unwrap(), 0xf_0000);
        assert_eq!(mem.read_obj::<u8>(zero_page(0x1e8)).unwrap(), 6);
        assert_eq!(mem.read_obj::<u32>(zero_page(0x202)).unwrap(), 0x5372_6448);
        assert_eq!(mem.read_obj::<u8>(zero_page(0x210)).unwrap(), LOADER_UNDEFINED);
        // The fourth piece of the map is RAM from 1 MiB on.
        assert_eq!(mem.read_obj::<u64>(zero_page(0x2d0 + 60)).unwrap(), 0x10_0000);
        assert_eq!(mem.read_obj::<u64>(zero_page(0x2d0 + 68)).unwrap(), RAM.low - 0x10_0000);
        let cmdline: u32 = mem.read_obj(zero_page(0x228)).unwrap();
        let mut text = [0; 14];
        mem.read_slice(&mut text, GuestAddress(cmdline.into())).unwrap();
        assert_eq!(&text, b"console=ttyS0\0");
    }

    fn refusal(change: impl FnOnce(&mut Vec<u8>)) -> BootError {
        let mut kernel = bzimage(&[0xf4; 100]);
        change(&mut kernel);
        load(&ram(), &image(&kernel)).unwrap_err()
    }

    #[test]
    fn bad_headers_are_refused_by_name() {
        let corrupt = |error: BootError, field: &str| match error {
            BootError::Corrupt { what, .. } => assert!(what.contains(field), "{what}"),
            other => panic!("{other}"),
        };
        corrupt(refusal(|k| k[0x1fe] = 0), "boot flag");
        corrupt(refusal(|k| k.truncate(0x240)), "length");
        corrupt(refusal(|k| k.truncate(0x800)), "length");
        corrupt(refusal(|k| k[0x1f1] = 255), "length");
        corrupt(refusal(|k| k[0x1f4..0x1f8].fill(0)), "syssize");
        let no_entry = |error| assert!(matches!(error, BootError::NoEntry { .. }), "{error}");
        no_entry(refusal(|k| k[0x206] = 0x0b));
        no_entry(refusal(|k| k[0x211] = 0));
        no_entry(refusal(|k| k[0x236] = 0));
        // More than RAM has, up to what no address can be.
        for size in [0x100_0000u32, u32::MAX] {
            let error = refusal(|k| k[0x260..0x264].copy_from_slice(&size.to_le_bytes()));
            assert!(matches!(error, BootError::KernelTooBig { .. }), "{error}");
        }
        let error = refusal(|k| k[0x258..0x260].fill(0xff));
        assert!(matches!(error, BootError::KernelTooBig { .. }), "{error}");
    }

    #[test]
    fn the_kernel_says_how_long_its_command_line_may_be() {
        let kernel = bzimage(&[0xf4; 100]);
        let cmdline = "x".repeat(2048);
        let error = load(&ram(), &BootConfig { cmdline: &cmdline, ..image(&kernel) }).unwrap_err();
        assert!(matches!(error, BootError::CmdlineTooLong { len: 2048, max: 2047 }), "{error}");
    }

    proptest! {
        #[test]
        fn hostile_headers_never_panic(
            changes in prop::collection::vec((0x1f1usize..0x268, any::<u8>()), 0..40),
            len in 0usize..8000,
        ) {
            let mut kernel = bzimage(&[0xf4; 3000]);
            for (offset, value) in changes {
                if !(0x202..0x206).contains(&offset) {
                    kernel[offset] = value;
                }
            }
            kernel.truncate(len);
            let _ = load(&ram(), &image(&kernel));
        }
    }
}
