//! A VM that only knows what it was told: the protocol is tested on it, not the machine.

use std::sync::{Arc, Mutex};

use migration::params::Parameters;
use migration::phase::Phase;
use migration::problem::{Problem, kind};
use migration::source::Wish;
use migration::source::{Preflight, Questions};
use migration::stats::{MigrationInfo, Report};
use serde_json::{Value, json};
use tokio::sync::{Notify, broadcast};
use uuid::Uuid;

use crate::config::MigrationUri;
use crate::control::{
    ControlError, CpuInfo, Event, EventBus, RunState, RuntimeInfo, ShutdownReason, TimedEvent,
    VmControl,
};
use crate::migrate::{DoubtInfo, RecoverError};

#[derive(Debug)]
struct State {
    run: RunState,
    phase: Phase,
    parameters: Parameters,
    /// Bytes of memory; none for a VM without a balloon.
    balloon: Option<u64>,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct FakeVm {
    pub(crate) bus: EventBus,
    state: Mutex<State>,
    /// Told when `quit` was called.
    pub(crate) quit: Notify,
    /// While this is locked, `stop` blocks.
    pub(crate) stop_gate: Mutex<()>,
}

impl FakeVm {
    pub(crate) fn running() -> Arc<Self> {
        Arc::new(Self {
            bus: EventBus::new(),
            state: Mutex::new(State {
                run: RunState::Running,
                phase: Phase::None,
                parameters: Parameters::default(),
                balloon: Some(256 << 20),
            }),
            quit: Notify::new(),
            stop_gate: Mutex::new(()),
        })
    }

    /// Takes its balloon away.
    pub(crate) fn without_balloon(&self) {
        self.state.lock().unwrap().balloon = None;
    }

    fn enter(&self, run: RunState, event: Event) {
        let mut state = self.state.lock().unwrap();
        if state.run != run {
            state.run = run;
            self.bus.send(event);
        }
    }
}

impl VmControl for FakeVm {
    fn status(&self) -> RunState {
        self.state.lock().unwrap().run
    }

    fn name(&self) -> String {
        "fake".into()
    }

    fn uuid(&self) -> Uuid {
        Uuid::nil()
    }

    fn config(&self) -> Value {
        json!({ "name": "fake" })
    }

    fn runtime(&self) -> RuntimeInfo {
        RuntimeInfo::default()
    }

    fn cpus(&self) -> Vec<CpuInfo> {
        vec![CpuInfo { index: 0, apic_id: 0, thread_id: 100 }]
    }

    fn stop(&self) -> Result<(), ControlError> {
        let _gate = self.stop_gate.lock().unwrap();
        self.enter(RunState::Paused, Event::Stop);
        Ok(())
    }

    fn cont(&self) -> Result<(), ControlError> {
        self.enter(RunState::Running, Event::Resume);
        Ok(())
    }

    fn system_powerdown(&self) -> Result<(), ControlError> {
        self.bus.send(Event::Powerdown);
        Ok(())
    }

    fn system_reset(&self) -> Result<(), ControlError> {
        self.bus.send(Event::Reset(ShutdownReason::HostQmpSystemReset));
        Ok(())
    }

    fn announce_self(&self, _: &Parameters, _: Option<Vec<String>>) -> Result<(), ControlError> {
        Ok(())
    }

    fn set_balloon(&self, bytes: u64) -> Result<(), ControlError> {
        *self.state.lock().unwrap().balloon.as_mut().ok_or(ControlError::NoBalloon)? = bytes;
        self.bus.send(Event::BalloonChange(bytes));
        Ok(())
    }

    fn balloon(&self) -> Result<u64, ControlError> {
        self.state.lock().unwrap().balloon.ok_or(ControlError::NoBalloon)
    }

    fn quit(&self) {
        self.bus.send(Event::Shutdown(ShutdownReason::HostQmpQuit));
        self.quit.notify_one();
    }

    fn migrate(&self, _: &MigrationUri) -> Result<(), ControlError> {
        let mut state = self.state.lock().unwrap();
        if state.phase.is_busy() {
            return Err(ControlError::MigrationInProgress);
        }
        state.phase = Phase::Setup;
        self.bus.send(Event::Migration(Phase::Setup));
        self.bus.send(Event::MigrationPass(1));
        Ok(())
    }

    fn preflight(
        &self,
        _: &MigrationUri,
        _: Parameters,
        _: &Questions,
    ) -> Result<Preflight, ControlError> {
        Ok(Preflight {
            would_move: true,
            destination: "mini-vmm 0.1.0".into(),
            problems: Vec::new(),
            left_out: 0,
            forecast: None,
            rehearsal: None,
        })
    }

    fn preflight_for_qemu(&self) -> Result<Preflight, ControlError> {
        let problem = Problem::new(kind::QEMU_FIRMWARE, "the guest", "a BIOS", "none", "");
        Ok(Preflight {
            would_move: false,
            destination: "QEMU 7.2 (nobody was asked)".into(),
            problems: vec![problem],
            left_out: 0,
            forecast: None,
            rehearsal: None,
        })
    }

    fn migrate_cancel(&self) -> Result<(), ControlError> {
        let mut state = self.state.lock().unwrap();
        if state.phase.is_busy() {
            state.phase = Phase::Cancelled;
            self.bus.send(Event::Migration(Phase::Cancelling));
            self.bus.send(Event::Migration(Phase::Cancelled));
        }
        Ok(())
    }

    fn migrate_continue(&self) -> Result<(), ControlError> {
        Err(ControlError::NotWaiting(self.state.lock().unwrap().phase))
    }

    fn migrate_incoming(&self, _: &MigrationUri) -> Result<(), ControlError> {
        Err(ControlError::NotDeferred)
    }

    fn keep_descriptor(&self, _: &str, _: std::os::fd::OwnedFd) -> Result<(), ControlError> {
        Ok(())
    }

    fn close_descriptor(&self, name: &str) -> bool {
        name == "there"
    }

    fn query_migrate(&self) -> MigrationInfo {
        match self.state.lock().unwrap().phase {
            Phase::None => MigrationInfo::default(),
            phase => MigrationInfo { status: Some(phase), ..MigrationInfo::default() },
        }
    }

    fn blockers(&self) -> Vec<String> {
        Vec::new()
    }

    fn doubt(&self) -> Option<DoubtInfo> {
        None
    }

    fn recover(&self, _: Wish) -> Result<(), ControlError> {
        Err(RecoverError::NoDoubt.into())
    }

    fn migrate_report(&self) -> Option<Report> {
        None
    }

    fn migrate_parameters(&self) -> Parameters {
        self.state.lock().unwrap().parameters.clone()
    }

    fn set_migrate_parameters(&self, parameters: Parameters) -> Result<(), ControlError> {
        self.bus.tell_migration(parameters.events);
        self.state.lock().unwrap().parameters = parameters;
        Ok(())
    }

    fn events(&self) -> broadcast::Receiver<TimedEvent> {
        self.bus.subscribe()
    }
}
