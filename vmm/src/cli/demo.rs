//! `mini-vmm demo`: two processes of this program, one guest that checks itself, and a migration
//! between them that one can watch. Nothing is pretended: the same commands can be typed by hand,
//! and are shown.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;

use super::CliError;
use crate::client::QmpClient;

/// What the guest does: it rewrites 32 MiB of its memory at 4000 pages a second.
const PARAMS: &str = "set=32M,rate=4000,hz=100,every=500";
/// How long any one step may take before the demonstration is called failed.
const PATIENCE: Duration = Duration::from_secs(60);
/// Status lines that are shown of the guest before and after the move.
const LINES: usize = 4;

fn failed(what: impl Into<String>) -> CliError {
    CliError::Demo(what.into())
}

/// One VM's process and its guest's serial line. Dropping it ends the process.
struct Side {
    label: &'static str,
    child: Child,
    directory: PathBuf,
    serial: Option<(UnixStream, Receiver<String>)>,
}

impl Drop for Side {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn wait_for<T>(what: &str, mut step: impl FnMut() -> Option<T>) -> Result<T, CliError> {
    let start = Instant::now();
    loop {
        if let Some(value) = step() {
            return Ok(value);
        }
        if start.elapsed() > PATIENCE {
            return Err(failed(format!("{what} did not come within {} s", PATIENCE.as_secs())));
        }
        thread::sleep(Duration::from_millis(10));
    }
}

impl Side {
    fn start(
        label: &'static str,
        program: &Path,
        base: &Path,
        args: &[&str],
    ) -> Result<Self, CliError> {
        let directory = base.join("mini-vmm").join(label);
        let serial = format!("unix:{}", base.join(format!("{label}.serial")).display());
        println!("$ mini-vmm run --name {label} {}", args.join(" "));
        let child = Command::new(program)
            .env("XDG_RUNTIME_DIR", base)
            .args(["run", "--name", label, "--serial", &serial])
            .args(args)
            .stdin(Stdio::null())
            .spawn()
            .map_err(CliError::io("cannot start a second mini-vmm"))?;
        let mut side = Self { label, child, directory, serial: None };
        let path = base.join(format!("{label}.serial"));
        let stream = wait_for("the serial line", || {
            if let Ok(Some(status)) = side.child.try_wait() {
                return Some(Err(failed(format!("'{label}' ended at once ({status})"))));
            }
            UnixStream::connect(&path).ok().map(Ok)
        })??;
        let reader = stream.try_clone().map_err(CliError::io("cannot read the serial line"))?;
        let (tx, rx) = channel();
        thread::Builder::new()
            .name(format!("serial {label}"))
            .spawn(move || {
                for line in BufReader::new(reader).lines().map_while(Result::ok) {
                    if tx.send(line.trim().to_string()).is_err() {
                        break;
                    }
                }
            })
            .map_err(CliError::io("cannot start a thread"))?;
        side.serial = Some((stream, rx));
        Ok(side)
    }

    fn qmp(&self) -> Result<QmpClient, CliError> {
        let path = self.directory.join("qmp.sock");
        let mut last = None;
        let client = wait_for("the control socket", || match QmpClient::connect(&path) {
            Ok(client) => Some(client),
            Err(e) => {
                last = Some(e);
                None
            }
        });
        client.map_err(|e| last.map_or(e, CliError::from))
    }

    /// Shows what the guest says until a line that `last` likes.
    fn watch(&self, mut last: impl FnMut(&str) -> bool) -> Result<String, CliError> {
        let Some((_, lines)) = &self.serial else { return Err(failed("no serial line")) };
        loop {
            let line = match lines.recv_timeout(PATIENCE) {
                Ok(line) => line,
                Err(RecvTimeoutError::Timeout) => {
                    return Err(failed(format!("the guest on '{}' says nothing", self.label)));
                }
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(failed(format!("'{}' ended unexpectedly", self.label)));
                }
            };
            if line.is_empty() {
                continue;
            }
            println!("[{} pid {}] {line}", self.label, self.child.id());
            if line.contains("FAIL") {
                return Err(failed("the guest found something wrong with itself"));
            }
            if last(&line) {
                return Ok(line);
            }
        }
    }

    fn say(&mut self, command: &[u8]) -> Result<(), CliError> {
        let Some((stream, _)) = &mut self.serial else { return Err(failed("no serial line")) };
        stream.write_all(command).map_err(CliError::io("cannot talk to the guest"))
    }
}

/// The number behind `key=` in a status line.
fn number(line: &str, key: &str) -> Option<u64> {
    line.split_whitespace().find_map(|word| word.strip_prefix(key)?.strip_prefix('=')?.parse().ok())
}

fn is_status(line: &str) -> bool {
    line.contains("up_ms=")
}

fn some_lines(mut left: usize) -> impl FnMut(&str) -> bool {
    move |line| {
        left -= usize::from(is_status(line));
        left == 0
    }
}

pub(super) fn demo(memory: &str, smp: u32) -> Result<(), CliError> {
    let program = std::env::current_exe().map_err(CliError::io("cannot find this program"))?;
    let base = std::env::temp_dir().join(format!("mini-vmm-demo-{}", std::process::id()));
    std::fs::create_dir_all(&base).map_err(CliError::io("cannot make a temporary directory"))?;
    let result = show(&program, &base, memory, &smp.to_string());
    let _ = std::fs::remove_dir_all(&base);
    result
}

fn show(program: &Path, base: &Path, memory: &str, smp: &str) -> Result<(), CliError> {
    println!("A VM with {memory} of memory starts. Its guest holds every page to a value that it");
    println!("can recompute, keeps rewriting 32 MiB of them, and goes on checking all of them.\n");
    let selfcheck = format!("--selfcheck={PARAMS}");
    let mut source =
        Side::start("source", program, base, &["--memory", memory, "--smp", smp, &selfcheck])?;
    source.watch(|line| line.contains("selfcheck: ready"))?;
    source.say(b"r")?;
    let before = source.watch(some_lines(LINES))?;

    println!("\nA second process waits for it.\n");
    let listen = ["--memory", memory, "--smp", smp, "--migrate-listen", "tcp:127.0.0.1:0"];
    let mut destination = Side::start("destination", program, base, &listen)?;
    let status = destination.qmp()?.execute("x-mini-vmm-status", json!({}))?;
    let uri = status
        .pointer("/runtime/migrate-listen")
        .and_then(|uri| uri.as_str())
        .ok_or_else(|| failed("the destination does not say where it listens"))?
        .to_string();

    println!("\n$ mini-vmm migrate --vm source {uri}");
    let migrated = Command::new(program)
        .env("XDG_RUNTIME_DIR", base)
        .args(["migrate", "--vm", "source", &uri])
        .status()
        .map_err(CliError::io("cannot start mini-vmm migrate"))?;
    if !migrated.success() {
        return Err(failed("the migration failed; the reason stands above"));
    }
    let ended = wait_for("the source's end", || source.child.try_wait().ok().flatten())?;
    println!("\nThe source's process has ended ({ended}). The guest goes on in the other one.\n");

    let after = destination.watch(some_lines(LINES))?;
    destination.say(b"v")?;
    let verdict = destination.watch(|line| line.contains("verified all"))?;

    let line = |key: &str, at: &str| number(at, key).unwrap_or(0);
    println!("\nThe guest's own proof:");
    println!(
        "  its clock went on          {} ms -> {} ms",
        line("up_ms", &before),
        line("up_ms", &after)
    );
    println!(
        "  its timer went on          {} ticks -> {} ticks",
        line("ticks", &before),
        line("ticks", &after)
    );
    println!(
        "  longest gap between ticks  {:.1} ms, the move included (10 ms apart when all is well)",
        line("max_gap_us", &after) as f64 / 1e3
    );
    println!("  all memory verified        {} pages", line("pages", &verdict));
    destination.qmp()?.execute("quit", json!({}))?;
    wait_for("the destination's end", || destination.child.try_wait().ok().flatten())?;
    println!("\nNothing was lost.");
    Ok(())
}
