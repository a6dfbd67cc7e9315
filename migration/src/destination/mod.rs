//! The side that takes a VM.
//!
//! ```text
//! header, commands ──→ hello, pong             who is there; receive.rs
//! manifest         ──→ verdict                 would it work (mini-vmm only); judge.rs
//! (memory          ──→ adopted                 in the place of its pages, between processes of one host)
//!   ── a preflight ends here: nothing has changed, and the next source may come ──
//! START, PART, END ──→ guest memory            ram.rs
//! FULL …           ──→ decoded and checked     load.rs; nothing is applied yet
//! EOF, description
//! ── everything has come ─────────────────────────────────────────────────────────
//! compare RAM, apply every section, prepare    any error here: FAILED, and the source goes on
//! PREPARED ──→ source;  COMMIT ←── source
//! take the disks, start, shut(0) ──→ source    settle.rs, in the order of handover/destination.rs
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
mod receive;
mod rehearse;
mod settle;

pub use afterwards::answer;
pub use compare::compare;
pub use error::{DestinationError, Failure};

use std::time::{Duration, Instant};

use crate::control::Control;
use crate::fate::Fate;
use crate::guest::DestinationVm;
use crate::handover::destination::{Action, Destination, Event};
use crate::manifest::{Digests, Manifest};
use crate::panics::guarded;
use crate::params::Parameters;
use crate::phase::Phase;
use crate::stats::{Report, Step};
use crate::transport::{Connection, Input, StreamReader, Supply};
use crate::vmstate::ByteSource;
use crate::wire::header::Configuration;

use answer::ReturnPath;
use channels::Channels;
use judge::Asked;
use load::Loader;
use ram::RamLoader;

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
    /// Since when the guest runs here.
    runs: Option<Instant>,
    /// Pages have come since the machine did for nothing what it will do when the last have.
    out_of_exercise: bool,
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
            runs: None,
            out_of_exercise: false,
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
                    if let Err(error) = self.announce() {
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

    fn out_of_turn(&self, what: &'static str) -> DestinationError {
        DestinationError::OutOfTurn { what, offset: self.reader.offset() }
    }

    /// From here on it is a migration to whoever watches this side, and no mere question.
    fn begin(&self) {
        self.control.begin(self.vm.ram().blocks().iter().map(|b| b.len).sum());
    }

    /// How a thread gives way to guests. A VM that was saved runs nowhere, and whoever restores it waits.
    fn way_to_give(&mut self) -> fn(bool) {
        if self.reader.supply().is_some() { |_| () } else { self.vm.give_way() }
    }

    /// Tells a mini-vmm that the guest runs, and since when: so that it need not count what came between that
    /// and this.
    fn announce(&mut self) -> Result<(), DestinationError> {
        let listens = self.manifest.as_ref().is_some_and(|manifest| manifest.hears_running);
        match self.runs.filter(|_| listens) {
            Some(since) => self.answer.running(since),
            None => self.answer.acknowledge(),
        }
    }

    /// The source's guest stands still from here on.
    fn stand_still(&mut self, step: Step) {
        let stats = self.control.stats();
        if !std::mem::replace(&mut self.stopped, true) {
            stats.stopped();
            self.channels.hurry();
        }
        if stats.current_step() != Some(step) {
            stats.step(step);
        }
    }
}
