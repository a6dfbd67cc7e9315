//! Where a VM goes that nobody answers for: a file, a pipe, a command.
//!
//! ```text
//! open → write, wait_writable …  → settle: flushed to disk, closed, the command has succeeded
//!           │ explain a failure      │           → publish: the file has its name
//!           ↓                        ↓
//!        dropped: half a file is removed, the command is ended
//! ```

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use nix::poll::PollFlags;

use super::StreamError;
use super::command::Running;
use super::descriptor::{self, Kind};
use super::pipe::{self, NotReady};
use super::saving::{Opened, Saving};

/// The writing end of a stream that goes one way.
#[derive(Debug)]
pub struct Sink {
    file: File,
    name: String,
    end: End,
}

#[derive(Debug)]
enum End {
    /// Nothing is known of the reader.
    Pipe,
    /// A file that someone else has opened.
    File,
    Saving(Saving),
    Command(Running),
}

/// A sink that holds all of a VM.
#[derive(Debug)]
#[must_use = "what is not published is undone"]
pub struct Settled(Option<Saving>);

impl Sink {
    /// A file, written from byte `offset` on; see [`crate::transport`].
    pub fn file(path: &Path, offset: u64) -> Result<Self, StreamError> {
        let name = path.display().to_string();
        Ok(match Saving::open(path, offset)? {
            Opened::File(file, saving) => Self { file, name, end: End::Saving(saving) },
            Opened::Pipe(file) => Self { file, name, end: End::Pipe },
        })
    }

    /// A shell command's standard input.
    pub fn command(command: &str) -> Result<Self, StreamError> {
        let (running, file) = Running::start(command, false)?;
        let name = format!("the command '{command}'");
        Ok(Self { file, name, end: End::Command(running) })
    }

    /// An open file or pipe; `name` is what messages call it. A socket is no sink, since it goes
    /// both ways.
    pub fn descriptor(fd: OwnedFd, name: String) -> Result<Self, StreamError> {
        let (file, kind) = descriptor::one_way(fd, &name, true)?;
        let end = if kind == Kind::Pipe { End::Pipe } else { End::File };
        Ok(Self { file, name, end })
    }

    /// What messages call it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Waits until it takes more, for at most `patience` if there is a limit.
    pub(crate) fn wait_writable(
        &self,
        patience: Option<Duration>,
        given_up: &dyn Fn() -> bool,
    ) -> io::Result<()> {
        pipe::wait(self.file.as_fd(), PollFlags::POLLOUT, patience, given_up).map_err(|e| match e {
            NotReady::GivenUp => io::ErrorKind::ConnectionAborted.into(),
            NotReady::Stalled => io::ErrorKind::TimedOut.into(),
            NotReady::Failed(error) => error,
        })
    }

    /// What is behind the failure of a write.
    pub(crate) fn explain(&mut self, error: io::Error, patience: Option<Duration>) -> StreamError {
        match (&mut self.end, error.kind()) {
            (_, io::ErrorKind::ConnectionAborted) => StreamError::GivenUp,
            (End::Command(command), io::ErrorKind::BrokenPipe) => command.last_words(),
            (_, io::ErrorKind::TimedOut) => StreamError::Stalled {
                name: self.name.clone(),
                seconds: patience.unwrap_or_default().as_secs(),
            },
            _ => StreamError::io("writing to", &self.name, error),
        }
    }

    /// Everything has been written: returns when it is where it should be, so that only its name
    /// is missing. Waits for as long as a disk or a command takes.
    pub(crate) fn settle(self, given_up: &dyn Fn() -> bool) -> Result<Settled, StreamError> {
        let Self { file, name, end } = self;
        match end {
            End::Pipe => Ok(Settled(None)),
            End::Command(mut command) => {
                // The end of its input is what makes it end.
                drop(file);
                command.succeed(given_up)?;
                Ok(Settled(None))
            }
            End::File => to_disk(&file, &name).map(|()| Settled(None)),
            End::Saving(saving) => to_disk(&file, &name).map(|()| Settled(Some(saving))),
        }
    }
}

fn to_disk(file: &File, name: &str) -> Result<(), StreamError> {
    match file.sync_all() {
        // Something that has no disk behind it.
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => Ok(()),
        result => result.map_err(|e| StreamError::io("writing to disk", name, e)),
    }
}

impl Settled {
    /// Whether it can still be undone.
    pub(crate) fn is_revocable(&self) -> bool {
        self.0.as_ref().is_some_and(Saving::is_revocable)
    }

    /// The last step: a file gets its name.
    pub(crate) fn publish(self) -> Result<(), StreamError> {
        self.0.map_or(Ok(()), Saving::publish)
    }
}

impl AsFd for Sink {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}
