//! `cargo xtask bench`: mini-vmm against QEMU, and whoever else is named, in one run.
//!
//! Every round migrates a fresh guest for each scenario and each rival over loopback, so that a
//! machine that is busy for a while is busy for all; who comes first changes from round to round.
//! The rivals run the same guest (the self-checking one) on the same board, and are told to migrate
//! by the same QMP commands. After each move the guest verifies all of its memory: one that finds
//! a difference ends the run, whatever its figures.

pub mod all;
mod arrival;
pub mod figures;
pub mod growth;
pub mod host;
pub mod memory;
mod moved;
mod picture;
pub mod plot;
pub mod report;
pub mod rival;
pub mod scenario;
pub mod targets;
pub mod vm;
mod work;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;

use serde_json::Value;
use tempfile::TempDir;

use crate::error::{Doing, Error, Result};
use crate::{process, setup};
use arrival::Arrival;
use figures::{Metric, Samples, Summary};
use host::{Machine, Stream};
use moved::{HandOver, Moved, Order, move_guest, orders};
use report::{Program, Results};
use rival::{Rival, Role, Size, Way};
use scenario::{Scenario, UNLIMITED};
use vm::Vm;

/// The rows of this project's own program.
const OURS: &str = "mini-vmm";
/// The rows that it is compared with.
const THEIRS: &str = "qemu";
const QEMU: &str = "/usr/bin/qemu-system-x86_64";
/// Memory that is touched before the first round, in guests: two live at a time, and the kernel may
/// give each of them any memory that is free.
const WARM: u64 = 9;
/// How long a guest's work is measured before it is moved.
const WORK_BEFORE: Duration = Duration::from_secs(2);
/// The scenario in which it is looked at what else a slow move needs: it comes to an end however slow it is.
const SLOWLY: &str = "idle";
/// In how many rounds, from the first on: memory hardly differs from one to the next, and these moves are slow.
const LOOKED_AT: u32 = 3;
/// How long a move takes in which both sides' memory is looked at, in s.
const SLOW_SECONDS: u64 = 2;
/// How often it is looked at, evenly over the move.
const LOOKS: u64 = 4;
const MIB: f64 = (1 << 20) as f64;
/// For a move that does not count.
const NO_LIMIT: Stream = Stream { plain: f64::INFINITY, unpaced: f64::INFINITY };

/// What to measure.
#[derive(Debug, Clone)]
pub struct Options {
    /// This project's program.
    pub program: PathBuf,
    /// More programs, with their names in the table.
    pub rivals: Vec<(String, PathBuf)>,
    /// Names of scenarios.
    pub scenarios: Vec<String>,
    /// Measure both programs with so many connections as well.
    pub channels: Option<u8>,
    /// Measure this project's program alone, with and without `--verify`.
    pub verify: bool,
    /// Measure this project's program alone, with the dirty log and with dirty rings of so many entries.
    pub dirty_ring: Option<u32>,
    /// Measure this project's program alone, with the memory copied and with `--local`.
    pub local: bool,
    /// Destinations allocate the guest's memory at their start, as every VMM can be told to: else it is
    /// mostly the host's clearing of memory that is measured.
    pub prealloc: bool,
    /// Look at both sides' memory while a guest is moved, in moves that count for nothing else.
    pub beside: bool,
    /// Rounds, at least 1.
    pub rounds: u32,
    /// How large the guest is.
    pub size: Size,
    /// How long `iperf3` sends in each round, in seconds.
    pub iperf_seconds: u32,
}

/// What to do with the results.
#[derive(Debug, Clone, Default)]
pub struct Report {
    /// Write them there.
    pub json: Option<PathBuf>,
    /// Compare them with those.
    pub compare: Option<PathBuf>,
    /// Draw them there.
    pub plots: Option<PathBuf>,
    /// A missed target is an error.
    pub check: bool,
}

/// Measures, prints, and does with the results what `report` says.
///
/// # Errors
/// Also if a guest was not what it was after a move, and with `report.check` for a missed target.
pub fn run(options: &Options, report: &Report) -> Result<()> {
    let old = report.compare.as_deref().map(Results::load).transpose()?;
    let results = measure(options)?;
    println!("\n{}\n{}", results.preface(), results.table());
    if let Some(old) = old {
        println!("changes of the medians:\n{}", results.changes(&old));
    }
    if let Some(path) = &report.json {
        results.save(path)?;
    }
    if let Some(dir) = &report.plots {
        for path in results.draw(dir)? {
            println!("{}", path.display());
        }
    }
    for (scenario, cost) in results.verifying() {
        println!(
            "{scenario}: --verify costs {cost:.0} ms of downtime for each GiB of memory (the source's \
             medians)"
        );
    }
    tell_missed(&results.missed(OURS, THEIRS), report.check)
}

/// Prints which targets are missed; with `check` that is an error.
fn tell_missed(missed: &[String], check: bool) -> Result<()> {
    match missed.is_empty() {
        true => println!("every target is met"),
        false if check => return Err(Error::Targets { missed: missed.join("\n") }),
        false => missed.iter().for_each(|target| println!("missed: {target}")),
    }
    Ok(())
}

fn measure(options: &Options) -> Result<Results> {
    setup::measuring()?;
    let mut rivals = Vec::new();
    let alone = Way { prealloc: options.prealloc, ..Way::default() };
    let several = options.channels.map(|_| Way { channels: options.channels, ..alone });
    for way in [alone].into_iter().chain(several) {
        rivals.push(Rival::new(OURS, &options.program, way)?);
        if options.verify {
            rivals.push(Rival::new(OURS, &options.program, Way { verify: true, ..way })?);
            continue;
        }
        if options.dirty_ring.is_some() {
            let rings = Way { dirty_ring: options.dirty_ring, ..way };
            rivals.push(Rival::new(OURS, &options.program, rings)?);
            continue;
        }
        if options.local {
            // What it allocated would be thrown away.
            let way = Way { local: true, prealloc: false, ..way };
            rivals.push(Rival::new(OURS, &options.program, way)?);
            continue;
        }
        rivals.push(Rival::new(THEIRS, Path::new(QEMU), way)?);
        for (name, path) in &options.rivals {
            rivals.push(Rival::new(name, path, way)?);
        }
    }
    let scenarios: Vec<Scenario> = options
        .scenarios
        .iter()
        .map(|name| {
            Scenario::named(name, options.size).ok_or_else(|| Error::Bench {
                what: format!("there is no scenario `{name}`"),
                found: format!("there are {}", scenario::NAMES.join(", ")),
            })
        })
        .collect::<Result<_>>()?;
    if options.beside && !scenarios.iter().any(|scenario| scenario.name == SLOWLY) {
        return Err(Error::Bench {
            what: format!("--beside needs the scenario `{SLOWLY}`"),
            found: options.scenarios.join(", "),
        });
    }
    let dir = TempDir::with_prefix("mini-vmm-bench-")
        .doing(|| "create a temporary directory".to_owned())?;
    let image = dir.path().join("selfcheck.elf");
    process::output(Command::new(&options.program).arg("selfcheck-image").arg(&image))?;

    let bench = Bench { options, dir: dir.path(), image: &image };
    let (mut samples, mut limits) = (Samples::default(), Vec::new());
    // So much that the kernel has little chance to hand out memory that is still cold.
    let warm = (WARM * options.size.memory_mib).min(host::available_mib() / 4 * 3);
    println!("touching {warm} MiB of memory once, so that nobody is the first to do so");
    host::warm_memory(warm);
    // Whoever is first gets memory that nobody had lately, whatever was touched before: seen to cost
    // four times the total time of those who get it next. So a first move is not counted.
    if let (Some(rival), Some(scenario)) = (rivals.first(), scenarios.first()) {
        println!("not counted");
        bench.one(rival, scenario, NO_LIMIT, None, &mut Samples::default())?.end()?;
    }
    for round in 0..options.rounds.max(1) {
        println!("round {} of {}", round + 1, options.rounds.max(1));
        let limit = Stream::measured(options.iperf_seconds)?;
        println!("  iperf3              {:7.0} MiB/s", limit.plain);
        println!("  iperf3 -C reno      {:7.0} MiB/s", limit.unpaced);
        limits.push(limit);
        let mut last = None;
        for scenario in &scenarios {
            let mut order: Vec<&Rival> = rivals.iter().collect();
            order.rotate_left(round as usize % rivals.len());
            for rival in order {
                last = Some(bench.one(rival, scenario, limit, last.take(), &mut samples)?);
                // Memory that changes hands is not sent: there is no middle to look at.
                if options.beside
                    && round < LOOKED_AT
                    && scenario.name == SLOWLY
                    && !rival.way.local
                {
                    last.take().map_or(Ok(()), Arrival::end)?;
                    bench.beside(rival, scenario, &mut samples)?;
                }
            }
        }
        last.map_or(Ok(()), Arrival::end)?;
    }
    let names: Vec<&str> = scenarios.iter().map(|scenario| scenario.name).collect();
    let rival_names: Vec<&str> = rivals.iter().map(|rival| rival.name.as_str()).collect();
    Ok(Results {
        machine: Machine::this()?,
        memory_mib: options.size.memory_mib,
        vcpus: options.size.vcpus,
        prealloc: options.prealloc,
        rounds: options.rounds.max(1),
        scenarios: scenarios.iter().map(|s| (s.name.to_owned(), s.described())).collect(),
        programs: rivals.iter().map(|rival| bench.program(rival, &scenarios)).collect(),
        migration: orders("tcp:127.0.0.1:PORT", UNLIMITED)
            .iter()
            .map(|(c, a)| format!("{c} {a}"))
            .collect(),
        iperf3: of_all(&limits, |limit| limit.plain),
        iperf3_unpaced: Some(of_all(&limits, |limit| limit.unpaced)),
        rows: samples.rows(&names, &rival_names),
        steps: samples.steps(),
    })
}

fn of_all(limits: &[Stream], figure: impl Fn(&Stream) -> f64) -> Summary {
    let values: Vec<f64> = limits.iter().map(figure).collect();
    Summary::of(&values).unwrap_or(Summary { median: 0.0, min: 0.0, max: 0.0, values })
}

struct Bench<'a> {
    options: &'a Options,
    dir: &'a Path,
    image: &'a Path,
}

impl Bench<'_> {
    /// The commands as a person would type them.
    fn program(&self, rival: &Rival, scenarios: &[Scenario]) -> Program {
        let (image, qmp) = (Path::new("selfcheck.elf"), Path::new("QMP"));
        // How many connections there are, and that it compares, is said on the control socket.
        let name = rival.name.split('×').next().unwrap_or_default();
        let name = name.split(" --").next().unwrap_or_default();
        let roles = scenarios.first().map(Role::Source).into_iter().chain([Role::Destination(0)]);
        let line = |role| {
            process::line(&rival.command(self.options.size, &role, image, qmp))
                .replacen(&rival.program.display().to_string(), name, 1)
                .replace("127.0.0.1:0", "127.0.0.1:PORT")
        };
        Program {
            name: rival.name.clone(),
            version: rival.version.clone(),
            commands: roles.map(line).collect(),
        }
    }

    fn start(&self, rival: &Rival, role: &Role<'_>) -> Result<Vm> {
        let side = match role {
            Role::Source(_) => "source",
            Role::Destination(_) => "destination",
        };
        let qmp = self.dir.join(format!("{side}.qmp"));
        let _ = std::fs::remove_file(&qmp);
        let command = rival.command(self.options.size, role, self.image, &qmp);
        Vm::start(format!("{}, {side}", rival.name), command, &qmp, self.dir)
    }

    /// A destination that listens, and the port.
    fn destination(&self, rival: &Rival) -> Result<(Vm, u16)> {
        let port = host::free_port()?;
        let mut destination = self.start(rival, &Role::Destination(port))?;
        destination.connect()?;
        for (command, arguments) in rival.listen(port) {
            destination.ask(command, arguments)?;
        }
        Ok((destination, port))
    }

    /// One guest, one slow move: how much memory both sides have beside guest RAM on the way.
    ///
    /// Whoever reads `/proc/PID/smaps` has the kernel walk the page tables of all of that process's memory and
    /// keeps it from changing its mappings meanwhile: 20 ms and more for a guest of 2 GiB in small pages. In
    /// a move that is timed this would be seen in its figures, so it is done in one of which nothing else
    /// is noted. That is limited to memory's size in [`SLOW_SECONDS`], so that it has a middle; what the
    /// sides hold then (buffers, bitmaps, threads) doesn't grow with the rate. `smaps_rollup` and `status` are
    /// no shorter way: they have guest RAM in their sums, and how much of that has come is not known.
    ///
    /// It is the resident set that counts here: source and destination share the pages of their program, of
    /// which the proportional set has half, and on two hosts they would not.
    fn beside(&self, rival: &Rival, scenario: &Scenario, samples: &mut Samples) -> Result<()> {
        let ram = self.options.size.memory_mib << 20;
        let mut source = self.start(rival, &Role::Source(scenario))?;
        source.line(0, "selfcheck: ready")?;
        source.connect()?;
        let (mut destination, port) = self.destination(rival)?;
        let (mut looks, mut most) = (0, [0; 2]);
        let mut look = |source: &Vm, destination: &Vm, info: &Value| {
            let left = info["ram"]["remaining"].as_u64().unwrap_or(ram);
            let due = left > 0 && ram.saturating_sub(left) * (LOOKS + 1) > ram * (looks + 1);
            if due && info["status"] == "active" {
                looks += 1;
                for (most, vm) in most.iter_mut().zip([source, destination]) {
                    *most = vm.memory(ram)?.rss.max(*most);
                }
            }
            Ok(())
        };
        let order = Order { port, bandwidth: ram / SLOW_SECONDS, meanwhile: &mut look };
        move_guest(source, &mut destination, rival, order)?;
        Arrival::new(destination)?.end()?;
        if looks == 0 {
            return Err(Error::Bench {
                what: format!("{}: its memory was to be looked at while it sends", rival.name),
                found: "the move was over before".to_owned(),
            });
        }
        let [source, destination] = most.map(|bytes| bytes as f64 / MIB);
        println!(
            "  {:8} {:10} {looks} looks at a slow move: {source:.1} MiB beside guest RAM, {destination:.1} \
             at the destination",
            scenario.name, rival.name
        );
        samples.add(scenario.name, &rival.name, Metric::MemorySourceMoving, source);
        samples.add(scenario.name, &rival.name, Metric::MemoryDestinationMoving, destination);
        Ok(())
    }

    /// One guest, one move. While it fills its memory, the `last` one verifies its own.
    fn one(
        &self,
        rival: &Rival,
        scenario: &Scenario,
        limit: Stream,
        mut last: Option<Arrival>,
        samples: &mut Samples,
    ) -> Result<Arrival> {
        let ram = self.options.size.memory_mib << 20;
        let mut add = |metric, value| samples.add(scenario.name, &rival.name, metric, value);

        // Once for nothing: the program and KVM get what was in use just now, and not what the VM that ended before
        // this gave back, which a virtual host takes away by and by.
        self.start(rival, &Role::Source(scenario))?.connect()?;
        let mut source = self.start(rival, &Role::Source(scenario))?;
        source.line(0, "selfcheck: start")?;
        last.as_mut().map_or(Ok(()), Arrival::verify)?;
        source.line(0, "selfcheck: ready")?;
        last.map_or(Ok(()), Arrival::end)?;
        let first_word = source.first_word().unwrap_or_default().as_secs_f64() * 1e3;
        add(Metric::FirstWord, first_word);
        if let Some(first) = source.first_instruction() {
            add(Metric::FirstInstruction, first.as_secs_f64() * 1e3);
        }
        add(Metric::MemorySource, source.memory(ram)?.pss as f64 / MIB);
        source.connect()?;
        let (mut destination, port) = self.destination(rival)?;
        let mut before = None;
        if scenario.works() {
            let from = source.heard();
            thread::sleep(WORK_BEFORE);
            before = work::rate(&source.said(from));
        }
        let (from, mut said) = (source.heard(), String::new());
        let mut listen = |source: &Vm, _: &Vm, _: &Value| {
            if scenario.works() {
                said = source.said(from);
            }
            Ok(())
        };
        let order = Order { port, bandwidth: scenario.bandwidth, meanwhile: &mut listen };
        let moved = move_guest(source, &mut destination, rival, order)?;
        let work = work::rate(&said).zip(before).map(|(during, before)| during / before);
        let Moved { total, downtime, gap, hand_over, .. } = moved;
        let throughput = moved.bytes / MIB / (total / 1e3).max(1e-3);
        add(Metric::Total, total);
        add(Metric::Downtime, downtime);
        add(Metric::Throughput, throughput);
        add(Metric::OfIperf, throughput / limit.plain);
        add(Metric::OfUnpaced, throughput / limit.unpaced);
        add(Metric::Gap, gap);
        let felt = match hand_over {
            HandOver::Gap(gap) => {
                add(Metric::HandOver, gap);
                format!("{gap:.1} ms")
            }
            // It was no longer than that.
            HandOver::Short(most) => {
                add(Metric::HandOver, most);
                format!("{most:.1} ms at most")
            }
        };
        moved.off(downtime).into_iter().for_each(|off| add(Metric::OffSource, off));
        if let Some(downtime) = moved.downtime_destination {
            add(Metric::DowntimeDestination, downtime);
            moved.off(downtime).into_iter().for_each(|off| add(Metric::OffDestination, off));
        }
        if let Some(work) = work {
            println!("  {:8} {:10} worked at {work:.2} of its speed", scenario.name, rival.name);
            add(Metric::Work, work);
        }
        add(Metric::MemoryDestination, destination.memory(ram)?.pss as f64 / MIB);
        for (side, step, ms) in &moved.steps {
            samples.add_step(scenario.name, &rival.name, side, step, *ms);
        }
        println!(
            "  {:8} {:10} {total:7.0} ms, stood still {downtime:.1} ms, felt {felt} then and \
             {gap:.1} ms at most; {throughput:.0} MiB/s; first word after {first_word:.0} ms",
            scenario.name, rival.name
        );
        Arrival::new(destination)
    }
}
