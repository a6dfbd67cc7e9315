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
use crate::{bench, images, process, setup};

/// Times in the lab are those of an emulated processor: the tests' deadlines grow by this factor.
const LAB_SLOWNESS: &str = "10";
/// How long one lab test program may take, the lab's boot included.
const LAB_TIMEOUT: Duration = Duration::from_secs(600);
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
    // The system tests run the program itself.
    step("build", &mut || cargo(&["build", "--package", "vmm", "--quiet"], &[]))?;
    step("unit, protocol and KVM tests", &mut || {
        cargo(&["test", "--workspace", "--exclude", "system-tests", "--quiet"], &[])
    })?;
    step("system tests on this machine", &mut || {
        cargo(&["test", "--package", "system-tests", "--", "--test-threads", "1"], &[])
    })?;
    // Its figures mean nothing: this is not the release build, and once is never.
    step("the benchmark, one short round", &mut || {
        let options = bench::Options {
            program: build_vmm(&[])?,
            rivals: Vec::new(),
            scenarios: vec!["dirty".into()],
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
            step(&format!("lab: {}", program.name), &mut || in_lab(&program, &[]))?;
        }
    }
    println!("\nall passed:");
    for Done { name, took } in &done {
        println!("  {:6.0} s  {name}", took.as_secs_f64());
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
    in_lab(program, args)
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

fn in_lab(program: &LabProgram, args: &[String]) -> Result<()> {
    // Made here, where there is a network; the lab finds them in the cache.
    let guest = images::linux_guest(KernelKind::Default)?;
    let path = |p: &Path| p.display().to_string();
    let vmm = program.path.ancestors().nth(2).unwrap_or(Path::new(".")).join("mini-vmm");
    let mut argv = vec![path(&program.path), "--test-threads=1".into(), "--nocapture".into()];
    argv.extend_from_slice(args);
    let command = LabCommand {
        argv,
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
    let run = lab::Run {
        command,
        a: HostOptions::default(),
        b: second,
        results: None,
        timeout: LAB_TIMEOUT,
    };
    // An emulated host may die under its guest, which says nothing about the test: once more then.
    // A test that failed has a status, and is not tried again.
    let status = match lab::run(&run) {
        Err(Error::Interrupted) => return Err(Error::Interrupted),
        Err(error) => {
            println!("=== the lab host did not last; once more, on a new one: {error}");
            lab::run(&run)?
        }
        Ok(status) => status,
    };
    match status {
        0 => Ok(()),
        status => Err(Error::Lab { program: program.name.clone(), status }),
    }
}
