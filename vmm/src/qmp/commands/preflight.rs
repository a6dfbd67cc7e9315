//! The question before a migration.

use std::time::Duration;

use migration::source::{Preflight, Questions};
use serde_json::Value;

use super::super::QmpError;
use super::migrate::refused;
use super::{Args, Outcome, Shared};
use crate::config::MigrationUri;

/// The longest sample, in ms: a client waits for the answer meanwhile.
const MAX_SAMPLE_MS: u64 = 30_000;

/// Would the VM move there? `sample` is for how many ms the guest's writes are watched (1000; 0 leaves
/// the forecast out). With `rehearse` the state of devices and vCPUs is loaded there and thrown away, for
/// which the guest stands still for about a millisecond. Any parameter of a migration may be said with it, and counts for this once.
///
/// With `qemu` nobody is asked: what stands against moving to any QEMU. It goes with nothing else.
///
/// ```text
/// -> {"execute": "x-mini-vmm-preflight", "arguments": {"uri": "tcp:192.0.2.1:4444", "sample": 100, "downtime-limit": 50}}
/// <- {"return": {"would-move": true, "destination": "mini-vmm 0.1.0", "problems": [], "left-out": 0, "forecast": null, "rehearsal": null}}
/// -> {"execute": "x-mini-vmm-preflight", "arguments": {"uri": "tcp:192.0.2.1:4444", "rehearse": 1}}
/// <- {"error": {"class": "GenericError", "desc": "Parameter 'rehearse' does not accept value '1'"}}
/// -> {"execute": "x-mini-vmm-preflight"}
/// <- {"error": {"class": "GenericError", "desc": "Parameter 'uri' is missing"}}
/// -> {"execute": "x-mini-vmm-preflight", "arguments": {"uri": "tcp:192.0.2.1:4444", "sample": 99999}}
/// <- {"error": {"class": "GenericError", "desc": "Parameter 'sample' does not accept value '99999'"}}
/// -> {"execute": "x-mini-vmm-preflight", "arguments": {"uri": "tcp:192.0.2.1:4444", "speed": 1}}
/// <- {"error": {"class": "GenericError", "desc": "Parameter 'speed' is unexpected"}}
/// -> {"execute": "x-mini-vmm-preflight", "arguments": {"qemu": true}}
/// <- {"return": {"would-move": false, "destination": "QEMU 7.2 (nobody was asked)", "problems": [{"code": "qemu-firmware", "what": "the guest", "expected": "a BIOS", "found": "none", "hint": "", "device": "", "field": "", "fatal": true, "known-as": ""}], "left-out": 0, "forecast": null, "rehearsal": null}}
/// -> {"execute": "x-mini-vmm-preflight", "arguments": {"qemu": true, "uri": "tcp:192.0.2.1:4444"}}
/// <- {"error": {"class": "GenericError", "desc": "Parameter 'uri' is unexpected"}}
/// ```
pub(super) fn preflight(shared: &Shared, mut args: Args) -> Outcome {
    if args.optional_bool("qemu")?.unwrap_or(false) {
        args.finish()?;
        return Ok(shown(&shared.vm.preflight_for_qemu()?));
    }
    let uri = args.string("uri")?.parse::<MigrationUri>()?;
    let mut rest = args.rest();
    let mut questions = Questions::default();
    if let Some(value) = rest.remove("sample") {
        let ms = value.as_u64().filter(|ms| *ms <= MAX_SAMPLE_MS);
        let ms = ms.ok_or_else(|| QmpError::Value("sample".to_string(), value.to_string()))?;
        questions.sample = Duration::from_millis(ms);
    }
    if let Some(value) = rest.remove("rehearse") {
        let wanted = value.as_bool();
        questions.rehearse =
            wanted.ok_or_else(|| QmpError::Value("rehearse".to_string(), value.to_string()))?;
    }
    let mut parameters = shared.vm.migrate_parameters();
    for (name, value) in rest {
        parameters.set(&name, &value).map_err(refused)?;
    }
    let answer = shared.vm.preflight(&uri, parameters, &questions)?;
    Ok(shown(&answer))
}

fn shown(answer: &Preflight) -> Value {
    // Plain values always have a JSON form.
    serde_json::to_value(answer).unwrap_or(Value::Null)
}
