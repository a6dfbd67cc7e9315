//! Who holds a lock on an image, as the host's kernel says.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::fcntl::{FcntlArg, fcntl};
use nix::unistd::Pid;

/// Whether a process holds a lock on a file (proc(5), `/proc/PID/fdinfo`).
pub fn holds(pid: Pid, path: &Path) -> bool {
    let Ok(inode) = path.metadata().map(|meta| meta.ino()) else { return false };
    let infos = fs::read_dir(format!("/proc/{pid}/fdinfo")).into_iter().flatten().flatten();
    let inode = format!(":{inode} ");
    infos
        .filter_map(|entry| fs::read_to_string(entry.path()).ok())
        .any(|info| info.lines().any(|line| line.starts_with("lock:") && line.contains(&inode)))
}

/// Whether anyone holds a lock on a file.
pub fn is_locked(path: &Path) -> bool {
    let Ok(file) = File::open(path) else { return false };
    let mut lock = whole_file();
    let asked = fcntl(&file, FcntlArg::F_OFD_GETLK(&mut lock));
    asked.is_ok() && i32::from(lock.l_type) != nix::libc::F_UNLCK
}

/// A lock on all of a file, to ask about.
fn whole_file() -> nix::libc::flock {
    nix::libc::flock {
        l_type: nix::libc::F_WRLCK as i16,
        l_whence: nix::libc::SEEK_SET as i16,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    }
}
