//! What a VM's process may use beside its configuration, by the will of whoever started it.
//!
//! None of it can come from a file: a configuration from elsewhere must not be able to run commands.

use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};

/// The most descriptors that are kept for later.
const MAX_DESCRIPTORS: usize = 64;

/// Open descriptors by name: the number of those that the process was started with.
#[derive(Debug, Default)]
pub struct Grants {
    /// Whether commands may be run (`--allow-exec`).
    pub allow_exec: bool,
    descriptors: Mutex<BTreeMap<String, OwnedFd>>,
}

/// There are too many descriptors already.
#[derive(Debug, thiserror::Error)]
#[error("there are {MAX_DESCRIPTORS} descriptors already: use them, or close some with 'closefd'")]
pub struct TooMany;

impl Grants {
    /// Takes over the descriptors that the process was started with, but for the standard streams.
    ///
    /// To be called once, before this process opens anything that it keeps.
    pub fn of_this_process(allow_exec: bool) -> Self {
        let descriptors = inherited().into_iter().map(|fd| (fd.as_raw_fd().to_string(), fd));
        Self { allow_exec, descriptors: Mutex::new(descriptors.collect()) }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, OwnedFd>> {
        // The map is whole at every moment.
        self.descriptors.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives the descriptor away.
    pub fn take(&self, name: &str) -> Option<OwnedFd> {
        self.lock().remove(name)
    }

    /// Keeps a descriptor; one of the same name is closed.
    ///
    /// # Errors
    /// If there are too many.
    pub fn keep(&self, name: String, fd: OwnedFd) -> Result<(), TooMany> {
        let mut descriptors = self.lock();
        if descriptors.len() >= MAX_DESCRIPTORS && !descriptors.contains_key(&name) {
            return Err(TooMany);
        }
        descriptors.insert(name, fd);
        Ok(())
    }
}

/// Keeps from a command that is about to be started whatever is open here. What this process opens
/// itself is marked when it is opened, but a library may forget to.
pub(crate) fn keep_from_commands() {
    // SAFETY: it only sets a flag on descriptors, which nothing here relies on being unset. Linux
    // before 5.11 does not know it and refuses.
    let done =
        unsafe { libc::syscall(libc::SYS_close_range, 3u32, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) };
    if done != 0 {
        let error = std::io::Error::last_os_error();
        tracing::debug!(%error, "a command may see a library's descriptors");
    }
}

/// Every open descriptor from 3 on. None of them goes on to a process that this one starts.
fn inherited() -> Vec<OwnedFd> {
    let open: Vec<RawFd> = match std::fs::read_dir("/proc/self/fd") {
        Ok(entries) => entries
            .flatten()
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .filter(|&fd| fd > 2)
            .collect(),
        Err(error) => {
            tracing::debug!(%error, "it can't be seen what the process was started with");
            return Vec::new();
        }
    };
    let mut all = Vec::new();
    for fd in open.into_iter().take(MAX_DESCRIPTORS) {
        // SAFETY: only looked at; the descriptor of the directory itself is closed by now.
        let borrowed = unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) };
        match fcntl(borrowed, FcntlArg::F_GETFD) {
            // Whatever this process has opened itself is closed on exec.
            Ok(flags) if !FdFlag::from_bits_retain(flags).contains(FdFlag::FD_CLOEXEC) => {}
            _ => continue,
        }
        if let Err(error) = fcntl(borrowed, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)) {
            tracing::debug!(%error, fd, "a descriptor would go on to commands");
        }
        // SAFETY: it is open, has come through `exec` (it was not marked to be closed by it, as
        // everything is that this process opens), and now is: nobody else here owns it.
        all.push(unsafe { OwnedFd::from_raw_fd(fd) });
    }
    all
}
