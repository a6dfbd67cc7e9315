//! Commands that stop, go on, press buttons, end.

use migration::params::Parameters;
use serde_json::json;

use super::{Args, Outcome, Shared};
use crate::control::ControlError;
use crate::qmp::QmpError;

/// Stops the vCPUs. The event comes first, then the answer.
///
/// ```text
/// -> {"execute": "stop"}
/// <- {"event": "STOP"}
/// <- {"return": {}}
/// -> {"execute": "stop", "arguments": {"now": true}, "id": 7}
/// <- {"error": {"class": "GenericError", "desc": "Parameter 'now' is unexpected"}, "id": 7}
/// ```
pub(super) fn stop(shared: &Shared, args: Args) -> Outcome {
    args.finish()?;
    shared.vm.stop()?;
    Ok(json!({}))
}

/// Lets the vCPUs run.
///
/// ```text
/// -> {"execute": "stop"}
/// <- {"event": "STOP"}
/// <- {"return": {}}
/// -> {"execute": "cont"}
/// <- {"event": "RESUME"}
/// <- {"return": {}}
/// ```
pub(super) fn cont(shared: &Shared, args: Args) -> Outcome {
    args.finish()?;
    shared.vm.cont()?;
    Ok(json!({}))
}

/// Presses the power button.
///
/// ```text
/// -> {"execute": "system_powerdown"}
/// <- {"event": "POWERDOWN"}
/// <- {"return": {}}
/// ```
pub(super) fn system_powerdown(shared: &Shared, args: Args) -> Outcome {
    args.finish()?;
    shared.vm.system_powerdown()?;
    Ok(json!({}))
}

/// Resets the machine.
///
/// ```text
/// -> {"execute": "system_reset"}
/// <- {"event": "RESET", "data": {"guest": false, "reason": "host-qmp-system-reset"}}
/// <- {"return": {}}
/// ```
pub(super) fn system_reset(shared: &Shared, args: Args) -> Outcome {
    args.finish()?;
    shared.vm.system_reset()?;
    Ok(json!({}))
}

/// Tells the networks where the guest is: after a switch has forgotten it, say.
///
/// ```text
/// -> {"execute": "announce-self", "arguments": {"initial": 50, "max": 550, "rounds": 2, "step": 100}}
/// <- {"return": {}}
/// -> {"execute": "announce-self", "arguments": {"initial": 50, "max": 550, "rounds": 2}}
/// <- {"error": {"class": "GenericError", "desc": "Parameter 'step' is missing"}}
/// -> {"execute": "announce-self", "arguments": {"initial": 50, "max": 550, "rounds": 2, "step": 0}}
/// <- {"error": {"class": "GenericError", "desc": "parameter 'announce-step' expects an integer from 1 to 10000, found 0"}}
/// -> {"execute": "announce-self", "arguments": {"initial": 0, "max": 0, "rounds": 1, "step": 1, "at": 1}}
/// <- {"error": {"class": "GenericError", "desc": "Parameter 'at' is unexpected"}}
/// ```
pub(super) fn announce_self(shared: &Shared, mut args: Args) -> Outcome {
    let only = args.optional_strings("interfaces")?;
    let mut rest = args.rest();
    let mut parameters = Parameters::default();
    for name in ["initial", "max", "rounds", "step"] {
        let value = rest.remove(name).ok_or_else(|| QmpError::Missing(name.to_owned()))?;
        parameters.set(&format!("announce-{name}"), &value).map_err(ControlError::from)?;
    }
    Args::new(rest).finish()?;
    shared.vm.announce_self(&parameters, (!only.is_empty()).then_some(only))?;
    Ok(json!({}))
}

/// Asks the guest to make do with so many bytes of memory. The answer says that it was asked; the
/// event, which comes at most once a second, how far it is.
///
/// ```text
/// -> {"execute": "balloon", "arguments": {"value": 67108864}}
/// <- {"event": "BALLOON_CHANGE", "data": {"actual": 67108864}}
/// <- {"return": {}}
/// -> {"execute": "query-balloon"}
/// <- {"return": {"actual": 67108864}}
/// -> {"execute": "balloon", "arguments": {"value": 0}}
/// <- {"error": {"class": "GenericError", "desc": "Parameter 'value' expects a size"}}
/// -> {"execute": "balloon", "arguments": {"value": -1}}
/// <- {"error": {"class": "GenericError", "desc": "Parameter 'value' expects a size"}}
/// -> {"execute": "balloon", "arguments": {"value": "64M"}}
/// <- {"error": {"class": "GenericError", "desc": "Invalid parameter type for 'value', expected: integer"}}
/// -> {"execute": "balloon"}
/// <- {"error": {"class": "GenericError", "desc": "Parameter 'value' is missing"}}
/// ```
pub(super) fn balloon(shared: &Shared, mut args: Args) -> Outcome {
    let value = args.int("value")?;
    args.finish()?;
    // Whether there is one comes before what is asked of it.
    shared.vm.balloon()?;
    let bytes = u64::try_from(value).ok().filter(|bytes| *bytes > 0);
    shared.vm.set_balloon(bytes.ok_or(QmpError::Expects("value", "a size"))?)?;
    Ok(json!({}))
}

/// Ends the VM. Here the answer may come before the event.
pub(super) fn quit(shared: &Shared, args: Args) -> Outcome {
    args.finish()?;
    shared.vm.quit();
    Ok(json!({}))
}
