//! The side that gives a VM away.
//!
//! ```text
//! caller's thread (run)                             thread "migration-return"
//! ─────────────────────                             ─────────────────────────
//! greet: header, ping → hello or pong ←──────────── reads every message of the destination
//! manifest → verdict  ←────────────────────────────  into the inbox; when the destination gives
//! passes over RAM while the guest runs               up, or a cancel is not heeded because a
//!   (converge.rs says when to stop)                  write is stuck, it breaks the connection
//! switch-over, hand-over (handover.rs)               so that the other thread wakes
//! ```
//!
//! [`run`] returns when it is known who has the guest, or that this is not known. [`save`] is the same
//! without anybody to ask: no return path, no thread, one pass after the other. [`preflight`] goes as
//! far as the verdict, and measures how the rest would go.

mod absent;
mod ask;
mod channels;
mod doubt;
mod error;
mod greet;
mod inbox;
mod local;
mod out;
mod pass;
mod precopy;
mod preflight;
mod rehearse;
mod switchover;

pub use ask::{Asked, ask};
pub use doubt::{Doubt, Objection, Settled, Wish};
pub use error::SourceError;
pub(crate) use greet::PROGRAM;
pub use preflight::{Preflight, Questions, preflight, preflight_for_qemu};
pub use rehearse::Rehearsal;

use std::panic::resume_unwind;
use std::thread;
use std::time::{Duration, Instant};

use crate::control::Control;
use crate::fate::MigrationId;
use crate::guest::{DirtyTracker, SourceVm, VmError};
use crate::handover::source::State;
use crate::panics::{asked_of_vm, guarded};
use crate::params::Parameters;
use crate::phase::Phase;
use crate::stats::Report;
use crate::throttle::{Rest, Throttle};
use crate::transport::{Connection, Links, Sink};
use crate::vmstate::Audience;
use crate::wire::bounded_reason;
use crate::wire::command::{Abort, Command};

use channels::Channels;
use inbox::Inbox;
use out::{Channel, Out};

/// How a migration ended, as seen from the source.
#[derive(Debug)]
pub enum Outcome {
    /// The destination runs the guest; this side must never run it again.
    Completed(Box<Report>),
    /// The guest is here as if nothing had been tried.
    Kept {
        /// Why; [`SourceError::Cancelled`] after a cancel.
        error: SourceError,
    },
    /// The guest is here, whole, but could not be resumed.
    KeptStopped {
        /// Why the migration failed.
        error: SourceError,
        /// Why the guest does not run.
        resume: VmError,
    },
    /// The destination has been told to run the guest and has not answered. The guest stands
    /// still here, with everything kept, until someone who knows settles it.
    InDoubt {
        /// What broke.
        error: SourceError,
        /// To be settled with [`Doubt::recover`].
        doubt: Doubt,
    },
}

/// Migrates `vm` over these connections, on the calling thread, until it is known how it ended.
pub fn run(vm: &mut dyn SourceVm, links: impl Into<Links>, control: &Control) -> Outcome {
    let Links { main: connection, pages } = links.into();
    let parameters = control.parameters();
    control.attach(connection.abort_handle());
    control.begin(vm.ram().blocks().iter().map(|b| b.len).sum());
    let outcome = with_return_path(&connection, control, |inbox| {
        let channel = Channel::Connection(&connection);
        let mut migration = Migration::new(vm, channel, control, inbox, parameters);
        migration.links = pages;
        migration.run()
    })
    .unwrap_or_else(|error| Outcome::Kept { error });
    conclude(control, &outcome);
    outcome
}

/// Saves `vm` to where nobody answers, on the calling thread. It is never in doubt whether the
/// stream is whole; the guest is gone from here when it is.
pub fn save(vm: &mut dyn SourceVm, sink: Sink, control: &Control) -> Outcome {
    let parameters = control.parameters();
    control.begin(vm.ram().blocks().iter().map(|b| b.len).sum());
    // Nobody ever puts anything in.
    let inbox = Inbox::default();
    let channel = Channel::Sink(Some(sink));
    let outcome = Migration::new(vm, channel, control, &inbox, parameters).run();
    conclude(control, &outcome);
    outcome
}

/// Runs `body` with a thread that reads the destination's messages; joins it.
fn with_return_path<T>(
    connection: &Connection,
    control: &Control,
    body: impl FnOnce(&Inbox) -> T,
) -> Result<T, SourceError> {
    let stall = control.parameters().stall_timeout;
    connection.set_stall_timeout(stall).map_err(|e| SourceError::send("the first bytes", e))?;
    connection.note_arrivals();
    let inbox = Inbox::default();
    thread::scope(|scope| {
        let reader = thread::Builder::new()
            .name("migration-return".into())
            .spawn_scoped(scope, || inbox::read_messages(connection, &inbox, control))
            .map_err(|e| SourceError::send("the return path's thread", e))?;
        let result = guarded(|| body(&inbox));
        inbox.finish();
        connection.shutdown(std::net::Shutdown::Both);
        // Joined here, since a panic of its own must not take the result along.
        if reader.join().is_err() {
            tracing::error!("the thread that reads the destination's answers panicked");
        }
        // Each step is guarded by itself; what is left is between them, and the caller's to report.
        Ok(result.unwrap_or_else(|panicked| resume_unwind(Box::new(panicked.to_string()))))
    })
}

fn conclude(control: &Control, outcome: &Outcome) {
    let (error, in_doubt) = match outcome {
        Outcome::Completed(_) => return,
        Outcome::Kept { error } | Outcome::KeptStopped { error, .. } => (error, false),
        Outcome::InDoubt { error, .. } => (error, true),
    };
    let mut text = error.chain();
    if in_doubt {
        text = format!("it is not known whether the destination runs the guest: {text}");
    }
    control.stats().fail(&text);
    tracing::warn!(error = %text, "the migration did not complete");
    if matches!(error, SourceError::Cancelled) {
        control.enter(Phase::Cancelling);
        control.enter(Phase::Cancelled);
    } else {
        control.enter(Phase::Failed);
    }
}

/// One migration on its way.
struct Migration<'a> {
    vm: &'a mut dyn SourceVm,
    control: &'a Control,
    inbox: &'a Inbox,
    out: Out<'a>,
    /// The parameters at the start; those that may change are asked for anew.
    parameters: Parameters,
    tracker: Option<Box<dyn DirtyTracker>>,
    /// How much the vCPUs rest.
    throttle: Throttle,
    /// Connections for pages that nobody uses yet.
    links: Vec<Connection>,
    /// What this attempt is called, and what each of them began with.
    name: MigrationId,
    /// Those that are in use.
    channels: Option<Channels>,
    /// What the destination knows this attempt by, if it can be asked for it.
    id: Option<MigrationId>,
    /// How long the first answer took; zero where nobody answers.
    round_trip: Duration,
    /// How long the destination waits for COMMIT after PREPARED.
    agreed: Option<Duration>,
    /// What a mini-vmm's sections are written for.
    audience: Audience,
    /// When it said PREPARED.
    prepared: Option<Instant>,
    /// Of the manifest's JSON, as it was sent.
    manifest_digest: String,
}

impl<'a> Migration<'a> {
    fn new(
        vm: &'a mut dyn SourceVm,
        channel: Channel<'a>,
        control: &'a Control,
        inbox: &'a Inbox,
        parameters: Parameters,
    ) -> Self {
        let out = Out::new(channel, vm.ram(), control);
        Self {
            vm,
            control,
            inbox,
            out,
            parameters,
            tracker: None,
            throttle: Throttle::default(),
            links: Vec::new(),
            name: MigrationId::random(),
            channels: None,
            id: None,
            round_trip: Duration::ZERO,
            agreed: None,
            audience: Audience::Restore,
            prepared: None,
            manifest_digest: String::new(),
        }
    }

    fn run(mut self) -> Outcome {
        let mut handover = match self.guarded("the two sides got to know each other", Self::greet) {
            Ok(peer) => {
                let machine = crate::handover::source::Source::new(peer, self.vm.arbiter());
                let machine = if self.parameters.local { machine.by_ledger() } else { machine };
                if self.id.is_some() { machine.fenced() } else { machine }
            }
            Err(error) => {
                self.farewell(&error.chain());
                return Outcome::Kept { error };
            }
        };
        let passes = match self.guarded("RAM was sent", Self::send_ram) {
            Ok(passes) => passes,
            Err(error) => {
                self.stop_tracking();
                self.farewell(&error.chain());
                return Outcome::Kept { error };
            }
        };
        let trouble = self.switch_over(&mut handover, passes);
        self.stop_tracking();
        match (handover.state(), trouble) {
            (State::HandedOver, _) => {
                self.control.enter(Phase::Completed);
                Outcome::Completed(Box::new(self.control.report()))
            }
            (State::InDoubt, e) => {
                let error = e.error();
                let doubt = Doubt::new(handover, &error, self.id);
                Outcome::InDoubt { error, doubt }
            }
            (State::KeptStopped, e) => {
                let (error, resume) = e.into_errors();
                self.farewell(&error.chain());
                Outcome::KeptStopped { error, resume }
            }
            (_, e) => {
                let error = e.error();
                self.farewell(&error.chain());
                Outcome::Kept { error }
            }
        }
    }

    /// Runs a step; its panic is a failure of it.
    fn guarded<T>(
        &mut self,
        during: &'static str,
        step: impl FnOnce(&mut Self) -> Result<T, SourceError>,
    ) -> Result<T, SourceError> {
        guarded(|| step(self))
            .unwrap_or_else(|source| Err(SourceError::Panicked { during, source }))
    }

    fn stop_tracking(&mut self) {
        self.unthrottle();
        if let Some(mut tracker) = self.tracker.take() {
            // Said already; a log that stays on costs time, and nothing else.
            let _ = guarded(|| tracker.stop());
        }
    }

    /// Lets the vCPUs run all of the time again.
    fn unthrottle(&mut self) {
        if self.throttle.percent() == 0 {
            return;
        }
        self.throttle = Throttle::default();
        self.control.stats().throttle(&Rest::NONE);
        if let Err(error) = asked_of_vm(|| self.vm.throttle(&Rest::NONE)) {
            tracing::error!(error = %crate::wire::error_chain(&error), "the vCPUs still rest");
        }
    }

    /// What ends this migration from outside: the destination gave up, or a cancel came.
    fn check(&self) -> Result<(), SourceError> {
        if let Some(error) = self.inbox.failure() {
            return Err(error);
        }
        if self.control.cancelled().is_some() {
            return Err(SourceError::Cancelled);
        }
        Ok(())
    }

    /// Turns the error of a write into what caused it: a destination that gives up says why before
    /// it closes the connection.
    fn write_failed(&self, error: SourceError) -> SourceError {
        if self.control.cancelled().is_some() {
            return SourceError::Cancelled;
        }
        if self.out.is_one_way() { error } else { cause(error, self.inbox.last_words()) }
    }

    /// Tells a destination that knows our messages that the guest stays here, as far as it can
    /// still be told.
    fn farewell(&mut self, reason: &str) {
        if self.inbox.is_mini_vmm() && self.inbox.failure().is_none() {
            let abort = Abort { reason: bounded_reason(reason) };
            // A destination that does not hear it hears that the connection ends.
            let _ = guarded(|| self.out.say_at_border(&Command::Abort(abort)));
        }
    }
}

/// Of a write's error and the destination's last words, what says more. A destination that took
/// nothing for too long has not closed the connection: the kernel has, and tells only one of the
/// two directions why.
fn cause(error: SourceError, last_words: Option<SourceError>) -> SourceError {
    match (error, last_words) {
        (stalled @ SourceError::Stalled { .. }, Some(SourceError::Closed { .. })) => stalled,
        (error, last_words) => last_words.unwrap_or(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stall_is_not_a_closed_connection_and_words_say_more_than_either() {
        let stalled = || SourceError::Stalled { during: "x", timeout: Default::default() };
        let closed = || SourceError::Closed { during: "x" };
        let words = || SourceError::Destination { reason: "no room".into() };
        let sent = || SourceError::send("x", std::io::ErrorKind::BrokenPipe.into());
        assert!(matches!(cause(stalled(), Some(closed())), SourceError::Stalled { .. }));
        assert!(matches!(cause(stalled(), None), SourceError::Stalled { .. }));
        assert!(matches!(cause(stalled(), Some(words())), SourceError::Destination { .. }));
        assert!(matches!(cause(sent(), Some(closed())), SourceError::Closed { .. }));
        assert!(matches!(cause(sent(), None), SourceError::Send { .. }));
    }
}
