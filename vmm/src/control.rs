//! The VM as its control plane sees it: what can be asked of it, and what it tells.
//!
//! The control socket ([`crate::qmp`]) and the command line know the machine only through
//! [`VmControl`] and [`Event`]; the machine knows neither of them. Every call may block for a while
//! (a `stop` waits for all vCPUs), so callers on an async runtime move it to a thread of its own.

use std::path::PathBuf;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};
use thiserror::Error;
use tokio::sync::broadcast;
use uuid::Uuid;

use crate::config::MigrationUri;

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
    pub migrate_listen: Option<MigrationUri>,
}

/// What may be said along with `migrate`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MigrateOptions {
    /// Compare RAM and device state on both sides at the switchover (slow; the guest stands still
    /// meanwhile). Only between two mini-vmms.
    pub verify: bool,
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
    /// The migration's status changed (sent to QMP clients only while the capability `events` is on).
    Migration(MigrationStatus),
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
pub struct EventBus(broadcast::Sender<TimedEvent>);

impl EventBus {
    /// Events kept for a listener that is slow. One that falls further behind is disconnected.
    const BACKLOG: usize = 1024;

    /// A bus with nobody listening yet.
    #[must_use]
    pub fn new() -> Self {
        Self(broadcast::Sender::new(Self::BACKLOG))
    }

    /// Tells everyone who listens now.
    pub fn send(&self, event: Event) {
        // An error only says that nobody listens.
        let _ = self.0.send(TimedEvent { at: SystemTime::now(), event });
    }

    /// Everything sent from now on.
    #[must_use]
    pub fn subscribe(&self) -> broadcast::Receiver<TimedEvent> {
        self.0.subscribe()
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
        "The VM now runs on the destination, which has confirmed it: running it here too would \
         corrupt its disks. Use 'quit' to end this copy"
    )]
    HandedOver,
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
    /// A parameter's value is out of its range.
    #[error("Parameter '{name}' expects {expected}")]
    InvalidParameter {
        /// The QMP name.
        name: &'static str,
        /// The range, in words: "an integer in the range of 0 to 2000 seconds".
        expected: String,
    },
    /// A capability that this VM doesn't have.
    #[error("Capability '{0}' is not supported by mini-vmm")]
    UnsupportedCapability(&'static str),
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

/// State of a migration, in the words of QMP's `MigrationStatus`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MigrationStatus {
    /// None has been asked for.
    #[default]
    None,
    /// Connecting and comparing.
    Setup,
    /// RAM is on its way while the guest runs.
    Active,
    /// The guest stands still; waiting for `migrate-continue`.
    PreSwitchover,
    /// The guest stands still; device state is on its way.
    Device,
    /// A cancel has been asked for.
    Cancelling,
    /// Cancelled; the guest stayed.
    Cancelled,
    /// The destination runs the guest.
    Completed,
    /// It failed, and the guest stayed (or, on a destination, never ran here).
    Failed,
}

impl MigrationStatus {
    /// The word on the wire.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Setup => "setup",
            Self::Active => "active",
            Self::PreSwitchover => "pre-switchover",
            Self::Device => "device",
            Self::Cancelling => "cancelling",
            Self::Cancelled => "cancelled",
            Self::Completed => "completed",
            Self::Failed => "failed",
        }
    }

    /// Whether nothing more will happen by itself.
    #[must_use]
    pub fn is_final(self) -> bool {
        matches!(self, Self::None | Self::Cancelled | Self::Completed | Self::Failed)
    }
}

/// RAM counters of `query-migrate`, with QMP's names; bytes unless said otherwise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct RamStats {
    /// Sent so far, headers included.
    pub transferred: u64,
    /// Left to send, as known at the last look at the dirty bitmaps.
    pub remaining: u64,
    /// RAM of the guest.
    pub total: u64,
    /// Pages of zeros.
    pub duplicate: u64,
    /// Always 0 (QEMU removed it later).
    pub skipped: u64,
    /// Pages sent whole.
    pub normal: u64,
    /// The same in bytes.
    pub normal_bytes: u64,
    /// Pages dirtied each second.
    pub dirty_pages_rate: u64,
    /// Throughput in megabits a second.
    pub mbps: f64,
    /// Passes begun.
    pub dirty_sync_count: u64,
    /// Pages the destination asked for (0: no postcopy).
    pub postcopy_requests: u64,
    /// Size of a page.
    pub page_size: u64,
    /// Sent over multifd channels.
    pub multifd_bytes: u64,
    /// Pages sent each second.
    pub pages_per_second: u64,
    /// Sent while the guest ran.
    pub precopy_bytes: u64,
    /// Sent while the guest stood still.
    pub downtime_bytes: u64,
    /// Sent after the switchover (0: no postcopy).
    pub postcopy_bytes: u64,
    /// Zero-copy sends that the kernel copied after all (0: not used).
    pub dirty_sync_missed_zero_copy: u64,
}

/// The answer to `query-migrate`: fields and meanings of QEMU 7.2. Times in milliseconds.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct MigrationInfo {
    /// Where it stands.
    pub status: MigrationStatus,
    /// RAM counters, once RAM is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ram: Option<RamStats>,
    /// Since the start, to the end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub total_time: Option<u64>,
    /// Before the first page.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub setup_time: Option<u64>,
    /// Forecast, while it runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expected_downtime: Option<u64>,
    /// Measured, when it has completed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub downtime: Option<u64>,
    /// Why it failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error_desc: Option<String>,
    /// Why none can be started.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub blocked_reasons: Option<Vec<String>>,
}

/// What `migrate-set-parameters` sets and `query-migrate-parameters` shows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MigrationParams {
    /// Bytes a second; 0 is no limit.
    pub max_bandwidth: u64,
    /// Longest stand-still of the guest, in milliseconds.
    pub downtime_limit: u64,
}

/// Switches of `migrate-set-capabilities`, those that exist here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Capability {
    /// MIGRATION and MIGRATION_PASS reach QMP clients.
    Events,
    /// The destination answers; always on here.
    ReturnPath,
    /// The destination refuses a VM with another UUID.
    ValidateUuid,
    /// Stop before the switchover until `migrate-continue`.
    PauseBeforeSwitchover,
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
    /// [`ControlError::HandedOver`] after a migration away has been confirmed.
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
    /// Ends the VM now, without asking the guest; returns at once.
    fn quit(&self);

    /// Starts to migrate, and returns as soon as it has started.
    ///
    /// # Errors
    /// If one runs already, or this VM can't be migrated.
    fn migrate(&self, uri: &MigrationUri, options: MigrateOptions) -> Result<(), ControlError>;
    /// Asks the running migration to end; the guest stays. Nothing happens if none runs.
    fn migrate_cancel(&self);
    /// Where the migration stands, outgoing or incoming.
    fn query_migrate(&self) -> MigrationInfo;
    /// Listens for a migration, for a VM started with `--migrate-listen defer`.
    ///
    /// # Errors
    /// If this VM does not wait for one, or the address can't be taken.
    fn migrate_incoming(&self, uri: &MigrationUri) -> Result<(), ControlError>;

    /// Parameters of the next or the running migration.
    fn migrate_parameters(&self) -> MigrationParams;
    /// Sets them; the running migration takes bandwidth and downtime over at once.
    ///
    /// # Errors
    /// [`ControlError::InvalidParameter`]; nothing has changed then.
    fn set_migrate_parameters(&self, params: MigrationParams) -> Result<(), ControlError>;
    /// All capabilities and whether each is on.
    fn migrate_capabilities(&self) -> Vec<(Capability, bool)>;
    /// Switches some of them; all or none.
    ///
    /// # Errors
    /// If one can't be switched so, or a migration runs.
    fn set_migrate_capabilities(&self, changes: &[(Capability, bool)]) -> Result<(), ControlError>;

    /// All events from now on.
    fn events(&self) -> broadcast::Receiver<TimedEvent>;
}
