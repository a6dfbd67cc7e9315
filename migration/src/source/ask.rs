//! A source in doubt asks what became of its migration, over a connection of its own.

use std::io::Write;
use std::time::Duration;

use super::SourceError;
use crate::fate::{Answer, FATE, Fate, MigrationId, Question};
use crate::transport::{Connection, StreamReader, is_stall};
use crate::wire::command::{Command, PING_MAGIC};
use crate::wire::header::{self, Configuration};
use crate::wire::return_path::Message;

/// Messages that may come before the answer: hello, pong, signs of life.
const MAX_MESSAGES: usize = 8;

/// An answer, and the connection that it came over.
#[derive(Debug)]
pub struct Asked {
    fate: Fate,
    connection: Connection,
}

impl Asked {
    /// What became of the migration.
    pub fn fate(&self) -> Fate {
        self.fate
    }

    /// Lets the destination know that this side has heard, and will not ask again.
    pub fn is_settled(self) {
        let mut bytes = Vec::new();
        Command::Settled.write(&mut bytes);
        if let Err(error) = (&self.connection).write_all(&bytes) {
            tracing::debug!(%error, "the destination can't be told that its answer has come");
        }
        self.connection.shutdown(std::net::Shutdown::Write);
    }
}

/// Asks the one at the other end what became of migration `id` of a VM of type `machine`. An error means
/// that nothing was learned; silence for `timeout` is one. Can be ended from another thread by the
/// connection's abort handle.
pub fn ask(
    connection: Connection,
    machine: String,
    id: MigrationId,
    timeout: Duration,
) -> Result<Asked, SourceError> {
    let during = "it was asked what became of the migration";
    connection.set_stall_timeout(timeout).map_err(|e| SourceError::send("the question", e))?;
    let mut bytes = Vec::new();
    header::write(&mut bytes, &Configuration { machine, ..Configuration::default() });
    Command::OpenReturnPath.write(&mut bytes);
    Command::Ping(PING_MAGIC).write(&mut bytes);
    let send = |bytes: &[u8]| {
        (&connection).write_all(bytes).map_err(|e| SourceError::send("the question", e))
    };
    send(&bytes)?;
    let mut reader = StreamReader::new(connection.clone());
    for _ in 0..MAX_MESSAGES {
        let message = Message::read(&mut reader).map_err(|source| match source.io() {
            Some(error) if is_stall(error) => SourceError::Stalled { during, timeout },
            Some(_) => SourceError::Closed { during },
            None => SourceError::BadAnswer { source },
        })?;
        match message {
            Message::Hello(hello) => {
                if !hello.can(FATE) {
                    // One of an older release, which can't be the one that was given the name.
                    return Ok(Asked { fate: Fate::Unknown, connection });
                }
                let mut bytes = Vec::new();
                Command::Ask(Question { id }).write(&mut bytes);
                send(&bytes)?;
            }
            Message::Pong(_) => {}
            Message::Fate(Answer { id: about, fate }) if about == id => {
                return Ok(Asked { fate, connection });
            }
            other => return Err(SourceError::NoAnswer { found: other.name() }),
        }
    }
    Err(SourceError::NoAnswer { found: "too many messages" })
}
