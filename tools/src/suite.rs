//! `cargo xtask test`: everything that must hold, in the order in which a failure costs least.
//!
//! A step that fails ends the run at once: what comes later would only say the same at greater
//! length. At the end stands how long each step took.

mod lab_tests;

pub use lab_tests::{run_in_lab, whole_lab};

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::error::{Error, Result};
use crate::{bench, golden, process, setup};
use lab_tests::Failures;

/// Streams that every later version must read.
const GOLDEN: &str = "tests/golden";

/// One finished step.
struct Done {
    name: String,
    took: Duration,
}

/// Runs everything. `native_only` leaves the lab out.
pub fn run(native_only: bool) -> Result<()> {
    setup::everything()?;
    let mut done = Vec::new();
    let failures = Failures::default();
    let mut step = |name: &str, work: &mut dyn FnMut() -> Result<()>| {
        println!("\n=== {name}");
        let start = Instant::now();
        let result = work();
        let took = start.elapsed();
        println!("=== {name}: {} ({:.0} s)", verdict(&result), took.as_secs_f64());
        done.push(Done { name: name.to_owned(), took });
        result
    };
    step("format", &mut || cargo(&["fmt", "--all", "--check"], &[]))?;
    step("lints", &mut || {
        cargo(&["clippy", "--workspace", "--all-targets", "--quiet", "--", "-D", "warnings"], &[])
    })?;
    step("documentation", &mut || {
        let deny = [("RUSTDOCFLAGS", "-D warnings")];
        cargo(&["doc", "--workspace", "--no-deps", "--quiet"], &deny)
    })?;
    step("licences and sources of dependencies", &mut dependencies)?;
    step("recorded streams", &mut || {
        golden::check(Path::new(GOLDEN))?;
        // Others, where this machine has some.
        match std::env::var_os("MINI_VMM_GOLDEN") {
            Some(folder) => golden::check(Path::new(&folder)).map(drop),
            None => Ok(()),
        }
    })?;
    step("hostile bytes for every section, a minute", &mut || fuzz(Duration::from_secs(60), None))?;
    // The system tests run the program itself.
    step("build", &mut || cargo(&["build", "--package", "vmm", "--quiet"], &[]))?;
    step("unit, protocol and KVM tests", &mut || {
        cargo(&["test", "--workspace", "--exclude", "system-tests", "--quiet"], &[])
    })?;
    step("system tests on this machine", &mut || {
        cargo(&["test", "--package", "system-tests", "--", "--test-threads", "1"], &[])
    })?;
    step("the same over four connections, where it makes a difference", &mut || {
        let programs = ["native_moves", "native_sizes", "native_failures"];
        let named = programs.iter().flat_map(|name| ["--test", name]);
        let mut args = vec!["test", "--package", "system-tests"];
        args.extend(named);
        // A proxy is for one connection.
        args.extend(["--", "--test-threads", "1", "--skip", "_cut_", "--skip", "_is_cut_"]);
        cargo(&args, &[("MINI_VMM_TEST_CHANNELS", "4")])
    })?;
    // Its figures mean nothing: this is not the release build, and once is never.
    step("the benchmark, one short round", &mut || {
        let options = bench::Options {
            program: build_vmm(&[])?,
            rivals: Vec::new(),
            scenarios: vec!["dirty".into()],
            channels: Some(2),
            verify: false,
            dirty_ring: None,
            local: false,
            beside: false,
            prealloc: true,
            rounds: 1,
            size: bench::rival::Size { memory_mib: 128, vcpus: 1 },
            iperf_seconds: 1,
        };
        bench::run(&options, &bench::Report::default())
    })?;
    if native_only {
        println!("\nthe lab was left out, as asked");
    } else {
        step("the lab", &mut || lab_tests::all(&failures))?;
    }
    println!("\nall passed:");
    for Done { name, took } in &done {
        println!("  {:6.0} s  {name}", took.as_secs_f64());
    }
    failures.print();
    Ok(())
}

/// Gives every section of a machine changed bytes for so long, from this seed on.
pub fn fuzz(time: Duration, seed: Option<u64>) -> Result<()> {
    let seconds = time.as_secs().to_string();
    let seed = seed.map(|seed| seed.to_string());
    let mut env = vec![("MINI_VMM_FUZZ_SECONDS", seconds.as_str())];
    env.extend(seed.as_deref().map(|seed| ("MINI_VMM_FUZZ_SEED", seed)));
    let test = ["test", "--package", "vmm", "--test", "fuzz_sections", "--quiet"];
    cargo(&[test.as_slice(), &["--", "--nocapture"]].concat(), &env)
}

/// Attacks migrations of this build's program, with these arguments for the one that does it.
pub fn faults(args: &[String]) -> Result<()> {
    let vmm = build_vmm(&[])?.display().to_string();
    let run = ["run", "--package", "system-tests", "--bin", "faults", "--quiet", "--"];
    let args: Vec<&str> = run.into_iter().chain(args.iter().map(String::as_str)).collect();
    cargo(&args, &[("MINI_VMM", vmm.as_str())])
}

fn verdict(result: &Result<()>) -> &'static str {
    if result.is_ok() { "passed" } else { "FAILED" }
}

fn cargo_program() -> OsString {
    std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into())
}

fn cargo(args: &[&str], env: &[(&str, &str)]) -> Result<()> {
    process::run(Command::new(cargo_program()).args(args).envs(env.iter().copied()))
}

/// `cargo deny` where it is installed. It takes minutes to build, and what it checks changes only
/// with `Cargo.lock`, so it is not fetched for every run.
fn dependencies() -> Result<()> {
    let there = Command::new(cargo_program())
        .args(["deny", "--version"])
        .output()
        .is_ok_and(|done| done.status.success());
    if there {
        return cargo(&["deny", "--all-features", "check", "bans", "licenses", "sources"], &[]);
    }
    println!("cargo-deny is not installed: only that Cargo.lock fits is checked");
    println!("(cargo install --locked cargo-deny, to have licences and sources checked too)");
    let metadata = ["metadata", "--locked", "--format-version", "1"];
    process::output(Command::new(cargo_program()).args(metadata)).map(drop)
}

/// Builds `mini-vmm` with these options of `cargo build` more, and says where it is.
///
/// What cargo says of its progress, and of another cargo that it waits for, is shown: a first
/// build takes minutes.
pub fn build_vmm(options: &[&str]) -> Result<PathBuf> {
    let mut command = Command::new(cargo_program());
    command.args(["build", "--package", "vmm", "--bin", "mini-vmm"]);
    command.arg("--message-format=json-render-diagnostics").args(options);
    let messages = process::output_told(&mut command)?;
    let built = messages
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .find_map(|message| Some(PathBuf::from(message.get("executable")?.as_str()?)));
    built.ok_or_else(|| Error::Bench {
        what: "cargo does not say where it put mini-vmm".to_owned(),
        found: process::tail(&messages),
    })
}
