//! Commands that ask a running VM one thing.

use std::thread;
use std::time::Duration;

use serde_json::{Value, json};

use super::{CliError, VmArg};
use crate::client::{ClientError, QmpClient};
use crate::config::ByteSize;
use crate::rundir;

/// How often a VM is asked whether it is done.
const STEP: Duration = Duration::from_millis(50);

pub(super) fn simple(vm: &VmArg, command: &str) -> Result<(), CliError> {
    vm.connect()?.execute(command, json!({}))?;
    Ok(())
}

/// Returns when it is known how the migration ended, for it may have been too late.
pub(super) fn cancel(vm: &VmArg) -> Result<(), CliError> {
    let mut client = vm.connect()?;
    match client.execute("migrate_cancel", json!({})) {
        Err(e @ ClientError::Refused { .. }) => eprintln!("{e}"),
        answer => drop(answer?),
    }
    loop {
        let info = client.execute("query-migrate", json!({}))?;
        match info["status"].as_str().unwrap_or("none") {
            "none" => return Err(CliError::Migration("there is no migration to cancel".into())),
            "completed" => {
                return Err(CliError::Migration(
                    "it was too late to cancel: the migration has completed".into(),
                ));
            }
            "cancelled" | "failed" => return Ok(()),
            _ => thread::sleep(STEP),
        }
    }
}

/// Asks the guest for a size, or shows the one that it has.
pub(super) fn balloon(vm: &VmArg, size: Option<ByteSize>) -> Result<(), CliError> {
    let mut client = vm.connect()?;
    if let Some(ByteSize(bytes)) = size {
        client.execute("balloon", json!({ "value": bytes }))?;
        return Ok(());
    }
    let answer = client.execute("query-balloon", json!({}))?;
    println!("{}", ByteSize(answer["actual"].as_u64().unwrap_or_default()));
    Ok(())
}

pub(super) fn quit(vm: &VmArg) -> Result<(), CliError> {
    let mut client = vm.connect()?;
    client.execute("quit", json!({}))?;
    client.wait_for_end()?;
    Ok(())
}

pub(super) fn list(as_json: bool) -> Result<(), CliError> {
    let mut rows = Vec::new();
    for vm in rundir::running() {
        let status = QmpClient::connect(&vm.socket)
            .and_then(|mut client| client.execute("query-status", json!({})))
            .map_or_else(
                // It runs, since its directory is locked, but it does not answer.
                |_| "unreachable".to_string(),
                |answer| match answer["x-in-doubt"].is_object() {
                    true => "in doubt".to_string(),
                    false => answer["status"].as_str().unwrap_or("unknown").to_string(),
                },
            );
        rows.push((vm.name, status, vm.socket));
    }
    if as_json {
        let rows: Vec<_> = rows
            .into_iter()
            .map(|(name, status, qmp)| json!({ "name": name, "status": status, "qmp": qmp }))
            .collect();
        println!("{}", Value::from(rows));
    } else if rows.is_empty() {
        println!("no VM runs here");
    } else {
        let width = rows.iter().map(|(name, ..)| name.len()).max().unwrap_or(0).max(4);
        println!("{:width$}  {:14}  CONTROL SOCKET", "NAME", "STATUS");
        for (name, status, socket) in rows {
            println!("{name:width$}  {status:14}  {}", socket.display());
        }
    }
    Ok(())
}

pub(super) fn status(vm: &VmArg, as_json: bool) -> Result<(), CliError> {
    let status = vm.connect()?.execute("x-mini-vmm-status", json!({}))?;
    if as_json {
        println!("{status:#}");
        return Ok(());
    }
    let text = |pointer: &str| {
        status.pointer(pointer).map_or_else(
            || "-".to_string(),
            |v| match v {
                Value::String(s) => s.clone(),
                other => other.to_string(),
            },
        )
    };
    println!("name      {}", text("/name"));
    println!("status    {}", text("/status"));
    if status.pointer("/in-doubt").is_some_and(serde_json::Value::is_object) {
        println!("IN DOUBT  it is not known whether the destination runs the guest");
        println!("          {}", text("/in-doubt/reason"));
        println!("          {}", text("/in-doubt/disks"));
        println!("          {}", text("/in-doubt/advice"));
    }
    println!("process   {}", text("/pid"));
    println!(
        "machine   {}, {} vCPU(s), {} of memory, --cpu {}",
        text("/config/machine"),
        text("/config/smp"),
        text("/config/memory"),
        text("/config/cpu")
    );
    for (label, pointer) in [
        ("serial", "/runtime/serial"),
        ("console", "/runtime/console"),
        ("listens", "/runtime/migrate-listen"),
    ] {
        if status.pointer(pointer).is_some_and(|v| !v.is_null()) {
            println!("{label:9} {}", text(pointer));
        }
    }
    if status.pointer("/migration/status").is_some_and(|s| s != "none") {
        println!("migration {}", text("/migration/status"));
        if status.pointer("/migration/error-desc").is_some() {
            println!("          {}", text("/migration/error-desc"));
        }
    }
    Ok(())
}
