//! The command for a migration of which nobody here knows how it ended.

use migration::source::Wish;
use serde_json::json;

use super::super::QmpError;
use super::{Args, Outcome, Shared};
use crate::control::ControlError;
use crate::migrate::RecoverError;

/// Says what is known of a doubt, or settles it: `action` is `resume` (the guest goes on here) or
/// `discard` (this copy ends). What could make two running guests, or none, is refused, unless one
/// of the three flags says in so many words what can't be seen from here.
///
/// ```text
/// -> {"execute": "x-recover"}
/// <- {"error": {"class": "GenericError", "desc": "there is nothing to recover: it is known who has the guest ('status' says what this VM does)"}}
/// -> {"execute": "x-recover", "arguments": {"action": "resume", "destination-does-not-run": true}}
/// <- {"error": {"class": "GenericError", "desc": "there is nothing to recover: it is known who has the guest ('status' says what this VM does)"}}
/// -> {"execute": "x-recover", "arguments": {"action": "guess"}}
/// <- {"error": {"class": "GenericError", "desc": "Parameter 'action' does not accept value 'guess'"}}
/// -> {"execute": "x-recover", "arguments": {"action": "discard", "destination-does-not-run": true}}
/// <- {"error": {"class": "GenericError", "desc": "Parameter 'destination-does-not-run' is unexpected"}}
/// ```
pub(super) fn recover(shared: &Shared, mut args: Args) -> Outcome {
    let wish = match args.optional_string("action")?.as_deref() {
        None => None,
        Some("resume") => Some(Wish::Resume {
            known_dead: args.optional_bool("destination-does-not-run")? == Some(true),
            even_changed: args.optional_bool("disks-may-have-changed")? == Some(true),
        }),
        Some("discard") => Some(Wish::Discard {
            known_running: args.optional_bool("destination-runs")? == Some(true),
        }),
        Some(other) => return Err(QmpError::Value("action".to_string(), other.to_string())),
    };
    args.finish()?;
    match wish {
        Some(wish) => {
            shared.vm.recover(wish)?;
            Ok(json!({}))
        }
        None => match shared.vm.doubt() {
            Some(doubt) => Ok(json!(doubt)),
            None => Err(ControlError::from(RecoverError::NoDoubt).into()),
        },
    }
}
