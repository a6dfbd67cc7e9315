//! The first words: who is there, and would it work.

use super::inbox::NoMessage;
use super::{Migration, SourceError};
use crate::handover::Peer;
use crate::manifest::{Hello, Manifest, PROTOCOL_VERSIONS, SectionManifest};
use crate::wire::command::{Command, PING_MAGIC};
use crate::wire::header::{self, Configuration};
use crate::wire::return_path::Message;

/// Name and version of this program, for the other side's messages.
pub(crate) const PROGRAM: &str = concat!("mini-vmm ", env!("CARGO_PKG_VERSION"));

impl Migration<'_> {
    /// Header, return path and ping; and with a mini-vmm manifest and verdict. Nothing has been
    /// sent then that a failure could waste. Where nobody answers, the header is all.
    pub(super) fn greet(&mut self) -> Result<Peer, SourceError> {
        let reasons = self.vm.blockers();
        if !reasons.is_empty() {
            return Err(SourceError::Blocked { reasons });
        }
        let configuration =
            Configuration { machine: self.vm.machine_type(), ..Configuration::default() };
        self.out.put(|out| header::write(out, &configuration));
        if self.out.is_one_way() {
            // Without a BIOS for a QEMU it is a VM for a mini-vmm only.
            if let Err(error) = self.vm.prepare_for_qemu() {
                let error = crate::wire::error_chain(&error);
                tracing::warn!(error, "a QEMU will not be able to take what is saved");
            }
            self.send("the header")?;
            return Ok(Peer::Nobody);
        }
        self.out.command(&Command::OpenReturnPath);
        self.out.command(&Command::Ping(PING_MAGIC));
        self.send("the header")?;
        match self.await_message("its first answer was awaited", false)? {
            Message::Hello(hello) => {
                self.compare(&hello)?;
                Ok(Peer::MiniVmm)
            }
            Message::Pong(_) => {
                self.vm
                    .prepare_for_qemu()
                    .map_err(SourceError::vm("getting ready for a QEMU, which the peer is"))?;
                Ok(Peer::Qemu)
            }
            other => {
                Err(SourceError::Unexpected { found: other.name(), expected: "hello or pong" })
            }
        }
    }

    fn compare(&mut self, hello: &Hello) -> Result<(), SourceError> {
        let common = PROTOCOL_VERSIONS.iter().find(|v| hello.protocols.contains(v));
        let Some(&protocol) = common else {
            return Err(SourceError::Protocol {
                theirs: hello.protocols.iter().take(16).copied().collect(),
                ours: PROTOCOL_VERSIONS,
            });
        };
        let manifest = self.manifest(protocol);
        self.out.command(&Command::Manifest(Box::new(manifest)));
        self.send("the manifest")?;
        match self.await_message("its verdict on the VM was awaited", true)? {
            Message::Verdict(verdict) if verdict.problems.is_empty() => Ok(()),
            Message::Verdict(verdict) => Err(SourceError::Refused { problems: verdict.problems }),
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
