//! The lab: virtual machines that have this machine's files, and a real KVM where it has none.
//!
//! A lab host is an emulated AMD processor with SVM and nested paging (QEMU's TCG), a Debian kernel
//! with `kvm_amd`, and this machine's root directory over 9p: whatever program is installed or
//! built here runs there, with no disk image to make. Writes go to a layer in the host's memory and
//! are gone afterwards, except in the results directory, which is shared at the same path.
//!
//! Start reading at [`run`]; `host` is one virtual machine, `resources/lab/init` its first process.

mod emulator;
mod host;
mod image;
pub mod peer;
mod streams;

pub use streams::Output;

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::cache;
use crate::error::{Doing, Error, Result};
use crate::kernel::{Kernel, KernelKind};
use crate::setup;
use emulator::Emulator;
use host::Host;

/// How often the run looks for what no event tells: signals, deadlines, a dead QEMU.
const TICK: Duration = Duration::from_millis(100);

/// How long a host may take to shut down after its command.
const SHUTDOWN: Duration = Duration::from_secs(20);

/// How long the other host of a pair may go on after one's command has failed.
const GRACE: Duration = Duration::from_secs(30);

/// The address of host A on the link between two hosts.
pub const ADDRESS_A: &str = "192.168.77.1";
/// The address of host B on the link between two hosts.
pub const ADDRESS_B: &str = "192.168.77.2";

/// One lab host as asked for.
#[derive(Debug, Clone)]
pub struct HostOptions {
    /// Its kernel.
    pub kernel: KernelKind,
    /// Features added to or taken from its processor, as in `-avx2,-pku`.
    pub cpu: Option<String>,
    /// Its processors. With more than one, hosts and their guests die now and then of the emulator's faults
    /// (docs/testing.md).
    pub smp: u32,
    /// Its memory in MiB.
    pub memory_mib: u32,
}

impl Default for HostOptions {
    fn default() -> Self {
        HostOptions { kernel: KernelKind::Default, cpu: None, smp: 1, memory_mib: 4096 }
    }
}

/// What a lab host runs.
#[derive(Debug, Clone)]
pub struct LabCommand {
    /// Program and arguments.
    pub argv: Vec<String>,
    /// Variables on top of those that are passed on from here (see `image.rs`).
    pub env: Vec<(String, String)>,
    /// The working directory.
    pub cwd: PathBuf,
}

/// One run of the lab.
#[derive(Debug)]
pub struct Run {
    /// Host A's command.
    pub command: LabCommand,
    /// Host A.
    pub a: HostOptions,
    /// Host B, if there is one.
    pub b: Option<Second>,
    /// The directory that the hosts share with this machine; a new one where none is named.
    pub results: Option<PathBuf>,
    /// How long all of it may take, boot included.
    pub timeout: Duration,
    /// Where the commands' output goes.
    pub output: Output,
}

/// The second host of a pair.
#[derive(Debug)]
pub struct Second {
    /// The host.
    pub options: HostOptions,
    /// Its command; without one it runs what host A asks it to (see [`peer`]) until A ends.
    pub command: Option<LabCommand>,
}

/// Boots the host or hosts, runs the commands, and returns their exit status: the first that is not
/// zero.
///
/// # Errors
/// When a host can't be made, dies, or takes too long; when a signal asks this process to end. No
/// virtual machine outlives this call.
pub fn run(run: &Run) -> Result<u8> {
    setup::lab()?;
    let emulator = Emulator::get()?;
    let interrupted = watch_signals()?;
    let results = Results::new(run.results.clone())?;
    let scratch = tempfile::tempdir().doing(|| "create a temporary directory".to_owned())?;
    let (events, receiver) = mpsc::channel();
    let start = Instant::now();

    let mut plans = vec![host::Plan {
        letter: 'a',
        emulator: emulator.clone(),
        kernel: Kernel::get(run.a.kernel)?,
        options: run.a.clone(),
        command: run.command.clone(),
        output: run.output.clone(),
        link: run.b.as_ref().map(|_| scratch.path().join("link")),
    }];
    if let Some(second) = &run.b {
        let command = match &second.command {
            Some(command) => command.clone(),
            None => peer::server_command()?,
        };
        plans.push(host::Plan {
            letter: 'b',
            emulator,
            kernel: Kernel::get(second.options.kernel)?,
            options: second.options.clone(),
            command,
            output: run.output.clone(),
            link: Some(scratch.path().join("link")),
        });
    }
    let b_serves = run.b.as_ref().is_some_and(|second| second.command.is_none());

    let mut hosts = Vec::new();
    for plan in plans {
        hosts.push(Host::start(plan, &results.dir, scratch.path(), events.clone())?);
    }

    // A host without a command of its own is done when the other is.
    let waited_for = if b_serves { 1 } else { hosts.len() };
    let deadline = start + run.timeout;
    let mut failed_at = None;
    while hosts[..waited_for].iter().any(|host| host.status().is_none()) {
        if interrupted.load(Ordering::Relaxed) {
            return Err(Error::Interrupted);
        }
        // In this order: what a host that is gone had still to say is in the queue by then.
        let gone = hosts.iter_mut().map(Host::is_gone).collect::<Result<Vec<bool>>>()?;
        let first = receiver.recv_timeout(TICK);
        for event in first.into_iter().chain(receiver.try_iter()) {
            hosts
                .iter_mut()
                .filter(|host| host.letter() == event.host)
                .for_each(|host| host.note(&event.line, start));
        }
        for (host, gone) in hosts.iter().zip(gone).filter(|(host, _)| host.status().is_none()) {
            if gone {
                return Err(host.died());
            }
            if host.is_silent() {
                return Err(host.silent());
            }
            if Instant::now() > deadline {
                return Err(host.timed_out(run.timeout));
            }
        }
        if hosts.iter().filter_map(Host::status).any(|status| status != 0) {
            let since = *failed_at.get_or_insert_with(Instant::now);
            if since.elapsed() > GRACE {
                run.output.say(format_args!(
                    "stopping the other lab host, {} s after this failure",
                    GRACE.as_secs()
                ));
                break;
            }
        }
    }
    let status = hosts.iter().filter_map(Host::status).find(|status| *status != 0).unwrap_or(0);
    for host in hosts.into_iter().filter(|host| host.status().is_some()) {
        host.finish(Instant::now() + SHUTDOWN)?;
    }
    results.done(status, &run.output);
    Ok(status)
}

/// The flag that SIGINT and SIGTERM raise, from the first run on and for the rest of the process.
fn watch_signals() -> Result<Arc<AtomicBool>> {
    static FLAG: Mutex<Option<Arc<AtomicBool>>> = Mutex::new(None);
    let mut watched = FLAG.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(flag) = &*watched {
        return Ok(Arc::clone(flag));
    }
    let flag = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(&flag))
            .doing(|| format!("watch for signal {signal}"))?;
    }
    *watched = Some(Arc::clone(&flag));
    Ok(flag)
}

/// The directory shared between the hosts and this machine.
struct Results {
    dir: PathBuf,
    ours: bool,
}

impl Results {
    fn new(asked: Option<PathBuf>) -> Result<Results> {
        if let Some(dir) = asked {
            cache::create_dir(&dir)?;
            let dir = dir.canonicalize().doing(|| format!("find {}", dir.display()))?;
            return Ok(Results { dir, ours: false });
        }
        let parent = cache::root()?.join("lab-runs");
        cache::create_dir(&parent)?;
        let dir = tempfile::Builder::new()
            .prefix("run-")
            .tempdir_in(&parent)
            .doing(|| format!("create a directory in {}", parent.display()))?;
        Ok(Results { dir: dir.keep(), ours: true })
    }

    /// Removes a directory that nobody asked for, unless something in it may explain a failure.
    fn done(self, status: u8, output: &Output) {
        if status != 0 {
            output.say(format_args!(
                "the lab command ended with status {status}; logs are in {}",
                self.dir.display()
            ));
        } else if self.ours {
            // A leftover directory in the cache harms nobody.
            let _ = std::fs::remove_dir_all(&self.dir);
        }
    }
}
