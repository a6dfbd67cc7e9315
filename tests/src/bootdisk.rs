//! Disks that a PC BIOS boots. What is on them is said in `resources/boot-disk/boot.S`: the boot code in
//! sectors 0 to 3, and in sector 4 what it has to do.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::linux::{COMMAND_LINE, file};

/// Assembled by this package's build script.
const BOOT_CODE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/boot.bin"));

const SECTOR: usize = 512;
/// Where it is written what there is to do.
const TASK: usize = 4;
/// The first sector of what is loaded.
const FIRST: usize = 64;
/// The longest command line with its NUL.
const MAX_COMMAND_LINE: usize = 400;

fn write(path: &Path, parts: &[(usize, &[u8])]) {
    let disk = File::create(path).expect("a disk image");
    disk.set_len(64 << 20).expect("a disk image");
    for (sector, bytes) in parts {
        disk.write_all_at(bytes, (sector * SECTOR) as u64).expect("writing to a disk image");
    }
}

/// What a counting disk does after a start that is not the last.
#[derive(Clone, Copy)]
pub enum Then {
    /// Resets the machine.
    Reset,
    /// Waits for somebody else to reset it.
    Wait,
}

/// A disk that prints `BOOT n` at its n-th start, and at the last one (9 at most) powers off.
pub fn counting(dir: &Path, last: u16, then: Then) -> PathBuf {
    let path = dir.join("counting.img");
    let mut task = [0; SECTOR];
    task[4..6].copy_from_slice(&last.to_le_bytes());
    task[6] = matches!(then, Then::Wait).into();
    write(&path, &[(0, BOOT_CODE), (TASK, &task)]);
    path
}

/// A disk that boots the tests' Linux guest; `append` is for the kernel's command line.
pub fn linux(dir: &Path, append: &str) -> PathBuf {
    let command_line = format!("{COMMAND_LINE} {append}");
    let path = dir.join("boot.img");
    let kernel = fs::read(file("MINI_VMM_GUEST_KERNEL")).expect("the guest's kernel");
    let initrd = fs::read(file("MINI_VMM_GUEST_INITRD")).expect("the guest's initrd");
    // The sector of the boot code, and as many as the kernel says (Documentation/arch/x86/boot.rst).
    let setup = 1 + usize::from(kernel[0x1f1]);
    let sectors = kernel.len().div_ceil(SECTOR);
    let initrd_at = FIRST + sectors;
    let mut task = Vec::new();
    for field in
        [FIRST, setup, sectors - setup, initrd_at, initrd.len().div_ceil(SECTOR), initrd.len()]
    {
        task.extend(u32::try_from(field).expect("small files").to_le_bytes());
    }
    task.resize(32, 0);
    assert!(command_line.len() < MAX_COMMAND_LINE, "the command line is too long: {command_line}");
    task.extend(command_line.as_bytes());
    task.resize(SECTOR, 0);
    write(&path, &[(0, BOOT_CODE), (TASK, &task), (FIRST, &kernel), (initrd_at, &initrd)]);
    path
}
