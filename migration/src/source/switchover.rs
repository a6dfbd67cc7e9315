//! The guest stands still: its last pages and its state travel, and it changes hands.
//!
//! The order is what makes a migration lossless:
//!
//! ```text
//! pause vCPUs        no new requests to devices
//! drain devices      nothing is in flight, disks are flushed, nobody writes to RAM any more
//! read vCPU state    which can make the hypervisor write to guest memory (kvmclock)
//! last bitmap        so it comes after
//! last pages, device sections, end of the stream
//! PREPARED → release disks → COMMIT → shut(0)             to a mini-vmm
//!            release disks → end of the stream → shut(0)  to a QEMU
//!            release disks → end of the stream → flushed, the command has succeeded, renamed
//! ```

use std::time::{Duration, Instant};

use serde_json::{Map, Value};

use super::doubt::{Objection, finish};
use super::inbox::NoMessage;
use super::out::RAM_SECTION_ID;
use super::precopy::Passes;
use super::{Migration, SourceError};
use crate::guest::VmError;
use crate::handover::Peer;
use crate::handover::source::{Action, Event, Source, State};
use crate::manifest::{Digests, PROTOCOL_VERSIONS, SectionDigest};
use crate::panics::asked_of_vm;
use crate::phase::Phase;
use crate::stats::Step;
use crate::supplement::{FullerSection, Supplement};
use crate::verify;
use crate::vmstate::{Audience, Description};
use crate::wire::command::{Command, Commit};
use crate::wire::return_path::Message;
use crate::wire::section::{self, NO_DESCRIPTION, PartType, SectionHeader};

/// What is being sent behind the last pages.
const SECTIONS: &str = "the device sections";
/// Bytes of sections in one write: less than a vCPU has, so that one is loaded while the next is written, and more
/// than most devices have, so that a write costs less than what it holds.
const SECTIONS_AT_ONCE: usize = 4 << 10;

/// What there is beside RAM, as it goes out to who can't be told what fails.
#[derive(Default)]
struct Saved {
    sections: Vec<(SectionHeader, Vec<u8>)>,
    /// One for each, for whoever has a use for them.
    descriptions: Vec<Description>,
    /// Of those that a QEMU would get shorter.
    fuller: Vec<FullerSection>,
}

/// What went wrong on the way, if anything did.
#[derive(Debug, Default)]
pub(super) struct Trouble {
    error: Option<SourceError>,
    pub(super) resume: Option<VmError>,
    /// Why a doubt was not settled.
    pub(super) objection: Option<Objection>,
}

impl Trouble {
    /// Keeps the first error: what follows from it says less.
    fn note(&mut self, error: SourceError) {
        if self.error.is_none() {
            self.error = Some(error);
        } else {
            tracing::warn!(error = %error.chain(), "a further error while the migration ends");
        }
    }

    pub(super) fn error(self) -> SourceError {
        self.error.unwrap_or(SourceError::Cancelled)
    }

    pub(super) fn into_errors(self) -> (SourceError, VmError) {
        let resume = self.resume.unwrap_or_else(|| VmError::new("the guest could not be resumed"));
        (self.error.unwrap_or(SourceError::Cancelled), resume)
    }
}

impl Migration<'_> {
    /// From the running guest to the end, whichever it is.
    pub(super) fn switch_over(&mut self, machine: &mut Source, mut passes: Passes) -> Trouble {
        let mut trouble = Trouble::default();
        let peer = machine.peer();
        let mut description = String::new();
        let mut action = machine.on(Event::Switch);
        loop {
            let step = match action {
                Action::Pause => {
                    self.guarded("the guest was stopped", Self::pause).map(|()| Event::Paused)
                }
                Action::Send => self
                    .guarded("the guest's state was sent", |m| m.send_rest(peer, &mut passes))
                    .map(|text| {
                        description = text;
                        Event::StateSent
                    }),
                Action::AwaitPrepared => self
                    .guarded("PREPARED was awaited", Self::await_prepared)
                    .map(|()| Event::Prepared),
                Action::ReleaseDisks => Ok(self.release_disks(&mut trouble)),
                // Whether the order has left is not known when this panics.
                Action::Commit => self.guarded("the order to run the guest was sent", |m| {
                    Ok(m.commit(peer, &description, &mut trouble))
                }),
                other => {
                    let handed_over = other == Action::HandOver;
                    if handed_over {
                        // It runs there already; to let go of its memory here takes longer the more it is.
                        let since = self.inbox.runs().map(|since| since.elapsed());
                        self.control.stats().running(since.unwrap_or_default());
                    }
                    finish(machine, other, self.vm, &mut trouble);
                    if let Some(objection) = &trouble.objection {
                        tracing::warn!(%objection, "the guest can't be taken back");
                    }
                    if !handed_over && machine.state() != State::InDoubt {
                        self.control.stats().running(Duration::ZERO);
                    }
                    return trouble;
                }
            };
            let event = step.unwrap_or_else(|error| {
                trouble.note(error);
                Event::Failed
            });
            action = machine.on(event);
        }
    }

    fn pause(&mut self) -> Result<(), SourceError> {
        let stats = self.control.stats();
        if self.inbox.is_mini_vmm() {
            self.vm.exercise();
        }
        self.check()?;
        stats.stopped();
        self.out.patience = Some(self.parameters.stall_timeout);
        stats.step(Step::Pause);
        let paused = self.vm.pause();
        // While nothing runs, so that it does not write with all its might for a last moment; and
        // whoever resumes it resumes it whole.
        self.unthrottle();
        paused.map_err(SourceError::vm("pausing the vCPUs"))?;
        stats.step(Step::Drain);
        self.vm.drain().map_err(SourceError::vm("finishing the devices' requests"))?;
        if self.parameters.pause_before_switchover {
            self.control.enter(Phase::PreSwitchover);
            // The pings tell the destination that this side is alive.
            let ping = (self.parameters.stall_timeout / 4).min(Duration::from_secs(1));
            while !self.control.wait_to_proceed(ping) {
                self.check()?;
                if self.out.is_one_way() {
                    continue;
                }
                self.out.command(&Command::Ping(0));
                self.send("a sign of life")?;
            }
        }
        self.check()?;
        self.control.enter(Phase::Device);
        Ok(())
    }

    /// Sends everything up to the point of no return. Gives the description of the sections, which
    /// only a QEMU and a saved VM get, and later.
    fn send_rest(&mut self, peer: Peer, passes: &mut Passes) -> Result<String, SourceError> {
        let stats = self.control.stats();
        stats.step(Step::VcpuState);
        self.vm.read_state().map_err(SourceError::vm("reading the machine's state"))?;
        // Who can't be told why the rest does not come gets nothing before all of it is there.
        let saved = match peer {
            Peer::MiniVmm => None,
            Peer::Qemu | Peer::Nobody => Some(self.save_sections(peer)?),
        };

        stats.step(Step::LastPages);
        // The log goes on: to stop it takes KVM a grace period for each slot, and the guest waits.
        self.send_last_pages(passes)?;
        let digests = self.ram_digests(peer)?;

        stats.step(Step::Devices);
        let description = match saved {
            None => {
                self.send_sections(digests)?;
                String::new()
            }
            Some(mut saved) => {
                for (header, body) in std::mem::take(&mut saved.sections) {
                    self.put_section(&header, body);
                }
                // The other side loads them while they are being described.
                self.send(SECTIONS)?;
                self.describe(peer, saved, digests)?
            }
        };
        self.check()?;
        Ok(description)
    }

    fn put_section(&mut self, header: &SectionHeader, body: Vec<u8>) {
        self.out.put(|out| section::write_header(out, PartType::Full, header));
        self.out.give(body);
        self.out.put(|out| section::write_footer(out, header.id));
    }

    /// Writes section after section for a mini-vmm, which reads one while the next is written.
    fn send_sections(&mut self, mut digests: Option<Digests>) -> Result<(), SourceError> {
        for (section, id) in self.vm.sections().into_iter().zip(RAM_SECTION_ID + 1..) {
            let header = SectionHeader { id, key: section.id(), version: section.version() };
            let body = section.save(self.audience);
            let body = body.map_err(|source| SourceError::State { source })?;
            if let Some(digests) = &mut digests {
                digests.sections.push(SectionDigest {
                    id: header.key.idstr.clone(),
                    instance: header.key.instance,
                    digest: verify::section_digest(header.version, &body),
                });
            }
            self.put_section(&header, body);
            if self.out.collected() >= SECTIONS_AT_ONCE {
                self.send(SECTIONS)?;
            }
        }
        if let Some(digests) = digests {
            self.out.command(&Command::Verify(digests));
        }
        self.out.put(|out| section::write_end(out, NO_DESCRIPTION));
        self.send(SECTIONS)
    }

    /// Writes down the state of everything but RAM, for a QEMU or a saved VM.
    fn save_sections(&mut self, peer: Peer) -> Result<Saved, SourceError> {
        let failed = |source| SourceError::State { source };
        let mut saved = Saved::default();
        for (section, id) in self.vm.sections().into_iter().zip(RAM_SECTION_ID + 1..) {
            let header = SectionHeader { id, key: section.id(), version: section.version() };
            let (body, description) = if peer == Peer::Qemu {
                section.save_described(Audience::Qemu).map_err(failed)?
            } else {
                let full = section.save_described(Audience::Restore).map_err(failed)?;
                match section.save_described(Audience::Qemu) {
                    Ok((body, _)) if body == full.0 => full,
                    Ok(plain) => {
                        let (key, version) = (&header.key, header.version);
                        saved.fuller.push(FullerSection::new(key, version, full.0));
                        plain
                    }
                    Err(error) => {
                        let error = crate::wire::error_chain(&error);
                        tracing::warn!(error, "only a mini-vmm will be able to take the saved VM");
                        full
                    }
                }
            };
            saved.descriptions.push(description);
            saved.sections.push((header, body));
        }
        Ok(saved)
    }

    /// What `--verify` compares of memory, if it is asked for and somebody will; a mini-vmm compares what it is
    /// asked for by, too.
    fn ram_digests(&self, peer: Peer) -> Result<Option<Digests>, SourceError> {
        if !self.parameters.verify || peer == Peer::Qemu {
            return Ok(None);
        }
        let ram = verify::digest(&*self.vm.ram());
        let mut digests = ram.map_err(|source| SourceError::Memory { source })?;
        if peer == Peer::MiniVmm {
            digests.manifest = self.manifest_digest.clone();
        }
        Ok(Some(digests))
    }

    /// The JSON at the stream's end. What nobody answers has there what else a mini-vmm wants to know.
    fn describe(
        &self,
        peer: Peer,
        saved: Saved,
        digests: Option<Digests>,
    ) -> Result<String, SourceError> {
        let devices: Result<Vec<Value>, _> =
            saved.descriptions.into_iter().map(|describe| describe()).collect();
        let devices = devices.map_err(|source| SourceError::State { source })?;
        let mut description = Map::new();
        description.insert("page_size".to_owned(), crate::guest::PAGE_SIZE.into());
        description.insert("devices".to_owned(), Value::Array(devices));
        if peer == Peer::Nobody {
            let protocol = PROTOCOL_VERSIONS.first().copied().unwrap_or_default();
            let manifest = self.manifest(protocol);
            let supplement = Supplement { manifest, sections: saved.fuller, digests };
            // Plain values always have a JSON form.
            let supplement = serde_json::to_value(supplement).unwrap_or_default();
            description.insert("mini-vmm".to_owned(), supplement);
        }
        Ok(Value::Object(description).to_string())
    }

    fn await_prepared(&mut self) -> Result<(), SourceError> {
        self.control.stats().step(Step::Prepared);
        match self.await_message("it was loading the VM", true)? {
            Message::Prepared(p) => {
                self.prepared = Some(Instant::now());
                self.control.stats().verified(p.verified_ram_bytes, p.verified_sections);
                self.check()
            }
            other => Err(SourceError::Unexpected { found: other.name(), expected: "prepared" }),
        }
    }

    fn release_disks(&mut self, trouble: &mut Trouble) -> Event {
        self.control.stats().step(Step::Commit);
        match asked_of_vm(|| self.vm.release_disks()) {
            Ok(()) => Event::DisksReleased,
            Err(source) => {
                trouble.note(SourceError::Vm { during: "giving up the disks' locks", source });
                Event::DisksKept
            }
        }
    }

    /// The end of a stream that nobody answers: only when all of it is on the disk, or a command says
    /// that it has succeeded, is the guest given away. Until then it may be cancelled.
    fn settle_and_publish(&mut self) -> Result<Event, SourceError> {
        let during = "the end of the stream";
        self.out.flush(during)?;
        self.control.stats().step(Step::Running);
        let settled = self.out.settle(during)?;
        // What has gone through a pipe is out of our hands; a cancel comes too late then.
        if !self.control.commit() && settled.is_revocable() {
            return Err(SourceError::Cancelled);
        }
        settled.publish().map_err(|source| SourceError::NotSaved { during, source })?;
        Ok(Event::Confirmed)
    }

    /// The point of no return, and the answer.
    fn commit(&mut self, peer: Peer, description: &str, trouble: &mut Trouble) -> Event {
        if peer == Peer::Nobody {
            self.out.put(|out| section::write_end(out, description));
            return self.settle_and_publish().unwrap_or_else(|error| {
                let cancelled = self.control.cancelled().is_some();
                trouble.note(if cancelled { SourceError::Cancelled } else { error });
                Event::Refused
            });
        }
        if let Some(error) = self.inbox.failure() {
            trouble.note(error);
            return Event::NotCommitted;
        }
        let waited = self.prepared.map(|since| since.elapsed()).unwrap_or_default();
        if let Some(agreed) = self.agreed.filter(|agreed| waited >= *agreed) {
            trouble.note(SourceError::TooLate { agreed, waited });
            return Event::NotCommitted;
        }
        if !self.control.commit() {
            trouble.note(SourceError::Cancelled);
            return Event::NotCommitted;
        }
        if self.parameters.local
            && let Err(source) = asked_of_vm(|| self.vm.offer_memory())
        {
            let during = "offering the guest's memory";
            trouble.note(SourceError::Vm { during, source });
            return Event::NotCommitted;
        }
        self.inbox.committed();
        match peer {
            Peer::MiniVmm => {
                let commit = Commit { disks: self.vm.left_disks() };
                self.out.command(&Command::Commit(commit));
            }
            Peer::Qemu | Peer::Nobody => self.out.put(|out| section::write_end(out, description)),
        }
        self.control.stats().step(Step::Running);
        // A write that fails may have been enough all the same: only the answer counts.
        let written = self.out.flush("the order to run the guest");
        let timeout = self.parameters.stall_timeout;
        let during = "its word that the guest runs was awaited";
        loop {
            let why = match self.inbox.next(timeout, true, None) {
                Ok(message) => {
                    tracing::warn!(message = message.name(), "unexpected after the hand-over");
                    continue;
                }
                Err(why) => why,
            };
            let refusal = self.inbox.refusal();
            if self.inbox.succeeded() || refusal.is_some() {
                if self.id.is_some() {
                    self.out.say_at_border(&Command::Settled);
                }
                let Some(refusal) = refusal else { return Event::Confirmed };
                trouble.note(refusal);
                return Event::Refused;
            }
            trouble.note(match (written, why) {
                (Err(error), _) => error,
                (_, NoMessage::Timeout) => SourceError::Stalled { during, timeout },
                _ => match self.inbox.stalled() {
                    Some(timeout) => SourceError::Stalled { during, timeout },
                    None => SourceError::Closed { during },
                },
            });
            return Event::Lost;
        }
    }
}
