//! ELF files with a PVH entry note, entered in 32-bit mode.
//!
//! Sources: Xen's documentation of the "x86/HVM direct boot ABI" (`docs/misc/pvh.pandoc`) and of
//! `hvm_start_info` (`xen/include/public/arch-x86/hvm/start_info.h`); System V ABI, "Object Files".

use std::io::{Read, SeekFrom};

use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::elf::start_info::{
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use linux_loader::loader::{Elf, KernelLoader};
use vm_memory::{Address, GuestAddress, GuestMemoryBackend};

use super::memory_map::MemoryMap;
use super::{
    BootConfig, BootError, Entry, Kernel, Protocol, Source, at, load_cmdline, load_initrd, write,
};

/// `hvm_start_info.magic`: "xEn3" with the top bit of the E set.
const MAGIC: u32 = 0x336e_c578;
/// The version with a memory map.
const VERSION: u32 = 1;
/// `e_ident[EI_CLASS]`: 64-bit.
const CLASS_64: u64 = 2;
/// `e_ident[EI_DATA]`: little-endian.
const LITTLE_ENDIAN: u64 = 1;
/// `e_machine`: x86-64.
const MACHINE_X86_64: u64 = 62;
const HEADER_LEN: u64 = 64;
const PROGRAM_HEADER_LEN: u64 = 56;
const PT_LOAD: u64 = 1;
const PT_NOTE: u64 = 4;
/// More program headers than this no kernel has; bounds what is read of a hostile file.
const MAX_PROGRAM_HEADERS: u64 = 128;

pub(super) fn load<M: GuestMemoryBackend, F: Source>(
    mem: &M,
    config: &BootConfig<'_>,
    map: &MemoryMap,
    mut kernel: Kernel<'_, F>,
) -> Result<Entry, BootError> {
    let segments = read_segments(&mut kernel)?;
    let mut kernel_end = at::HIGH_MEMORY;
    for segment in &segments {
        let end = segment.address.saturating_add(segment.mem_len);
        if !map.holds(segment.address, end) {
            return Err(BootError::KernelTooBig {
                name: kernel.name.into(),
                start: segment.address,
                end,
                ram_end: config.ram.low,
            });
        }
        kernel_end = kernel_end.max(end);
    }
    let loaded = Elf::load(mem, None, &mut kernel.file, None)
        .map_err(|source| BootError::Loader { name: kernel.name.into(), source })?;
    let PvhBootCapability::PvhEntryPresent(entry) = loaded.pvh_boot_cap else {
        return Err(BootError::NoEntry {
            name: kernel.name.into(),
            missing: "PVH entry note (a Linux kernel needs CONFIG_PVH)",
        });
    };
    let inside = |s: &Segment| s.address <= entry.0 && entry.0 < s.address + s.file_len;
    if !segments.iter().any(inside) {
        let expected = "inside a loaded segment".into();
        return Err(kernel.corrupt("the PVH entry address", expected, entry.raw_value()));
    }
    // Memory may be that of a guest that has been reset: what the file does not fill must be zero.
    for segment in &segments {
        zero(mem, segment.address + segment.file_len, segment.address + segment.mem_len)?;
    }
    let initrd = load_initrd(mem, config, map, kernel_end, 1 << 32)?;
    load_cmdline(mem, config.cmdline, u64::MAX)?;

    let modules: Vec<hvm_modlist_entry> = initrd
        .iter()
        .map(|initrd| hvm_modlist_entry {
            paddr: initrd.address,
            size: initrd.size,
            ..Default::default()
        })
        .collect();
    let memory: Vec<hvm_memmap_table_entry> = map
        .pieces()
        .iter()
        .map(|piece| hvm_memmap_table_entry {
            addr: piece.start,
            size: piece.end - piece.start,
            type_: piece.kind as u32,
            reserved: 0,
        })
        .collect();
    let info = hvm_start_info {
        magic: MAGIC,
        version: VERSION,
        flags: 0,
        nr_modules: modules.len() as u32,
        modlist_paddr: if modules.is_empty() { 0 } else { at::MODULES },
        cmdline_paddr: at::CMDLINE,
        rsdp_paddr: config.acpi.map_or(0, |acpi| acpi.rsdp),
        memmap_paddr: at::MEMORY_MAP,
        memmap_entries: memory.len() as u32,
        reserved: 0,
    };
    let mut params = BootParams::new(&info, GuestAddress(at::START_INFO));
    params.set_sections(&memory, GuestAddress(at::MEMORY_MAP));
    if !modules.is_empty() {
        params.set_modules(&modules, GuestAddress(at::MODULES));
    }
    PvhBootConfigurator::write_bootparams(&params, mem)?;
    super::cpu::write_pvh_tables(mem)?;
    Ok(Entry {
        protocol: Protocol::Pvh,
        rip: entry.raw_value(),
        boot_info: at::START_INFO,
        kernel_end,
    })
}

/// A piece of the file to be loaded, found to lie inside the file.
struct Segment {
    address: u64,
    file_len: u64,
    mem_len: u64,
}

/// Checks the ELF header and every program header that the loader will follow.
fn read_segments<F: Source>(kernel: &mut Kernel<'_, F>) -> Result<Vec<Segment>, BootError> {
    let mut header = Vec::new();
    kernel.rewind_and_read(HEADER_LEN, &mut header)?;
    if (header.len() as u64) < HEADER_LEN {
        let expected = format!("at least {HEADER_LEN} bytes");
        return Err(kernel.corrupt("the file's length", expected, kernel.len));
    }
    let expect = |what, offset, size, expected: u64, words: &str| {
        let found = field(&header, offset, size);
        if found == expected { Ok(()) } else { Err(kernel.corrupt(what, words.into(), found)) }
    };
    expect("the ELF class", 4, 1, CLASS_64, "2 (64-bit)")?;
    expect("the ELF byte order", 5, 1, LITTLE_ENDIAN, "1 (little-endian)")?;
    expect("the ELF machine", 18, 2, MACHINE_X86_64, "62 (x86-64)")?;
    expect("the size of an ELF program header", 54, 2, PROGRAM_HEADER_LEN, "56")?;
    let count = field(&header, 56, 2);
    if count == 0 || count > MAX_PROGRAM_HEADERS {
        let expected = format!("1 to {MAX_PROGRAM_HEADERS}");
        return Err(kernel.corrupt("the number of ELF program headers", expected, count));
    }
    let table = field(&header, 32, 8);
    let table_end = table.saturating_add(count * PROGRAM_HEADER_LEN);
    if table < HEADER_LEN || table_end > kernel.len {
        let expected = format!("between {HEADER_LEN} and the file's end ({})", kernel.len);
        return Err(kernel.corrupt("the place of the ELF program headers", expected, table));
    }

    let mut segments = Vec::new();
    let mut bytes = Vec::new();
    kernel
        .file
        .seek(SeekFrom::Start(table))
        .and_then(|_| kernel.file.by_ref().take(count * PROGRAM_HEADER_LEN).read_to_end(&mut bytes))
        .map_err(|source| BootError::Read { path: kernel.name.into(), source })?;
    for entry in bytes.chunks_exact(PROGRAM_HEADER_LEN as usize) {
        let (kind, offset) = (field(entry, 0, 4), field(entry, 8, 8));
        let (address, file_len) = (field(entry, 24, 8), field(entry, 32, 8));
        let mem_len = field(entry, 40, 8);
        if kind != PT_LOAD && kind != PT_NOTE {
            continue;
        }
        if offset.checked_add(file_len).is_none_or(|end| end > kernel.len) {
            let expected = format!(
                "inside the file ({} bytes, of which it wants {file_len}; cut short?)",
                kernel.len
            );
            return Err(kernel.corrupt("an ELF segment's offset", expected, offset));
        }
        if kind == PT_LOAD {
            if mem_len < file_len {
                let expected = format!("at least its size in the file ({file_len})");
                return Err(kernel.corrupt("an ELF segment's size in memory", expected, mem_len));
            }
            segments.push(Segment { address, file_len, mem_len });
        }
    }
    if segments.is_empty() {
        return Err(kernel.corrupt("the number of loadable segments", "1 or more".into(), 0));
    }
    Ok(segments)
}

fn field(bytes: &[u8], offset: usize, size: usize) -> u64 {
    let bytes = bytes.get(offset..offset + size).unwrap_or_default();
    bytes.iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte))
}

fn zero<M: GuestMemoryBackend>(mem: &M, start: u64, end: u64) -> Result<(), BootError> {
    const ZEROS: [u8; 4096] = [0; 4096];
    let mut at = start;
    while at < end {
        let len = (end - at).min(ZEROS.len() as u64);
        write(mem, "zeros behind a segment", at, &ZEROS[..len as usize])?;
        at += len;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vm_memory::Bytes;

    use super::super::testing::*;
    use super::super::{AcpiArea, load};
    use super::*;

    #[test]
    fn an_elf_lands_where_it_says_with_its_start_info() {
        let kernel = pvh_elf(&[0xf4; 10]);
        let acpi = Some(AcpiArea { rsdp: 0xf_0000, start: 0xf_0000, size: 0x1_0000 });
        let config = BootConfig { cmdline: "hello", acpi, ..image(&kernel) };
        let mem = ram();
        // What a former guest left where the new one expects zeros.
        mem.write_slice(&[0xaa; 0x2000], GuestAddress(ELF_BASE)).unwrap();
        let entry = load(&mem, &config).unwrap();
        assert_eq!((entry.protocol, entry.rip), (Protocol::Pvh, ELF_BASE));
        let mut code = [0; 12];
        mem.read_slice(&mut code, GuestAddress(entry.rip)).unwrap();
        assert_eq!(code, [0xf4, 0xf4, 0xf4, 0xf4, 0xf4, 0xf4, 0xf4, 0xf4, 0xf4, 0xf4, 0, 0]);
        assert_eq!(mem.read_obj::<u8>(GuestAddress(ELF_BASE + 0xfff)).unwrap(), 0);
        assert_eq!(mem.read_obj::<u8>(GuestAddress(ELF_BASE + 0x1000)).unwrap(), 0xaa);
        let info = |offset| GuestAddress(entry.boot_info + offset);
        assert_eq!(mem.read_obj::<u32>(info(0)).unwrap(), MAGIC);
        assert_eq!(mem.read_obj::<u64>(info(32)).unwrap(), 0xf_0000);
        let entries: u32 = mem.read_obj(info(48)).unwrap();
        assert_eq!(entries, 6);
        let cmdline: u64 = mem.read_obj(info(24)).unwrap();
        let mut text = [0; 6];
        mem.read_slice(&mut text, GuestAddress(cmdline)).unwrap();
        assert_eq!(&text, b"hello\0");
    }

    fn refusal(change: impl FnOnce(&mut Vec<u8>)) -> BootError {
        let mut kernel = pvh_elf(&[0xf4; 10]);
        change(&mut kernel);
        load(&ram(), &image(&kernel)).unwrap_err()
    }

    #[test]
    fn bad_headers_are_refused_by_name() {
        let corrupt = |error: BootError, field: &str| match error {
            BootError::Corrupt { what, .. } => assert!(what.contains(field), "{what}"),
            other => panic!("{other}"),
        };
        corrupt(refusal(|k| k.truncate(10)), "length");
        corrupt(refusal(|k| k[4] = 1), "class");
        corrupt(refusal(|k| k[5] = 2), "byte order");
        corrupt(refusal(|k| k[18] = 3), "machine");
        corrupt(refusal(|k| k[54] = 32), "size of an ELF program header");
        corrupt(refusal(|k| k[56] = 0), "number of ELF program headers");
        corrupt(refusal(|k| k[32..40].fill(0xff)), "place of the ELF program headers");
        corrupt(refusal(|k| k[LOAD + 8..LOAD + 16].fill(0xff)), "segment's offset");
        corrupt(refusal(|k| k[LOAD] = 6), "loadable segments");
        corrupt(refusal(|k| k[LOAD + 40..LOAD + 48].fill(0)), "size in memory");
        corrupt(refusal(|k| k[NOTE_DESC + 1] = 0xff), "PVH entry address");
        assert!(matches!(
            refusal(|k| k[LOAD + 24..LOAD + 32].fill(0)),
            BootError::KernelTooBig { .. }
        ));
        assert!(matches!(refusal(|k| k[LOAD + 47] = 1), BootError::KernelTooBig { .. }));
        assert!(matches!(refusal(|k| k[NOTE_DESC - 8] = 17), BootError::NoEntry { .. }));
    }

    proptest! {
        #[test]
        fn hostile_files_never_panic(
            changes in prop::collection::vec((4usize..250, any::<u8>()), 0..20),
            len in 0usize..300,
        ) {
            let mut kernel = pvh_elf(&[0xf4; 100]);
            for (offset, value) in changes {
                if let Some(byte) = kernel.get_mut(offset) {
                    *byte = value;
                }
            }
            let _ = load(&ram(), &image(&kernel));
            kernel.truncate(len);
            let _ = load(&ram(), &image(&kernel));
        }
    }
}
