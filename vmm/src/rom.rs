//! What a QEMU's board has in memory beside its RAM, and sends as RAM blocks of their own: the
//! BIOS, option ROMs, and the ACPI tables that its firmware fetches.
//!
//! A guest that came from a QEMU brings them along, and they are kept: it reboots by them, here or in
//! a QEMU that it goes back to, since one that waits for a migration fills none of these blocks itself.
//! A guest that boots by firmware here has the same ones (`machine::firmware`), and one that was booted
//! here without is given a BIOS when it leaves for a QEMU.

use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use migration::guest::{PAGE_SIZE, RamBlock};
use vm_memory::mmap::MmapRegion;

/// The block that holds the BIOS.
pub const PC_BIOS: &str = "pc.bios";

/// The block that shows at 0xc0000 where the chipset shows no RAM; empty, since option ROMs come by
/// other ways.
pub const PC_ROM: &str = "pc.rom";

/// The length of [`PC_ROM`] on this board in bytes.
pub const ROM_LEN: u64 = 128 << 10;

/// Blocks of files that a firmware fetches are named so, the file's name behind it.
pub const FILE_PREFIX: &str = "/rom@";

/// The length of [`PC_BIOS`] on this board in bytes; what a QEMU of this machine type has, and
/// insists on.
pub const BIOS_LEN: u64 = 256 << 10;

/// The most bytes of one block: what the ACPI tables of this board may grow to.
const MAX_LEN: u64 = 2 << 20;

/// The most blocks: five of the board and an option ROM for every slot.
const MAX_COUNT: usize = 40;

/// Where a distribution puts SeaBIOS for this board.
const BIOS_FILES: [&str; 3] = [
    "/usr/share/seabios/bios-256k.bin",
    "/usr/share/qemu/bios-256k.bin",
    "/usr/share/qemu-kvm/bios-256k.bin",
];

/// A block can't be kept, or the BIOS can't be had.
#[derive(Debug, thiserror::Error)]
pub enum RomError {
    /// Not one of QEMU's.
    #[error("RAM block '{0}' is none that this board knows")]
    Unknown(String),
    /// Not a whole number of pages up to 2 MiB.
    #[error(
        "RAM block '{name}' has {len:#x} bytes: a block of firmware has a whole number of 4 KiB \
         pages, and at most {MAX_LEN:#x} bytes"
    )]
    Length {
        /// Its name.
        name: String,
        /// Its length in bytes.
        len: u64,
    },
    /// More than the board can have, or the same again.
    #[error("RAM block '{0}' is one too many")]
    TooMany(String),
    /// The host refused the memory.
    #[error("no memory for RAM block '{name}'")]
    Memory {
        /// Its name.
        name: String,
        /// The reason.
        #[source]
        source: vm_memory::mmap::MmapRegionError,
    },
    /// The file can't be read.
    #[error("cannot read the firmware {path}")]
    Read {
        /// Which file.
        path: PathBuf,
        /// The reason.
        #[source]
        source: std::io::Error,
    },
    /// The file is no BIOS of this board.
    #[error(
        "the firmware {path} has {len} bytes: a BIOS of this board has {BIOS_LEN} bytes \
         (bios-256k.bin of SeaBIOS)"
    )]
    FileLength {
        /// Which file.
        path: PathBuf,
        /// Its length in bytes.
        len: u64,
    },
    /// There is none.
    #[error(
        "there is no firmware for the guest: install the package seabios, or name its \
         bios-256k.bin with --firmware"
    )]
    NoFile,
}

/// One block.
#[derive(Clone)]
pub struct Rom {
    name: String,
    memory: Arc<MmapRegion>,
}

impl Rom {
    /// Its length in bytes.
    pub fn size(&self) -> u64 {
        self.memory.size() as u64
    }

    /// Where it begins in this process. It is there as long as the `Rom` or a copy of it.
    pub fn host_address(&self) -> u64 {
        self.memory.as_ptr() as u64
    }

    /// Its memory.
    pub fn memory(&self) -> &Arc<MmapRegion> {
        &self.memory
    }

    /// Its first `len` bytes, or all if there are less.
    pub fn content(&self, len: u64) -> Vec<u8> {
        let mut bytes = vec![0; len.min(self.size()) as usize];
        // SAFETY: the mapping has that many bytes, no Rust reference to it exists, and `bytes` is no part
        // of it.
        unsafe {
            std::ptr::copy_nonoverlapping(self.memory.as_ptr(), bytes.as_mut_ptr(), bytes.len());
        }
        bytes
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    fn write(&self, content: &[u8]) {
        let len = content.len().min(self.memory.size());
        // SAFETY: the mapping has `len` bytes, no Rust reference to it exists, and `content` is no
        // part of it.
        unsafe { std::ptr::copy_nonoverlapping(content.as_ptr(), self.memory.as_ptr(), len) };
    }

    /// Its name and length.
    pub fn block(&self) -> RamBlock {
        RamBlock { name: self.name.clone(), len: self.size() }
    }
}

/// The blocks at one moment.
pub type RomList = Arc<Vec<Rom>>;

/// The blocks of one machine.
#[derive(Default)]
pub struct Roms {
    list: RwLock<RomList>,
}

impl Roms {
    /// The blocks as they are now. What the list holds stays mapped as long as the list.
    pub fn list(&self) -> RomList {
        self.list.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Gives all of them up.
    pub fn clear(&self) {
        *self.list.write().unwrap_or_else(PoisonError::into_inner) = RomList::default();
    }

    /// Adds a block of zeros at the list's end.
    pub fn add(&self, block: &RamBlock) -> Result<(), RomError> {
        let (name, len) = (block.name.clone(), block.len);
        if !is_known(&name) {
            return Err(RomError::Unknown(name));
        }
        if len == 0 || len > MAX_LEN || !len.is_multiple_of(PAGE_SIZE) {
            return Err(RomError::Length { name, len });
        }
        let mut list = self.list.write().unwrap_or_else(PoisonError::into_inner);
        if list.len() >= MAX_COUNT || list.iter().any(|rom| rom.name == name) {
            return Err(RomError::TooMany(name));
        }
        let memory = MmapRegion::new(len as usize)
            .map_err(|source| RomError::Memory { name: name.clone(), source })?;
        let mut longer = list.to_vec();
        longer.push(Rom { name, memory: Arc::new(memory) });
        *list = Arc::new(longer);
        Ok(())
    }

    /// Adds a block that holds `content`, and zeros to the end of its last page.
    pub fn add_filled(&self, name: &str, content: &[u8]) -> Result<(), RomError> {
        let len = (content.len() as u64).next_multiple_of(PAGE_SIZE);
        self.add(&RamBlock { name: name.into(), len })?;
        let list = self.list();
        if let Some(rom) = list.last().filter(|rom| rom.name == name) {
            rom.write(content);
        }
        Ok(())
    }

    /// Whether there is a block of that name.
    pub fn has(&self, name: &str) -> bool {
        self.list().iter().any(|rom| rom.name == name)
    }
}

/// The names of blocks on a QEMU's board of this type.
fn is_known(name: &str) -> bool {
    matches!(name, PC_BIOS | PC_ROM)
        || name.starts_with("/rom@etc/")
        || (name.starts_with("0000:") && name.ends_with(".rom"))
}

/// The BIOS: `file`, else the first that is found where distributions put it.
pub fn read_bios(file: Option<&Path>) -> Result<Vec<u8>, RomError> {
    let found = || BIOS_FILES.iter().map(Path::new).find(|path| path.exists());
    let path = file.or_else(found).ok_or(RomError::NoFile)?;
    let read = |source| RomError::Read { path: path.to_path_buf(), source };
    let len = std::fs::metadata(path).map_err(read)?.len();
    if len != BIOS_LEN {
        return Err(RomError::FileLength { path: path.to_path_buf(), len });
    }
    std::fs::read(path).map_err(read)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(name: &str, len: u64) -> RamBlock {
        RamBlock { name: name.into(), len }
    }

    #[test]
    fn known_blocks_are_kept_in_their_order() {
        let roms = Roms::default();
        for name in [PC_BIOS, "pc.rom", "/rom@etc/acpi/tables", "0000:00:02.0/virtio-net-pci.rom"] {
            roms.add(&block(name, 0x2_0000)).unwrap();
            assert_eq!(roms.list().last().unwrap().block(), block(name, 0x2_0000));
        }
        assert!(roms.has(PC_BIOS));
        let kept = roms.list();
        roms.clear();
        assert!(!roms.has(PC_BIOS) && kept.len() == 4);
    }

    #[test]
    fn what_no_board_has_is_refused() {
        let roms = Roms::default();
        assert!(matches!(roms.add(&block("vga.vram", 4096)), Err(RomError::Unknown(_))));
        for len in [0, 100, 4097, MAX_LEN + 4096, u64::MAX] {
            assert!(matches!(roms.add(&block(PC_BIOS, len)), Err(RomError::Length { .. })));
        }
        roms.add(&block(PC_BIOS, 4096)).unwrap();
        assert!(matches!(roms.add(&block(PC_BIOS, 4096)), Err(RomError::TooMany(_))));
        for n in 0.. {
            match roms.add(&block(&format!("/rom@etc/{n}"), 4096)) {
                Ok(()) => assert!(n < MAX_COUNT),
                Err(e) => {
                    assert!(matches!(e, RomError::TooMany(_)));
                    break;
                }
            }
        }
    }

    #[test]
    fn a_bios_has_the_boards_size() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("bios.bin");
        assert!(matches!(read_bios(Some(&path)), Err(RomError::Read { .. })));
        std::fs::write(&path, [1; 4096]).unwrap();
        assert!(matches!(read_bios(Some(&path)), Err(RomError::FileLength { .. })));
        std::fs::write(&path, vec![7; BIOS_LEN as usize]).unwrap();
        assert_eq!(read_bios(Some(&path)).unwrap().len() as u64, BIOS_LEN);
    }
}
