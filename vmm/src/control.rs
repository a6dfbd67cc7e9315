//! The VM as its control plane sees it: what can be asked of it, and what it tells.
//!
//! The control socket ([`crate::qmp`]) and the command line know the machine only through
//! [`VmControl`] and [`Event`]; the machine knows neither of them. Every call may block for a while
//! (a `stop` waits for all vCPUs), so callers on an async runtime move it to a thread of its own.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::SystemTime;

use migration::control::TooLate;
use migration::params::{ParameterError, Parameters};
use migration::phase::Phase;
use migration::source::Wish;
use migration::source::{Preflight, Questions};
use migration::stats::{MigrationInfo, Report};
use serde::{Deserialize, Serialize};
use thiserror::Error;
use tokio::sync::broadcast;
use uuid::Uuid;

use crate::config::{MigrationUri, SocketUri};
use crate::migrate::{DoubtInfo, RecoverError};

/// What the machine is doing, in the words of QMP's `query-status`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RunState {
    /// The vCPUs have never run, and wait for `cont` (started with `--paused`).
    Prelaunch,
    /// A migration stream is expected or being read; the vCPUs have not run here.
    Inmigrate,
    /// The vCPUs run.
    Running,
    /// Stopped on request.
    Paused,
    /// Stopped by a migration that is sending its last part.
    FinishMigrate,
    /// Stopped for good here: the VM now belongs to the destination.
    Postmigrate,
    /// The guest has powered off.
    Shutdown,
    /// KVM could not go on with a vCPU.
    InternalError,
    /// A device could not do its input or output.
    IoError,
    /// The guest reported a panic, or a triple fault ended it.
    GuestPanicked,
}

impl RunState {
    /// The word on the wire.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Prelaunch => "prelaunch",
            Self::Inmigrate => "inmigrate",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::FinishMigrate => "finish-migrate",
            Self::Postmigrate => "postmigrate",
            Self::Shutdown => "shutdown",
            Self::InternalError => "internal-error",
            Self::IoError => "io-error",
            Self::GuestPanicked => "guest-panicked",
        }
    }

    /// Whether the vCPUs run.
    #[must_use]
    pub fn is_running(self) -> bool {
        self == Self::Running
    }
}

impl std::fmt::Display for RunState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// One vCPU, for `query-cpus-fast`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CpuInfo {
    /// Index of the vCPU, from 0.
    pub index: u32,
    /// APIC id.
    pub apic_id: u32,
    /// Host thread id (`gettid`) of its thread.
    pub thread_id: i32,
}

/// Facts that only the running process knows, shown beside the configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct RuntimeInfo {
    /// Where a terminal can attach to the serial port: its socket, or the device of its pty.
    pub serial: Option<PathBuf>,
    /// The same for the virtio console.
    pub console: Option<PathBuf>,
    /// Where the VM listens for a migration, with the port that was really taken.
    pub migrate_listen: Option<SocketUri>,
}

/// Who or what ended the VM, as QMP's `ShutdownCause` says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ShutdownReason {
    /// An error of the host or of KVM.
    HostError,
    /// `quit` on the control socket.
    HostQmpQuit,
    /// `system_reset` on the control socket, where a reset is not allowed.
    HostQmpSystemReset,
    /// A signal to the process.
    HostSignal,
    /// The guest powered off.
    GuestShutdown,
    /// The guest asked for a reset.
    GuestReset,
    /// The guest panicked, or ended in a triple fault.
    GuestPanic,
}

impl ShutdownReason {
    /// Whether the guest itself asked for it.
    #[must_use]
    pub fn is_guest(self) -> bool {
        matches!(self, Self::GuestShutdown | Self::GuestReset | Self::GuestPanic)
    }
}

/// What the VM tells everyone who listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The vCPUs stopped.
    Stop,
    /// The vCPUs run again.
    Resume,
    /// The VM ends.
    Shutdown(ShutdownReason),
    /// The VM was reset.
    Reset(ShutdownReason),
    /// The power button was pressed on behalf of the host.
    Powerdown,
    /// The guest has more or less memory now, in bytes.
    BalloonChange(u64),
    /// The migration's status changed (told only while [`EventBus::tell_migration`] says so).
    Migration(Phase),
    /// A pass over RAM begins; the first is 1 (same condition).
    MigrationPass(u64),
}

/// An event and the moment it happened.
#[derive(Clone, Debug)]
pub struct TimedEvent {
    /// When it happened, by the host's wall clock.
    pub at: SystemTime,
    /// What happened.
    pub event: Event,
}

/// Where the machine puts its events; cheap to clone, never blocks.
#[derive(Clone, Debug)]
pub struct EventBus {
    listeners: broadcast::Sender<TimedEvent>,
    /// Whether events of a migration are told: the capability `events`.
    migration: Arc<AtomicBool>,
}

impl EventBus {
    /// Events kept for a listener that is slow. One that falls further behind is disconnected.
    const BACKLOG: usize = 1024;

    /// A bus with nobody listening yet.
    #[must_use]
    pub fn new() -> Self {
        Self { listeners: broadcast::Sender::new(Self::BACKLOG), migration: Arc::default() }
    }

    /// Whether what a migration does is told from now on; not, until someone wants it.
    ///
    /// It is decided here, when something happens, and not by each listener when it comes to hear
    /// of it: one that is behind would be told of what happened before, or miss what happened since.
    pub fn tell_migration(&self, on: bool) {
        self.migration.store(on, Ordering::Relaxed);
    }

    /// Tells everyone who listens now.
    pub fn send(&self, event: Event) {
        let of_migration = matches!(event, Event::Migration(_) | Event::MigrationPass(_));
        if of_migration && !self.migration.load(Ordering::Relaxed) {
            return;
        }
        // An error only says that nobody listens.
        let _ = self.listeners.send(TimedEvent { at: SystemTime::now(), event });
    }

    /// Everything sent from now on.
    #[must_use]
    pub fn subscribe(&self) -> broadcast::Receiver<TimedEvent> {
        self.listeners.subscribe()
    }
}

impl Default for EventBus {
    fn default() -> Self {
        Self::new()
    }
}

/// Why the VM does not do what it was asked.
///
/// The texts are what a QMP client sees as `desc`; where clients are known to look at the words,
/// they are QEMU's.
#[derive(Debug, Error)]
pub enum ControlError {
    /// A second `migrate` while one runs.
    #[error("There's a migration process in progress")]
    MigrationInProgress,
    /// `migrate` after the VM has left.
    #[error("Can't migrate the vm that was paused due to previous migration")]
    AlreadyMigrated,
    /// `migrate` of a VM that is itself still arriving.
    #[error("Guest is waiting for an incoming migration")]
    Inmigrate,
    /// `cont` (or anything that would run the guest) after the destination has confirmed that it
    /// holds the VM: it would run twice.
    #[error(
        "The VM has been given away: the destination has confirmed that it runs there, or all of it is \
         saved. Running it here too would corrupt its disks. Use 'quit' to end this copy"
    )]
    HandedOver,
    /// `cont` (or a migration) while nobody here knows whether the destination runs the VM.
    #[error(
        "It is not known whether the destination runs the VM: it was told to and has not answered. \
         Running it here too would corrupt its disks. 'mini-vmm recover' (x-recover) says what is known, \
         and settles it"
    )]
    InDoubt,
    /// `migrate_cancel` behind the point of no return.
    #[error(transparent)]
    TooLateToCancel(#[from] TooLate),
    /// `x-recover` that was refused, or had nothing to do.
    #[error(transparent)]
    Recover(#[from] RecoverError),
    /// `migrate-incoming` for a VM that was not started to receive one, or that has one already.
    #[error(
        "'migrate-incoming' needs a VM started with --migrate-listen defer that has not received one yet"
    )]
    NotDeferred,
    /// The request makes no sense in this state.
    #[error("'{command}' is not possible while the VM is in state '{state}'")]
    WrongState {
        /// The QMP command.
        command: &'static str,
        /// The state found.
        state: RunState,
    },
    /// A network interface that the VM doesn't have.
    #[error("There is no network interface '{id}'; there are: {known}")]
    NoInterface {
        /// What was asked for.
        id: String,
        /// Those that there are.
        known: String,
    },
    /// A VM without a balloon.
    #[error("No balloon device has been activated")]
    NoBalloon,
    /// A migration parameter or capability that doesn't exist, or doesn't take that value.
    #[error(transparent)]
    Parameter(#[from] ParameterError),
    /// `migrate-continue` while nothing waits for it.
    #[error("Migration not in expected state: {0}")]
    NotWaiting(Phase),
    /// The VM can't be migrated, for these reasons.
    #[error("The VM can't be migrated: {}", .0.join("; "))]
    Blocked(Vec<String>),
    /// Something under it failed; the chain of causes is kept.
    #[error("{what}")]
    Failed {
        /// What was tried, as a sentence: "The tap device tap0 could not be opened".
        what: String,
        /// Why not.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl ControlError {
    /// The error and all its causes as one line, for `desc`.
    #[must_use]
    pub fn chain(&self) -> String {
        crate::error_chain(self)
    }
}

/// A running VM, as seen by whoever controls it. Implemented by the machine.
///
/// Calls come from several threads at once and may block; none may be made while a lock is held
/// that the machine needs.
pub trait VmControl: Send + Sync {
    /// What the machine is doing.
    fn status(&self) -> RunState;
    /// The VM's name.
    fn name(&self) -> String;
    /// The VM's UUID (all zeros if none was given, as QEMU has it).
    fn uuid(&self) -> Uuid;
    /// The effective configuration, every default written out.
    fn config(&self) -> serde_json::Value;
    /// What only the running process knows.
    fn runtime(&self) -> RuntimeInfo;
    /// The vCPUs.
    fn cpus(&self) -> Vec<CpuInfo>;

    /// Stops the vCPUs; returns when all of them stand still. Nothing happens if they do already.
    ///
    /// # Errors
    /// [`ControlError::WrongState`] if the VM has ended.
    fn stop(&self) -> Result<(), ControlError>;
    /// Lets the vCPUs run. While a migration arrives, only notes that the guest shall run afterwards.
    ///
    /// # Errors
    /// [`ControlError::HandedOver`] after a migration away has been confirmed,
    /// [`ControlError::InDoubt`] while it is not known whether it has succeeded.
    fn cont(&self) -> Result<(), ControlError>;
    /// Presses the power button; the guest decides.
    ///
    /// # Errors
    /// If the VM has ended.
    fn system_powerdown(&self) -> Result<(), ControlError>;
    /// Resets the machine.
    ///
    /// # Errors
    /// If the VM has ended, or is on its way in or out.
    fn system_reset(&self) -> Result<(), ControlError>;
    /// Tells the networks where the guest is, as often as `parameters` say; `only` are the interfaces
    /// for which, none means all.
    ///
    /// # Errors
    /// If the guest doesn't run, or has no such interface.
    fn announce_self(
        &self,
        parameters: &Parameters,
        only: Option<Vec<String>>,
    ) -> Result<(), ControlError>;
    /// Asks the guest to make do with `bytes` of memory; returns at once, the guest takes its time.
    ///
    /// # Errors
    /// [`ControlError::NoBalloon`], or if the VM is on its way in or out.
    fn set_balloon(&self, bytes: u64) -> Result<(), ControlError>;
    /// How many bytes of memory the guest has now, by its own account.
    ///
    /// # Errors
    /// [`ControlError::NoBalloon`].
    fn balloon(&self) -> Result<u64, ControlError>;
    /// Ends the VM now, without asking the guest; returns at once.
    fn quit(&self);

    /// Starts to migrate by the parameters set, and returns as soon as it has started.
    ///
    /// # Errors
    /// If one runs already, or this VM can't be migrated.
    fn migrate(&self, uri: &MigrationUri) -> Result<(), ControlError>;
    /// Asks the destination whether the VM could move there with these parameters. Takes as long as the questions say, and a
    /// little more; nothing changes.
    ///
    /// # Errors
    /// If nobody there can be asked, or a migration is under way.
    fn preflight(
        &self,
        uri: &MigrationUri,
        parameters: Parameters,
        questions: &Questions,
    ) -> Result<Preflight, ControlError>;
    /// What stands against moving the VM to any QEMU, which nobody is asked; nothing changes.
    ///
    /// # Errors
    /// If a migration is under way, or the vCPUs can't be looked at.
    fn preflight_for_qemu(&self) -> Result<Preflight, ControlError>;
    /// Asks the running migration to end; the guest stays. Nothing happens if none runs.
    ///
    /// # Errors
    /// [`ControlError::TooLateToCancel`], if the guest has been given to the other side.
    fn migrate_cancel(&self) -> Result<(), ControlError>;
    /// Goes on from `pre-switchover`.
    ///
    /// # Errors
    /// [`ControlError::NotWaiting`].
    fn migrate_continue(&self) -> Result<(), ControlError>;
    /// Listens for a migration, for a VM started with `--migrate-listen defer`.
    ///
    /// # Errors
    /// If this VM does not wait for one, or the address can't be taken.
    fn migrate_incoming(&self, uri: &MigrationUri) -> Result<(), ControlError>;
    /// Keeps an open descriptor, for a migration to `fd:NAME`.
    ///
    /// # Errors
    /// If there are too many.
    fn keep_descriptor(&self, name: &str, fd: OwnedFd) -> Result<(), ControlError>;
    /// Closes such a descriptor; whether there was one.
    fn close_descriptor(&self, name: &str) -> bool;
    /// Where the migration stands, outgoing or incoming.
    fn query_migrate(&self) -> MigrationInfo;
    /// Why this VM can't be migrated at all, each a sentence; empty when it can.
    fn blockers(&self) -> Vec<String>;
    /// What is known of a hand-over of which nobody here knows how it ended; nothing if there is none.
    fn doubt(&self) -> Option<DoubtInfo>;
    /// Settles it.
    ///
    /// # Errors
    /// [`ControlError::Recover`], if there is none, or the wish could make two running guests or none.
    fn recover(&self, wish: Wish) -> Result<(), ControlError>;
    /// What there is to say about the last migration, outgoing or incoming, finished or not; nothing
    /// if there has been none.
    fn migrate_report(&self) -> Option<Report>;
    /// Parameters and capabilities of the next or the running migration.
    fn migrate_parameters(&self) -> Parameters;
    /// Sets them; the running migration takes bandwidth and downtime over at once.
    ///
    /// # Errors
    /// If one of them can't be changed now; nothing has changed then.
    fn set_migrate_parameters(&self, parameters: Parameters) -> Result<(), ControlError>;

    /// All events from now on.
    fn events(&self) -> broadcast::Receiver<TimedEvent>;
}
