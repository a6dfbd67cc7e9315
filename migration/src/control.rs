//! One migration as seen from outside of its thread: cancel, parameters, progress, events.
//!
//! The thread that runs [`crate::source::run`] or [`crate::destination::run`] and everyone who
//! watches or steers it share one [`Control`]. Make a new one for every migration.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::fate::{Fate, MigrationId};
use crate::panics::{Panicked, guarded};
use crate::params::{OnTimeout, Parameters};
use crate::phase::Phase;
use crate::stats::{MigrationInfo, MigrationStats, Report};
use crate::transport::Abort;

/// Hears what happens, on the migration's thread. Must return soon.
pub trait Events: Send + Sync {
    /// The migration has come to `phase`.
    fn phase(&self, phase: Phase);
    /// Pass number `pass` over RAM begins (from 1 on); only on a source.
    fn pass(&self, pass: u64);
}

/// Hears nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoEvents;

impl Events for NoEvents {
    fn phase(&self, _: Phase) {}
    fn pass(&self, _: u64) {}
}

/// A cancel came when the guest was no longer this side's to keep.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("too late to cancel: the guest has been given to the other side")]
pub struct TooLate;

/// The shared handle of one migration.
pub struct Control {
    parameters: Mutex<Parameters>,
    requests: Mutex<Requests>,
    wake: Condvar,
    stats: MigrationStats,
    events: Box<dyn Events>,
}

#[derive(Debug, Default)]
struct Requests {
    cancelled: Option<Instant>,
    committed: bool,
    proceed: bool,
    abort: Option<Abort>,
    owed: Option<Owed>,
}

/// What a source may not know of its migration, and may ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Owed {
    /// Which migration.
    pub id: MigrationId,
    /// What became of it.
    pub fate: Fate,
    /// How long the source may take to find out that it does not know.
    pub patience: Duration,
}

impl std::fmt::Debug for Control {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Control").field("stats", &self.stats).finish_non_exhaustive()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Requests and parameters are whole at every moment, also when a holder panicked.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Control {
    /// The handle of a migration that has not begun.
    pub fn new(parameters: Parameters, events: Box<dyn Events>) -> Self {
        Self {
            parameters: Mutex::new(parameters),
            requests: Mutex::default(),
            wake: Condvar::new(),
            stats: MigrationStats::default(),
            events,
        }
    }

    /// The parameters as they are now.
    pub fn parameters(&self) -> Parameters {
        lock(&self.parameters).clone()
    }

    /// `max-bandwidth` as it is now, in bytes per second; 0 is no limit.
    pub(crate) fn max_bandwidth(&self) -> u64 {
        lock(&self.parameters).max_bandwidth
    }

    /// `x-timeout` and `x-on-timeout` as they are now.
    pub(crate) fn timeout(&self) -> (Option<Duration>, OnTimeout) {
        let parameters = lock(&self.parameters);
        (parameters.timeout, parameters.on_timeout)
    }

    /// Changes parameters; a running migration uses them from the next pass (bandwidth: the next
    /// write) on.
    pub fn set_parameters(&self, parameters: Parameters) {
        *lock(&self.parameters) = parameters;
        self.wake.notify_all();
    }

    /// Asks for the migration to be given up. Returns at once; the migration's thread ends soon
    /// after, and the guest stays where it was. Nothing is wrong with asking twice.
    pub fn cancel(&self) -> Result<(), TooLate> {
        let mut requests = lock(&self.requests);
        if requests.committed {
            return Err(TooLate);
        }
        requests.cancelled.get_or_insert_with(Instant::now);
        self.wake.notify_all();
        Ok(())
    }

    /// Goes on after `pre-switchover`.
    pub fn proceed(&self) {
        lock(&self.requests).proceed = true;
        self.wake.notify_all();
    }

    /// Live numbers.
    pub fn stats(&self) -> &MigrationStats {
        &self.stats
    }

    /// What `query-migrate` answers.
    pub fn info(&self) -> MigrationInfo {
        self.stats.info()
    }

    /// The report at the end.
    pub fn report(&self) -> Report {
        self.stats.report()
    }

    /// Since when a cancel is wanted.
    pub(crate) fn cancelled(&self) -> Option<Instant> {
        lock(&self.requests).cancelled
    }

    /// From here on a cancel is refused. `false` when one has come before.
    pub(crate) fn commit(&self) -> bool {
        let mut requests = lock(&self.requests);
        requests.committed = requests.cancelled.is_none();
        requests.committed
    }

    /// Waits until the user goes on, a cancel comes, or `timeout` is over; says whether the user
    /// went on.
    pub(crate) fn wait_to_proceed(&self, timeout: Duration) -> bool {
        let requests = lock(&self.requests);
        let (requests, _) = self
            .wake
            .wait_timeout_while(requests, timeout, |r| !r.proceed && r.cancelled.is_none())
            .unwrap_or_else(PoisonError::into_inner);
        requests.proceed
    }

    /// Sleeps, but not beyond a cancel or a change of parameters.
    pub(crate) fn rest(&self, time: Duration) {
        let requests = lock(&self.requests);
        if requests.cancelled.is_none() {
            drop(self.wake.wait_timeout(requests, time));
        }
    }

    /// The doubt in which the migration ended is over; `how` is a sentence.
    pub fn settled(&self, how: &str) {
        self.stats.settled(how);
    }

    /// What the source may still ask a destination for, now that the migration has ended here.
    pub fn owed(&self) -> Option<Owed> {
        lock(&self.requests).owed
    }

    pub(crate) fn owe(&self, owed: Option<Owed>) {
        lock(&self.requests).owed = owed;
    }

    /// The connection that [`abort`](Self::abort) is to break.
    pub(crate) fn attach(&self, abort: Abort) {
        lock(&self.requests).abort = Some(abort);
    }

    /// Breaks the connection at once, for a destination that is to be shut down. A migration that
    /// has been committed is not affected by it.
    pub fn abort(&self) {
        let mut requests = lock(&self.requests);
        requests.cancelled.get_or_insert_with(Instant::now);
        if let Some(abort) = &requests.abort
            && !requests.committed
        {
            abort.shutdown();
        }
        self.wake.notify_all();
    }

    /// Runs `body`, the thread of this migration, to its end. The engine catches what panics in it; should
    /// anything around it panic, the migration has failed, if it had not ended before.
    pub fn watch<T>(&self, body: impl FnOnce() -> T) -> Result<T, Panicked> {
        guarded(body).inspect_err(|panicked| self.panicked(panicked))
    }

    /// The thread of this migration has ended by a panic.
    pub fn panicked(&self, panicked: &Panicked) {
        if self.stats.phase().is_busy() {
            let given = lock(&self.requests).committed;
            let doubt = "it is not known whether the destination runs the guest: ";
            let doubt = if given { doubt } else { "" };
            self.stats.fail(&format!("{doubt}the migration's thread has ended: {panicked}"));
            let _ = guarded(|| self.enter(Phase::Failed));
        }
    }

    /// Goes to `phase` if the table of phases allows it, and tells everyone.
    pub(crate) fn enter(&self, phase: Phase) {
        if self.stats.become_phase(phase) {
            self.events.phase(phase);
        }
    }

    /// The migration of `total` bytes of RAM has begun. Whoever starts the engine on a thread of
    /// its own may say so first, that nobody finds no migration in between; the second time says
    /// nothing.
    pub fn begin(&self, total: u64) {
        if self.stats.begin(total) {
            self.events.phase(Phase::Setup);
        }
    }

    pub(crate) fn pass(&self) -> u64 {
        let pass = self.stats.pass();
        self.events.pass(pass);
        pass
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(phases: &[Phase]) -> Control {
        let control = Control::new(Parameters::default(), Box::new(NoEvents));
        control.begin(1 << 20);
        phases.iter().for_each(|phase| control.enter(*phase));
        control
    }

    #[test]
    fn a_thread_that_panics_leaves_a_migration_that_has_failed() {
        use Phase::*;
        for phases in
            [&[][..], &[Active], &[Active, PreSwitchover], &[Active, Device], &[Active, Cancelling]]
        {
            let control = at(phases);
            let panicked = control.watch(|| panic!("a bad day")).unwrap_err().to_string();
            let info = control.info();
            assert_eq!(info.status, Some(Failed), "{phases:?}");
            let said = info.error_desc.unwrap_or_default();
            assert_eq!(said, format!("the migration's thread has ended: {panicked}"));
            assert!(said.ends_with("a bad day"), "{said}");
        }
        // Behind the order it does not say that the guest is here.
        let control = at(&[Active, Device]);
        assert!(control.commit());
        assert!(control.watch(|| panic!("a bad day")).is_err());
        let said = control.info().error_desc.unwrap_or_default();
        assert!(
            said.starts_with("it is not known whether the destination runs the guest"),
            "{said}"
        );
    }

    #[test]
    fn what_had_ended_before_stays_as_it_was() {
        use Phase::*;
        for end in [Completed, Failed] {
            let control = at(&[Active, end]);
            assert!(control.watch(|| panic!("too late")).is_err());
            let info = control.info();
            assert_eq!(info.status, Some(end));
            assert!(info.error_desc.is_none());
        }
        let control = at(&[Active]);
        assert_eq!(control.watch(|| 7), Ok(7));
        assert_eq!(control.info().status, Some(Active));
    }
}
