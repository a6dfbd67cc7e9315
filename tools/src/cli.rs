//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use xtask::bench;
use xtask::error::{Doing, Result};
use xtask::kernel::{Kernel, KernelKind};
use xtask::lab::{self, HostOptions, LabCommand, Second};
use xtask::setup;

/// The project's tools.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", version, long_about = LONG_ABOUT)]
pub(crate) struct Cli {
    #[command(subcommand)]
    command: Command,
}

const LONG_ABOUT: &str = "\
The project's tools: set-up, tests, and a lab with real KVM.

They need Debian 12 on x86-64, and root or sudo only where packages are missing. What is fetched or \
built is kept in $XDG_CACHE_HOME/mini-vmm (else ~/.cache/mini-vmm); removing that directory makes \
the tools start afresh.

  cargo xtask demo                       a running VM moves, before your eyes
  cargo xtask test                       all there is to test (--native-only: without the lab)
  cargo xtask bench                      mini-vmm against QEMU, measured in one run
  cargo xtask lab run -- COMMAND         run anything on a host with real KVM
  cargo xtask lab test lab_linux         one of the lab's test programs
  cargo xtask lab pair -- COMMAND        two hosts with different kernels and processors";

#[derive(Subcommand)]
enum Command {
    /// Build mini-vmm and watch a running VM leave one process and go on in another
    Demo {
        /// Arguments of `mini-vmm demo`
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Run all tests: formatting, lints, documentation, unit tests, system tests, the lab
    Test {
        /// Leave the lab out
        #[arg(long)]
        native_only: bool,
    },
    /// Measure mini-vmm against QEMU, and others, in one run with interleaved rounds
    #[command(long_about = BENCH_ABOUT)]
    Bench(BenchArgs),
    /// Measure what a move costs more for each MiB, vCPU and device
    Growth(GrowthArgs),
    /// Give every section of a machine bytes as a hostile source would send them
    Fuzz {
        /// For how long: 60s, 8h
        #[arg(long, default_value = "60s", value_name = "TIME", value_parser = duration)]
        time: Duration,
        /// Begin where an earlier run began, which has printed this
        #[arg(long, value_name = "NUMBER")]
        seed: Option<u64>,
    },
    /// Attack migrations, each in a way that follows from a seed and a number (docs/faults.md)
    Faults(FaultsArgs),
    /// Read the streams in a folder to their last bytes, and write them the same
    ///
    /// Files may be packed with xz, gzip or zstd.
    Golden {
        /// Where they are
        #[arg(required_unless_present = "strip")]
        folder: Option<PathBuf>,
        /// Write the stream in a file without its pages to a new file, packed by xz
        #[arg(long, num_args = 2, value_names = ["FROM", "TO"], conflicts_with = "folder")]
        strip: Option<Vec<PathBuf>>,
    },
    /// Install and fetch what the tools need (they also do so themselves when they need it)
    Setup,
    /// Make the files of a Linux guest for tests, and print where they are
    Images {
        /// The guest's kernel
        #[arg(long, default_value = "default")]
        kernel: KernelKind,
    },
    /// Lab hosts: virtual machines with this machine's files and a real KVM
    #[command(subcommand, long_about = LAB_ABOUT)]
    Lab(Lab),
}

const BENCH_ABOUT: &str = "\
Measures mini-vmm (the release build) against Debian's QEMU, and others, in one run.

Each round, each scenario: each rival boots the self-checking guest and migrates it over loopback to \
a second process of its own; then the guest verifies all of its memory. In each round one iperf3 \
stream says what loopback can do, and one with -C reno, as mini-vmm asks for inside a host, what it can \
do where the host's congestion control paces its streams. Printed are medians and spread.

  total        as the source's query-migrate says
  downtime     as the source says, and as the destination says (only mini-vmm does)
  gap          the time between two timer interrupts of the guest's first vCPU, by the host's clock: \
the longest of the whole move, and that across the hand-over (or the shortest of 32 that were longer)
  off          by how much a downtime contradicts the latter: it may be less by up to the 1 ms between \
two ticks, and not more
  throughput   the source's bytes by its total time
  memory       proportional set size of all mappings but guest RAM, from /proc/PID/smaps; while \
migrating (only with --beside) the resident set size, for both sides share a program here
  own work     (in `work`) pages that the guest got done in a ms of its own time, from the order to \
migrate until it stands still, as a part of those in the two seconds before
  first word   from exec to the guest's first byte on the serial port; QEMU's has its firmware in it

Scenarios: idle, dirty (an eighth of memory rewritten at 78 MiB/s), hot (a quarter, as fast as the \
guest can; only when asked for), work (the guest rewrites and verifies memory without rest, and the \
migration has a link of 10 Gbit/s, 1250 MB/s: how much of its work it does meanwhile; only when asked \
for). In none is any page zero. A rival is a QEMU or a mini-vmm, told \
apart by what it says to --version.

To be sure of a change: build both, and name the older one with --rival old=PATH.";

const LAB_ABOUT: &str = "\
Lab hosts: virtual machines with this machine's files and a real KVM.

A lab host is an emulated AMD processor with SVM and a Debian kernel with kvm_amd. It sees this \
machine's whole file tree; what it writes is gone afterwards, except in the results directory, which \
is shared at the same path. In it are /dev/kvm, /dev/net/tun, loop, veth, bridge. Programs built here \
run there. The command gets PATH, HOME, RUST_*, MINI_VMM_* and:

  MINI_VMM_LAB_HOST      a or b
  MINI_VMM_LAB_RESULTS   the results directory
  MINI_VMM_LAB_XTASK     this program
  MINI_VMM_LAB_ADDRESS, MINI_VMM_LAB_PEER   (pair) the host's own address and the other's

Files opened with O_DIRECT must lie in the results directory: what is written elsewhere is held by a \
tmpfs, which has no O_DIRECT.

A test for the lab is a file tests/tests/lab_NAME.rs with an entry in tests/Cargo.toml that says \
required-features = [\"lab\"]; `cargo xtask lab test lab_NAME` builds and runs it, and `cargo xtask \
test` runs them all. lab_pair… get a second host.

Times in the lab are those of an emulated processor: compare them with each other only.
The exit status is the command's; 124 after the timeout, 125 when the host died.";

#[derive(Subcommand)]
enum Lab {
    /// Run a command on a lab host
    Run {
        #[command(flatten)]
        host: HostArgs,
        #[command(flatten)]
        run: RunArgs,
    },
    /// Run a command on a lab host that is joined to a second one
    ///
    /// The second host, B, has another kernel and a processor with less. Without --b it runs what
    /// the command on A asks it to: "$MINI_VMM_LAB_XTASK" lab on-peer -- COMMAND. With --b it runs
    /// that, at the same time, and both must succeed.
    Pair {
        #[command(flatten)]
        host: HostArgs,
        /// Host B's kernel
        #[arg(long, default_value = "backports", value_name = "KERNEL")]
        kernel_b: KernelKind,
        /// Features that are taken from (or added to) host B's processor
        #[arg(
            long,
            default_value = "-avx2,-pku",
            allow_hyphen_values = true,
            value_name = "FEATURES"
        )]
        cpu_b: String,
        /// A shell command for host B
        #[arg(long, value_name = "SHELL-COMMAND")]
        b: Option<String>,
        #[command(flatten)]
        run: RunArgs,
    },
    /// Build and run the lab's tests, or one of their programs (tests/tests/lab_*.rs)
    ///
    /// Those named lab_pair… get a second host.
    Test {
        /// The program, as in lab_linux; without one all run, several at a time
        program: Option<String>,
        /// Arguments for it: names of tests, and whatever else a Rust test program takes
        #[arg(last = true, requires = "program", value_name = "ARGS")]
        args: Vec<String>,
    },
    /// (In a pair) Run a command on the other host; killing this kills it
    OnPeer {
        /// The command and its arguments
        #[arg(last = true, required = true, value_name = "COMMAND")]
        command: Vec<String>,
    },
    /// (In a pair) Serve the other host's `on-peer`
    #[command(hide = true)]
    Serve,
}

#[derive(Args)]
struct BenchArgs {
    /// Measure everything that there is a target for, and end with a table of all: more than an hour with 7 rounds
    #[arg(
        long,
        conflicts_with_all = [
            "scenarios", "channels", "smp", "verify", "dirty_ring", "local", "fresh_memory", "beside", "compare"
        ]
    )]
    all: bool,
    /// How often each is measured
    #[arg(long, default_value_t = 7, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// The guest's memory: 512M, 2G
    #[arg(long, default_value = "2G", value_name = "SIZE", value_parser = mebibytes)]
    memory: u64,
    /// The guest's vCPUs, 1 to 64, all of which tick and do its work
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=64))]
    smp: u64,
    /// What the guest does: idle, dirty, hot, work (repeatable; idle and dirty when not given)
    #[arg(long = "scenario", value_name = "NAME")]
    scenarios: Vec<String>,
    /// Measure both with so many connections as well, 2 to 16
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(2..=16))]
    channels: Option<u8>,
    /// Measure mini-vmm alone, with and without `migrate --verify`, and say what that costs
    #[arg(long)]
    verify: bool,
    /// Measure mini-vmm alone, with the dirty log and with dirty rings of so many entries
    #[arg(long, value_name = "ENTRIES", conflicts_with = "verify")]
    dirty_ring: Option<u32>,
    /// Measure mini-vmm alone, with memory that is copied and with `migrate --local`
    #[arg(long, conflicts_with_all = ["verify", "channels", "dirty_ring"])]
    local: bool,
    /// Let destinations allocate the guest's memory as it comes, and not before
    #[arg(long)]
    fresh_memory: bool,
    /// In the first three rounds of idle, look at both sides' memory in a slow move more, which counts for nothing else
    #[arg(long)]
    beside: bool,
    /// One more program to measure, another mini-vmm or another QEMU (repeatable)
    #[arg(long = "rival", value_name = "NAME=PATH", value_parser = bench::rival::parse)]
    rivals: Vec<(String, PathBuf)>,
    /// Write the results to a file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Draw throughput, downtime, and the steps of mini-vmm's pause, in files of this directory
    #[arg(long, value_name = "DIR")]
    plots: Option<PathBuf>,
    /// Show what changed since the results in a file
    #[arg(long, value_name = "OLD.json")]
    compare: Option<PathBuf>,
    /// Fail if a target is missed
    #[arg(long)]
    check: bool,
}

#[derive(Args)]
struct GrowthArgs {
    /// How often each size is measured
    #[arg(long, default_value_t = 3, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// What grows: memory, vcpus, devices, sparse (repeatable; all when not given)
    #[arg(long = "series", value_name = "NAME", value_parser = series)]
    series: Vec<bench::growth::Series>,
    /// Draw it, in files of this directory
    #[arg(long, value_name = "DIR")]
    plots: Option<PathBuf>,
    /// Write the results to a file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Fail if a target is missed
    #[arg(long)]
    check: bool,
}

fn series(name: &str) -> std::result::Result<bench::growth::Series, String> {
    let all = bench::growth::Series::ALL;
    let found = all.into_iter().find(|series| series.name() == name);
    found.ok_or_else(|| format!("expected one of {}", all.map(|series| series.name()).join(", ")))
}

#[derive(Args)]
struct FaultsArgs {
    /// Decides all that is done
    #[arg(long, default_value_t = 1, value_name = "NUMBER")]
    seed: u64,
    /// How many cases
    #[arg(long, default_value_t = 2000, value_name = "N")]
    cases: u64,
    /// The first case's number
    #[arg(long, default_value_t = 0, value_name = "NUMBER")]
    first: u64,
    /// This case alone
    #[arg(long, value_name = "NUMBER", conflicts_with_all = ["cases", "first"])]
    case: Option<u64>,
    /// How many at a time
    #[arg(long, default_value_t = 3, value_name = "N")]
    jobs: usize,
    /// Say something about each
    #[arg(long, short)]
    verbose: bool,
}

impl FaultsArgs {
    /// As the program that runs them takes it.
    fn words(&self) -> Vec<String> {
        let mut words = vec![format!("--seed={}", self.seed), format!("--jobs={}", self.jobs)];
        match self.case {
            Some(case) => words.push(format!("--case={case}")),
            None => {
                words
                    .extend([format!("--cases={}", self.cases), format!("--first={}", self.first)]);
            }
        }
        words.extend(self.verbose.then(|| "--verbose".to_owned()));
        words
    }
}

#[derive(Args)]
struct HostArgs {
    /// The lab host's kernel
    #[arg(long, default_value = "default")]
    kernel: KernelKind,
    /// Features that are added to or taken from the lab host's processor, as in -avx2,-pku
    #[arg(long, allow_hyphen_values = true, value_name = "FEATURES")]
    cpu: Option<String>,
    /// Processors of each lab host
    #[arg(long, default_value_t = 1, value_name = "N")]
    smp: u32,
    /// Memory of each lab host in MiB
    #[arg(long, default_value_t = 4096, value_name = "MIB")]
    memory: u32,
}

#[derive(Args)]
struct RunArgs {
    /// A variable for the command's environment
    #[arg(long = "env", value_name = "NAME=VALUE", value_parser = assignment)]
    env: Vec<(String, String)>,
    /// The shared directory, which also gets the consoles' logs
    #[arg(long, value_name = "DIR")]
    results: Option<PathBuf>,
    /// Give up after this time: 90s, 10m, 1h
    #[arg(long, default_value = "600s", value_parser = duration)]
    timeout: Duration,
    /// The command and its arguments
    #[arg(last = true, required = true, value_name = "COMMAND")]
    command: Vec<String>,
}

impl Cli {
    /// Does what was asked; returns the exit status.
    pub(crate) fn run(self) -> Result<u8> {
        match self.command {
            Command::Demo { args } => {
                setup::toolchain()?;
                demo(&args)
            }
            Command::Test { native_only } => xtask::suite::run(native_only).map(|()| 0),
            Command::Bench(args) => args.run().map(|()| 0),
            Command::Growth(args) => args.run().map(|()| 0),
            Command::Fuzz { time, seed } => {
                xtask::suite::fuzz(time, seed)?;
                Ok(0)
            }
            Command::Faults(args) => {
                xtask::suite::faults(&args.words())?;
                Ok(0)
            }
            Command::Golden { folder, strip } => {
                if let Some([from, to]) = strip.as_deref() {
                    xtask::golden::strip(from, to)?;
                }
                if let Some(folder) = folder {
                    xtask::golden::check(&folder)?;
                }
                Ok(0)
            }
            Command::Setup => {
                setup::everything()?;
                // After this the tests need no network.
                xtask::images::linux_guest(KernelKind::Default)?;
                Kernel::get(KernelKind::Backports)?;
                println!("all is there; the cache is {}", xtask::cache::root()?.display());
                Ok(0)
            }
            Command::Images { kernel } => {
                let images = xtask::images::linux_guest(kernel)?;
                println!("bzimage {}", images.bzimage.display());
                println!("vmlinux {}", images.vmlinux.display());
                println!("initrd {}", images.initrd.display());
                println!("guest-tool {}", images.guest_tool.display());
                Ok(0)
            }
            Command::Lab(Lab::Run { host, run }) => lab_run(&host, run, None),
            Command::Lab(Lab::Pair { host, kernel_b, cpu_b, b, run }) => {
                let options = HostOptions {
                    kernel: kernel_b,
                    cpu: Some(cpu_b).filter(|cpu| !cpu.is_empty()),
                    ..host.options()
                };
                let command = match b {
                    Some(line) => {
                        Some(lab_command(vec!["/bin/sh".into(), "-c".into(), line], &run.env)?)
                    }
                    None => None,
                };
                lab_run(&host, run, Some(Second { options, command }))
            }
            Command::Lab(Lab::Test { program: Some(program), args }) => {
                xtask::suite::run_in_lab(&program, &args).map(|()| 0)
            }
            Command::Lab(Lab::Test { program: None, .. }) => xtask::suite::whole_lab().map(|()| 0),
            Command::Lab(Lab::OnPeer { command }) => lab::peer::run_on_peer(command),
            Command::Lab(Lab::Serve) => lab::peer::serve(),
        }
    }
}

/// Builds the product as it is shipped and lets it show itself.
fn demo(args: &[String]) -> Result<u8> {
    let program = xtask::suite::build_vmm(&["--release"])?;
    let mut command = std::process::Command::new(&program);
    let status = command.arg("demo").args(args).status();
    let status = status.map_err(|source| xtask::process::start_error(&command, source))?;
    Ok(status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1))
}

impl BenchArgs {
    fn run(self) -> Result<()> {
        setup::toolchain()?;
        let scenarios = if self.scenarios.is_empty() {
            bench::scenario::NAMES[..bench::scenario::USUAL].iter().map(|&s| s.into()).collect()
        } else {
            self.scenarios
        };
        let options = bench::Options {
            program: xtask::suite::build_vmm(&["--release"])?,
            rivals: self.rivals,
            scenarios,
            channels: self.channels,
            verify: self.verify,
            dirty_ring: self.dirty_ring,
            local: self.local,
            beside: self.beside,
            prealloc: !self.fresh_memory,
            rounds: self.rounds,
            size: bench::rival::Size { memory_mib: self.memory, vcpus: self.smp },
            iperf_seconds: 2,
        };
        let report = bench::Report {
            json: self.json,
            compare: self.compare,
            plots: self.plots,
            check: self.check,
        };
        match self.all {
            true => bench::all::run(&options, &report),
            false => bench::run(&options, &report),
        }
    }
}

impl GrowthArgs {
    fn run(self) -> Result<()> {
        setup::toolchain()?;
        let all = bench::growth::Series::ALL.to_vec();
        let series = if self.series.is_empty() { all } else { self.series };
        bench::growth::run(&bench::growth::Options {
            program: xtask::suite::build_vmm(&["--release"])?,
            rounds: self.rounds,
            series,
            plots: self.plots,
            json: self.json,
            check: self.check,
        })
    }
}

impl HostArgs {
    fn options(&self) -> HostOptions {
        HostOptions {
            kernel: self.kernel,
            cpu: self.cpu.clone(),
            smp: self.smp,
            memory_mib: self.memory,
        }
    }
}

fn lab_run(host: &HostArgs, run: RunArgs, b: Option<Second>) -> Result<u8> {
    lab::run(&lab::Run {
        command: lab_command(run.command, &run.env)?,
        a: host.options(),
        b,
        results: run.results,
        timeout: run.timeout,
        output: lab::Output::Own,
    })
}

fn lab_command(argv: Vec<String>, env: &[(String, String)]) -> Result<LabCommand> {
    let cwd = std::env::current_dir().doing(|| "find the current directory".to_owned())?;
    Ok(LabCommand { argv, env: env.to_vec(), cwd })
}

fn assignment(text: &str) -> std::result::Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err("expected NAME=VALUE".to_owned()),
    }
}

/// A guest's memory in MiB.
fn mebibytes(text: &str) -> std::result::Result<u64, String> {
    let expected = || "expected a size of 64M or more, as in 512M or 2G".to_owned();
    let (number, scale) = match text.strip_suffix('G') {
        Some(number) => (number, 1024),
        None => (text.strip_suffix('M').ok_or_else(expected)?, 1),
    };
    let number: u64 = number.parse().map_err(|_| expected())?;
    number.checked_mul(scale).filter(|mib| (64..1 << 30).contains(mib)).ok_or_else(expected)
}

fn duration(text: &str) -> std::result::Result<Duration, String> {
    let split = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let scale = match unit {
        "" | "s" => 1,
        "m" => 60,
        "h" => 3600,
        _ => return Err(format!("unknown unit `{unit}`; use s, m or h")),
    };
    let number: u64 =
        number.parse().map_err(|_| "expected a number and a unit, as in 90s".to_owned())?;
    number.checked_mul(scale).map(Duration::from_secs).ok_or_else(|| "that is too long".to_owned())
}
