//! The stream, from its first byte to the last section.

use std::time::Duration;

use crate::handover::Peer;
use crate::manifest::PROTOCOL_VERSIONS;
use crate::phase::Phase;
use crate::stats::Step;
use crate::supplement::{self, Supplement};
use crate::transport::{StreamError, Supply};
use crate::verify;
use crate::vmstate::SectionId;
use crate::wire::command::{self, Abort, Command, PING_MAGIC};
use crate::wire::header;
use crate::wire::limits::MAX_SECTION_BODY;
use crate::wire::ram::{SECTION, VERSION};
use crate::wire::return_path::Message;
use crate::wire::section::{self, PartType};

use super::judge::Asked;
use super::{Arrival, DestinationError, afterwards, compare};

/// How long a source's last word is waited for, which it says before it closes anything.
const LAST_WORD: Duration = Duration::from_millis(500);
/// x86's page size as a power of two.
const PAGE_BITS: u32 = 12;

impl Arrival<'_> {
    /// Reads the whole stream.
    pub(super) fn receive(&mut self) -> Result<(), DestinationError> {
        let begun = header::read_magic(&mut self.reader);
        begun.map_err(|source| match self.reader.supply() {
            // Nothing at all came: that is no other kind of file.
            Some(_) if source.io().is_some() => source.into(),
            Some(supply) => DestinationError::NoVm { name: supply.name().to_owned(), source },
            None => DestinationError::Stranger { source },
        })?;
        self.configuration = header::read_configuration(&mut self.reader)?;
        loop {
            match section::read_part_type(&mut self.reader)? {
                PartType::Command => {
                    let command = self.read_command()?;
                    self.obey(command)?;
                }
                PartType::Start => self.start_section()?,
                kind @ (PartType::Part | PartType::End) => self.ram_section(kind)?,
                PartType::Full => self.full_section()?,
                PartType::Eof => break,
                PartType::Description => {
                    return Err(self.out_of_turn("a description before the end"));
                }
            }
        }
        self.accept()?;
        if self.answer.peer() == Peer::MiniVmm {
            if self.rehearsal.is_some() {
                self.skip_description()?;
            }
            let missing = self.loader.missing();
            if !missing.is_empty() {
                return Err(DestinationError::MissingSections { sections: missing });
            }
        } else if self.reader.supply().is_some() {
            self.receive_supplement()?;
        }
        Ok(())
    }

    /// Passes by the description, of which this side has no use. A source of an earlier release makes a long
    /// one, while this side loads what it describes.
    pub(super) fn skip_description(&mut self) -> Result<(), DestinationError> {
        match section::read_part_type(&mut self.reader)? {
            PartType::Description => Ok(section::skip_description(&mut self.reader)?),
            PartType::Command => match Command::read(&mut self.reader)? {
                Command::Abort(Abort { reason }) => Err(DestinationError::SourceGaveUp { reason }),
                _ => Err(self.out_of_turn("a command before the description")),
            },
            _ => Err(self.out_of_turn("no description at the end")),
        }
    }

    /// Reads a command, and notes the digest of a manifest's JSON as it came.
    fn read_command(&mut self) -> Result<Command, DestinationError> {
        if self.manifest.is_none() && self.asked.is_none() {
            self.reader.begin_body(MAX_SECTION_BODY, true);
        }
        let command = Command::read(&mut self.reader);
        let bytes = self.reader.end_body().unwrap_or_default();
        let command = command?;
        if matches!(command, Command::Manifest(_)) {
            let json = bytes.get(command::JSON_AT..).unwrap_or_default();
            self.manifest_digest = verify::manifest_digest(json);
        }
        Ok(command)
    }

    /// What stands behind the end where nobody answers: the description, with what was saved for a
    /// mini-vmm. Both kinds of source write one, so without it the stream is not whole.
    fn receive_supplement(&mut self) -> Result<(), DestinationError> {
        match section::read_part_type(&mut self.reader)? {
            PartType::Description => {}
            _ => return Err(self.out_of_turn("no description at the end")),
        }
        if let Some(Supplement { manifest, sections, digests }) =
            supplement::read(&mut self.reader)?
        {
            if !PROTOCOL_VERSIONS.contains(&manifest.protocol) {
                return Err(DestinationError::Protocol { found: manifest.protocol });
            }
            let mut problems = compare(self.vm, self.loader.sections(), &manifest);
            problems.retain(|problem| problem.fatal);
            if !problems.is_empty() {
                return Err(DestinationError::Refused { problems });
            }
            for section in sections {
                self.loader.replace(section)?;
            }
            let missing = self.loader.missing();
            if !missing.is_empty() {
                return Err(DestinationError::MissingSections { sections: missing });
            }
            self.digests = digests;
            self.manifest = Some(manifest);
        }
        let finished = self.reader.supply().map_or(Ok(()), Supply::finish);
        finished.map_err(|source| match source {
            StreamError::GivenUp => DestinationError::Cancelled,
            source => DestinationError::Stream { source },
        })
    }

    fn obey(&mut self, command: Command) -> Result<(), DestinationError> {
        match command {
            Command::OpenReturnPath => self.answer.open(),
            Command::Ping(value) => {
                if value == PING_MAGIC && self.answer.recognise() {
                    self.answer.send(&Message::Hello(afterwards::hello()))?;
                }
                self.answer.pong(value)?;
                let mini_vmm = self.answer.peer() == Peer::MiniVmm;
                if mini_vmm && !self.stopped && std::mem::take(&mut self.out_of_exercise) {
                    // A pass has ended, and it may have been the last before the guest stands still.
                    self.vm.exercise();
                }
            }
            Command::SwitchoverStart => {}
            Command::Manifest(manifest) => self.judge(*manifest)?,
            Command::Verify(digests) => {
                if !self.manifest.as_ref().is_some_and(|m| m.verify) || self.digests.is_some() {
                    return Err(self.out_of_turn("digests that were not announced"));
                }
                self.digests = Some(digests);
            }
            Command::Commit(_) => return Err(self.out_of_turn("COMMIT before PREPARED")),
            Command::Ask(question) if self.manifest.is_none() && self.asked.is_none() => {
                return Err(self.never_heard_of(&question));
            }
            Command::Ask(_) | Command::Settled => {
                return Err(self.out_of_turn("a question in the middle of a migration"));
            }
            Command::Probe(len) => self.probed(len)?,
            Command::Rehearse(asked) => self.begin_rehearsal(asked)?,
            Command::Abort(abort) => {
                return Err(match self.asked {
                    Some(Asked { count, .. }) => DestinationError::OnlyAsked { count },
                    None => DestinationError::SourceGaveUp { reason: abort.reason },
                });
            }
        }
        Ok(())
    }

    /// What must be true before the first section.
    fn accept(&mut self) -> Result<(), DestinationError> {
        if self.accepted {
            return Ok(());
        }
        let rehearsal = self.rehearsal.is_some();
        if self.asked.is_some() && !rehearsal {
            return Err(self.out_of_turn("a VM after a mere question"));
        }
        if !rehearsal {
            self.begin();
        }
        if self.answer.peer() == Peer::MiniVmm && self.manifest.is_none() && !rehearsal {
            return Err(self.out_of_turn("no manifest before the first section"));
        }
        let expected = self.vm.machine_type();
        if self.configuration.machine != expected {
            let found = self.configuration.machine.clone();
            return Err(DestinationError::MachineType { expected, found });
        }
        if let Some(name) = self.configuration.capabilities.first() {
            return Err(DestinationError::Capability { name: name.clone() });
        }
        if self.configuration.uuid.is_some() {
            // The source wants it compared, and this side knows none.
            return Err(DestinationError::Capability { name: "validate-uuid".into() });
        }
        if let Some(found) = self.configuration.page_bits.filter(|bits| *bits != PAGE_BITS) {
            return Err(DestinationError::PageSize { found });
        }
        self.accepted = true;
        if !rehearsal {
            self.control.enter(Phase::Active);
            self.touched = true;
            self.vm
                .expect()
                .map_err(|source| DestinationError::Vm { during: "getting ready", source })?;
        }
        Ok(())
    }

    fn start_section(&mut self) -> Result<(), DestinationError> {
        let header = section::read_header(&mut self.reader)?;
        self.accept()?;
        if self.rehearsal.is_some() {
            return Err(self.out_of_turn("pages in a rehearsal"));
        }
        if header.key != SectionId::new(SECTION, 0) {
            return Err(DestinationError::UnknownSection { section: header.key });
        }
        if header.version != VERSION {
            return Err(DestinationError::RamVersion { found: header.version });
        }
        if self.ram_id.replace(header.id).is_some() {
            return Err(self.out_of_turn("a second START of the RAM section"));
        }
        if self.answer.peer() != Peer::MiniVmm && self.parameters.multifd {
            self.take_channels(self.parameters.multifd_channels, None)?;
        }
        // From here on pages may be written.
        self.touched = true;
        let way_to_give = self.way_to_give();
        self.channels.start(&self.vm.ram(), self.answer.connection(), way_to_give)?;
        self.pages_that_can_wait(header.id)
    }

    fn ram_section(&mut self, kind: PartType) -> Result<(), DestinationError> {
        let id = crate::wire::read_u32(&mut self.reader, "a section's id")?;
        if self.ram_id != Some(id) {
            return Err(DestinationError::UnknownSectionId { id });
        }
        if kind == PartType::End {
            self.stand_still(Step::LastPages);
            return self.ram_records(id);
        }
        self.pages_that_can_wait(id)
    }

    /// A section of RAM while the source's guest runs, so that nobody waits for its pages. Between sections
    /// something may come for which it waits.
    fn pages_that_can_wait(&mut self, id: u32) -> Result<(), DestinationError> {
        self.out_of_exercise = true;
        let give_way = self.way_to_give();
        give_way(true);
        // Whatever becomes of it, this thread goes on.
        let read = self.guarded(|arrival| arrival.ram_records(id));
        give_way(false);
        read
    }

    fn ram_records(&mut self, id: u32) -> Result<(), DestinationError> {
        self.ram.read_section(&mut self.reader, self.vm, self.control.stats())?;
        let stall = self.parameters.stall_timeout;
        if let Err(error) = self.channels.sync(stall, self.control.stats()) {
            return Err(self.reason_behind(id).unwrap_or(error));
        }
        self.look_beside()?;
        let footer = section::read_footer(&mut self.reader, &SectionId::new(SECTION, 0), id);
        if footer.is_err() {
            // A source that waits for its other connections to be read sends nothing here.
            self.look_beside()?;
        }
        Ok(footer?)
    }

    /// A source that gives up closes its other connections, and says why on this one.
    fn reason_behind(&mut self, id: u32) -> Option<DestinationError> {
        self.answer.set_stall_timeout(LAST_WORD).ok()?;
        section::read_footer(&mut self.reader, &SectionId::new(SECTION, 0), id).ok()?;
        match section::read_part_type(&mut self.reader).ok()? {
            PartType::Command => match Command::read(&mut self.reader).ok()? {
                Command::Abort(abort) => {
                    Some(DestinationError::SourceGaveUp { reason: abort.reason })
                }
                _ => None,
            },
            _ => None,
        }
    }

    pub(super) fn look_beside(&mut self) -> Result<(), DestinationError> {
        if self.answer.peer() == Peer::MiniVmm || !self.channels.is_empty() {
            return Ok(());
        }
        self.vm
            .between_sections()
            .map_err(|source| DestinationError::Vm { during: "receiving memory", source })
    }

    fn full_section(&mut self) -> Result<(), DestinationError> {
        let header = section::read_header(&mut self.reader)?;
        self.accept()?;
        let rehearsal = self.rehearsal.is_some();
        if !rehearsal {
            self.stand_still(Step::Devices);
        }
        let record = rehearsal || self.manifest.as_ref().is_some_and(|m| m.verify);
        self.reader.begin_body(MAX_SECTION_BODY, record);
        self.loader.read(&mut self.reader, &header)?;
        let body = self.reader.end_body();
        self.loader.keep_body(&header.key, body);
        section::read_footer(&mut self.reader, &header.key, header.id)?;
        Ok(())
    }
}
