//! Events as JSON.

use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use crate::control::{Event, ShutdownReason, TimedEvent};

/// The event as a client sees it. Times before 1970 are shown as 1970.
pub(super) fn to_json(event: &TimedEvent) -> Value {
    let (name, data) = name_and_data(&event.event);
    let mut object = json!({ "timestamp": timestamp(event.at), "event": name });
    if let (Some(data), Some(members)) = (data, object.as_object_mut()) {
        members.insert("data".to_string(), data);
    }
    object
}

fn name_and_data(event: &Event) -> (&'static str, Option<Value>) {
    let by = |reason: &ShutdownReason| json!({ "guest": reason.is_guest(), "reason": reason });
    match event {
        Event::Stop => ("STOP", None),
        Event::Resume => ("RESUME", None),
        Event::Shutdown(reason) => ("SHUTDOWN", Some(by(reason))),
        Event::Reset(reason) => ("RESET", Some(by(reason))),
        Event::Powerdown => ("POWERDOWN", None),
        Event::BalloonChange(actual) => ("BALLOON_CHANGE", Some(json!({ "actual": actual }))),
        Event::Migration(status) => ("MIGRATION", Some(json!({ "status": status }))),
        Event::MigrationPass(pass) => ("MIGRATION_PASS", Some(json!({ "pass": pass }))),
    }
}

fn timestamp(at: SystemTime) -> Value {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    json!({ "seconds": since.as_secs(), "microseconds": since.subsec_micros() })
}
