//! Commands about migration.

use std::os::fd::OwnedFd;

use migration::params::ParameterError;
use serde_json::{Value, json};

use super::super::QmpError;
use super::{Args, Outcome, Shared};
use crate::config::{MigrationUri, SocketUri};
use crate::control::{ControlError, RunState};

/// Starts a migration; the answer says that it has started, `query-migrate` how it goes.
/// `detach` means nothing, as in QEMU; what QEMU 7.2 can and we can't is refused if switched on.
///
/// ```text
/// -> {"execute": "migrate", "arguments": {"uri": "tcp:192.0.2.1:4444", "detach": true, "resume": false}}
/// <- {"return": {}}
/// -> {"execute": "migrate", "arguments": {"uri": "tcp:192.0.2.1:4444"}}
/// <- {"error": {"class": "GenericError", "desc": "There's a migration process in progress"}}
/// -> {"execute": "migrate"}
/// <- {"error": {"class": "GenericError", "desc": "Parameter 'uri' is missing"}}
/// -> {"execute": "migrate", "arguments": {"uri": 4444}}
/// <- {"error": {"class": "GenericError", "desc": "Invalid parameter type for 'uri', expected: string"}}
/// ```
pub(super) fn migrate(shared: &Shared, mut args: Args) -> Outcome {
    let uri = args.string("uri")?;
    args.optional_bool("detach")?;
    for (name, why) in [
        ("blk", "disks are not copied: both hosts must reach them"),
        ("inc", "disks are not copied: both hosts must reach them"),
        ("resume", "there is no postcopy to recover"),
    ] {
        if args.optional_bool(name)? == Some(true) {
            return Err(QmpError::Unsupported(name, why));
        }
    }
    args.finish()?;
    shared.vm.migrate(&uri.parse::<MigrationUri>()?)?;
    Ok(json!({}))
}

/// Goes on from `pre-switchover`, where a migration waits with capability `pause-before-switchover`.
///
/// ```text
/// -> {"execute": "migrate-continue", "arguments": {"state": "pre-switchover"}}
/// <- {"error": {"class": "GenericError", "desc": "Migration not in expected state: none"}}
/// ```
pub(super) fn migrate_continue(shared: &Shared, mut args: Args) -> Outcome {
    let state = args.string("state")?;
    args.finish()?;
    if state != "pre-switchover" {
        return Err(QmpError::Value("state".to_string(), state));
    }
    shared.vm.migrate_continue()?;
    Ok(json!({}))
}

/// Says where a VM started with `--migrate-listen defer` shall arrive.
///
/// ```text
/// -> {"execute": "migrate-incoming", "arguments": {"uri": "tpc::4444"}}
/// <- {"error": {"class": "GenericError", "desc": "address: 'tpc::4444' is not an address: tcp:HOST:PORT, tcp:[IPV6]:PORT, unix:PATH, file:PATH[,offset=N], fd:N or exec:COMMAND; did you mean 'tcp::4444'?"}}
/// ```
pub(super) fn migrate_incoming(shared: &Shared, mut args: Args) -> Outcome {
    let uri = args.string("uri")?;
    args.finish()?;
    shared.vm.migrate_incoming(&uri.parse::<MigrationUri>()?)?;
    Ok(json!({}))
}

/// Cancels. Fine, too, if nothing runs; an error when the guest has been given to the other side.
///
/// ```text
/// -> {"execute": "migrate_cancel"}
/// <- {"return": {}}
/// ```
pub(super) fn migrate_cancel(shared: &Shared, args: Args) -> Outcome {
    args.finish()?;
    shared.vm.migrate_cancel()?;
    Ok(json!({}))
}

/// Keeps the descriptor that came along with the command (`SCM_RIGHTS`), for `fd:NAME`.
///
/// ```text
/// -> {"execute": "getfd", "arguments": {"fdname": "file"}}
/// <- {"error": {"class": "GenericError", "desc": "No file descriptor supplied via SCM_RIGHTS"}}
/// -> {"execute": "getfd", "arguments": {"fdname": "7file"}}
/// <- {"error": {"class": "GenericError", "desc": "Parameter 'fdname' expects a name not starting with a digit"}}
/// ```
pub(super) fn getfd(shared: &Shared, mut args: Args, fd: Option<OwnedFd>) -> Outcome {
    let name = args.string("fdname")?;
    args.finish()?;
    // Numbers are those that the process was started with.
    if name.starts_with(|c: char| c.is_ascii_digit()) {
        return Err(QmpError::Digit("fdname"));
    }
    match format!("fd:{name}").parse::<MigrationUri>() {
        Ok(MigrationUri::Descriptor(_)) => {}
        Ok(_) => return Err(QmpError::Value("fdname".to_string(), name)),
        Err(error) => return Err(error.into()),
    }
    shared.vm.keep_descriptor(&name, fd.ok_or(QmpError::NoDescriptor)?)?;
    Ok(json!({}))
}

/// Closes a descriptor that `getfd` has kept.
///
/// ```text
/// -> {"execute": "closefd", "arguments": {"fdname": "there"}}
/// <- {"return": {}}
/// -> {"execute": "closefd", "arguments": {"fdname": "file"}}
/// <- {"error": {"class": "GenericError", "desc": "File descriptor named 'file' not found"}}
/// ```
pub(super) fn closefd(shared: &Shared, mut args: Args) -> Outcome {
    let name = args.string("fdname")?;
    args.finish()?;
    if shared.vm.close_descriptor(&name) { Ok(json!({})) } else { Err(QmpError::NotKept(name)) }
}

/// How it goes. A destination that listens on TCP tells its address, so that port 0 is of use.
///
/// ```text
/// -> {"execute": "query-migrate"}
/// <- {"return": {}}
/// ```
pub(super) fn query_migrate(shared: &Shared, args: Args) -> Outcome {
    args.finish()?;
    let mut info = serde_json::to_value(shared.vm.query_migrate()).map_err(|_| QmpError::Lost)?;
    let blockers = shared.vm.blockers();
    if let Some(members) = info.as_object_mut().filter(|_| !blockers.is_empty()) {
        members.insert("blocked-reasons".to_string(), json!(blockers));
    }
    if let (RunState::Inmigrate, Some(uri), Some(members)) =
        (shared.vm.status(), shared.vm.runtime().migrate_listen, info.as_object_mut())
    {
        members.entry("status").or_insert_with(|| json!("setup"));
        members.insert("socket-address".to_string(), json!([socket_address(&uri)]));
    }
    Ok(info)
}

fn socket_address(uri: &SocketUri) -> Value {
    match uri {
        SocketUri::Tcp { host, port } => {
            json!({ "type": "inet", "host": host, "port": port.to_string() })
        }
        SocketUri::Unix(path) => json!({ "type": "unix", "path": path }),
    }
}

/// The parameters, QEMU's and our own (`x-…`).
pub(super) fn query_parameters(shared: &Shared, args: Args) -> Outcome {
    args.finish()?;
    Ok(shared.vm.migrate_parameters().to_json())
}

/// Sets some of them: all that are named, or none.
///
/// ```text
/// -> {"execute": "migrate-set-parameters", "arguments": {"downtime-limit": 50, "max-bandwidth": 1000000}}
/// <- {"return": {}}
/// -> {"execute": "migrate-set-parameters", "arguments": {"downtime-limit": 60, "downtime": 1}}
/// <- {"error": {"class": "GenericError", "desc": "Parameter 'downtime' is unexpected"}}
/// -> {"execute": "migrate-set-parameters", "arguments": {"downtime-limit": -1}}
/// <- {"error": {"class": "GenericError", "desc": "parameter 'downtime-limit' expects an integer from 0 to 2000000, found -1"}}
/// ```
pub(super) fn set_parameters(shared: &Shared, args: Args) -> Outcome {
    shared.change_parameters(|parameters| {
        for (name, value) in args.rest() {
            parameters.set(&name, &value).map_err(refused)?;
        }
        Ok(())
    })?;
    Ok(json!({}))
}

/// The capabilities. All of QEMU 7.2's are there, because clients switch off what they don't want.
pub(super) fn query_capabilities(shared: &Shared, args: Args) -> Outcome {
    args.finish()?;
    let all = shared.vm.migrate_parameters().capabilities();
    Ok(all.into_iter().map(|(name, state)| json!({ "capability": name, "state": state })).collect())
}

/// Switches some of them: all that are named, or none.
///
/// ```text
/// -> {"execute": "migrate-set-capabilities", "arguments": {"capabilities": [{"capability": "events", "state": true}]}}
/// <- {"return": {}}
/// -> {"execute": "migrate", "arguments": {"uri": "unix:/run/x.sock"}}
/// <- {"event": "MIGRATION", "data": {"status": "setup"}}
/// <- {"event": "MIGRATION_PASS", "data": {"pass": 1}}
/// <- {"return": {}}
/// -> {"execute": "migrate-set-capabilities", "arguments": {"capabilities": [{"capability": "teleport", "state": true}]}}
/// <- {"error": {"class": "GenericError", "desc": "Parameter 'capabilities[0].capability' does not accept value 'teleport'"}}
/// -> {"execute": "migrate-set-capabilities", "arguments": {"capabilities": [{"capability": "events"}]}}
/// <- {"error": {"class": "GenericError", "desc": "Parameter 'capabilities[0].state' is missing"}}
/// ```
pub(super) fn set_capabilities(shared: &Shared, mut args: Args) -> Outcome {
    let list = args.objects("capabilities")?;
    args.finish()?;
    shared.change_parameters(|parameters| {
        for mut item in list {
            let path = item.path("capability");
            let name = item.string("capability")?;
            let state = item.bool("state")?;
            item.finish()?;
            parameters.set_capability(&name, state).map_err(|error| match error {
                ParameterError::UnknownCapability { name } => QmpError::Value(path, name),
                other => refused(other),
            })?;
        }
        Ok(())
    })?;
    Ok(json!({}))
}

/// QEMU's words where it has the same complaint.
pub(super) fn refused(error: ParameterError) -> QmpError {
    match error {
        ParameterError::UnknownParameter { name } => QmpError::Unexpected(name),
        other => ControlError::Parameter(other).into(),
    }
}
