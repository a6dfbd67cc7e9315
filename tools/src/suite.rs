//! `cargo xtask test`: everything that must hold, in the order in which a failure costs least.
//!
//! A step that fails ends the run at once: what comes later would only say the same at greater
//! length. At the end stands how long each step took.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::error::{Error, Result};
use crate::kernel::KernelKind;
use crate::lab::{self, HostOptions, LabCommand, Second};
use crate::{bench, golden, images, process, setup};

/// Times in the lab are those of an emulated processor: the tests' deadlines grow by this factor.
const LAB_SLOWNESS: &str = "5";
/// How long one lab test may take, the lab's boot included: longer than any wait in it, which says what
/// it waited for.
const LAB_TIMEOUT: Duration = Duration::from_secs(480);
/// How often a lab test is tried, each time on a new host (docs/testing.md, "What the lab is not").
const LAB_TRIES: u32 = 4;
/// How many tries may fail in one run of all tests: a change that breaks much is not the lab's fault.
const LAB_FAILURES: u32 = 10;
/// Streams that every later version must read.
const GOLDEN: &str = "tests/golden";
/// Lab tests whose names begin so need a second host.
const PAIR_PREFIX: &str = "lab_pair";

/// One finished step.
struct Done {
    name: String,
    took: Duration,
}

/// Runs everything. `native_only` leaves the lab out.
pub fn run(native_only: bool) -> Result<()> {
    setup::everything()?;
    let mut done = Vec::new();
    let mut failures = Failures::default();
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
            prealloc: true,
            rounds: 1,
            memory_mib: 128,
            iperf_seconds: 1,
        };
        bench::run(&options, &bench::Report::default())
    })?;
    if native_only {
        println!("\nthe lab was left out, as asked");
    } else {
        for program in lab_programs()? {
            let name = format!("lab: {}", program.name);
            step(&name, &mut || in_lab(&program, &[], &mut failures))?;
        }
    }
    println!("\nall passed:");
    for Done { name, took } in &done {
        println!("  {:6.0} s  {name}", took.as_secs_f64());
    }
    for failure in &failures.0 {
        println!("passed at a later try only: {failure}");
    }
    Ok(())
}

/// Builds `mini-vmm` and the lab's tests, and runs one of their programs in the lab, with these
/// arguments for it.
pub fn run_in_lab(name: &str, args: &[String]) -> Result<()> {
    cargo(&["build", "--package", "vmm", "--quiet"], &[])?;
    let programs = lab_programs()?;
    let program = programs.iter().find(|program| program.name == name);
    let known: Vec<&str> = programs.iter().map(|program| program.name.as_str()).collect();
    let program = program
        .ok_or_else(|| Error::NoLabProgram { name: name.into(), known: known.join(", ") })?;
    in_lab(program, args, &mut Failures::default())
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
pub fn build_vmm(options: &[&str]) -> Result<PathBuf> {
    let mut command = Command::new(cargo_program());
    command.args(["build", "--package", "vmm", "--bin", "mini-vmm", "--message-format=json"]);
    let messages = process::output(command.arg("--quiet").args(options))?;
    let built = messages
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .find_map(|message| Some(PathBuf::from(message.get("executable")?.as_str()?)));
    built.ok_or_else(|| Error::Bench {
        what: "cargo does not say where it put mini-vmm".to_owned(),
        found: process::tail(&messages),
    })
}

/// A test program for the lab.
struct LabProgram {
    name: String,
    path: PathBuf,
}

/// Builds the lab's tests and says where they are.
fn lab_programs() -> Result<Vec<LabProgram>> {
    let build = ["test", "--package", "system-tests", "--features", "lab", "--no-run", "--quiet"];
    // Once for people, who want to read what does not compile, and once for the paths.
    cargo(&build, &[])?;
    let mut command = Command::new(cargo_program());
    command.args(build).arg("--message-format=json");
    let messages = process::output(&mut command)?;
    let mut programs: Vec<_> = messages
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .filter_map(|message| {
            let name = message.pointer("/target/name")?.as_str()?;
            let path = message.get("executable")?.as_str()?;
            name.starts_with("lab_").then(|| LabProgram { name: name.into(), path: path.into() })
        })
        .collect();
    programs.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(programs)
}

/// The names of a program's tests, those that contain `filter`.
fn tests_of(program: &LabProgram, filter: &[String]) -> Result<Vec<String>> {
    let mut command = Command::new(&program.path);
    let listed = process::output(command.args(["--list", "--format", "terse"]).args(filter))?;
    let name = |line: &str| line.strip_suffix(": test").map(str::to_owned);
    Ok(listed.lines().filter_map(name).collect())
}

/// Tries of lab tests that have failed, and why.
#[derive(Default)]
struct Failures(Vec<String>);

/// Runs the tests of a program, each on a lab host of its own, so that a host which one of them has
/// brought down harms no other.
fn in_lab(program: &LabProgram, filter: &[String], failures: &mut Failures) -> Result<()> {
    let tests = tests_of(program, filter)?;
    if tests.is_empty() {
        return Err(Error::NoLabTest { program: program.name.clone(), filter: filter.join(" ") });
    }
    for test in tests {
        let run = lab_run(program, &test)?;
        let mut tries = 1;
        while let Err(why) = lab_try(program, &test, &run) {
            failures.0.push(format!("{}, {test}, try {tries}: {why}", program.name));
            let spent = failures.0.len() > LAB_FAILURES as usize;
            if matches!(why, Error::Interrupted) || tries == LAB_TRIES || spent {
                return Err(why);
            }
            println!(
                "=== {test}: try {tries} of {LAB_TRIES} failed, once more on a new host: {why}"
            );
            tries += 1;
        }
        if tries > 1 {
            println!("=== {test}: passed at try {tries}");
        }
    }
    Ok(())
}

fn lab_try(program: &LabProgram, test: &str, run: &lab::Run) -> Result<()> {
    match lab::run(run)? {
        0 => Ok(()),
        status => Err(Error::Lab { program: format!("{}, {test},", program.name), status }),
    }
}

/// One test of a program as a run of the lab.
fn lab_run(program: &LabProgram, test: &str) -> Result<lab::Run> {
    // Made here, where there is a network; the lab finds them in the cache.
    let guest = images::linux_guest(KernelKind::Default)?;
    let path = |p: &Path| p.display().to_string();
    let vmm = program.path.ancestors().nth(2).unwrap_or(Path::new(".")).join("mini-vmm");
    let options = ["--exact", "--test-threads=1", "--nocapture"].map(str::to_owned);
    let command = LabCommand {
        argv: [path(&program.path), test.to_owned()].into_iter().chain(options).collect(),
        env: vec![
            ("MINI_VMM".into(), path(&vmm)),
            ("MINI_VMM_TEST_SLOWNESS".into(), LAB_SLOWNESS.into()),
            ("MINI_VMM_GUEST_KERNEL".into(), path(&guest.bzimage)),
            ("MINI_VMM_GUEST_INITRD".into(), path(&guest.initrd)),
            ("MINI_VMM_GUEST_TOOL".into(), path(&guest.guest_tool)),
        ],
        cwd: std::env::current_dir()
            .map_err(|source| Error::Start { program: "the lab".into(), source })?,
    };
    let second = program.name.starts_with(PAIR_PREFIX).then(|| Second {
        options: HostOptions {
            kernel: KernelKind::Backports,
            cpu: Some("-avx2,-pku".into()),
            ..HostOptions::default()
        },
        command: None,
    });
    Ok(lab::Run {
        command,
        a: HostOptions::default(),
        b: second,
        results: None,
        timeout: LAB_TIMEOUT,
    })
}
