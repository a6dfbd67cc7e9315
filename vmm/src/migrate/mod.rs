//! Migration as this VM does it: one at a time, on a thread of its own, steered from outside.
//!
//! The engine is `migration::{source, destination}`; `leaving` and `arriving` are what it sees
//! of this machine. Here is who may start one, who watches it, and what its end means for the VM.

mod arriving;
mod asking;
mod details;
mod disks;
mod exercise;
mod fit;
mod for_qemu;
mod leaving;
mod local;
mod outgoing;
mod recover;
mod settle;
mod trial;
mod way;

pub use asking::PreflightError;
pub use details::Device as DeviceDetails;
pub use outgoing::{IncomingError, MigrateError};
use recover::Standing;
pub use recover::{DoubtInfo, RecoverError};
pub use way::WayError;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use migration::control::{Control, Events};
use migration::params::Parameters;
use migration::phase::Phase;
use migration::stats::{MigrationInfo, Report};

use crate::config::SocketUri;
use crate::control::{Event, EventBus};
use crate::grants::Grants;

/// How long a migration that has ended may take to let go of what it used, before another is refused for it.
const LETTING_GO: Duration = Duration::from_secs(1);

/// What is known of this VM's migrations: the last one or the one that runs.
#[derive(Default)]
pub struct MigrationDesk {
    /// What it may use.
    pub(crate) grants: Grants,
    inner: Mutex<Desk>,
    /// A hand-over of which nobody knows how it ended. Held while it is settled; whoever holds the
    /// VM's life must not wait for it.
    doubt: Mutex<Option<Standing>>,
}

#[derive(Default)]
pub(crate) struct Desk {
    pub(crate) parameters: Parameters,
    pub(crate) control: Option<Arc<Control>>,
    thread: Option<JoinHandle<()>>,
    /// Threads that ask, or answer, what became of a migration.
    helpers: Vec<JoinHandle<()>>,
    /// A preflight that is under way. While it is, no migration begins: both switch the log of written
    /// pages on and off.
    pub(crate) asking: Option<Arc<Control>>,
    /// Where a migration is waited for.
    pub(crate) listening: Option<SocketUri>,
    /// The process is ending: an incoming thread stops waiting.
    pub(crate) closing: bool,
}

impl Desk {
    /// Whether a thread of a migration still works, or a preflight does.
    pub(crate) fn is_busy(&self) -> bool {
        self.asking.is_some() || self.thread.as_ref().is_some_and(|thread| !thread.is_finished())
    }

    /// Notes a thread that helps to settle a doubt, or ends what a migration has used, and forgets those that have
    /// ended.
    fn helps(&mut self, thread: JoinHandle<()>) {
        self.helpers.retain(|helper| !helper.is_finished());
        self.helpers.push(thread);
    }

    /// Notes a new migration and its thread; the one before has ended and is joined.
    fn begin(&mut self, control: Arc<Control>, thread: JoinHandle<()>) {
        if let Some(before) = self.thread.take()
            && before.join().is_err()
        {
            tracing::error!("a migration's thread panicked");
        }
        self.control = Some(control);
        self.thread = Some(thread);
    }
}

impl MigrationDesk {
    /// Nothing has migrated yet.
    pub fn new(grants: Grants) -> Self {
        Self { grants, ..Self::default() }
    }

    /// Waits until the thread of a migration that has ended has let go of what it used: whoever has seen the end may
    /// begin another one.
    pub(crate) fn let_end(&self) {
        let begin = Instant::now();
        let ends = || {
            let desk = self.lock();
            let phase = desk.control.as_ref().map(|control| control.stats().phase());
            let over = matches!(phase, Some(Phase::Completed | Phase::Failed | Phase::Cancelled));
            over && desk.thread.as_ref().is_some_and(|thread| !thread.is_finished())
        };
        while ends() && begin.elapsed() < LETTING_GO {
            thread::sleep(Duration::from_millis(1));
        }
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, Desk> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What `query-migrate` answers.
    pub fn info(&self) -> MigrationInfo {
        let desk = self.lock();
        desk.control.as_ref().map(|control| control.info()).unwrap_or_default()
    }

    /// The last migration's report, also while it runs.
    pub fn report(&self) -> Option<Report> {
        self.lock().control.as_ref().map(|control| control.report())
    }

    /// A doubt about the last migration has ended.
    fn note_settled(&self, how: &str) {
        if let Some(control) = &self.lock().control {
            control.settled(how);
        }
    }

    /// Breaks off what still runs and joins its threads.
    pub fn shut_down(&self) {
        let (thread, helpers) = {
            let mut desk = self.lock();
            desk.closing = true;
            for control in desk.control.iter().chain(&desk.asking) {
                control.abort();
            }
            (desk.thread.take(), std::mem::take(&mut desk.helpers))
        };
        if let Some(thread) = thread
            && thread.join().is_err()
        {
            tracing::error!("a migration's thread panicked");
        }
        if let Some(standing) = self.doubt().take() {
            tracing::warn!("this copy ends in doubt: {}", standing.reason());
            standing.asker.end();
        }
        // Those that the migration's thread has started last.
        let more = std::mem::take(&mut self.lock().helpers);
        for helper in helpers.into_iter().chain(more) {
            if helper.join().is_err() {
                tracing::error!("a thread that was to outlive a migration panicked");
            }
        }
    }
}

/// Passes the engine's events on to everyone who listens to the VM.
struct Tell(EventBus);

impl Events for Tell {
    fn phase(&self, phase: Phase) {
        self.0.send(Event::Migration(phase));
    }
    fn pass(&self, pass: u64) {
        self.0.send(Event::MigrationPass(pass));
    }
}
