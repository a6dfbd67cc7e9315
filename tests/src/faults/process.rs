//! A process of a case, as it is seen from outside: it may have ended, stand still, or say how it is.

use std::time::Duration;

use serde_json::{Value, json};

use crate::qmp::Qmp;
use crate::vm::Vm;

/// How long a process that stands still is waited for.
const PATIENCE: Duration = Duration::from_millis(400);

/// How a process is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum State {
    Ended(i32),
    /// It does not answer at the moment.
    Mute,
    Alive {
        status: String,
        migration: String,
        why: String,
        doubt: bool,
    },
}

impl State {
    pub(super) fn runs(&self) -> bool {
        matches!(self, Self::Alive { status, .. } if status == "running")
    }
}

/// How it is at the moment.
pub(super) fn state(vm: &mut Vm) -> State {
    if vm.has_ended() {
        return State::Ended(vm.wait_exit(1));
    }
    let ask = || -> std::io::Result<State> {
        let mut qmp = Qmp::attempt(&vm.qmp_path(), PATIENCE)?;
        let mut ask = |command: &str| -> std::io::Result<Value> {
            qmp.try_execute(command, json!({}))?.map_err(std::io::Error::other)
        };
        let migrate = ask("query-migrate")?;
        let status = ask("query-status")?;
        let text = |value: &Value, key: &str| value[key].as_str().unwrap_or_default().to_string();
        Ok(State::Alive {
            status: text(&status, "status"),
            migration: text(&migrate, "status"),
            why: text(&migrate, "error-desc"),
            doubt: status["x-in-doubt"].is_object(),
        })
    };
    ask().unwrap_or(State::Mute)
}

/// A command for a process that may have ended.
pub(super) fn command(vm: &Vm, command: &str, arguments: Value) -> Result<Value, String> {
    let mut qmp =
        Qmp::attempt(&vm.qmp_path(), Duration::from_secs(20)).map_err(|e| e.to_string())?;
    let answer = qmp.try_execute(command, arguments).map_err(|e| e.to_string())?;
    answer.map_err(|e| e.to_string())
}
