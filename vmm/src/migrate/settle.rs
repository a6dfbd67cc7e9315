//! A source in doubt does not wait for its operator: it asks the destination, at the address that it
//! migrated to, and looks at the disks, again and again until one of them tells, or somebody decides.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use migration::fate::{Fate, MigrationId};
use migration::panics::guarded;
use migration::source::{self, Asked, Settled};
use migration::transport::{Abort, Address, Connection};

use super::recover::Standing;
use crate::power::MachineEvent;
use crate::vm::Vm;

/// The first question comes so soon: a destination that is about to run the guest has done so by then.
const FIRST: Duration = Duration::from_millis(500);
/// Pauses double up to this.
const LONGEST: Duration = Duration::from_secs(10);
/// How long a connection may take to be made, and an answer to come.
const PATIENCE: Duration = Duration::from_secs(5);

/// What the thread that asks shares with everyone else.
#[derive(Debug, Default)]
pub(super) struct Asker {
    state: Mutex<State>,
    wake: Condvar,
}

#[derive(Debug, Default)]
struct State {
    over: bool,
    abort: Option<Abort>,
    asked: u64,
    last: Option<(Instant, String)>,
}

/// Whom to ask for what.
pub(super) struct Whom {
    pub(super) address: Address,
    pub(super) id: MigrationId,
}

impl Asker {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Nothing needs to be asked any more. The thread ends soon.
    pub(super) fn end(&self) {
        let mut state = self.lock();
        state.over = true;
        if let Some(abort) = state.abort.take() {
            abort.shutdown();
        }
        self.wake.notify_all();
    }

    /// What came of asking so far, as a sentence; nothing before the first time.
    pub(super) fn report(&self) -> Option<String> {
        let state = self.lock();
        let (when, what) = state.last.as_ref()?;
        let (times, ago) = (state.asked, when.elapsed().as_secs());
        Some(format!("asked {times} times, the last time {ago} s ago: {what}"))
    }

    /// Rests; whether it is still wanted.
    fn rest(&self, time: Duration) -> bool {
        let state = self.lock();
        let (state, _) = self
            .wake
            .wait_timeout_while(state, time, |state| !state.over)
            .unwrap_or_else(PoisonError::into_inner);
        !state.over
    }

    fn ask(&self, whom: &Whom, machine: String) -> Result<Asked, String> {
        let connection =
            Connection::connect(&whom.address, PATIENCE).map_err(|e| crate::error_chain(&e))?;
        {
            let mut state = self.lock();
            if state.over {
                return Err("it is settled".into());
            }
            state.abort = Some(connection.abort_handle());
        }
        source::ask(connection, machine, whom.id, PATIENCE).map_err(|e| e.chain())
    }

    fn note(&self, answer: &Result<Asked, String>) {
        let what = match answer.as_ref().map(Asked::fate) {
            Ok(Fate::Runs) => "the guest runs at the destination".into(),
            Ok(Fate::NeverHere) => {
                "the guest has not run at the destination, and never will".into()
            }
            Ok(Fate::Unknown) => "who answers there knows nothing of this migration".into(),
            Err(why) => why.clone(),
        };
        let mut state = self.lock();
        state.abort = None;
        state.asked = state.asked.saturating_add(1);
        // Only what is new is worth a line in the log.
        if state.last.as_ref().is_none_or(|(_, before)| *before != what) {
            tracing::info!("what became of the guest was asked: {what}");
        }
        state.last = Some((Instant::now(), what));
    }
}

impl Vm {
    /// Starts to ask; the doubt stands already.
    pub(super) fn begin_asking_after(self: &Arc<Self>, whom: Whom, asker: &Arc<Asker>) {
        let (vm, asker) = (self.clone(), asker.clone());
        let thread = thread::Builder::new()
            .name("migration-ask".into())
            .spawn(move || vm.ask_until_settled(&whom, &asker));
        match thread {
            Ok(thread) => self.migration.lock().helps(thread),
            Err(e) => tracing::error!("cannot start the thread that asks the destination: {e}"),
        }
    }

    fn ask_until_settled(self: &Arc<Self>, whom: &Whom, asker: &Arc<Asker>) {
        let mut pause = FIRST;
        while asker.rest(pause) {
            pause = pause.saturating_mul(2).min(LONGEST);
            let asked = guarded(|| asker.ask(whom, self.config().machine.to_string()));
            let answer = asked.unwrap_or_else(|panicked| Err(panicked.to_string()));
            asker.note(&answer);
            let settled = self.settle(asker, answer.as_ref().ok().map(Asked::fate));
            if settled && let Ok(answer) = answer {
                answer.is_settled();
            }
        }
    }

    /// Takes an answer, and looks at the disks where it decides nothing. Whether it is known now who
    /// has the guest.
    fn settle(self: &Arc<Self>, asker: &Arc<Asker>, fate: Option<Fate>) -> bool {
        let mut place = self.migration.doubt();
        // The operator may have been quicker.
        let Some(Standing { mut doubt, mut leaving, .. }) =
            place.take_if(|standing| standing.is_asked_by(asker))
        else {
            return false;
        };
        let answers = fate.filter(|fate| *fate != Fate::Unknown);
        let mut tries = answers.map(Some).into_iter().chain([None]);
        let settled = loop {
            let settled = match tries.next() {
                Some(Some(fate)) => doubt.hear(&mut leaving, fate),
                Some(None) => doubt.look(&mut leaving),
                None => {
                    *place = Some(Standing { doubt, leaving, asker: asker.clone() });
                    return false;
                }
            };
            match settled {
                Settled::StillInDoubt(objection, again) => {
                    tracing::debug!("still in doubt: {objection}");
                    doubt = again;
                }
                settled => break settled,
            }
        };
        asker.end();
        let how = asker.report().unwrap_or_default();
        let what = match settled {
            Settled::HandedOver => {
                self.queue(MachineEvent::HandedOver);
                format!("the guest runs at the destination, and this copy ends ({how})")
            }
            Settled::KeptStopped(error) => {
                let error = crate::error_chain(&error);
                format!("the guest is here, and could not be resumed: {error} ({how})")
            }
            _ => format!("the guest goes on here ({how})"),
        };
        tracing::warn!("the doubt has settled: {what}");
        self.migration.note_settled(&what);
        true
    }
}
