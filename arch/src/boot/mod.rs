//! Booting without a firmware: a kernel, its initrd and its command line are put into guest
//! memory, and the first vCPU is set to where the boot protocol says it begins.
//!
//! Two kinds of kernel are known: a Linux `bzImage`, entered in 64-bit mode (`linux.rs`), and an
//! ELF file with a PVH entry note, entered in 32-bit mode (`pvh.rs`). Both are read straight into
//! guest memory, never into a buffer of their size. Files are hostile: every number that addresses
//! or sizes something is checked against the file and against RAM before it is used.
//!
//! [`load`] may be called again on memory that a guest has used, to boot it anew after a reset.

mod cpu;
mod error;
mod linux;
mod memory_map;
mod pvh;
#[cfg(test)]
mod testing;

use std::fs::File;
use std::io::{Cursor, Read, Seek, SeekFrom};
use std::path::Path;

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, ReadVolatile};

pub use cpu::setup_bsp;
pub use error::BootError;
use memory_map::MemoryMap;

/// Where the loader puts what it makes itself. All of it lies in the first 640 KiB, which both
/// protocols leave to the loader, and is free for the guest once it has read it.
mod at {
    /// The global descriptor table.
    pub(super) const GDT: u64 = 0x500;
    /// PVH: `hvm_start_info`, and behind it the list of modules.
    pub(super) const START_INFO: u64 = 0x6000;
    /// PVH: the list of modules (the initrd).
    pub(super) const MODULES: u64 = 0x6100;
    /// PVH: the memory map. Linux: the zero page.
    pub(super) const MEMORY_MAP: u64 = 0x7000;
    /// Linux: `struct boot_params`, one page.
    pub(super) const ZERO_PAGE: u64 = 0x7000;
    /// Linux: PML4, page directory pointers, and four page directories.
    pub(super) const PAGE_TABLES: u64 = 0xa000;
    /// The command line.
    pub(super) const CMDLINE: u64 = 0x2_0000;
    /// The longest command line that there is room for, with its final NUL.
    pub(super) const CMDLINE_MAX: u64 = 0x1_0000;
    /// Where extended memory begins, and the lowest address of a kernel.
    pub(super) const HIGH_MEMORY: u64 = 0x10_0000;
}

/// Where the kernel comes from.
#[derive(Debug, Clone, Copy)]
pub enum KernelSource<'a> {
    /// A file on the host.
    File(&'a Path),
    /// Bytes in this program, and what to call them in an error.
    Image {
        /// What messages call it.
        name: &'a str,
        /// The whole file.
        bytes: &'a [u8],
    },
}

/// Where guest RAM is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RamMap {
    /// Bytes from address 0.
    pub low: u64,
    /// Bytes from 4 GiB.
    pub high: u64,
}

/// The ACPI tables already in guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AcpiArea {
    /// Address of the root pointer.
    pub rsdp: u64,
    /// First address of the area that holds all tables.
    pub start: u64,
    /// Its length in bytes.
    pub size: u64,
}

/// What to boot, and the machine it finds.
#[derive(Debug, Clone, Copy)]
pub struct BootConfig<'a> {
    /// The kernel.
    pub kernel: KernelSource<'a>,
    /// The initial RAM disk, handed to the kernel as it is.
    pub initrd: Option<&'a Path>,
    /// The kernel's command line.
    pub cmdline: &'a str,
    /// Where RAM is; the same as in the guest memory given to [`load`].
    pub ram: RamMap,
    /// The ACPI tables, if there are any.
    pub acpi: Option<AcpiArea>,
}

/// How the kernel expects to be entered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// Linux x86 boot protocol, 64-bit entry: long mode, first 4 GiB mapped to themselves, RSI =
    /// zero page.
    Linux64,
    /// PVH: 32-bit protected mode, flat segments, no paging, EBX = `hvm_start_info`.
    Pvh,
}

/// Where the first vCPU begins; for [`setup_bsp`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// How the kernel expects to be entered.
    pub protocol: Protocol,
    /// The first instruction.
    pub rip: u64,
    /// What the protocol's register (RSI or RBX) points to.
    pub boot_info: u64,
    /// The first address after the kernel's own memory.
    pub kernel_end: u64,
}

/// What a kernel may be read from.
trait Source: Read + ReadVolatile + Seek {}
impl<T: Read + ReadVolatile + Seek> Source for T {}

/// A kernel being loaded: its file, and what to call it.
struct Kernel<'a, F> {
    file: F,
    name: &'a str,
    len: u64,
}

impl<F> Kernel<'_, F> {
    /// The error for a header that says something impossible.
    fn corrupt(&self, what: &'static str, expected: String, found: u64) -> BootError {
        BootError::Corrupt { name: self.name.into(), what, expected, found }
    }
}

/// Puts kernel, initrd, command line and boot structures into `mem`. Kernel formats are tried in
/// order: ELF with a PVH note, then `bzImage`.
///
/// The ACPI tables, if any, must be written by the caller, before or after.
pub fn load<M: GuestMemoryBackend>(mem: &M, config: &BootConfig<'_>) -> Result<Entry, BootError> {
    match config.kernel {
        KernelSource::File(path) => {
            let name = path.display().to_string();
            let (file, len) = open(path)?;
            load_from(mem, config, Kernel { file, name: &name, len })
        }
        KernelSource::Image { name, bytes } => {
            let len = bytes.len() as u64;
            load_from(mem, config, Kernel { file: Cursor::new(bytes), name, len })
        }
    }
}

fn load_from<M: GuestMemoryBackend, F: Source>(
    mem: &M,
    config: &BootConfig<'_>,
    mut kernel: Kernel<'_, F>,
) -> Result<Entry, BootError> {
    if kernel.len == 0 {
        return Err(BootError::Empty { name: kernel.name.into() });
    }
    let map = MemoryMap::new(config.ram, config.acpi);
    let mut start = Vec::new();
    kernel.rewind_and_read(0x206, &mut start)?;
    if start.starts_with(b"\x7fELF") {
        pvh::load(mem, config, &map, kernel)
    } else if start.get(0x202..0x206) == Some(b"HdrS") {
        linux::load(mem, config, &map, kernel)
    } else {
        Err(BootError::NotAKernel { name: kernel.name.into(), found: error::describe(&start) })
    }
}

impl<F: Source> Kernel<'_, F> {
    /// The first `len` bytes of the file, or fewer where it is shorter.
    fn rewind_and_read(&mut self, len: u64, into: &mut Vec<u8>) -> Result<(), BootError> {
        self.file
            .seek(SeekFrom::Start(0))
            .and_then(|_| self.file.by_ref().take(len).read_to_end(into))
            .map_err(|source| BootError::Read { path: self.name.into(), source })?;
        Ok(())
    }
}

/// Opens a file that must be a regular one (or a block device would stall, a FIFO block), and
/// gives its length.
fn open(path: &Path) -> Result<(File, u64), BootError> {
    let read = |source| BootError::Read { path: path.into(), source };
    // Asked before opening, for opening a FIFO waits for its writer.
    let meta = std::fs::metadata(path).map_err(read)?;
    if !meta.is_file() {
        return Err(BootError::NotAFile { path: path.into() });
    }
    Ok((File::open(path).map_err(read)?, meta.len()))
}

/// A loaded initrd.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Initrd {
    address: u64,
    size: u64,
}

/// Puts the initrd as high as it can be below `limit` (exclusive) and above the kernel.
fn load_initrd<M: GuestMemoryBackend>(
    mem: &M,
    config: &BootConfig<'_>,
    map: &MemoryMap,
    kernel_end: u64,
    limit: u64,
) -> Result<Option<Initrd>, BootError> {
    let Some(path) = config.initrd else { return Ok(None) };
    let (mut file, size) = open(path)?;
    if size == 0 {
        return Err(BootError::Empty { name: path.display().to_string() });
    }
    let address = map.highest_fit(size, kernel_end, limit).ok_or(BootError::InitrdTooBig {
        path: path.into(),
        size,
        kernel_end,
        limit: limit.min(config.ram.low),
    })?;
    let len = usize::try_from(size).unwrap_or(usize::MAX);
    mem.read_exact_volatile_from(GuestAddress(address), &mut file, len)
        .map_err(|source| BootError::Copy { name: path.display().to_string(), address, source })?;
    Ok(Some(Initrd { address, size }))
}

/// Writes the command line and its final NUL. `max` is the longest that the kernel takes, in
/// bytes without the NUL.
fn load_cmdline<M: GuestMemoryBackend>(mem: &M, cmdline: &str, max: u64) -> Result<(), BootError> {
    let max = max.min(at::CMDLINE_MAX - 1);
    let len = cmdline.len() as u64;
    if len > max {
        return Err(BootError::CmdlineTooLong { len, max });
    }
    if let Some(position) = cmdline.bytes().position(|byte| byte == 0) {
        return Err(BootError::CmdlineNul { position });
    }
    write(mem, "command line", at::CMDLINE, cmdline.as_bytes())?;
    write(mem, "command line", at::CMDLINE + len, &[0])
}

/// Writes one of the loader's own structures.
fn write<M: GuestMemoryBackend>(
    mem: &M,
    what: &str,
    address: u64,
    bytes: &[u8],
) -> Result<(), BootError> {
    mem.write_slice(bytes, GuestAddress(address)).map_err(|source| BootError::Copy {
        name: what.into(),
        address,
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::testing::*;
    use super::*;

    #[test]
    fn what_is_no_kernel_is_named_by_what_was_seen() {
        for (bytes, words) in [
            (&b""[..], "is empty"),
            (b"\x1f\x8b\x08\0garbage", "1f 8b 08 00 67 61 72 62 (gzip"),
            (b"#!/bin/sh\n", "23 21 2f 62 69 6e 2f 73 (a script"),
            (b"MZ", "4d 5a"),
            (b"x", "78"),
        ] {
            let error = load(&ram(), &image(bytes)).unwrap_err().to_string();
            assert!(error.contains(words), "{error:?} lacks {words:?}");
            assert!(error.contains("test image"), "{error}");
        }
    }

    #[test]
    fn files_that_cannot_be_read_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let missing = dir.path().join("vmlinuz");
        let kernel = KernelSource::File(&missing);
        let error = load(&ram(), &BootConfig { kernel, ..image(b"") }).unwrap_err();
        assert!(matches!(error, BootError::Read { .. }));
        assert!(error.to_string().contains("vmlinuz"), "{error}");

        let kernel = KernelSource::File(dir.path());
        let error = load(&ram(), &BootConfig { kernel, ..image(b"") }).unwrap_err();
        assert!(matches!(error, BootError::NotAFile { .. }), "{error}");
    }

    #[test]
    fn an_initrd_must_be_there_and_fit_above_the_kernel() {
        let kernel = pvh_elf(&[]);
        let mut file = tempfile::NamedTempFile::new().unwrap();
        let config = BootConfig { initrd: Some(file.path()), ..image(&kernel) };
        assert!(matches!(load(&ram(), &config), Err(BootError::Empty { .. })));

        std::io::Write::write_all(&mut file, b"an initrd").unwrap();
        let config = BootConfig { initrd: Some(file.path()), ..image(&kernel) };
        let mem = ram();
        load(&mem, &config).unwrap();
        let mut found = [0; 9];
        mem.read_slice(&mut found, GuestAddress(RAM.low - 4096)).unwrap();
        assert_eq!(&found, b"an initrd");

        file.as_file().set_len(RAM.low).unwrap();
        let config = BootConfig { initrd: Some(file.path()), ..image(&kernel) };
        let error = load(&ram(), &config).unwrap_err();
        assert!(matches!(error, BootError::InitrdTooBig { .. }), "{error}");
    }

    #[test]
    fn a_command_line_has_a_longest_length_and_no_nul() {
        let kernel = pvh_elf(&[]);
        let long = "x".repeat(70_000);
        let config = BootConfig { cmdline: &long, ..image(&kernel) };
        let error = load(&ram(), &config).unwrap_err();
        assert!(matches!(error, BootError::CmdlineTooLong { len: 70_000, max: 65_535 }));
        let config = BootConfig { cmdline: "a\0b", ..image(&kernel) };
        assert!(matches!(load(&ram(), &config), Err(BootError::CmdlineNul { position: 1 })));
    }
}
