//! The first words: who is there, and would it work.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::channels::{Channels, introduce};
use super::inbox::NoMessage;
use super::{Migration, SourceError};
use crate::fate::FATE;
use crate::handover::Peer;
use crate::manifest::{
    CHANNELS, Channels as Announced, Hello, MEMORY, Manifest, PROTOCOL_VERSIONS, RUNS, SHORT,
    SectionManifest, Verdict, ZSTD,
};
use crate::problem::Problem;
use crate::verify;
use crate::vmstate::Audience;
use crate::wire::command::{Command, PING_MAGIC};
use crate::wire::header::{self, Configuration};
use crate::wire::return_path::Message;

/// Name and version of this program, for the other side's messages.
pub(crate) const PROGRAM: &str = concat!("mini-vmm ", env!("CARGO_PKG_VERSION"));

/// Who has answered the first ping.
pub(super) enum First {
    /// A mini-vmm.
    Hello(Hello),
    /// Something that merely echoes it, as a QEMU does.
    Pong,
    /// There is nobody who could.
    Nobody,
}

impl Migration<'_> {
    /// Header, return path and ping; and with a mini-vmm manifest and verdict. Nothing has been
    /// sent then that a failure could waste. Where nobody answers, the header is all.
    pub(super) fn greet(&mut self) -> Result<Peer, SourceError> {
        let reasons = self.vm.blockers();
        if !reasons.is_empty() {
            return Err(SourceError::Blocked { reasons });
        }
        match self.introduce()? {
            First::Hello(hello) => {
                if self.parameters.local && !hello.can(MEMORY) {
                    return Err(SourceError::NotLocal { program: Some(hello.program) });
                }
                let verdict = self.verdict(&hello, false)?;
                for warning in &verdict.warnings {
                    tracing::warn!("{}: {warning}", warning.code);
                }
                if !verdict.problems.is_empty() {
                    return Err(SourceError::Refused { problems: verdict.problems });
                }
                if hello.can(CHANNELS) {
                    let zstd = self.parameters.zstd().filter(|_| {
                        let can = hello.can(ZSTD) || self.links.is_empty();
                        if !can {
                            tracing::warn!("the destination takes no compressed pages");
                        }
                        can
                    });
                    self.open_channels(zstd)?;
                } else if !self.links.is_empty() {
                    tracing::warn!("the destination takes one connection only");
                    self.links.clear();
                }
                if hello.can(RUNS) {
                    self.out.allow_runs();
                }
                if hello.can(SHORT) {
                    self.audience = Audience::MiniVmm;
                }
                self.agreed =
                    Some(verdict.prepared_for_ms).filter(|ms| *ms > 0).map(Duration::from_millis);
                Ok(Peer::MiniVmm)
            }
            First::Pong if self.parameters.local => Err(SourceError::NotLocal { program: None }),
            First::Pong => {
                self.refuse_losses()?;
                self.vm
                    .prepare_for_qemu()
                    .map_err(SourceError::vm("getting ready for a QEMU, which the peer is"))?;
                self.open_channels(self.parameters.zstd())?;
                Ok(Peer::Qemu)
            }
            First::Nobody => {
                // Without a BIOS for a QEMU it is a VM for a mini-vmm only. State that only a mini-vmm
                // has a place for is written for one, and said, when it is.
                if let Err(error) = self.vm.prepare_for_qemu() {
                    let error = crate::wire::error_chain(&error);
                    tracing::warn!(error, "a QEMU will not be able to take what is saved");
                }
                self.send("the header")?;
                Ok(Peer::Nobody)
            }
        }
    }

    /// What the guest would lose in a QEMU keeps it here; what it can do without is logged.
    fn refuse_losses(&self) -> Result<(), SourceError> {
        let found = self.vm.against_qemu().map_err(SourceError::vm("looking at the VM"))?;
        let (problems, rest): (Vec<Problem>, Vec<_>) = found.into_iter().partition(|p| p.fatal);
        for warning in &rest {
            tracing::warn!("{}: {warning}", warning.code);
        }
        if problems.is_empty() { Ok(()) } else { Err(SourceError::NotForQemu { problems }) }
    }

    /// From here on pages go through connections of their own, if there are any, and through zstd of
    /// this level.
    fn open_channels(&mut self, zstd: Option<u8>) -> Result<(), SourceError> {
        if !self.links.is_empty() {
            let links = std::mem::take(&mut self.links);
            let stall = self.parameters.stall_timeout;
            self.channels = Some(Channels::open(links, self.vm.ram(), stall, zstd)?);
        }
        Ok(())
    }

    /// The first words, and who answers them.
    pub(super) fn introduce(&mut self) -> Result<First, SourceError> {
        let configuration =
            Configuration { machine: self.vm.machine_type(), ..Configuration::default() };
        self.out.put(|out| header::write(out, &configuration));
        if self.out.is_one_way() {
            return Ok(First::Nobody);
        }
        // A QEMU that has been told to expect several reads none before all are there.
        introduce(&self.links, self.vm.uuid(), self.name.to_bytes())?;
        self.out.command(&Command::OpenReturnPath);
        self.out.command(&Command::Ping(PING_MAGIC));
        let begin = Instant::now();
        self.send("the header")?;
        let answer = self.await_message("its first answer was awaited", false)?;
        self.round_trip = begin.elapsed();
        match answer {
            Message::Hello(hello) => Ok(First::Hello(hello)),
            Message::Pong(_) => Ok(First::Pong),
            other => {
                Err(SourceError::Unexpected { found: other.name(), expected: "hello or pong" })
            }
        }
    }

    /// Sends the manifest, and gives what the destination thinks of it.
    pub(super) fn verdict(
        &mut self,
        hello: &Hello,
        only_asking: bool,
    ) -> Result<Verdict, SourceError> {
        let common = PROTOCOL_VERSIONS.iter().find(|v| hello.protocols.contains(v));
        let Some(&protocol) = common else {
            return Err(SourceError::Protocol {
                theirs: hello.protocols.iter().take(16).copied().collect(),
                ours: PROTOCOL_VERSIONS,
            });
        };
        let count = u8::try_from(self.links.len()).unwrap_or_default();
        let channels =
            (count > 0 && hello.can(CHANNELS)).then_some(Announced { count, token: self.name });
        self.id = (hello.can(FATE) && !only_asking).then_some(self.name);
        let memory = self.parameters.local && !only_asking;
        let manifest = Manifest { only_asking, channels, memory, ..self.manifest(protocol) };
        // Plain values always have a JSON form.
        let json = serde_json::to_vec(&manifest).unwrap_or_default();
        self.manifest_digest = verify::manifest_digest(&json);
        self.out.command(&Command::Manifest(Box::new(manifest)));
        self.send("the manifest")?;
        match self.await_message("its verdict on the VM was awaited", true)? {
            Message::Verdict(verdict) => Ok(verdict.bounded()),
            other => Err(SourceError::Unexpected { found: other.name(), expected: "verdict" }),
        }
    }

    /// What this VM is and needs.
    pub(super) fn manifest(&self, protocol: u32) -> Manifest {
        let sections = self.vm.sections();
        Manifest {
            protocol,
            program: PROGRAM.to_owned(),
            machine: self.vm.machine_type(),
            vcpus: self.vm.vcpus(),
            ram: self.vm.ram().blocks(),
            sections: sections
                .iter()
                .map(|s| {
                    let id = s.id();
                    SectionManifest {
                        id: id.idstr,
                        instance: id.instance,
                        version: s.version(),
                        layout: format!("{:016x}", s.layout_digest()),
                    }
                })
                .collect(),
            verify: self.parameters.verify,
            only_asking: false,
            channels: None,
            memory: false,
            hears_running: true,
            id: self.id,
            commit_within_ms: u64::try_from(self.parameters.stall_timeout.as_millis()).unwrap_or(0),
            sent_at_ms: wall_clock_ms(),
            details: self.vm.details(),
        }
    }

    /// Writes what has been collected.
    pub(super) fn send(&mut self, what: &'static str) -> Result<(), SourceError> {
        self.out.flush(what).map_err(|e| self.write_failed(e))
    }

    /// The destination's next message; silence for the stall timeout is a failure.
    pub(super) fn await_message(
        &self,
        during: &'static str,
        skip_pongs: bool,
    ) -> Result<Message, SourceError> {
        let timeout = self.parameters.stall_timeout;
        self.inbox.next(timeout, skip_pongs, Some(self.control)).map_err(|why| match why {
            NoMessage::Ended => self.inbox.failure().unwrap_or(SourceError::Closed { during }),
            NoMessage::Timeout => SourceError::Stalled { during, timeout },
            NoMessage::Cancelled => SourceError::Cancelled,
        })
    }
}

/// The host's wall clock; 0, which says nothing, where it is before 1970.
fn wall_clock_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(0)
}
