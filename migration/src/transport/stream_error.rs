//! Why a stream that goes one way could not be opened, filled or taken.

use std::io;

/// Why a file, a pipe or a command does not give or take a VM.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// A VM is saved to a file.
    #[error("{path} is a directory: name a file in it, for example {path}/vm.mig")]
    Directory {
        /// The directory.
        path: String,
    },
    /// It can't be opened.
    #[error("{name} can't be opened for {purpose}")]
    Open {
        /// Which.
        name: String,
        /// `reading` or `writing`.
        purpose: &'static str,
        /// The operating system's reason.
        #[source]
        source: io::Error,
    },
    /// The descriptor is none that a stream can go through.
    #[error("{name} is {found}, expected {expected}")]
    Descriptor {
        /// Which.
        name: String,
        /// What it is.
        found: &'static str,
        /// What it should be.
        expected: &'static str,
    },
    /// The shell did not start.
    #[error("the command '{command}' can't be started")]
    Spawn {
        /// The command.
        command: String,
        /// The operating system's reason.
        #[source]
        source: io::Error,
    },
    /// The command says that it has failed, or ended too early.
    #[error("the command '{command}' {how}")]
    Command {
        /// The command.
        command: String,
        /// How it ended.
        how: String,
    },
    /// Something about it failed.
    #[error("{what} {name} failed{}", hint(.source))]
    Io {
        /// What was done to it, for example `writing to`.
        what: &'static str,
        /// Which.
        name: String,
        /// The operating system's reason.
        #[source]
        source: io::Error,
    },
    /// The reader at the other end stands still while the guest does.
    #[error("{name} has taken nothing for {seconds} s, and the guest stands still")]
    Stalled {
        /// Which.
        name: String,
        /// How long.
        seconds: u64,
    },
    /// A command wrote on after the VM's end.
    #[error("{name} goes on after the VM's end: only a file may have something behind it")]
    Trailing {
        /// Which.
        name: String,
    },
    /// Someone asked for it.
    #[error("it was given up")]
    GivenUp,
}

fn hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            " (a VM needs about as much room as its guest uses memory; make room, or save elsewhere)"
        }
        _ => "",
    }
}

impl StreamError {
    pub(super) fn io(what: &'static str, name: &str, source: io::Error) -> Self {
        Self::Io { what, name: name.to_owned(), source }
    }
}
