//! What a source may still ask when its migration has ended here: is it heard that this side knows, and
//! who answers when it is not.

use std::time::Duration;

use super::answer::ReturnPath;
use super::{Arrival, DestinationError};
use crate::control::Owed;
use crate::fate::{Answer, FATE, Fate, Question};
use crate::manifest::{
    CHANNELS, Hello, MEMORY, PREFLIGHT, PROTOCOL_VERSIONS, REHEARSE, RUNS, SHORT, ZSTD,
};
use crate::source::PROGRAM;
use crate::transport::{Connection, StreamReader};
use crate::vmstate::ByteSource;
use crate::wire::command::{Command, PING_MAGIC};
use crate::wire::header;
use crate::wire::return_path::{Failed, Message};
use crate::wire::section::{self, PartType};

/// Commands of a source that asks: return path, ping, question, and its thanks; and some to spare.
const MAX_COMMANDS: usize = 8;

/// This program's first words.
pub(super) fn hello() -> Hello {
    Hello {
        program: PROGRAM.to_owned(),
        protocols: PROTOCOL_VERSIONS.to_vec(),
        abilities: [PREFLIGHT, FATE, REHEARSE, RUNS, SHORT, CHANNELS, ZSTD, MEMORY]
            .map(str::to_owned)
            .to_vec(),
    }
}

impl Arrival<'_> {
    /// Notes what the source may not have heard, as soon as it is so for ever, and lets go of the
    /// connection. A source that says it knows will not ask.
    pub(super) fn leave_word(&mut self, fate: Fate) {
        let id = self.manifest.as_ref().and_then(|manifest| manifest.id);
        let Some(id) = id.filter(|_| self.prepared) else {
            self.answer.linger(&mut self.reader);
            return;
        };
        let patience = self.manifest.as_ref().map_or(0, |manifest| manifest.commit_within_ms);
        let patience = Duration::from_millis(patience);
        self.control.owe(Some(Owed { id, fate, patience }));
        if self.answer.await_settled(&mut self.reader) {
            self.control.owe(None);
        }
    }

    /// A source asks what became of a VM that has never come here.
    pub(super) fn never_heard_of(&mut self, question: &Question) -> DestinationError {
        let answer = Answer { id: question.id, fate: Fate::Unknown };
        match self.answer.send(&Message::Fate(answer)) {
            Ok(()) => DestinationError::AskedAfter { id: question.id },
            Err(error) => error,
        }
    }
}

/// Answers one that has connected after a migration has ended here, with what is known of that. Whether
/// the source has heard it, and will not ask again. Silence for `timeout` ends it.
pub fn answer(connection: Connection, owed: &Owed, timeout: Duration) -> bool {
    let mut path = ReturnPath::new(Some(connection.clone()));
    if path.set_stall_timeout(timeout).is_err() {
        return false;
    }
    let mut reader = StreamReader::new(connection);
    match converse(&mut path, &mut reader, owed) {
        Ok(settled) => settled,
        Err(error) => {
            tracing::debug!(error = %error.chain(), "whoever came to ask was not answered");
            path.linger(&mut reader);
            false
        }
    }
}

fn converse(
    path: &mut ReturnPath,
    reader: &mut StreamReader,
    owed: &Owed,
) -> Result<bool, DestinationError> {
    header::read_magic(reader).map_err(|source| DestinationError::Stranger { source })?;
    header::read_configuration(reader)?;
    let mut told = false;
    for _ in 0..MAX_COMMANDS {
        match section::read_part_type(reader)? {
            PartType::Command => {}
            _ => break,
        }
        match Command::read(reader)? {
            Command::OpenReturnPath => path.open(),
            Command::Ping(value) => {
                if value == PING_MAGIC && path.recognise() {
                    path.send(&Message::Hello(hello()))?;
                }
                path.pong(value)?;
            }
            Command::Ask(Question { id }) => {
                told = id == owed.id;
                let fate = if told { owed.fate } else { Fate::Unknown };
                path.send(&Message::Fate(Answer { id, fate }))?;
            }
            Command::Settled if told => {
                path.linger(reader);
                return Ok(true);
            }
            _ => break,
        }
    }
    let reason = "this VM waits for no migration: one has come here before";
    path.send(&Message::Failed(Failed { reason: reason.into() }))?;
    let offset = reader.offset();
    Err(DestinationError::OutOfTurn { what: "something else than a question", offset })
}
