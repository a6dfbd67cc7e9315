//! What several tests of a cut hand-over need: a disk that both sides see, and where to cut.

use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// How COMMIT begins: type, number and length.
pub const COMMIT: &[u8] = b"\x08\x4d\x03\0\x04";

/// A disk that both sides see.
pub struct Disk {
    /// The image.
    pub path: PathBuf,
    _dir: Option<tempfile::TempDir>,
}

impl Disk {
    /// An empty one of 1 MiB.
    #[allow(clippy::new_without_default, reason = "it makes a file")]
    pub fn new() -> Self {
        let dir = tempfile::tempdir().expect("an image");
        let path = Self::inside(dir.path(), 1 << 20).path;
        Self { path, _dir: Some(dir) }
    }

    /// An empty one of so many bytes in a directory of the caller's.
    pub fn inside(dir: &Path, len: u64) -> Self {
        let path = dir.join("disk.img");
        File::create(&path).and_then(|file| file.set_len(len)).expect("an image");
        Self { path, _dir: None }
    }

    /// The option that gives it to a VM.
    pub fn argument(&self) -> String {
        format!("--disk path={}", self.path.display())
    }

    /// Writes to it as a stranger would.
    pub fn write(&self) {
        let mut file = OpenOptions::new().write(true).open(&self.path).expect("an image");
        file.seek(SeekFrom::Start(4096)).expect("an image");
        file.write_all(b"somebody was here").expect("an image");
    }
}
