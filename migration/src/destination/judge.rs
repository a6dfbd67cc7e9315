//! Would the source's VM fit: the verdict on a manifest, and what a source that only asks may do
//! afterwards.

use std::os::fd::AsFd;
use std::time::Duration;

use super::{Arrival, DestinationError, compare};
use crate::handover::Peer;
use crate::manifest::{Manifest, PROTOCOL_VERSIONS, Verdict};
use crate::wire::limits::MAX_PROBES;
use crate::wire::return_path::Message;

/// A source only asks.
pub(super) struct Asked {
    /// The fatal problems that it was told.
    pub(super) count: usize,
    /// Bytes of probes that it has sent.
    probed: u64,
}

impl Arrival<'_> {
    /// Says everything that stands against the manifest's VM. With a source that only asks that is
    /// no reason to hang up: it will measure the connection.
    pub(super) fn judge(&mut self, manifest: Manifest) -> Result<(), DestinationError> {
        if self.answer.peer() != Peer::MiniVmm || self.manifest.is_some() || self.asked.is_some() {
            return Err(self.out_of_turn("a manifest"));
        }
        if !manifest.only_asking {
            self.begin();
        }
        if !PROTOCOL_VERSIONS.contains(&manifest.protocol) {
            return Err(DestinationError::Protocol { found: manifest.protocol });
        }
        let mut verdict = Verdict::new(compare(self.vm, self.loader.sections(), &manifest));
        if manifest.commit_within_ms > 0 {
            let ours = self.parameters.stall_timeout;
            let agreed = ours.min(Duration::from_millis(manifest.commit_within_ms));
            verdict.prepared_for_ms = u64::try_from(agreed.as_millis()).unwrap_or(u64::MAX);
            self.agreed = agreed;
        }
        self.answer.send(&Message::Verdict(verdict.clone()))?;
        if manifest.only_asking {
            self.asked = Some(Asked { count: verdict.problems.len(), probed: 0 });
            return Ok(());
        }
        for warning in &verdict.warnings {
            tracing::warn!("{}: {warning}", warning.code);
        }
        let (announced, memory) = (manifest.channels.clone(), manifest.memory);
        if memory && (announced.is_some() || manifest.verify) {
            return Err(self.out_of_turn("pages, or their digests, beside memory as a descriptor"));
        }
        self.manifest = Some(manifest);
        if !verdict.problems.is_empty() {
            return Err(DestinationError::Refused { problems: verdict.problems });
        }
        if memory {
            return self.adopt_memory();
        }
        self.take_announced(announced)
    }

    /// Takes the source's memory as a descriptor. The source has waited for the verdict, so that nothing else
    /// is on its way.
    fn adopt_memory(&mut self) -> Result<(), DestinationError> {
        let from = match self.answer.connection() {
            Some(connection) if !self.reader.has_buffered() => connection.as_fd(),
            _ => return Err(self.out_of_turn("bytes in the place of memory as a descriptor")),
        };
        self.vm.adopt_memory(from).map_err(|source| DestinationError::Vm {
            during: "taking the source's memory",
            source,
        })?;
        // It can't wait for another source with this one's memory.
        (self.adopted, self.touched) = (true, true);
        self.ram.has_come(0);
        Ok(())
    }

    /// Bytes have come for a measurement, and are gone. They may only follow a question, and a
    /// source can't keep this side busy with them for ever.
    pub(super) fn probed(&mut self, len: u32) -> Result<(), DestinationError> {
        let Some(asked) = &mut self.asked else {
            return Err(self.out_of_turn("a probe without a question"));
        };
        asked.probed = asked.probed.saturating_add(len.into());
        if asked.probed > MAX_PROBES {
            return Err(self.out_of_turn("more probes than anybody needs"));
        }
        Ok(())
    }
}
