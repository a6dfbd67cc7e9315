//! Pipes that never block for longer than a moment, so that whoever waits can be told to stop.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// How often someone who waits looks whether it was told to stop.
const TICK: Duration = Duration::from_millis(50);

/// Makes our end of a pipe non-blocking.
pub(super) fn set_nonblocking(fd: BorrowedFd<'_>) -> io::Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL)?);
    fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}

/// A non-blocking handle of an inherited pipe. The mode belongs to the open file, which others may
/// share, so it is opened anew where the host allows it.
pub(super) fn reopen_nonblocking(fd: OwnedFd, write: bool) -> io::Result<File> {
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    let mut options = OpenOptions::new();
    options.read(!write).write(write).custom_flags(OFlag::O_NONBLOCK.bits());
    match options.open(path) {
        Ok(file) => Ok(file),
        Err(error) => {
            tracing::debug!(%error, "the pipe can't be opened anew");
            set_nonblocking(fd.as_fd())?;
            Ok(fd.into())
        }
    }
}

/// Why a wait ended without its event.
#[derive(Debug)]
pub(super) enum NotReady {
    /// Whoever waits was told to stop.
    GivenUp,
    /// The patience is over.
    Stalled,
    /// The descriptor can't be waited for.
    Failed(io::Error),
}

/// Waits until `fd` can be read from or written to, or nobody is there to write or read any more.
/// Without `patience` it waits for as long as it takes.
pub(super) fn wait(
    fd: BorrowedFd<'_>,
    events: PollFlags,
    patience: Option<Duration>,
    given_up: &dyn Fn() -> bool,
) -> Result<(), NotReady> {
    let begin = Instant::now();
    let tick = PollTimeout::try_from(TICK).unwrap_or(PollTimeout::ZERO);
    loop {
        if given_up() {
            return Err(NotReady::GivenUp);
        }
        let mut fds = [PollFd::new(fd, events)];
        match poll(&mut fds, tick) {
            Ok(0) | Err(nix::Error::EINTR) => {}
            Ok(_) => return Ok(()),
            Err(error) => return Err(NotReady::Failed(error.into())),
        }
        if patience.is_some_and(|patience| begin.elapsed() > patience) {
            return Err(NotReady::Stalled);
        }
    }
}
