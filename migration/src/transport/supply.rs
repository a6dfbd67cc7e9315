//! Where a VM comes from that nobody answers: a file, a pipe, a command.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::fcntl::OFlag;
use nix::poll::PollFlags;

use super::StreamError;
use super::command::Running;
use super::descriptor::{self, Kind};
use super::pipe::{self, NotReady};

/// What a pipe may still hold behind a VM's end, in bytes, before it is no oversight any more.
const MAX_TRAILING: usize = 64 << 10;

/// The reading end of a stream that goes one way.
#[derive(Debug)]
pub struct Supply {
    file: File,
    name: String,
    pipe: bool,
    command: Option<Running>,
    given_up: Arc<AtomicBool>,
}

impl Supply {
    fn new(file: File, name: String, pipe: bool, command: Option<Running>) -> Self {
        Self { file, name, pipe, command, given_up: Arc::default() }
    }

    /// A file, read from byte `offset` on.
    pub fn file(path: &Path, offset: u64) -> Result<Self, StreamError> {
        let name = path.display().to_string();
        let failed = |source| StreamError::Open { name: name.clone(), purpose: "reading", source };
        let mut options = File::options();
        // Not to hang where nobody writes to a named pipe; to a file it means nothing.
        let options = options.read(true).custom_flags(OFlag::O_NONBLOCK.bits());
        let mut file = options.open(path).map_err(failed)?;
        let kind = file.metadata().map_err(failed)?.file_type();
        if kind.is_dir() {
            return Err(StreamError::Directory { path: name });
        }
        if offset != 0 {
            file.seek(SeekFrom::Start(offset)).map_err(failed)?;
        }
        Ok(Self::new(file, name, kind.is_fifo(), None))
    }

    /// A shell command's standard output.
    pub fn command(command: &str) -> Result<Self, StreamError> {
        let (running, file) = Running::start(command, true)?;
        let name = format!("the command '{command}'");
        Ok(Self::new(file, name, true, Some(running)))
    }

    /// An open file or pipe; `name` is what messages call it. A socket is no supply, since it goes
    /// both ways.
    pub fn descriptor(fd: OwnedFd, name: String) -> Result<Self, StreamError> {
        let (file, kind) = descriptor::one_way(fd, &name, false)?;
        Ok(Self::new(file, name, kind == Kind::Pipe, None))
    }

    /// What messages call it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Set from another thread, it ends whatever waits here.
    pub(super) fn given_up(&self) -> Arc<AtomicBool> {
        self.given_up.clone()
    }

    /// Waits until a read gives something; for as long as that takes.
    pub(super) fn wait_readable(&self) -> io::Result<()> {
        let given_up = || self.given_up.load(Ordering::Relaxed);
        match pipe::wait(self.file.as_fd(), PollFlags::POLLIN, None, &given_up) {
            Ok(()) => Ok(()),
            Err(NotReady::Failed(error)) => Err(error),
            Err(_) => Err(io::ErrorKind::ConnectionAborted.into()),
        }
    }

    /// The whole VM has been read: a command must end, and well. It may find out only at its very
    /// end that what it has given was damaged. What is behind a VM in a file is left alone.
    pub(crate) fn finish(&mut self) -> Result<(), StreamError> {
        let Some(mut command) = self.command.take() else { return Ok(()) };
        let mut rest = [0; 4096];
        let mut trailing = 0usize;
        loop {
            match (&*self).read(&mut rest) {
                Ok(0) => break,
                Ok(n) => trailing = trailing.saturating_add(n),
                Err(e) if e.kind() == io::ErrorKind::ConnectionAborted => {
                    return Err(StreamError::GivenUp);
                }
                Err(e) => return Err(StreamError::io("reading from", &self.name, e)),
            }
            if trailing > MAX_TRAILING {
                return Err(StreamError::Trailing { name: self.name.clone() });
            }
        }
        command.succeed(&|| self.given_up.load(Ordering::Relaxed))
    }

    /// The stream broke off: a command that has failed says more about it.
    pub(crate) fn why_broken(&mut self) -> Option<StreamError> {
        self.command.as_mut().map(Running::last_words)
    }
}

impl Read for &Supply {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            if self.pipe {
                self.wait_readable()?;
            }
            match (&self.file).read(buf) {
                Err(e) if self.pipe && e.kind() == io::ErrorKind::WouldBlock => {}
                result => return result,
            }
        }
    }
}

impl AsFd for Supply {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}
