//! The tests that need a real KVM, each on a lab host of its own.
//!
//! A lab host has one processor, so several run side by side, as many as this machine has processors and
//! at most four. What a test has to say is kept until it is over.

use std::collections::VecDeque;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::{cargo, cargo_program};
use crate::error::{Doing, Error, Result};
use crate::kernel::KernelKind;
use crate::lab::{self, HostOptions, LabCommand, Output, Second};
use crate::{images, process};

/// Times in the lab are those of an emulated processor: the tests' deadlines grow by this factor.
const SLOWNESS: &str = "5";
/// How long one test may take, the lab's boot included: longer than most waits in it, which say what they
/// waited for, and than the longest test takes (400 s) where processors are half as fast for a while. To try it once
/// more takes longer than to let it go on; a host that is dead is noticed within a minute.
const TIMEOUT: Duration = Duration::from_secs(900);
/// How often a test is tried, each time on a new host (docs/testing.md, "What the lab is not").
const TRIES: u32 = 4;
/// How many tries may fail in one run of all tests: a change that breaks much is not the lab's fault.
const FAILURES: usize = 10;

/// How many hosts there are at a time at most: each may use 4 GiB of memory.
const AT_ONCE: usize = 4;

/// What has failed so far.
#[derive(Default)]
pub(super) struct Failures {
    /// Tries, and why.
    tries: Mutex<Vec<String>>,
    /// A test has failed for good, and nothing need be tried any more.
    is_final: AtomicBool,
}

impl Failures {
    /// For whoever reads the end of a run that has passed.
    pub(super) fn print(&self) {
        for failure in locked(&self.tries).iter() {
            println!("passed at a later try only: {failure}");
        }
    }

    /// Notes one, and says how many that makes.
    fn note(&self, failure: String) -> usize {
        let mut all = locked(&self.tries);
        all.push(failure);
        all.len()
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Builds `mini-vmm` and the lab's tests, and runs them all.
pub fn whole_lab() -> Result<()> {
    cargo(&["build", "--package", "vmm", "--quiet"], &[])?;
    let failures = Failures::default();
    all(&failures)?;
    failures.print();
    Ok(())
}

/// Runs all of them.
pub(super) fn all(failures: &Failures) -> Result<()> {
    let programs = lab_programs()?;
    let mut tests = Vec::new();
    for program in &programs {
        tests.extend(some_tests_of(program, &[])?.into_iter().map(|test| (program, test)));
    }
    if tests.is_empty() {
        return Err(Error::NoLabProgram { name: "lab_…".into(), known: String::new() });
    }
    let (pairs, single): (Vec<_>, Vec<_>) =
        tests.into_iter().partition(|(program, _)| program.is_pair());
    let queue = Mutex::new(VecDeque::from(single));
    let failed = Mutex::new(None);
    let worker = || {
        while !failures.is_final.load(Ordering::Relaxed) {
            let Some((program, test)) = locked(&queue).pop_front() else { break };
            if let Err(error) = kept_apart(program, &test, failures) {
                failures.is_final.store(true, Ordering::Relaxed);
                locked(&failed).get_or_insert(error);
            }
        }
    };
    let count = thread::available_parallelism().map_or(1, usize::from).min(AT_ONCE);
    thread::scope(|scope| {
        for _ in 0..count {
            scope.spawn(worker);
        }
    });
    if let Some(error) = locked(&failed).take() {
        return Err(error);
    }
    // Two hosts each.
    pairs.into_iter().try_for_each(|(program, test)| kept_apart(program, &test, failures))
}

/// Runs one test, and prints what it said when it is over.
fn kept_apart(program: &LabProgram, test: &str, failures: &Failures) -> Result<()> {
    let start = Instant::now();
    let file = tempfile::NamedTempFile::new().doing(|| "create a temporary file".to_owned())?;
    // Whoever reads it has a place of its own in it.
    let open = || file.reopen().doing(|| format!("open {}", file.path().display()));
    let result = tried(program, test, Output::File(Arc::new(open()?)), failures);
    let verdict = super::verdict(&result);
    let mut out = io::stdout().lock();
    io::copy(&mut open()?, &mut out).doing(|| "print what a test has said".to_owned())?;
    println!("=== {}, {test}: {verdict} ({:.0} s)", program.name, start.elapsed().as_secs_f64());
    result
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
    let tests = some_tests_of(program, args)?;
    let failures = Failures::default();
    tests.iter().try_for_each(|test| tried(program, test, Output::Own, &failures))
}

/// Runs one test, on a host of its own, so that a host which it brings down harms no other; and once more
/// where it fails.
fn tried(program: &LabProgram, test: &str, output: Output, failures: &Failures) -> Result<()> {
    let run = lab_run(program, test, output.clone())?;
    let mut tries = 1;
    while let Err(why) = lab_try(program, test, &run) {
        let all = failures.note(format!("{}, {test}, try {tries}: {why}", program.name));
        let last = matches!(why, Error::Interrupted) || tries == TRIES || all > FAILURES;
        if last || failures.is_final.load(Ordering::Relaxed) {
            output.say(format_args!("{test}: try {tries} of {TRIES} failed: {why}"));
            return Err(why);
        }
        output.say(format_args!("{test}: try {tries} of {TRIES} failed, once more: {why}"));
        tries += 1;
    }
    if tries > 1 {
        output.say(format_args!("{test}: passed at try {tries}"));
    }
    Ok(())
}

fn lab_try(program: &LabProgram, test: &str, run: &lab::Run) -> Result<()> {
    match lab::run(run)? {
        0 => Ok(()),
        status => Err(Error::Lab { program: format!("{}, {test},", program.name), status }),
    }
}

/// A test program for the lab.
struct LabProgram {
    name: String,
    path: PathBuf,
}

impl LabProgram {
    /// Whether its tests need a second host.
    fn is_pair(&self) -> bool {
        self.name.starts_with("lab_pair")
    }
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

/// The same, and there is one.
fn some_tests_of(program: &LabProgram, filter: &[String]) -> Result<Vec<String>> {
    let tests = tests_of(program, filter)?;
    if tests.is_empty() {
        return Err(Error::NoLabTest { program: program.name.clone(), filter: filter.join(" ") });
    }
    Ok(tests)
}

/// One test of a program as a run of the lab.
fn lab_run(program: &LabProgram, test: &str, output: Output) -> Result<lab::Run> {
    // Made here, where there is a network; the lab finds them in the cache.
    let guest = images::linux_guest(KernelKind::Default)?;
    let path = |p: &Path| p.display().to_string();
    let vmm = program.path.ancestors().nth(2).unwrap_or(Path::new(".")).join("mini-vmm");
    let options = ["--exact", "--test-threads=1", "--nocapture"].map(str::to_owned);
    let command = LabCommand {
        argv: [path(&program.path), test.to_owned()].into_iter().chain(options).collect(),
        env: vec![
            ("MINI_VMM".into(), path(&vmm)),
            ("MINI_VMM_TEST_SLOWNESS".into(), SLOWNESS.into()),
            ("MINI_VMM_GUEST_KERNEL".into(), path(&guest.bzimage)),
            ("MINI_VMM_GUEST_VMLINUX".into(), path(&guest.vmlinux)),
            ("MINI_VMM_GUEST_INITRD".into(), path(&guest.initrd)),
            ("MINI_VMM_GUEST_TOOL".into(), path(&guest.guest_tool)),
        ],
        cwd: std::env::current_dir()
            .map_err(|source| Error::Start { program: "the lab".into(), source })?,
    };
    let second = program.is_pair().then(|| Second {
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
        timeout: TIMEOUT,
        output,
    })
}
