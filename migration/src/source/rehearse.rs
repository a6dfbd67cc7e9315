//! A rehearsal: the guest is stopped for as long as it takes to read the state of its devices and vCPUs,
//! and goes on; then that state is sent, to be loaded at the destination and thrown away.

use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::out::RAM_SECTION_ID;
use super::{Migration, SourceError};
use crate::manifest::{Rehearse, Scrap};
use crate::panics::asked_of_vm;
use crate::problem::{Problem, kind};
use crate::wire::command::Command;
use crate::wire::return_path::Message;
use crate::wire::section::{self, NO_DESCRIPTION, PartType, SectionHeader};

/// How a rehearsal went.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Rehearsal {
    /// How long the guest stood still, in µs.
    pub pause_us: u64,
    /// How many sections were sent.
    pub sections: u64,
    /// How many bytes they had.
    pub bytes: u64,
    /// Whether the destination has loaded them all.
    pub loaded: bool,
    /// How many it has saved again and found the same.
    pub compared_sections: u64,
    /// From the first byte sent to the answer, in µs.
    pub load_us: u64,
}

struct Taken {
    saved: Vec<(SectionHeader, Vec<u8>)>,
    scraps: Vec<Scrap>,
}

impl Migration<'_> {
    /// Rehearses. What the destination can't load is a problem, and no error.
    pub(super) fn rehearse(&mut self) -> Result<(Rehearsal, Option<Problem>), SourceError> {
        let begin = Instant::now();
        let taken = self.guarded("the guest stood still for the rehearsal", |migration| {
            let stopped = migration.vm.pause();
            stopped.map_err(SourceError::vm("stopping the guest for the rehearsal"))?;
            migration.take()
        });
        // Whatever came of it: a pause may have failed half way.
        asked_of_vm(|| self.vm.resume())
            .map_err(SourceError::vm("letting the guest go on after the rehearsal"))?;
        let pause_us = micros(begin);
        let Taken { saved, scraps } = taken?;
        let mut rehearsal = Rehearsal {
            pause_us,
            sections: saved.len() as u64,
            bytes: saved.iter().map(|(_, body)| body.len() as u64).sum(),
            loaded: false,
            compared_sections: 0,
            load_us: 0,
        };
        let begin = Instant::now();
        self.out.command(&Command::Rehearse(Rehearse { scraps }));
        for (header, body) in &saved {
            self.out.put(|out| {
                section::write_header(out, PartType::Full, header);
                out.extend_from_slice(body);
                section::write_footer(out, header.id);
            });
        }
        self.out.put(|out| section::write_end(out, NO_DESCRIPTION));
        let answer = self.send("the rehearsal").and_then(|()| self.rehearsed());
        rehearsal.load_us = micros(begin);
        match answer {
            Ok(sections) => {
                (rehearsal.loaded, rehearsal.compared_sections) = (true, sections);
                Ok((rehearsal, None))
            }
            Err(SourceError::Destination { reason }) => {
                let problem = Problem::new(
                    kind::REHEARSAL,
                    "the state of the devices and vCPUs",
                    &reason,
                    "it, as it is now",
                    "do what the reason says",
                );
                Ok((rehearsal, Some(problem.known_as(reason))))
            }
            Err(error) => Err(error),
        }
    }

    /// Reads everything that a destination gets beside RAM. The guest stands still.
    fn take(&mut self) -> Result<Taken, SourceError> {
        self.vm.drain().map_err(SourceError::vm("finishing the devices' requests"))?;
        self.vm.read_state().map_err(SourceError::vm("reading the machine's state"))?;
        let mut saved = Vec::new();
        for (section, id) in self.vm.sections().into_iter().zip(RAM_SECTION_ID + 1..) {
            let header = SectionHeader { id, key: section.id(), version: section.version() };
            let body = section.save(self.audience);
            saved.push((header, body.map_err(|source| SourceError::State { source })?));
        }
        Ok(Taken { saved, scraps: self.vm.scraps() })
    }

    fn rehearsed(&mut self) -> Result<u64, SourceError> {
        match self.await_message("it was loading what was sent for show", true)? {
            Message::Prepared(prepared) => Ok(prepared.verified_sections),
            other => Err(SourceError::Unexpected { found: other.name(), expected: "prepared" }),
        }
    }
}

fn micros(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX)
}
