//! `mini-vmm migrate`: starts a migration, shows how it goes, and reports how it went.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use clap::{Args, ValueEnum};
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use migration::params::Parameters;
use migration::wire::multifd::MAX_CHANNELS;
use serde_json::{Map, Value, json};
use signal_hook::consts::SIGINT;

use super::{CliError, VmArg, checked_uri, preflight};
use crate::client::{ClientError, QmpClient};
use crate::config::{HumanDuration, MigrationUri, Rate};
use crate::grants::Grants;

/// How often the VM is asked how far it has come.
const STEP: Duration = Duration::from_millis(100);

#[derive(Debug, Args)]
pub(super) struct MigrateArgs {
    #[command(flatten)]
    vm: VmArg,
    /// Where to: tcp:HOST:PORT, unix:PATH, file:PATH[,offset=N], fd:N (a descriptor of this command, which is
    /// handed to the VM) or exec:COMMAND (a shell's, run by the VM; see 'run --allow-exec')
    uri: String,
    /// How long the guest may stand still [default: 300ms]
    #[arg(long, value_name = "TIME")]
    downtime: Option<HumanDuration>,
    /// The most to send in a second while the guest runs [default: no limit]
    #[arg(long, value_name = "RATE")]
    bandwidth: Option<Rate>,
    /// How long the migration may take before --on-timeout happens [default: for ever]
    #[arg(long, value_name = "TIME")]
    timeout: Option<HumanDuration>,
    /// What happens then: cancel (the guest stays) or force (it moves, however long it stands still)
    #[arg(long, value_name = "WHAT", requires = "timeout")]
    on_timeout: Option<OnTimeout>,
    /// Compare memory and device state of both sides before the guest runs there (the guest stands
    /// still meanwhile)
    #[arg(long)]
    verify: bool,
    /// Connections that memory goes through, 1 to 16: several where one doesn't fill the network [default: 1]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=MAX_CHANNELS as i64))]
    channels: Option<u8>,
    /// Compress pages, for slow networks (1 Gbit/s and less): zstd or zstd:LEVEL, 1 (fast) to 19 [default: no;
    /// LEVEL: 1]
    #[arg(long, value_name = "HOW", value_parser = zstd_level)]
    compress: Option<u8>,
    /// Slow the guest where it writes faster than can be sent: its vCPUs rest for a growing share of the
    /// time, 20 % at first and 99 % at last, until the rest fits --downtime
    #[arg(long)]
    auto_converge: bool,
    /// Give a new mini-vmm of this host, which waits at unix:PATH, the memory itself: nothing of it is copied, so
    /// that the guest stands still as shortly whatever its size ('run --shared-memory')
    #[arg(long, conflicts_with_all = ["downtime", "bandwidth", "timeout", "on_timeout", "verify", "channels",
        "compress", "auto_converge", "rehearse"])]
    local: bool,
    /// Move nothing: say what 'preflight' says, and load the state of devices and vCPUs there for show, for
    /// which the guest stands still for about a millisecond
    #[arg(long, conflicts_with = "detach")]
    rehearse: bool,
    /// Start it, and do not wait for its end
    #[arg(long)]
    detach: bool,
    /// No progress bar; the report as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum OnTimeout {
    Cancel,
    Force,
}

/// The level in `zstd` or `zstd:LEVEL`.
fn zstd_level(text: &str) -> Result<u8, String> {
    let level = match text.split_once(':') {
        None if text == "zstd" => Some(1),
        Some(("zstd", level)) => level.parse().ok(),
        _ => None,
    };
    level
        .filter(|level| (1..=19).contains(level))
        .ok_or_else(|| "expected zstd or zstd:LEVEL, LEVEL from 1 to 19".into())
}

impl MigrateArgs {
    /// What the flags say, and for a mini-vmm also their defaults: what an earlier migration was
    /// told is not meant for this one.
    fn parameters(&self, defaults: bool) -> Value {
        let ms = |time: HumanDuration| u64::try_from(time.0.as_millis()).unwrap_or(u64::MAX);
        let mut p = Map::new();
        if defaults {
            let known = Parameters::default().to_json();
            for key in [
                "downtime-limit",
                "max-bandwidth",
                "x-timeout",
                "x-on-timeout",
                "x-verify",
                "x-local",
                "multifd-compression",
            ] {
                p.insert(key.to_string(), known[key].clone());
            }
        }
        let mut put = |key: &str, value: Value| drop(p.insert(key.to_string(), value));
        if let Some(time) = self.downtime {
            put("downtime-limit", ms(time).into());
        }
        if let Some(rate) = self.bandwidth {
            put("max-bandwidth", rate.0.into());
        }
        if let Some(time) = self.timeout {
            put("x-timeout", ms(time).into());
        }
        match self.on_timeout {
            Some(OnTimeout::Cancel) => put("x-on-timeout", "cancel".into()),
            Some(OnTimeout::Force) => put("x-on-timeout", "force".into()),
            None => {}
        }
        if let Some(channels) = self.channels.or(self.compress.map(|_| 1)) {
            put("multifd-channels", channels.into());
        }
        if let Some(level) = self.compress {
            put("multifd-compression", "zstd".into());
            put("multifd-zstd-level", level.into());
        }
        if self.verify {
            put("x-verify", true.into());
        }
        if self.local {
            put("x-local", true.into());
        }
        Value::from(p)
    }
}

pub(super) fn migrate(args: &MigrateArgs) -> Result<(), CliError> {
    // First of all, while nothing else is open.
    let grants = Grants::of_this_process(false);
    let uri = checked_uri(&args.uri)?;
    if args.rehearse {
        return preflight::rehearse(&args.vm, args.parameters(true), &uri, args.json);
    }
    let interrupted = Arc::new(AtomicBool::new(false));
    let mut client = args.vm.connect()?;
    let parameters = args.parameters(client.is_mini_vmm());
    client.execute("migrate-set-parameters", parameters)?;
    let compress = args.compress.is_some();
    if client.is_mini_vmm() || args.channels.is_some() || compress {
        // Compressed pages go through a connection of their own, if it is only one.
        let several = args.channels.is_some_and(|channels| channels > 1) || compress;
        set_capability(&mut client, "multifd", several)?;
    }
    if client.is_mini_vmm() || args.auto_converge {
        set_capability(&mut client, "auto-converge", args.auto_converge)?;
    }
    signal_hook::flag::register(SIGINT, interrupted.clone())
        .map_err(CliError::io("cannot watch for Ctrl-C"))?;
    let uri = hand_over(&mut client, &grants, uri)?;
    client.execute("migrate", json!({ "uri": uri.to_string(), "detach": true }))?;
    if args.detach {
        return Ok(());
    }
    let bar = if args.json { ProgressBar::hidden() } else { progress_bar() };
    let last = follow(&mut client, &interrupted, &bar);
    bar.finish_and_clear();
    let last = last?;
    let report = client.execute("x-mini-vmm-status", json!({}));
    let report = report.map(|mut status| status["report"].take()).unwrap_or(Value::Null);
    if args.json {
        println!("{}", json!({ "migration": last, "report": report }));
    }
    match last["status"].as_str() {
        Some("completed") => {
            if !args.json {
                print_report(&report);
                if args.local {
                    println!("the guest's memory is the same as before: none of it was copied");
                }
            }
            // The source has nothing left to do; it would say goodbye by itself a little later.
            let _ = client.execute("quit", json!({}));
            Ok(())
        }
        Some("cancelled") => Err(CliError::Migration(match last["error-desc"].as_str() {
            Some(why) => format!("the migration was cancelled, the guest goes on here: {why}"),
            None => "the migration was cancelled, the guest goes on here".into(),
        })),
        _ => Err(CliError::Migration(format!(
            "the migration failed: {}",
            last["error-desc"].as_str().unwrap_or("the VM gives no reason")
        ))),
    }
}

fn set_capability(client: &mut QmpClient, name: &str, state: bool) -> Result<(), CliError> {
    let list = json!([{ "capability": name, "state": state }]);
    client.execute("migrate-set-capabilities", json!({ "capabilities": list }))?;
    Ok(())
}

/// A descriptor that this command has goes to the VM; a number that it has not may be one of the VM's
/// own.
fn hand_over(
    client: &mut QmpClient,
    grants: &Grants,
    uri: MigrationUri,
) -> Result<MigrationUri, CliError> {
    let MigrationUri::Descriptor(number) = &uri else { return Ok(uri) };
    let Some(fd) = grants.take(number) else { return Ok(uri) };
    let name = format!("migrate-{}-{number}", std::process::id());
    client.pass_descriptor(&name, fd.as_fd())?;
    Ok(MigrationUri::Descriptor(name))
}

fn progress_bar() -> ProgressBar {
    let style = ProgressStyle::with_template("{bar:24} {percent:>3}%  {msg}");
    ProgressBar::new(1).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

/// Watches until the status is one that does not change any more, and gives the last answer.
fn follow(
    client: &mut QmpClient,
    interrupted: &AtomicBool,
    bar: &ProgressBar,
) -> Result<Value, CliError> {
    let mut asked_to_cancel = false;
    loop {
        if interrupted.load(Ordering::Relaxed) && !asked_to_cancel {
            asked_to_cancel = true;
            bar.println("cancelling …");
            match client.execute("migrate_cancel", json!({})) {
                // It is too late; what comes of it is still worth waiting for.
                Err(e @ ClientError::Refused { .. }) => bar.println(e.to_string()),
                answer => drop(answer?),
            }
        }
        let info = client.execute("query-migrate", json!({})).map_err(|e| match e {
            ClientError::Closed => CliError::Migration(
                "the source ended before it said how the migration went; look at its log and at \
                 the destination before you start the VM anywhere"
                    .into(),
            ),
            e => e.into(),
        })?;
        if matches!(info["status"].as_str(), Some("completed" | "failed" | "cancelled")) {
            return Ok(info);
        }
        show(&info, bar);
        thread::sleep(STEP);
    }
}

fn show(info: &Value, bar: &ProgressBar) {
    let Some(ram) = info.get("ram") else {
        bar.set_message("connecting and comparing");
        return;
    };
    let n = |key: &str| ram[key].as_u64().unwrap_or(0);
    let (total, remaining, page) = (n("total"), n("remaining"), n("page-size"));
    bar.set_length(total.max(1));
    bar.set_position(total.saturating_sub(remaining));
    let rate = ram["mbps"].as_f64().unwrap_or(0.0) * 1e6 / 8.0;
    let mut text = format!(
        "pass {}, {} sent, {}/s, dirtied {}/s, {} left",
        n("dirty-sync-count"),
        HumanBytes(n("transferred")),
        HumanBytes(rate as u64),
        HumanBytes(n("dirty-pages-rate").saturating_mul(page)),
        HumanBytes(remaining),
    );
    if let Some(percent) = info["cpu-throttle-percentage"].as_u64() {
        let rests = |vcpu: &&Value| vcpu["cpu-throttle-percentage"].as_u64() > Some(0);
        match info["x-vcpus"].as_array().map(|all| (all.len(), all.iter().filter(rests).count())) {
            Some((all, resting)) if resting < all => {
                text.push_str(&format!(", {resting} of {all} vCPUs rest {percent} % at most"));
            }
            _ => text.push_str(&format!(", vCPUs rest {percent} %")),
        }
    }
    let ms = |key: &str| info[key].as_u64();
    if let Some(left) = ms("x-expected-total-time").zip(ms("total-time")) {
        text.push_str(&format!(", about {} s to go", left.0.saturating_sub(left.1).div_ceil(1000)));
    }
    if let Some(ms) = ms("expected-downtime") {
        text.push_str(&format!(", downtime about {ms} ms"));
    }
    bar.set_message(text);
}

fn print_report(report: &Value) {
    let ms = |key: &str| report[key].as_f64().unwrap_or(0.0);
    let n = |key: &str| report[key].as_u64().unwrap_or(0);
    println!(
        "completed in {:.3} s: {} pass(es), {} sent, {} pages, {} zero pages, {}/s",
        ms("total-ms") / 1e3,
        n("passes"),
        HumanBytes(n("transferred-bytes")),
        n("normal-pages"),
        n("zero-pages"),
        HumanBytes(report["bytes-per-second"].as_f64().unwrap_or(0.0) as u64),
    );
    let pages = n("normal-pages").saturating_mul(migration::guest::PAGE_SIZE);
    if n("transferred-bytes") < pages {
        println!(
            "compressed: {} of memory's pages, {:.1} times what was sent",
            HumanBytes(pages),
            pages as f64 / n("transferred-bytes").max(1) as f64
        );
    }
    if n("throttle-percent") != 0 {
        println!("the vCPUs rested for {} % of the time at last", n("throttle-percent"));
    }
    if let Some(expected) = report["first-forecast"]["total-ms"].as_f64() {
        println!("after the first pass {:.3} s were expected", expected / 1e3);
    }
    let expected = report["expected-downtime-ms"].as_f64();
    let expected = expected.map(|ms| format!(" ({ms:.1} ms were expected)")).unwrap_or_default();
    println!("the guest stood still for {:.1} ms{expected}:", ms("downtime-ms"));
    for step in report["downtime-steps"].as_array().into_iter().flatten() {
        let name = step["step"].as_str().unwrap_or("?");
        println!("  {name:12} {:8.2} ms", step["ms"].as_f64().unwrap_or(0.0));
    }
    if n("verified-ram-bytes") != 0 {
        println!(
            "verified: {} of memory and {} sections are the same on both sides",
            HumanBytes(n("verified-ram-bytes")),
            n("verified-sections")
        );
    }
}
