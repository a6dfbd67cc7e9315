//! When everything has come: compare, apply, agree with the source, and run.

use std::io;
use std::time::{Duration, Instant};

use crate::guest::VmError;
use crate::handover::Peer;
use crate::handover::destination::Event;
use crate::manifest::Prepared;
use crate::panics::guarded;
use crate::stats::Step;
use crate::transport::is_stall;
use crate::verify;
use crate::wire::WireError;
use crate::wire::command::{Command, Commit};
use crate::wire::return_path::Message;
use crate::wire::section::{self, PartType};

use super::{Arrival, DestinationError};

/// In which what the source has said already is read.
const SAID_ALREADY: Duration = Duration::from_millis(20);

impl Arrival<'_> {
    /// Compares, applies, builds.
    pub(super) fn prepare(&mut self) -> Result<(), DestinationError> {
        self.prepare_all().map_err(|error| self.unless_given_up(error))
    }

    /// What the source has said meanwhile, in the place of an error that may come of it: one that gave up, because this
    /// side stood still, has let its guest go on, and that writes to pages that were not read yet here.
    fn unless_given_up(&mut self, error: DestinationError) -> DestinationError {
        if self.answer.peer() == Peer::Qemu || self.prepared {
            return error;
        }
        if self.answer.set_stall_timeout(SAID_ALREADY).is_err() {
            return error;
        }
        let said = self.skip_description().and_then(|()| self.next_command());
        let _ = self.answer.set_stall_timeout(self.parameters.stall_timeout);
        let given_up = match said {
            Ok(Command::Abort(abort)) => DestinationError::SourceGaveUp { reason: abort.reason },
            Err(given_up @ DestinationError::SourceGaveUp { .. }) => given_up,
            Err(DestinationError::Wire(hung_up)) if hung_up.io().is_some_and(is_end) => {
                DestinationError::Wire(hung_up)
            }
            _ => return error,
        };
        tracing::warn!(error = %error.chain(), "the source had given up before");
        given_up
    }

    fn prepare_all(&mut self) -> Result<(), DestinationError> {
        self.stand_still(Step::Prepared);
        self.touched = true;
        let mut prepared = Prepared::default();
        if let Some(digests) = self.digests.take() {
            let (expected, found) = (digests.manifest.clone(), self.manifest_digest.clone());
            if !expected.is_empty() && expected != found {
                return Err(DestinationError::ManifestDamaged { expected, found });
            }
            self.loader.check_digests(&digests.sections)?;
            prepared.verified_ram_bytes = verify::compare(&*self.vm.ram(), &digests)
                .map_err(|source| DestinationError::Memory { source })?
                .map_err(|source| DestinationError::RamDiffers { source })?;
        } else if self.manifest.as_ref().is_some_and(|m| m.verify) {
            return Err(self.out_of_turn("no digests although they were announced"));
        }
        let answer = &mut self.answer;
        self.loader.apply(|| answer.alive())?;
        self.look_beside()?;
        self.vm
            .prepare()
            .map_err(|source| DestinationError::Vm { during: "preparing the VM", source })?;
        if self.manifest.as_ref().is_some_and(|m| m.verify) {
            prepared.verified_sections = self.loader.compare(&*self.vm)?;
        }
        let (ram, sections) = (prepared.verified_ram_bytes, prepared.verified_sections);
        self.control.stats().verified(ram, sections);
        if self.answer.peer() == Peer::MiniVmm {
            // Only when nothing more is on its way: a connection that breaks before that leaves no doubt.
            self.skip_description()?;
            self.prepared = true;
            self.answer.send(&Message::Prepared(prepared))?;
        }
        Ok(())
    }

    /// PREPARED has been said; the source has the next word.
    pub(super) fn await_commit(&mut self) -> Result<(), DestinationError> {
        self.control.stats().step(Step::Commit);
        let until = Instant::now().checked_add(self.agreed);
        loop {
            let left = until.map_or(self.agreed, |t| t.saturating_duration_since(Instant::now()));
            let in_time = !left.is_zero() && self.answer.set_stall_timeout(left).is_ok();
            let next = if in_time { self.next_command() } else { Err(self.no_order()) };
            match next? {
                // An abort of this side that came first wins.
                Command::Commit(Commit { disks }) if self.control.commit() => {
                    self.left = disks;
                    return Ok(());
                }
                Command::Commit(_) => return Err(DestinationError::Cancelled),
                Command::Ping(value) => self.answer.pong(value)?,
                Command::Abort(abort) => {
                    return Err(DestinationError::SourceGaveUp { reason: abort.reason });
                }
                _ => return Err(self.out_of_turn("a command after the end")),
            }
        }
    }

    /// The next command after everything has come.
    fn next_command(&mut self) -> Result<Command, DestinationError> {
        let stalled = |error: &WireError| error.io().is_some_and(is_stall);
        match section::read_part_type(&mut self.reader) {
            Ok(PartType::Command) => {}
            Ok(_) => return Err(self.out_of_turn("a section after the end")),
            Err(error) if stalled(&error) => return Err(self.no_order()),
            Err(error) => return Err(error.into()),
        }
        Command::read(&mut self.reader).map_err(|error| match stalled(&error) {
            true => self.no_order(),
            false => error.into(),
        })
    }

    fn no_order(&self) -> DestinationError {
        DestinationError::NoOrder { agreed: self.agreed }
    }

    pub(super) fn take_disks(&mut self) -> Result<Event, DestinationError> {
        if self.answer.peer() == Peer::Qemu {
            self.control.stats().step(Step::Commit);
            if !self.control.commit() {
                return Err(DestinationError::Disks { source: aborted() });
            }
        }
        let taken = guarded(|| self.vm.take_disks(&self.left)).unwrap_or_else(|panicked| {
            // It has some of them, perhaps.
            let _ = guarded(|| self.vm.release_disks());
            Err(VmError::new(panicked.to_string()))
        });
        taken.map_err(|source| DestinationError::Disks { source })?;
        Ok(Event::DisksTaken)
    }

    pub(super) fn claim(&mut self) -> Result<(), DestinationError> {
        self.vm.claim_memory().map_err(|source| DestinationError::Start { source })
    }

    pub(super) fn start(&mut self) -> Result<Event, DestinationError> {
        self.control.stats().step(Step::Running);
        let since = self.vm.start().map_err(|source| DestinationError::Start { source })?;
        self.runs = Some(since);
        self.control.stats().running(since.elapsed());
        Ok(Event::Started)
    }
}

fn aborted() -> VmError {
    VmError::new("the migration was given up on this side")
}

/// Whether an error says that the source has hung up.
fn is_end(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
    matches!(error.kind(), UnexpectedEof | ConnectionReset | BrokenPipe)
}
