//! Commands that stop, go on, press buttons, end.

use serde_json::json;

use super::{Args, Outcome, Shared};

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

/// Ends the VM. Here the answer may come before the event.
pub(super) fn quit(shared: &Shared, args: Args) -> Outcome {
    args.finish()?;
    shared.vm.quit();
    Ok(json!({}))
}
