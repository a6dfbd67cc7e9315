//! The destination's side of the return path.

use std::io::{self, Write};
use std::net::Shutdown;
use std::time::{Duration, Instant};

use super::DestinationError;
use crate::handover::Peer;
use crate::manifest::Running;
use crate::transport::{Connection, StreamReader};
use crate::wire::bounded_reason;
use crate::wire::command::Command;
use crate::wire::limits::MAX_LINGER;
use crate::wire::return_path::{Failed, Message};
use crate::wire::section::{self, PartType};

/// How often a source that waits hears that this side is at work.
const SIGN_OF_LIFE: Duration = Duration::from_secs(1);
/// How long a source has to read this side's last words.
const LINGER: Duration = Duration::from_secs(2);

/// Where answers go.
pub(super) struct ReturnPath {
    /// None where nobody hears.
    connection: Option<Connection>,
    open: bool,
    mini_vmm: bool,
    last: Instant,
}

impl ReturnPath {
    pub(super) fn new(connection: Option<Connection>) -> Self {
        Self { connection, open: false, mini_vmm: false, last: Instant::now() }
    }

    /// What it goes over.
    pub(super) fn connection(&self) -> Option<&Connection> {
        self.connection.as_ref()
    }

    /// Says nothing any more.
    pub(super) fn close(&self) {
        if let Some(connection) = &self.connection {
            connection.shutdown(Shutdown::Both);
        }
    }

    /// The source wants answers.
    pub(super) fn open(&mut self) {
        self.open = self.connection.is_some();
    }

    /// The source is a mini-vmm; says whether that is news. Without a return path there is no way
    /// to tell it so, and it is treated as a QEMU.
    pub(super) fn recognise(&mut self) -> bool {
        let news = self.open && !self.mini_vmm;
        self.mini_vmm |= self.open;
        news
    }

    /// What the source is.
    pub(super) fn peer(&self) -> Peer {
        if self.mini_vmm { Peer::MiniVmm } else { Peer::Qemu }
    }

    pub(super) fn set_stall_timeout(&self, timeout: Duration) -> io::Result<()> {
        self.connection.as_ref().map_or(Ok(()), |c| c.set_stall_timeout(timeout))
    }

    pub(super) fn send(&mut self, message: &Message) -> Result<(), DestinationError> {
        self.send_all(std::slice::from_ref(message))
    }

    /// Sends them in one piece.
    fn send_all(&mut self, messages: &[Message]) -> Result<(), DestinationError> {
        let mut bytes = Vec::new();
        messages.iter().for_each(|message| message.write(&mut bytes));
        self.last = Instant::now();
        let what = messages.last().map_or("", Message::name);
        let Some(mut connection) = self.connection.as_ref() else { return Ok(()) };
        connection.write_all(&bytes).map_err(|source| DestinationError::Answer { what, source })
    }

    /// Answers a ping, if answers are wanted.
    pub(super) fn pong(&mut self, value: u32) -> Result<(), DestinationError> {
        if self.open { self.send(&Message::Pong(value)) } else { Ok(()) }
    }

    /// Says `shut(0)`, if answers are wanted.
    pub(super) fn acknowledge(&mut self) -> Result<(), DestinationError> {
        if self.open { self.send(&Message::Shut(0)) } else { Ok(()) }
    }

    /// Says `shut(0)`, and that the guest has been running since then.
    pub(super) fn running(&mut self, since: Instant) -> Result<(), DestinationError> {
        if !self.open {
            return Ok(());
        }
        let since_us = u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.send_all(&[Message::Running(Running { since_us }), Message::Shut(0)])
    }

    /// Lets a waiting mini-vmm know that this side is at work.
    pub(super) fn alive(&mut self) {
        if self.mini_vmm
            && self.last.elapsed() > SIGN_OF_LIFE
            && let Err(error) = self.send(&Message::Pong(0))
        {
            tracing::debug!(error = %error.chain(), "a sign of life was not sent");
        }
    }

    /// Says why not, as far as the source can understand it.
    pub(super) fn refuse(&mut self, error: &DestinationError) {
        let message = match error {
            // It knows the problems from the verdict.
            DestinationError::Refused { .. } if self.mini_vmm => return,
            // It has said goodbye.
            DestinationError::OnlyAsked { .. } => return,
            _ if self.mini_vmm => {
                Message::Failed(Failed { reason: bounded_reason(&error.chain()) })
            }
            _ if self.open => Message::Shut(1),
            _ => return,
        };
        if let Err(error) = self.send(&message) {
            tracing::debug!(error = %error.chain(), "the source can't be told");
        }
    }

    /// Waits a moment for the source to say that it has heard, and will not ask again; then closes.
    pub(super) fn await_settled(&mut self, reader: &mut StreamReader) -> bool {
        let Some(connection) = &self.connection else { return false };
        connection.shutdown(Shutdown::Write);
        let settled = connection.set_stall_timeout(LINGER).is_ok()
            && matches!(section::read_part_type(reader), Ok(PartType::Command))
            && matches!(Command::read(reader), Ok(Command::Settled));
        self.linger(reader);
        settled
    }

    /// Closes such that the source can read what was said: a socket that is closed with unread
    /// bytes in it may throw away what it has sent.
    pub(super) fn linger(&mut self, reader: &mut StreamReader) {
        let Some(connection) = &self.connection else { return };
        connection.shutdown(Shutdown::Write);
        if connection.set_stall_timeout(LINGER).is_ok() {
            reader.drain(MAX_LINGER, Instant::now(), LINGER);
        }
        connection.shutdown(Shutdown::Both);
    }
}
