//! `mini-vmm run`: a VM from its configuration to its end.

use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::thread;
use std::time::{Duration, Instant};

use devices::device::PowerRequest;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::chardev::TerminalMode;
use crate::config::{Config, MigrateListen};
use crate::control::{ControlError, RunState, ShutdownReason};
use crate::grants::Grants;
use crate::machine::{Machine, MachineError};
use crate::migrate::IncomingError;
use crate::power::{MachineEvent, MachineEvents};
use crate::qmp::{self, PreparedServer, ServerError};
use crate::rundir::{RunDir, RunDirError};
use crate::vcpu::{CrashKind, CrashReport};
use crate::vm::Vm;
use crate::vm_control::VmHandle;

/// How long a VM that has moved away still answers on its control socket, unless it is told to
/// quit.
const FAREWELL: Duration = Duration::from_secs(3);

/// What the log says (at the level `info`) when a guest's vCPUs begin.
const GUEST_RUNS: &str = "the guest runs";

/// How a VM ended.
#[derive(Debug)]
pub enum RunOutcome {
    /// The guest switched itself off.
    PoweredOff,
    /// Somebody ended it with `quit` or a signal.
    Quit,
    /// It goes on elsewhere.
    Migrated,
}

/// Why a VM could not run, or had to end.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// It could not be built.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// Its directory.
    #[error(transparent)]
    Directory(#[from] RunDirError),
    /// Its control socket.
    #[error(transparent)]
    Socket(#[from] ServerError),
    /// The process' signals.
    #[error("cannot watch for signals")]
    Signals(#[source] std::io::Error),
    /// The guest died.
    #[error("{0}")]
    Crashed(Box<CrashReport>),
    /// It did not arrive.
    #[error(transparent)]
    Incoming(#[from] IncomingError),
    /// The guest asked for something that failed.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// No thread to build it on.
    #[error("cannot start the thread that builds the VM")]
    Thread(#[source] std::io::Error),
    /// The process' main thread was left alone.
    #[error("nobody is left to say when the VM ends")]
    Abandoned,
}

/// Runs a VM until it ends.
pub fn run(config: &Config, grants: Grants) -> Result<RunOutcome, RunError> {
    let (queue, events) = MachineEvents::new();
    // Before the machine: a signal that comes while it is built must end it too.
    let signals = Signals::new([SIGINT, SIGTERM, SIGHUP]).map_err(RunError::Signals)?;
    let handle = signals.handle();
    let watcher = watch_signals(signals, queue.clone()).map_err(RunError::Signals)?;
    let outcome = build_and_live(config, grants, &events, queue);
    handle.close();
    if watcher.join().is_err() {
        tracing::error!("the thread that watches for signals panicked");
    }
    outcome
}

fn build_and_live(
    config: &Config,
    grants: Grants,
    events: &Receiver<MachineEvent>,
    queue: MachineEvents,
) -> Result<RunOutcome, RunError> {
    let directory = RunDir::claim(config)?;
    let mut listeners = vec![qmp::bind(&directory.socket())?];
    if let Some(more) = &config.qmp {
        listeners.push(qmp::bind(&more.0)?);
    }
    let terminal = TerminalMode::of_stdin();
    let builder = start_building(config, grants, queue.clone())?;
    // Meanwhile.
    let server = PreparedServer::new(listeners);
    let Some(vm) = wait_built(builder, events, &queue)? else {
        // Whoever would have put it back is still building.
        terminal.restore();
        return Ok(RunOutcome::Quit);
    };
    let server = server?.serve(Arc::new(VmHandle(vm.clone())))?;
    let outcome = begin(&vm).and_then(|()| serve(&vm, events));
    // In this order: what still migrates is told, then whoever watches, then the machine goes.
    vm.migration.shut_down();
    server.stop();
    outcome
}

type Builder = thread::JoinHandle<Result<Arc<Vm>, RunError>>;

/// Builds the VM on a thread of its own, for that may take long (a pipe in a disk's place, a file
/// server that does not answer) and can't be broken off.
fn start_building(
    config: &Config,
    grants: Grants,
    queue: MachineEvents,
) -> Result<Builder, RunError> {
    let config = config.clone();
    let build = move || {
        let _done = Done(queue.clone());
        let machine = Machine::new(&config, &queue)?;
        let vm = Vm::new(machine, queue, grants);
        if let Some(MigrateListen::At(uri)) = &config.migrate_listen {
            vm.begin_incoming(uri)?;
        }
        Ok(vm)
    };
    thread::Builder::new().name("build".into()).spawn(build).map_err(RunError::Thread)
}

/// The VM. Nothing when a signal or so came first: the thread is left to itself then, and ends with the
/// process, which is to follow at once.
fn wait_built(
    builder: Builder,
    events: &Receiver<MachineEvent>,
    queue: &MachineEvents,
) -> Result<Option<Arc<Vm>>, RunError> {
    let mut early = Vec::new();
    loop {
        match events.recv().map_err(|_| RunError::Abandoned)? {
            MachineEvent::Built => break,
            MachineEvent::Quit(_) => return Ok(None),
            event => early.push(event),
        }
    }
    // What it has said already, such as that the guest did not arrive, is for later.
    early.into_iter().for_each(|event| queue.send(event));
    builder.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)).map(Some)
}

/// Says that the machine is built, even when building it panics.
struct Done(MachineEvents);

impl Drop for Done {
    fn drop(&mut self) {
        self.0.send(MachineEvent::Built);
    }
}

fn begin(vm: &Vm) -> Result<(), RunError> {
    let prelaunch = vm.state() == RunState::Prelaunch;
    if prelaunch && vm.life().autostart {
        vm.cont()?;
        tracing::info!("{GUEST_RUNS}");
    }
    Ok(())
}

/// Serves the machine's events until one of them is the end.
fn serve(vm: &Arc<Vm>, events: &Receiver<MachineEvent>) -> Result<RunOutcome, RunError> {
    loop {
        match events.recv().map_err(|_| RunError::Abandoned)? {
            MachineEvent::Guest => match vm.asked() {
                Some(PowerRequest::PowerOff) => {
                    vm.end(RunState::Shutdown, ShutdownReason::GuestShutdown);
                    return Ok(RunOutcome::PoweredOff);
                }
                Some(PowerRequest::Reset) => match vm.reset(ShutdownReason::GuestReset) {
                    // On its way to another host; whoever ends up with the guest does it.
                    Err(ControlError::WrongState { state, .. }) => {
                        tracing::info!("the guest's reset waits in state {state}");
                    }
                    r => r?,
                },
                // Done already.
                None => {}
            },
            MachineEvent::Crashed(report) => {
                let (state, reason) = match report.kind {
                    CrashKind::TripleFault => (RunState::GuestPanicked, ShutdownReason::GuestPanic),
                    _ => (RunState::InternalError, ShutdownReason::HostError),
                };
                vm.end(state, reason);
                return Err(RunError::Crashed(report));
            }
            MachineEvent::HandedOver => {
                // Whoever asked for the migration may still want to read how it went.
                let deadline = Instant::now() + FAREWELL;
                loop {
                    let left = deadline.saturating_duration_since(Instant::now());
                    match events.recv_timeout(left) {
                        Ok(MachineEvent::Quit(reason)) => {
                            vm.end(RunState::Postmigrate, reason);
                            break;
                        }
                        // What the machine said before it was handed over means nothing now.
                        Ok(_) => {}
                        Err(_) => break,
                    }
                }
                return Ok(RunOutcome::Migrated);
            }
            MachineEvent::Built => {}
            MachineEvent::IncomingFailed(e) => return Err(e.into()),
            MachineEvent::Quit(reason) => {
                vm.end(RunState::Shutdown, reason);
                return Ok(RunOutcome::Quit);
            }
        }
    }
}

fn watch_signals(
    mut signals: Signals,
    queue: MachineEvents,
) -> std::io::Result<thread::JoinHandle<()>> {
    thread::Builder::new().name("signals".into()).spawn(move || {
        for _ in signals.forever() {
            queue.send(MachineEvent::Quit(ShutdownReason::HostSignal));
        }
    })
}
