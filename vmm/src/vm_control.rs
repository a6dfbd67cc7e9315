//! [`VmControl`] as the machine gives it.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use migration::params::Parameters;
use migration::phase::Phase;
use migration::source::Wish;
use migration::source::{Preflight, Questions};
use migration::stats::{MigrationInfo, Report};
use tokio::sync::broadcast;
use uuid::Uuid;

use crate::announce::Rounds;
use crate::config::{MigrateListen, MigrationUri};
use crate::control::{
    ControlError, CpuInfo, RunState, RuntimeInfo, ShutdownReason, TimedEvent, VmControl,
};
use crate::migrate::DoubtInfo;
use crate::migrate::PreflightError;
use crate::vm::Vm;

/// The VM as its control plane holds it.
pub(crate) struct VmHandle(pub(crate) Arc<Vm>);

fn failed(
    what: impl Into<String>,
    source: impl std::error::Error + Send + Sync + 'static,
) -> ControlError {
    ControlError::Failed { what: what.into(), source: Box::new(source) }
}

impl VmHandle {
    /// Whether there is a guest here that could move.
    fn can_be_asked(&self) -> Result<(), ControlError> {
        match self.0.state() {
            RunState::Running | RunState::Paused | RunState::Prelaunch => Ok(()),
            RunState::Inmigrate => Err(ControlError::Inmigrate),
            RunState::FinishMigrate => Err(ControlError::MigrationInProgress),
            RunState::Postmigrate => Err(ControlError::AlreadyMigrated),
            state => Err(ControlError::WrongState { command: "preflight", state }),
        }
    }
}

impl VmControl for VmHandle {
    fn status(&self) -> RunState {
        self.0.state()
    }

    fn name(&self) -> String {
        self.0.config().name.to_string()
    }

    fn uuid(&self) -> Uuid {
        self.0.config().uuid
    }

    fn config(&self) -> serde_json::Value {
        // Plain values always have a JSON form.
        serde_json::to_value(self.0.config()).unwrap_or_default()
    }

    fn runtime(&self) -> RuntimeInfo {
        let board = &self.0.machine.board;
        RuntimeInfo {
            serial: board.serial_path.clone(),
            console: board.console_path.clone(),
            migrate_listen: self.0.migration.lock().listening.clone(),
        }
    }

    fn cpus(&self) -> Vec<CpuInfo> {
        let vcpus = self.0.machine.vcpus().iter();
        vcpus
            .map(|vcpu| CpuInfo {
                index: vcpu.index(),
                apic_id: vcpu.index(),
                thread_id: vcpu.thread_id(),
            })
            .collect()
    }

    fn stop(&self) -> Result<(), ControlError> {
        self.0.stop()
    }

    fn cont(&self) -> Result<(), ControlError> {
        self.0.cont()
    }

    fn system_powerdown(&self) -> Result<(), ControlError> {
        self.0.powerdown()
    }

    fn announce_self(
        &self,
        parameters: &Parameters,
        only: Option<Vec<String>>,
    ) -> Result<(), ControlError> {
        let state = self.0.state();
        if !state.is_running() {
            return Err(ControlError::WrongState { command: "announce-self", state });
        }
        let board = &self.0.machine.board;
        let all = board.interfaces();
        if let Some(unknown) = only.iter().flatten().find(|id| !all.contains(id)) {
            return Err(ControlError::NoInterface { id: unknown.clone(), known: all.join(", ") });
        }
        board.announce(Rounds::from(parameters), only);
        Ok(())
    }

    fn set_balloon(&self, bytes: u64) -> Result<(), ControlError> {
        self.0.set_balloon(bytes)
    }

    fn balloon(&self) -> Result<u64, ControlError> {
        self.0.balloon().map(|balloon| balloon.actual())
    }

    fn system_reset(&self) -> Result<(), ControlError> {
        self.0.reset(ShutdownReason::HostQmpSystemReset)
    }

    fn quit(&self) {
        self.0.ask_quit(ShutdownReason::HostQmpQuit);
    }

    fn migrate(&self, to: &MigrationUri) -> Result<(), ControlError> {
        match self.0.state() {
            RunState::Running | RunState::Paused | RunState::Prelaunch => {}
            RunState::Inmigrate => return Err(ControlError::Inmigrate),
            RunState::FinishMigrate if self.0.migration.is_in_doubt() => {
                return Err(ControlError::InDoubt);
            }
            RunState::FinishMigrate => return Err(ControlError::MigrationInProgress),
            RunState::Postmigrate => return Err(ControlError::AlreadyMigrated),
            state => return Err(ControlError::WrongState { command: "migrate", state }),
        }
        let blockers = self.0.blockers();
        if !blockers.is_empty() {
            return Err(ControlError::Blocked(blockers));
        }
        self.0.migration.let_end();
        if self.0.migration.lock().is_busy() {
            return Err(ControlError::MigrationInProgress);
        }
        self.0
            .begin_outgoing(to)
            .map_err(|e| failed(format!("The migration to {to} could not be started"), e))
    }

    fn preflight(
        &self,
        to: &MigrationUri,
        parameters: Parameters,
        questions: &Questions,
    ) -> Result<Preflight, ControlError> {
        self.can_be_asked()?;
        self.0.ask(to, parameters, questions).map_err(|e| match e {
            PreflightError::Busy => ControlError::MigrationInProgress,
            e => failed(format!("Nobody at {to} could be asked"), e),
        })
    }

    fn preflight_for_qemu(&self) -> Result<Preflight, ControlError> {
        self.can_be_asked()?;
        self.0.look_for_qemu().map_err(|e| match e {
            PreflightError::Busy => ControlError::MigrationInProgress,
            e => failed("The VM could not be looked at", e),
        })
    }

    fn migrate_cancel(&self) -> Result<(), ControlError> {
        let in_doubt = self.0.migration.is_in_doubt();
        let left = self.0.state() == RunState::Postmigrate;
        let desk = self.0.migration.lock();
        for control in desk.control.iter().chain(&desk.asking) {
            // One that has ended otherwise is nothing to cancel.
            let matters = in_doubt || left || control.stats().phase().is_busy();
            control.cancel().or_else(|e| if matters { Err(e) } else { Ok(()) })?;
        }
        Ok(())
    }

    fn migrate_continue(&self) -> Result<(), ControlError> {
        let control = self.0.migration.lock().control.clone();
        let phase = control.as_ref().map_or(Phase::None, |control| control.stats().phase());
        match control {
            Some(control) if phase == Phase::PreSwitchover => {
                control.proceed();
                Ok(())
            }
            _ => Err(ControlError::NotWaiting(phase)),
        }
    }

    fn migrate_incoming(&self, at: &MigrationUri) -> Result<(), ControlError> {
        let deferred = self.0.config().migrate_listen == Some(MigrateListen::Defer);
        let waits = self.0.state() == RunState::Inmigrate;
        if !deferred || !waits || self.0.migration.lock().is_busy() {
            return Err(ControlError::NotDeferred);
        }
        self.0.begin_incoming(at).map_err(|e| failed(format!("Nothing can be received at {at}"), e))
    }

    fn keep_descriptor(&self, name: &str, fd: OwnedFd) -> Result<(), ControlError> {
        let kept = self.0.migration.grants.keep(name.to_string(), fd);
        kept.map_err(|e| failed(format!("The descriptor '{name}' can't be kept"), e))
    }

    fn close_descriptor(&self, name: &str) -> bool {
        // A number is none that was handed over.
        !name.starts_with(|c: char| c.is_ascii_digit())
            && self.0.migration.grants.take(name).is_some()
    }

    fn query_migrate(&self) -> MigrationInfo {
        self.0.migration.info()
    }

    fn blockers(&self) -> Vec<String> {
        self.0.blockers()
    }

    fn doubt(&self) -> Option<DoubtInfo> {
        self.0.migration.doubt_info()
    }

    fn recover(&self, wish: Wish) -> Result<(), ControlError> {
        Ok(self.0.recover(wish)?)
    }

    fn migrate_report(&self) -> Option<Report> {
        self.0.migration.report()
    }

    fn migrate_parameters(&self) -> Parameters {
        self.0.migration.lock().parameters.clone()
    }

    fn set_migrate_parameters(&self, parameters: Parameters) -> Result<(), ControlError> {
        let mut desk = self.0.migration.lock();
        if let Some(control) = &desk.control {
            control.set_parameters(parameters.clone());
        }
        self.0.events.tell_migration(parameters.events);
        desk.parameters = parameters;
        Ok(())
    }

    fn events(&self) -> broadcast::Receiver<TimedEvent> {
        self.0.events.subscribe()
    }
}
