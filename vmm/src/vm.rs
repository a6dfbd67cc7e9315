//! A running VM as one object: the machine, what it is doing, and who may change that.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use arch::trial::VcpuNeeds;
use devices::device::PowerRequest;

use crate::balloon::GuestBalloon;
use crate::config::Config;
use crate::control::{ControlError, Event, EventBus, RunState, ShutdownReason};
use migration::vmstate::Section;

use crate::grants::Grants;
use crate::kvm_state::{self, KvmState};
use crate::machine::{Machine, MachineError};
use crate::migrate::MigrationDesk;
use crate::power::{MachineEvent, MachineEvents};

/// What the VM is doing; changed only under its lock, which is held while vCPUs stop and start so
/// that two requests cannot cross.
pub(crate) struct Life {
    pub(crate) state: RunState,
    /// Whether the guest shall run when what arrives has arrived.
    pub(crate) autostart: bool,
}

/// A VM.
pub struct Vm {
    pub(crate) machine: Machine,
    pub(crate) events: EventBus,
    queue: MachineEvents,
    life: Mutex<Life>,
    pub(crate) migration: MigrationDesk,
    pub(crate) kvm_state: KvmState,
}

fn failed(what: &str, e: MachineError) -> ControlError {
    ControlError::Failed { what: what.into(), source: Box::new(e) }
}

impl Vm {
    /// Takes a machine that stands still.
    pub fn new(machine: Machine, queue: MachineEvents, grants: Grants) -> Arc<Self> {
        let config = machine.config();
        let state = match (&config.migrate_listen, config.paused) {
            (Some(_), _) => RunState::Inmigrate,
            (None, _) => RunState::Prelaunch,
        };
        let life = Life { state, autostart: !config.paused };
        let events = EventBus::new();
        if let Some(balloon) = &machine.board.balloon {
            let events = events.clone();
            balloon.on_change(Box::new(move |actual| events.send(Event::BalloonChange(actual))));
        }
        Arc::new(Self {
            machine,
            events,
            queue,
            life: Mutex::new(life),
            migration: MigrationDesk::new(grants),
            kvm_state: KvmState::default(),
        })
    }

    pub(crate) fn life(&self) -> MutexGuard<'_, Life> {
        self.life.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The configuration.
    pub fn config(&self) -> &Config {
        self.machine.config()
    }

    /// What the VM is doing.
    pub fn state(&self) -> RunState {
        self.life().state
    }

    /// Lets the vCPUs run, and says so. Gives the time since which all of them do.
    pub(crate) fn start_running(&self, life: &mut Life) -> Instant {
        let since = self.machine.resume();
        life.state = RunState::Running;
        self.events.send(Event::Resume);
        if self.asked().is_some() {
            // Nobody could do it before.
            self.queue(MachineEvent::Guest);
        }
        since
    }

    /// What the guest has asked of the machine, if that is still to be done.
    pub(crate) fn asked(&self) -> Option<PowerRequest> {
        self.queue.pending().get()
    }

    /// Does a reset that the guest has asked for, of a machine that stands still.
    pub(crate) fn reset_if_asked(&self) -> Result<(), MachineError> {
        if self.asked() == Some(PowerRequest::Reset) {
            self.machine.reset()?;
            self.queue.pending().clear();
            self.events.send(Event::Reset(ShutdownReason::GuestReset));
        }
        Ok(())
    }

    /// Stops the vCPUs and the devices, and says so. When it fails the VM goes on.
    pub(crate) fn stop_running(&self, life: &mut Life, to: RunState) -> Result<(), MachineError> {
        self.machine.pause_vcpus()?;
        self.machine.pause_devices();
        life.state = to;
        self.events.send(Event::Stop);
        Ok(())
    }

    /// QMP's `stop`.
    pub(crate) fn stop(&self) -> Result<(), ControlError> {
        let mut life = self.life();
        match life.state {
            RunState::Running => self
                .stop_running(&mut life, RunState::Paused)
                .map_err(|e| failed("The VM could not be stopped", e)),
            RunState::Inmigrate => {
                life.autostart = false;
                Ok(())
            }
            RunState::Prelaunch
            | RunState::Paused
            | RunState::FinishMigrate
            | RunState::Postmigrate => Ok(()),
            state => Err(ControlError::WrongState { command: "stop", state }),
        }
    }

    /// QMP's `cont`.
    pub(crate) fn cont(&self) -> Result<(), ControlError> {
        // Not while life is held: whoever settles the doubt may need it.
        let in_doubt = self.migration.is_in_doubt();
        let mut life = self.life();
        match life.state {
            RunState::Running => Ok(()),
            RunState::Prelaunch | RunState::Paused => {
                self.start_running(&mut life);
                self.machine.catch_up();
                Ok(())
            }
            RunState::Inmigrate => {
                life.autostart = true;
                Ok(())
            }
            RunState::Postmigrate => Err(ControlError::HandedOver),
            RunState::FinishMigrate if in_doubt => Err(ControlError::InDoubt),
            state => Err(ControlError::WrongState { command: "cont", state }),
        }
    }

    /// Presses the power button.
    pub(crate) fn powerdown(&self) -> Result<(), ControlError> {
        match self.life().state {
            RunState::Running | RunState::Paused | RunState::Prelaunch => {
                self.machine.board.press_power_button();
                self.events.send(Event::Powerdown);
                Ok(())
            }
            state => Err(ControlError::WrongState { command: "system_powerdown", state }),
        }
    }

    /// The guest's balloon.
    pub(crate) fn balloon(&self) -> Result<&GuestBalloon, ControlError> {
        self.machine.board.balloon.as_ref().ok_or(ControlError::NoBalloon)
    }

    /// Asks the guest to make do with so many bytes of memory.
    pub(crate) fn set_balloon(&self, bytes: u64) -> Result<(), ControlError> {
        let balloon = self.balloon()?;
        // Held until it is set: what is set after the device was saved would be lost.
        let life = self.life();
        match life.state {
            RunState::Running | RunState::Paused | RunState::Prelaunch => {
                balloon.set_target(bytes);
                Ok(())
            }
            state => Err(ControlError::WrongState { command: "balloon", state }),
        }
    }

    /// Starts the machine anew, on behalf of the guest or of the host.
    pub(crate) fn reset(&self, reason: ShutdownReason) -> Result<(), ControlError> {
        let mut life = self.life();
        let runs = match life.state {
            RunState::Running => true,
            RunState::Paused | RunState::Prelaunch => false,
            state => return Err(ControlError::WrongState { command: "system_reset", state }),
        };
        let what = "The VM could not be reset";
        if runs {
            self.machine.pause_vcpus().map_err(|e| failed(what, e))?;
            self.machine.pause_devices();
        }
        self.machine.reset().map_err(|e| {
            life.state = RunState::InternalError;
            failed(what, e)
        })?;
        self.queue.pending().clear();
        self.events.send(Event::Reset(reason));
        if runs {
            self.machine.resume();
            self.machine.catch_up();
        }
        Ok(())
    }

    /// The VM has come to an end here and executes nothing more.
    pub(crate) fn end(&self, state: RunState, reason: ShutdownReason) {
        let mut life = self.life();
        if let Err(e) = self.machine.pause_vcpus() {
            tracing::error!("a vCPU does not stop: {e}");
        }
        self.machine.pause_devices();
        life.state = state;
        self.events.send(Event::Shutdown(reason));
    }

    /// Ends the process, soon.
    pub(crate) fn ask_quit(&self, reason: ShutdownReason) {
        self.queue(MachineEvent::Quit(reason));
    }

    /// Tells the machine's main thread.
    pub(crate) fn queue(&self, event: MachineEvent) {
        self.queue.send(event);
    }

    /// Tells everyone that the vCPUs have stopped.
    pub(crate) fn says_stopped(&self) {
        self.events.send(Event::Stop);
    }

    /// Every section of the machine, in QEMU's order. `state` is what is told of whether it runs.
    pub fn sections(self: &Arc<Self>, state: RunState) -> Vec<Box<dyn Section>> {
        let [mut all, chips, pit] = kvm_state::sections(self);
        let (mut chips, mut pit) = (Some(chips), Some(pit));
        for section in self.machine.board.sections() {
            match section.id().idstr.as_str() {
                "mc146818rtc" => all.extend(chips.take().into_iter().flatten()),
                "pcspk" => all.extend(pit.take().into_iter().flatten()),
                _ => {}
            }
            all.push(section);
        }
        all.push(kvm_state::global_state(self, state));
        all
    }

    /// What its vCPUs need of a host; nothing where they can't be looked at, which is then not
    /// compared.
    pub(crate) fn look_at_vcpus(&self) -> Vec<VcpuNeeds> {
        // Nobody stops or starts them meanwhile.
        let _life = self.life();
        self.machine.look_at_vcpus().unwrap_or_else(|error| {
            let error = crate::error_chain(&error);
            tracing::warn!(error, "the vCPUs could not be looked at");
            Vec::new()
        })
    }

    /// Why this VM can't be migrated, whatever the destination.
    pub(crate) fn blockers(&self) -> Vec<String> {
        let mut blockers = Vec::new();
        if !self.config().cpu.migratable {
            blockers.push(
                "State blocked by non-migratable CPU device (invtsc flag): the VM was started with \
                 --cpu …,migratable=off"
                    .into(),
            );
        }
        blockers
    }

    /// Whether the VM that arrived ran when it was stopped.
    pub(crate) fn came_running(&self) -> bool {
        let arrived = self.kvm_state.arrived();
        // A QEMU may leave the section out; then it ran.
        let global = arrived.global.as_ref();
        global.and_then(|g| g.runstate().ok()).is_none_or(|state| state == "running")
    }
}
