//! `cargo xtask growth`: what a move costs more for each MiB, vCPU and device.
//!
//! One thing grows at a time, everything else stays as small as it can be. Every move is one of the
//! self-checking guest over loopback, as in the [benchmark](super), and its memory is verified after it.

use std::fmt::Write;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde::{Deserialize, Serialize};
use tempfile::TempDir;

use super::arrival::Arrival;
use super::figures::Summary;
use super::host::{self, Machine};
use super::moved::{Order, move_guest};
use super::plot;
use super::report;
use super::rival::{Rival, Role, Size, Way};
use super::scenario::{Scenario, UNLIMITED};
use super::targets::{self, Target, Wanted};
use super::vm::Vm;
use super::{OURS, tell_missed};
use crate::error::{Doing, Result};
use crate::{process, setup};

/// Memory of the guests of which something else grows, in MiB.
const SMALL_MIB: u64 = 512;
/// One vCPU more may make the pause longer by this, in ms.
const PER_VCPU_MS: f64 = 0.3;
/// One device more may make it longer by this, in ms.
const PER_DEVICE_MS: f64 = 0.1;
/// A guest that uses little of much memory may take this much of the time of one that has little.
const SPARSE: f64 = 1.3;
/// A GiB of the largest guest may take this much of the time of a GiB of a guest of 2 GiB.
const STRAIGHT: f64 = 1.25;
/// Memory that is touched before a destination that does not allocate ahead is started, in MiB.
const WARM_MIB: u64 = 1024;
/// How many times a guest's memory must be free: two guests, and something for everyone else.
const ROOM: f64 = 2.3;

/// What grows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Series {
    /// MiB of memory, all of it in use.
    Memory,
    /// vCPUs.
    Vcpus,
    /// Disks.
    Devices,
    /// MiB of memory, of which 256 are in use.
    Sparse,
}

impl Series {
    /// All, in the order in which they are measured.
    pub const ALL: [Series; 4] = [Series::Memory, Series::Vcpus, Series::Devices, Series::Sparse];

    /// The sizes that are measured.
    pub fn sizes(self) -> &'static [u64] {
        match self {
            Series::Memory => &[512, 1024, 2048, 4096, 8192],
            Series::Vcpus => &[1, 2, 4, 8],
            Series::Devices => &[1, 4, 8, 16],
            Series::Sparse => &[256, 8192],
        }
    }

    /// In how many rounds it is measured at most: guests with much memory take long to fill and to verify theirs.
    fn rounds(self) -> u32 {
        match self {
            Series::Memory => 3,
            Series::Vcpus | Series::Devices | Series::Sparse => u32::MAX,
        }
    }

    /// What a size counts.
    pub fn unit(self) -> &'static str {
        match self {
            Series::Memory => "MiB in use",
            Series::Vcpus => "vCPUs",
            Series::Devices => "disks",
            Series::Sparse => "MiB, 256 in use",
        }
    }

    /// Its name in file names.
    pub fn name(self) -> &'static str {
        match self {
            Series::Memory => "memory",
            Series::Vcpus => "vcpus",
            Series::Devices => "devices",
            Series::Sparse => "sparse",
        }
    }

    fn guest(self, size: u64) -> Guest {
        let idle = "set=0,verify=0,hz=250";
        let one = Size { memory_mib: SMALL_MIB, vcpus: 1 };
        let small = Guest { size: one, disks: 0, parameters: idle.into(), prealloc: true };
        match self {
            Series::Memory => Guest { size: Size { memory_mib: size, ..one }, ..small },
            Series::Vcpus => Guest {
                size: Size { vcpus: size, ..one },
                parameters: format!("{idle},vcpus={size}"),
                ..small
            },
            // A host has more to do for a device that its guest uses.
            Series::Devices => {
                Guest { disks: size, parameters: format!("{idle},drive=1"), ..small }
            }
            Series::Sparse => Guest {
                size: Size { memory_mib: size, ..one },
                parameters: format!("{idle},fill=200M"),
                prealloc: false,
                ..small
            },
        }
    }
}

struct Guest {
    size: Size,
    disks: u64,
    parameters: String,
    /// Whether its destination allocates all memory at its start. One that does has memory to look at where
    /// the guest never had any.
    prealloc: bool,
}

/// What one size came to, in ms.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Point {
    /// What grows.
    pub series: Series,
    /// How much of it there is.
    pub size: u64,
    /// From the order to migrate to its completion.
    pub total: Summary,
    /// How long the guest stood still, as the source says.
    pub downtime: Summary,
    /// The longest time between two of the guest's timer interrupts, 4 ms apart.
    pub gap: Summary,
}

/// All of them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Growth {
    /// Where it was measured.
    pub machine: Machine,
    /// What the program says of itself.
    pub version: String,
    /// How often each was measured.
    pub rounds: u32,
    /// What came of it.
    pub points: Vec<Point>,
}

/// What to measure, and what to do with it.
#[derive(Debug, Clone)]
pub struct Options {
    /// This project's program.
    pub program: PathBuf,
    /// Rounds, at least 1.
    pub rounds: u32,
    /// What grows.
    pub series: Vec<Series>,
    /// Draw it there.
    pub plots: Option<PathBuf>,
    /// Write it there as JSON.
    pub json: Option<PathBuf>,
    /// A missed target is an error.
    pub check: bool,
}

/// Measures, prints, draws.
///
/// # Errors
/// Also if a guest was not what it was after a move, and with `check` for a missed target.
pub fn run(options: &Options) -> Result<()> {
    let growth = found(options)?;
    if let Some(path) = &options.json {
        report::save(path, &growth)?;
    }
    tell_missed(&growth.missed(), options.check)
}

/// Measures, prints the table, draws.
pub(super) fn found(options: &Options) -> Result<Growth> {
    setup::measuring()?;
    let growth = measure(options)?;
    println!("\n{}", growth.table());
    if let Some(dir) = &options.plots {
        growth.draw(dir)?;
    }
    Ok(growth)
}

fn measure(options: &Options) -> Result<Growth> {
    let rival = Rival::new(OURS, &options.program, Way { prealloc: true, ..Way::default() })?;
    let fresh = Rival::new(OURS, &options.program, Way::default())?;
    let dir = TempDir::with_prefix("mini-vmm-growth-")
        .doing(|| "create a temporary directory".to_owned())?;
    let image = dir.path().join("selfcheck.elf");
    process::output(Command::new(&options.program).arg("selfcheck-image").arg(&image))?;

    let mut taken: Vec<(Series, u64, [Vec<f64>; 3])> = Vec::new();
    for series in &options.series {
        for size in series.sizes() {
            let needed = series.guest(*size).size.memory_mib as f64 * ROOM;
            if host::available_mib() as f64 > needed {
                taken.push((*series, *size, Default::default()));
            } else {
                println!("{size} {}: left out, {needed:.0} MiB are not free", series.unit());
            }
        }
    }
    let bench = Bench { rival: &rival, fresh: &fresh, dir: dir.path(), image: &image };
    println!("not counted");
    bench.one(&Series::Vcpus.guest(1))?;
    for round in 0..options.rounds.max(1) {
        println!("round {} of {}", round + 1, options.rounds.max(1));
        for (series, size, figures) in &mut taken {
            if round >= series.rounds() {
                continue;
            }
            let found = bench.one(&series.guest(*size))?;
            let [total, downtime, gap] = found;
            println!(
                "  {size:5} {:16} {total:7.0} ms, stood still {downtime:.1} ms, felt {gap:.1} ms",
                series.unit()
            );
            figures.iter_mut().zip(found).for_each(|(all, one)| all.push(one));
        }
    }
    let points = taken.iter().filter_map(|(series, size, [total, downtime, gap])| {
        Some(Point {
            series: *series,
            size: *size,
            total: Summary::of(total)?,
            downtime: Summary::of(downtime)?,
            gap: Summary::of(gap)?,
        })
    });
    Ok(Growth {
        machine: Machine::this()?,
        version: rival.version.clone(),
        rounds: options.rounds.max(1),
        points: points.collect(),
    })
}

struct Bench<'a> {
    rival: &'a Rival,
    /// The same, whose destinations do not allocate ahead.
    fresh: &'a Rival,
    dir: &'a Path,
    image: &'a Path,
}

impl Bench<'_> {
    /// Moves a guest of this kind: total time, downtime and gap, in ms.
    fn one(&self, guest: &Guest) -> Result<[f64; 3]> {
        let scenario =
            Scenario { name: "growth", guest: guest.parameters.clone(), bandwidth: UNLIMITED };
        let mut source = self.start(guest, &Role::Source(&scenario))?;
        source.line(0, &format!("driven={}", guest.disks))?;
        source.connect()?;
        if !guest.prealloc {
            self.warm()?;
        }
        let port = host::free_port()?;
        let mut destination = self.start(guest, &Role::Destination(port))?;
        destination.connect()?;
        let order = Order { port, bandwidth: UNLIMITED, meanwhile: &mut |_, _, _| Ok(()) };
        let moved = move_guest(source, &mut destination, self.rival(guest), order)?;
        Arrival::new(destination)?.end()?;
        Ok([moved.total, moved.downtime, moved.gap])
    }

    /// Lets a destination allocate memory that nobody comes for: what it gives back is what the next one
    /// is given, in pieces of the same size. Otherwise that may be memory that a virtual host has to find first,
    /// which was seen to take seven times as long as all else.
    fn warm(&self) -> Result<()> {
        let guest = Guest { prealloc: true, ..Series::Memory.guest(WARM_MIB) };
        let port = host::free_port()?;
        self.start(&guest, &Role::Destination(port))?.connect()
    }

    fn rival(&self, guest: &Guest) -> &Rival {
        if guest.prealloc { self.rival } else { self.fresh }
    }

    fn start(&self, guest: &Guest, role: &Role<'_>) -> Result<Vm> {
        let side = match role {
            Role::Source(_) => "source",
            Role::Destination(_) => "destination",
        };
        let qmp = self.dir.join(format!("{side}.qmp"));
        let _ = fs::remove_file(&qmp);
        let mut command = self.rival(guest).command(guest.size, role, self.image, &qmp);
        for disk in 0..guest.disks {
            let path = self.dir.join(format!("{disk}.img"));
            let made = File::create(&path).and_then(|file| file.set_len(1 << 20));
            made.doing(|| format!("create {}", path.display()))?;
            command.args(["--disk", &format!("path={}", path.display())]);
        }
        Vm::start(format!("{OURS}, {side}"), command, &qmp, self.dir)
    }
}

/// The slope of the line that fits best, by least squares; `None` of fewer than two sizes.
fn slope(points: &[(f64, f64)]) -> Option<f64> {
    let count = points.len() as f64;
    let mean = |of: fn(&(f64, f64)) -> f64| points.iter().map(of).sum::<f64>() / count;
    let (x, y) = (mean(|p| p.0), mean(|p| p.1));
    let spread: f64 = points.iter().map(|p| (p.0 - x).powi(2)).sum();
    let common: f64 = points.iter().map(|p| (p.0 - x) * (p.1 - y)).sum();
    (spread > 0.0).then(|| common / spread)
}

impl Growth {
    fn of(&self, series: Series) -> impl Iterator<Item = &Point> {
        self.points.iter().filter(move |point| point.series == series)
    }

    fn line(&self, series: Series, of: fn(&Point) -> f64) -> Vec<(f64, f64)> {
        self.of(series).map(|point| (point.size as f64, of(point))).collect()
    }

    /// How much longer the pause is for one more, in ms.
    fn downtime_slope(&self, series: Series) -> Option<f64> {
        slope(&self.line(series, |point| point.downtime.median))
    }

    /// The time of a guest that uses little of much memory, in times of one that has little.
    fn sparse(&self) -> Option<f64> {
        let points: Vec<&Point> = self.of(Series::Sparse).collect();
        let [small, large] = points[..] else { return None };
        Some(large.total.median / small.total.median)
    }

    /// How much longer each GiB of the largest guest takes than one of a guest of 2 GiB, in times of that; the
    /// smallest guest's time, most of which is none of its memory's, is taken off both. `None` where the largest
    /// is no larger.
    fn straightness(&self) -> Option<f64> {
        let line = self.line(Series::Memory, |point| point.total.median);
        let (least, most) = (line.first()?, line.last()?);
        let middle = line.iter().find(|point| point.0 == 2048.0).filter(|at| at.0 < most.0)?;
        let each = |point: &(f64, f64)| (point.1 - least.1) / (point.0 - least.0);
        // Less than nothing is noise, of which no ratio says anything.
        (each(middle) > 0.0).then(|| each(most) / each(middle))
    }

    /// The figures in Markdown.
    pub fn table(&self) -> String {
        let Machine { cpu, cpus, memory_mib, kernel } = &self.machine;
        let mut text = format!(
            "machine   {cpu}, {cpus} processors, {memory_mib} MiB, Linux {kernel}\n\
             program   {}, {} rounds (of memory in use {} at most); median (least .. most), ms\n\n\
             | | total | downtime | longest gap the guest felt |\n|---|---|---|---|\n",
            self.version,
            self.rounds,
            Series::Memory.rounds()
        );
        let cell = |Summary { median, min, max, .. }: &Summary, digits: usize| {
            format!("{median:.digits$} ({min:.digits$} .. {max:.digits$})")
        };
        for Point { series, size, total, downtime, gap } in &self.points {
            let (total, downtime, gap) = (cell(total, 0), cell(downtime, 1), cell(gap, 1));
            let _ = writeln!(text, "| {size} {} | {total} | {downtime} | {gap} |", series.unit());
        }
        text.push('\n');
        if let Some(ms) = slope(&self.line(Series::Memory, |point| point.total.median)) {
            let _ = writeln!(text, "each GiB more takes {:.0} ms longer", ms * 1024.0);
        }
        for (series, what) in [(Series::Vcpus, "vCPU"), (Series::Devices, "disk")] {
            if let Some(ms) = self.downtime_slope(series) {
                let _ = writeln!(text, "each {what} more makes the pause {ms:.2} ms longer");
            }
        }
        if let Some(times) = self.sparse() {
            let _ =
                writeln!(text, "8 GiB of which little is used take {times:.2} of a small guest's");
        }
        text
    }

    /// The targets that are missed, each a sentence.
    pub fn missed(&self) -> Vec<String> {
        targets::missed(&self.targets())
    }

    /// What was measured that there is a target for.
    pub fn targets(&self) -> Vec<Target> {
        let mut targets = Vec::new();
        let mut add = |series, what: &str, found: Option<f64>, most: f64| {
            // What was not asked for misses nothing.
            if self.of(series).next().is_some() {
                targets.push(Target {
                    what: what.to_owned(),
                    found,
                    spread: None,
                    wanted: Wanted::AtMost(most),
                    digits: 2,
                });
            }
        };
        let (vcpus, devices, sparse) = (Series::Vcpus, Series::Devices, Series::Sparse);
        add(vcpus, "ms of downtime for a vCPU", self.downtime_slope(vcpus), PER_VCPU_MS);
        add(devices, "ms of downtime for a device", self.downtime_slope(devices), PER_DEVICE_MS);
        let what = "8 GiB with little in use, in times of a small guest";
        add(sparse, what, self.sparse(), SPARSE);
        let what = "a GiB of the largest guest, in times of one of a guest of 2 GiB";
        add(Series::Memory, what, self.straightness(), STRAIGHT);
        targets
    }

    /// Draws each series that has at least two sizes.
    fn draw(&self, dir: &Path) -> Result<()> {
        fs::create_dir_all(dir).doing(|| format!("create {}", dir.display()))?;
        for series in Series::ALL.into_iter().filter(|series| *series != Series::Sparse) {
            let total = series == Series::Memory;
            let (what, line) = match total {
                true => ("total time, ms", self.line(series, |point| point.total.median)),
                false => ("downtime, ms", self.line(series, |point| point.downtime.median)),
            };
            if line.len() > 1 {
                let path = dir.join(format!("growth-{}.svg", series.name()));
                plot::line(&path, series.unit(), what, &line)?;
                println!("{}", path.display());
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn growth(series: Series, figures: &[(u64, f64)]) -> Growth {
        let summary = |value: f64| Summary::of(&[value]).unwrap();
        let point = |&(size, ms): &(u64, f64)| Point {
            series,
            size,
            total: summary(ms),
            downtime: summary(ms),
            gap: summary(ms),
        };
        Growth {
            machine: Machine { cpu: "c".into(), cpus: 1, memory_mib: 1, kernel: "k".into() },
            version: "1".into(),
            rounds: 1,
            points: figures.iter().map(point).collect(),
        }
    }

    #[test]
    fn the_slope_is_that_of_the_line() {
        assert_eq!(slope(&[(1.0, 5.0), (2.0, 7.0), (4.0, 11.0)]), Some(2.0));
        assert_eq!(slope(&[(1.0, 5.0)]), None);
        assert_eq!(slope(&[]), None);
    }

    #[test]
    fn what_grows_too_fast_is_named() {
        assert_eq!(growth(Series::Vcpus, &[(1, 3.0), (2, 3.2), (4, 3.6)]).missed().len(), 0);
        let missed = growth(Series::Vcpus, &[(1, 3.0), (2, 4.0)]).missed();
        assert_eq!(missed, ["ms of downtime for a vCPU: 1.00, at most 0.30 is wanted"]);
        assert_eq!(growth(Series::Devices, &[(1, 3.0), (11, 6.0)]).missed().len(), 1);
        assert_eq!(growth(Series::Sparse, &[(256, 100.0), (8192, 131.0)]).missed().len(), 1);
        assert_eq!(growth(Series::Sparse, &[(256, 100.0), (8192, 129.0)]).missed().len(), 0);
        let straight = |most| {
            let sizes = [(512, 100.0), (2048, 250.0), (8192, most)];
            growth(Series::Memory, &sizes).missed().len()
        };
        assert_eq!((straight(100.0 + 750.0 * 1.24), straight(100.0 + 750.0 * 1.26)), (0, 1));
        // Memory for the larger one was not free.
        let missed = growth(Series::Sparse, &[(256, 100.0)]).missed();
        assert!(missed[0].contains("not measured"), "{missed:?}");
    }

    #[test]
    fn a_series_becomes_a_table_and_a_picture() {
        let growth = growth(Series::Memory, &[(512, 300.0), (1024, 600.0)]);
        let table = growth.table();
        assert!(table.contains("| 512 MiB in use | 300 (300 .. 300) | 300.0 "), "{table}");
        assert!(table.contains("each GiB more takes 600 ms longer"), "{table}");
        let dir = TempDir::new().unwrap();
        growth.draw(dir.path()).unwrap();
        let svg = fs::read_to_string(dir.path().join("growth-memory.svg")).unwrap();
        assert!(svg.starts_with("<svg") && svg.contains("MiB in use"), "{svg}");
        assert!(!dir.path().join("growth-vcpus.svg").exists());
    }
}
