//! QEMU's command line: `mini-vmm qemu-command`, and `--like` of `mini-vmm run`.

use std::io::Write;
use std::path::PathBuf;

use clap::Args;
use serde_json::{Value, json};

use super::{CliError, VmArg};
use crate::config::{Config, MigrateListen, Settings};
use crate::qemu_line::{Like, QemuLine};

#[derive(Debug, Args)]
pub(super) struct QemuArgs {
    #[command(flatten)]
    vm: VmArg,
    /// The VM that this TOML file describes, instead of one that runs
    #[arg(long, value_name = "FILE", conflicts_with_all = ["vm", "qmp"])]
    config: Option<PathBuf>,
    /// Where that QEMU waits for the VM: tcp:HOST:PORT, unix:PATH, or defer
    #[arg(long, value_name = "URI")]
    incoming: Option<MigrateListen>,
    /// As a JSON array of words, not for a shell
    #[arg(long)]
    json: bool,
}

pub(super) fn command(args: &QemuArgs) -> Result<(), CliError> {
    let mut settings = match &args.config {
        Some(file) => Settings::from_file(file)?,
        None => recorded(&args.vm)?,
    };
    // A machine that waits for its guest needs no kernel.
    if settings.migrate_listen.is_none() {
        settings.migrate_listen.clone_from(&args.incoming);
    }
    let config = Config::resolve(settings)?;
    let line = QemuLine::of(&config, args.incoming.as_ref())?;
    notes(line.notes());
    let text = if args.json {
        Value::from(line.args().collect::<Vec<_>>()).to_string()
    } else {
        line.to_shell()
    };
    let mut out = std::io::stdout();
    writeln!(out, "{text}").map_err(CliError::io("cannot write the command line"))
}

/// The settings that a running VM's recorded configuration is: the same words.
fn recorded(vm: &VmArg) -> Result<Settings, CliError> {
    let status = vm.connect()?.execute("x-mini-vmm-status", json!({}))?;
    let mut config = status.get("config").cloned().unwrap_or_default();
    if let Some(table) = config.as_object_mut() {
        // That it waited for 'cont' once is past: what takes it over shall let it go on.
        table.retain(|key, value| !value.is_null() && key != "paused");
    }
    serde_json::from_value(config).map_err(CliError::Recorded)
}

/// The settings of a QEMU command line; what was left out is told.
pub(super) fn like(line: &str) -> Result<Settings, CliError> {
    let Like { settings, notes: left_out } = Like::from_line(line)?;
    notes(&left_out);
    Ok(settings)
}

fn notes(all: &[String]) {
    for note in all {
        eprintln!("mini-vmm: note: {note}");
    }
}
