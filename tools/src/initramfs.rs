//! Writes initial RAM filesystems.
//!
//! The format is cpio's "newc" (the kernel's `Documentation/driver-api/early-userspace/
//! buffer-format.rst`): a header of 6 + 13 × 8 hexadecimal ASCII characters, the name with its NUL,
//! the data, each padded to 4 bytes; the entry `TRAILER!!!` ends it.

use std::fs;
use std::path::Path;

use crate::error::{Doing, Result};
use crate::kernel::{Kernel, Module};

const DIRECTORY: u32 = 0o040_755;
const SYMLINK: u32 = 0o120_777;
const CHARACTER_DEVICE: u32 = 0o020_600;
const FILE: u32 = 0o100_000;

/// An initial RAM filesystem being put together.
pub struct Initramfs {
    bytes: Vec<u8>,
    entries: u32,
    directories: Vec<String>,
}

impl Initramfs {
    /// One with an empty tree and `/dev/console`.
    pub fn new() -> Initramfs {
        let mut new = Initramfs { bytes: Vec::new(), entries: 0, directories: Vec::new() };
        new.parents_of("dev/console");
        // Device 5:1, as the kernel's list of devices has it.
        new.entry("dev/console", CHARACTER_DEVICE, &[], (5, 1));
        new
    }

    /// Adds a directory.
    pub fn directory(&mut self, path: &str) {
        self.parents_of(&format!("{path}/x"));
    }

    /// Adds a file that its owner can execute or not.
    pub fn file(&mut self, path: &str, data: &[u8], executable: bool) {
        self.parents_of(path);
        let mode = FILE | if executable { 0o755 } else { 0o644 };
        self.entry(path, mode, data, (0, 0));
    }

    /// Adds a copy of a file of this machine, executable.
    pub fn program(&mut self, path: &str, source: &Path) -> Result<()> {
        let data = fs::read(source).doing(|| format!("read {}", source.display()))?;
        self.file(path, &data, true);
        Ok(())
    }

    /// Adds busybox as `/bin/busybox`, with links of its commonest names.
    pub fn busybox(&mut self, source: &Path) -> Result<()> {
        self.program("bin/busybox", source)?;
        self.parents_of("bin/sh");
        self.entry("bin/sh", SYMLINK, b"busybox", (0, 0));
        Ok(())
    }

    /// Adds kernel modules under `/modules` and the list `/modules/order`, one file name per line, in
    /// the order in which they are to be loaded.
    pub fn modules(&mut self, kernel: &Kernel, names: &[&str]) -> Result<()> {
        let mut order = String::new();
        for module in kernel.modules(names)? {
            let Module { name, .. } = &module;
            self.file(&format!("modules/{name}.ko"), &module.read()?, false);
            order += &format!("{name}.ko\n");
        }
        self.file("modules/order", order.as_bytes(), false);
        Ok(())
    }

    /// Ends the archive and returns it.
    pub fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[], (0, 0));
        self.bytes
    }

    fn parents_of(&mut self, path: &str) {
        for (end, _) in path.match_indices('/') {
            let parent = &path[..end];
            if !parent.is_empty() && !self.directories.iter().any(|known| known == parent) {
                self.directories.push(parent.to_owned());
                self.entry(parent, DIRECTORY, &[], (0, 0));
            }
        }
    }

    fn entry(&mut self, path: &str, mode: u32, data: &[u8], device: (u32, u32)) {
        self.entries += 1;
        let size = u32::try_from(data.len()).expect("no file of 4 GiB goes into an initramfs");
        let name_size = u32::try_from(path.len() + 1).expect("paths are short");
        let links = if mode == DIRECTORY { 2 } else { 1 };
        // inode, mode, uid, gid, links, mtime, size, the file's device (2), device (2), name, check
        let fields =
            [self.entries, mode, 0, 0, links, 0, size, 0, 0, device.0, device.1, name_size, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(data);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

impl Default for Initramfs {
    fn default() -> Self {
        Initramfs::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads an archive by the format's definition: (name, mode, data) of every entry.
    fn read(mut bytes: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let mut entries = Vec::new();
        loop {
            assert_eq!(&bytes[..6], b"070701");
            let field = |index: usize| {
                let digits = std::str::from_utf8(&bytes[6 + index * 8..][..8]).unwrap();
                u32::from_str_radix(digits, 16).unwrap()
            };
            let (mode, size, name_size) = (field(1), field(6) as usize, field(11) as usize);
            let name = String::from_utf8(bytes[110..][..name_size - 1].to_vec()).unwrap();
            let data_at = (110 + name_size).next_multiple_of(4);
            let data = bytes[data_at..][..size].to_vec();
            bytes = &bytes[(data_at + size).next_multiple_of(4)..];
            if name == "TRAILER!!!" {
                assert!(bytes.is_empty());
                return entries;
            }
            entries.push((name, mode, data));
        }
    }

    #[test]
    fn directories_come_once_and_before_what_is_in_them() {
        let mut archive = Initramfs::new();
        archive.file("a/b/one", b"first", false);
        archive.file("a/b/two", b"2", true);
        archive.directory("empty");
        let entries = read(&archive.finish());
        let names: Vec<&str> = entries.iter().map(|(name, ..)| name.as_str()).collect();
        assert_eq!(names, ["dev", "dev/console", "a", "a/b", "a/b/one", "a/b/two", "empty"]);
        assert_eq!(entries[4], ("a/b/one".to_owned(), 0o100_644, b"first".to_vec()));
        assert_eq!(entries[5].1, 0o100_755);
        assert_eq!(entries[6].1, 0o040_755);
    }
}
