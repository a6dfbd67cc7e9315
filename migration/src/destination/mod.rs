//! The side that takes a VM.
//!
//! ```text
//! header, commands ──→ hello, pong             who is there
//! manifest         ──→ verdict                 would it work (mini-vmm only); judge.rs
//! (memory          ──→ adopted                 in the place of its pages, between processes of one host)
//!   ── a preflight ends here: nothing has changed, and the next source may come ──
//! START, PART, END ──→ guest memory            ram.rs
//! FULL …           ──→ decoded and checked     load.rs; nothing is applied yet
//! EOF, description
//! ── everything has come ─────────────────────────────────────────────────────────
//! compare RAM, apply every section, prepare    any error here: FAILED, and the source goes on
//! PREPARED ──→ source;  COMMIT ←── source
//! take the disks, start, shut(0) ──→ source    handover.rs
//! ```
//!
//! Everything that comes is hostile: every length has a bound in [`crate::wire::limits`], every
//! block, offset, section and version is looked up before it is used, and nothing runs before the
//! whole stream has been accepted.
#![cfg_attr(
    not(test),
    deny(
        clippy::indexing_slicing,
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::arithmetic_side_effects
    )
)]

mod afterwards;
mod ahead;
mod answer;
mod channels;
mod compare;
mod compressed;
mod error;
mod judge;
mod load;
mod ram;
mod rehearse;

pub use afterwards::answer;
pub use compare::compare;
pub use error::{DestinationError, Failure};

use std::time::{Duration, Instant};

use crate::control::Control;
use crate::fate::Fate;
use crate::guest::{DestinationVm, VmError};
use crate::handover::Peer;
use crate::handover::destination::{Action, Destination, Event};
use crate::manifest::{Digests, Manifest, PROTOCOL_VERSIONS, Prepared};
use crate::panics::guarded;
use crate::params::Parameters;
use crate::phase::Phase;
use crate::stats::{Report, Step};
use crate::supplement::{self, Supplement};
use crate::transport::{Connection, Input, StreamError, StreamReader, Supply, is_stall};
use crate::verify;
use crate::vmstate::{ByteSource, SectionId};
use crate::wire::WireError;
use crate::wire::command::{self, Abort, Command, Commit, PING_MAGIC};
use crate::wire::header::{self, Configuration};
use crate::wire::limits::MAX_SECTION_BODY;
use crate::wire::ram::{SECTION, VERSION};
use crate::wire::return_path::Message;
use crate::wire::section::{self, PartType};

use answer::ReturnPath;
use channels::Channels;
use judge::Asked;
use load::Loader;
use ram::RamLoader;

/// How long a source's last word is waited for, which it says before it closes anything.
const LAST_WORD: Duration = Duration::from_millis(500);
/// x86's page size as a power of two.
const PAGE_BITS: u32 = 12;

/// Takes a VM that comes over `connection` into `vm`, on the calling thread. When it returns `Ok`
/// the VM is this side's, and runs if it ran before; when it fails no vCPU has run.
pub fn run(
    vm: &mut dyn DestinationVm,
    connection: Connection,
    control: &Control,
) -> Result<Box<Report>, Failure> {
    take(vm, connection.clone().into(), Some(connection), control)
}

/// Takes a VM that was saved; the same otherwise.
pub fn restore(
    vm: &mut dyn DestinationVm,
    supply: Supply,
    control: &Control,
) -> Result<Box<Report>, Failure> {
    take(vm, supply.into(), None, control)
}

fn take(
    vm: &mut dyn DestinationVm,
    input: Input,
    answers: Option<Connection>,
    control: &Control,
) -> Result<Box<Report>, Failure> {
    control.attach(input.abort_handle());
    let nobody_asks = answers.is_none();
    let mut arrival = Arrival::new(vm, input, answers, control);
    if nobody_asks {
        arrival.begin();
    }
    match arrival.run() {
        Ok(()) => {
            control.enter(Phase::Completed);
            arrival.leave_word(Fate::Runs);
            Ok(Box::new(control.report()))
        }
        Err(error) => {
            if arrival.asked.is_some() || matches!(error, DestinationError::AskedAfter { .. }) {
                // Nothing was to come, so nothing has failed.
                tracing::info!(error = %error.chain(), "the end of a question");
                return Err(Failure { error, vm_untouched: !arrival.spoiled });
            }
            arrival.begin();
            let text = error.chain();
            control.stats().fail(&text);
            tracing::warn!(error = %text, "the VM was not taken");
            control.enter(Phase::Failed);
            let panicked = matches!(error, DestinationError::Panicked { .. });
            Err(Failure { error, vm_untouched: !arrival.touched && !panicked })
        }
    }
}

/// A VM on its way in.
struct Arrival<'a> {
    vm: &'a mut dyn DestinationVm,
    control: &'a Control,
    reader: StreamReader,
    answer: ReturnPath,
    parameters: Parameters,
    configuration: Configuration,
    manifest: Option<Manifest>,
    /// What a source that only asks was told.
    asked: Option<Asked>,
    /// What came after that is only for show.
    rehearsal: Option<rehearse::Rehearsal>,
    /// It could not be undone.
    spoiled: bool,
    digests: Option<Digests>,
    /// Of the manifest's JSON, as it came.
    manifest_digest: String,
    loader: Loader,
    ram: RamLoader,
    channels: Channels,
    ram_id: Option<u32>,
    stopped: bool,
    accepted: bool,
    touched: bool,
    /// The RAM is the source's own.
    adopted: bool,
    /// PREPARED has been said: the source may believe that the guest runs here.
    prepared: bool,
    /// How long COMMIT may take after that.
    agreed: Duration,
    /// How the source has left the disks.
    left: serde_json::Value,
}

impl<'a> Arrival<'a> {
    fn new(
        vm: &'a mut dyn DestinationVm,
        input: Input,
        answers: Option<Connection>,
        control: &'a Control,
    ) -> Self {
        let loader = Loader::new(vm.sections());
        let ram = RamLoader::new(vm.ram());
        let parameters = control.parameters();
        Self {
            control,
            adopted: false,
            prepared: false,
            agreed: parameters.stall_timeout,
            left: serde_json::Value::Null,
            reader: StreamReader::new(input),
            answer: ReturnPath::new(answers),
            parameters,
            configuration: Configuration::default(),
            manifest: None,
            asked: None,
            rehearsal: None,
            spoiled: false,
            digests: None,
            manifest_digest: String::new(),
            loader,
            ram,
            channels: Channels::default(),
            ram_id: None,
            stopped: false,
            accepted: false,
            touched: false,
            vm,
        }
    }

    fn run(&mut self) -> Result<(), DestinationError> {
        let timeout = self.parameters.stall_timeout;
        let received = self
            .answer
            .set_stall_timeout(timeout)
            .map_err(|source| DestinationError::Answer { what: "setting timeouts", source })
            .and_then(|()| self.guarded(Self::receive));
        if self.rehearsal.is_some() {
            let received = received.map_err(|error| self.cause(error));
            return self.end_rehearsal(received);
        }
        let machine = Destination::new(self.answer.peer());
        let mut machine = if self.adopted { machine.by_ledger() } else { machine };
        let mut error = None;
        let mut action = machine.on(match received {
            Ok(()) => Event::Received,
            Err(e) => {
                error = Some(self.cause(e));
                Event::Failed
            }
        });
        loop {
            let step = match action {
                Action::Prepare => self.guarded(Self::prepare).map(|()| Event::Prepared),
                Action::SendPrepared => self.guarded(Self::await_commit).map(|()| Event::Commit),
                Action::TakeDisks => self.take_disks(),
                Action::Claim => self.guarded(Self::claim).map(|()| Event::Claimed),
                Action::Acknowledge => self.answer.acknowledge().map(|()| Event::Acknowledged),
                Action::Start => match guarded(|| self.start()) {
                    Ok(started) => started,
                    // It may have run for a moment, so nobody is told that it never will: the source
                    // stays in doubt until it sees who has the disks, and this process ends.
                    Err(source) => {
                        self.answer.close();
                        return Err(DestinationError::Panicked { source });
                    }
                },
                Action::Announce => {
                    // The guest runs; a source that does not hear it stays in doubt and still.
                    if let Err(error) = self.answer.acknowledge() {
                        tracing::warn!(error = %error.chain(), "the source was not told");
                    }
                    return Ok(());
                }
                Action::None => return Ok(()),
                Action::Refuse | Action::ReleaseDisksAndRefuse => {
                    if action == Action::ReleaseDisksAndRefuse {
                        // What is not given back ends with this process.
                        let _ = guarded(|| self.vm.release_disks());
                    }
                    if self.adopted {
                        // Before the source hears that it can have it.
                        let _ = guarded(|| self.vm.give_memory_back());
                    }
                    let error = error.unwrap_or(DestinationError::Cancelled);
                    self.answer.refuse(&error);
                    match &error {
                        // It knows.
                        DestinationError::SourceGaveUp { .. } => {
                            self.answer.linger(&mut self.reader);
                        }
                        _ => self.leave_word(Fate::NeverHere),
                    }
                    return Err(error);
                }
            };
            let event = step.unwrap_or_else(|e| {
                let event = e.event();
                error = Some(self.cause(e));
                event
            });
            action = machine.on(event);
        }
    }

    /// Runs a step; its panic is a failure of it.
    fn guarded<T>(
        &mut self,
        step: impl FnOnce(&mut Self) -> Result<T, DestinationError>,
    ) -> Result<T, DestinationError> {
        guarded(|| step(self)).unwrap_or_else(|source| Err(DestinationError::Panicked { source }))
    }

    /// An error of the connection after an abort is the abort; a command's own words say more than
    /// that its stream broke off.
    fn cause(&mut self, error: DestinationError) -> DestinationError {
        if self.control.cancelled().is_some() {
            return DestinationError::Cancelled;
        }
        let broken = error.event() == Event::Lost;
        if let Some(failed) = broken.then(|| self.channels.failure()).flatten() {
            return failed;
        }
        let words = self.reader.supply().filter(|_| broken).and_then(Supply::why_broken);
        match words {
            Some(source) => DestinationError::Stream { source },
            None if error.is_stall() => {
                let timeout = self.parameters.stall_timeout;
                DestinationError::Stalled { timeout, source: Box::new(error) }
            }
            None => error,
        }
    }

    /// Reads the whole stream.
    fn receive(&mut self) -> Result<(), DestinationError> {
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
    fn skip_description(&mut self) -> Result<(), DestinationError> {
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

    fn out_of_turn(&self, what: &'static str) -> DestinationError {
        DestinationError::OutOfTurn { what, offset: self.reader.offset() }
    }

    fn obey(&mut self, command: Command) -> Result<(), DestinationError> {
        match command {
            Command::OpenReturnPath => self.answer.open(),
            Command::Ping(value) => {
                if value == PING_MAGIC && self.answer.recognise() {
                    self.answer.send(&Message::Hello(afterwards::hello()))?;
                }
                self.answer.pong(value)?;
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

    /// From here on it is a migration to whoever watches this side, and no mere question.
    fn begin(&self) {
        self.control.begin(self.vm.ram().blocks().iter().map(|b| b.len).sum());
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
        self.channels.start(&self.vm.ram(), self.answer.connection())?;
        self.ram_records(header.id)
    }

    fn ram_section(&mut self, kind: PartType) -> Result<(), DestinationError> {
        let id = crate::wire::read_u32(&mut self.reader, "a section's id")?;
        if self.ram_id != Some(id) {
            return Err(DestinationError::UnknownSectionId { id });
        }
        if kind == PartType::End {
            self.stand_still(Step::LastPages);
        }
        self.ram_records(id)
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

    fn look_beside(&mut self) -> Result<(), DestinationError> {
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

    /// The source's guest stands still from here on.
    fn stand_still(&mut self, step: Step) {
        let stats = self.control.stats();
        if !std::mem::replace(&mut self.stopped, true) {
            stats.stopped();
        }
        if stats.current_step() != Some(step) {
            stats.step(step);
        }
    }

    /// Compares, applies, builds.
    fn prepare(&mut self) -> Result<(), DestinationError> {
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
    fn await_commit(&mut self) -> Result<(), DestinationError> {
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

    fn take_disks(&mut self) -> Result<Event, DestinationError> {
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

    fn claim(&mut self) -> Result<(), DestinationError> {
        self.vm.claim_memory().map_err(|source| DestinationError::Start { source })
    }

    fn start(&mut self) -> Result<Event, DestinationError> {
        self.control.stats().step(Step::Running);
        self.vm.start().map_err(|source| DestinationError::Start { source })?;
        self.control.stats().running();
        Ok(Event::Started)
    }
}

fn aborted() -> VmError {
    VmError::new("the migration was given up on this side")
}
