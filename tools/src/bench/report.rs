//! The results: as a table, as JSON, against older ones.

use std::fmt::Write;
use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::figures::{Metric, Row, StepRow, Summary};
use super::host::Machine;
use super::rival::VERIFIED;
use crate::error::{Doing, Error, Result};

/// A program that was measured.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Program {
    /// Its name in the table.
    pub name: String,
    /// What it says of itself.
    pub version: String,
    /// The commands that started its VMs, of the first scenario.
    pub commands: Vec<String>,
}

/// Everything that a run found out.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Results {
    /// Where.
    pub machine: Machine,
    /// Guest memory in MiB.
    pub memory_mib: u64,
    /// The guest's vCPUs.
    #[serde(default = "one")]
    pub vcpus: u64,
    /// Whether destinations had allocated it when the move began.
    #[serde(default)]
    pub prealloc: bool,
    /// Rounds.
    pub rounds: u32,
    /// Name and guest parameters of each scenario.
    pub scenarios: Vec<(String, String)>,
    /// Who.
    pub programs: Vec<Program>,
    /// The QMP commands that a migration consists of, the same for all.
    pub migration: Vec<String>,
    /// One `iperf3` stream on loopback, in MiB/s.
    pub iperf3: Summary,
    /// The same of one that is not paced.
    #[serde(default)]
    pub iperf3_unpaced: Option<Summary>,
    /// The figures.
    pub rows: Vec<Row>,
    /// What the mini-vmms tell of the standstill.
    #[serde(default)]
    pub steps: Vec<StepRow>,
}

/// The vCPUs of a run that does not say how many its guest had.
fn one() -> u64 {
    1
}

impl Results {
    /// Reads what [`save`](Self::save) wrote.
    pub fn load(path: &Path) -> Result<Results> {
        let text = fs::read_to_string(path).doing(|| format!("read {}", path.display()))?;
        serde_json::from_str(&text).map_err(|error| Error::Bench {
            what: format!("{} holds no results of this benchmark", path.display()),
            found: error.to_string(),
        })
    }

    /// Writes them as JSON.
    pub fn save(&self, path: &Path) -> Result<()> {
        save(path, self)
    }

    /// What came of this metric.
    pub(super) fn find(&self, scenario: &str, rival: &str, metric: Metric) -> Option<&Summary> {
        let same =
            |row: &&Row| row.scenario == scenario && row.rival == rival && row.metric == metric;
        self.rows.iter().find(same).map(|row| &row.summary)
    }

    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.programs.iter().map(|program| program.name.as_str())
    }

    /// What was measured where and how.
    pub fn preface(&self) -> String {
        let Machine { cpu, cpus, memory_mib, kernel } = &self.machine;
        let mut text = format!(
            "machine   {cpu}, {cpus} processors, {memory_mib} MiB, Linux {kernel}\n\
             guest     {} MiB of memory, vCPUs: {}, no page zero\n\
             memory    of destinations: {}\n\
             rounds    {}, interleaved; median (least .. most)\n",
            self.memory_mib,
            self.vcpus,
            if self.prealloc {
                "allocated at their start"
            } else {
                "allocated as it is written to"
            },
            self.rounds
        );
        for Program { name, version, commands } in &self.programs {
            let _ = writeln!(text, "{name:9} {version}");
            for command in commands {
                let _ = writeln!(text, "          $ {command}");
            }
        }
        text.push_str("migration on the source's control socket:\n");
        for command in &self.migration {
            let _ = writeln!(text, "          {command}");
        }
        text
    }

    /// The figures in Markdown, a table for each scenario.
    pub fn table(&self) -> String {
        let mut text = format!(
            "iperf3, one stream over loopback: {} MiB/s\n",
            spread(&self.iperf3, Metric::Throughput.digits())
        );
        if let Some(unpaced) = &self.iperf3_unpaced {
            let found = spread(unpaced, Metric::Throughput.digits());
            let _ = writeln!(text, "iperf3 -C reno, the same: {found} MiB/s");
        }
        for (scenario, guest) in &self.scenarios {
            let _ = write!(text, "\n{scenario} ({guest})\n\n| |");
            self.names().for_each(|name| text.extend([" ", name, " |"]));
            text.push_str("\n|---|");
            self.names().for_each(|_| text.push_str("---|"));
            for metric in Metric::ALL {
                // What was measured of nobody was not asked for.
                if !self.names().any(|name| self.find(scenario, name, metric).is_some()) {
                    continue;
                }
                let cell = |name| match self.find(scenario, name, metric) {
                    Some(summary) => spread(summary, metric.digits()),
                    None => "–".to_owned(),
                };
                let cells: Vec<String> = self.names().map(cell).collect();
                let _ = write!(text, "\n| {} | {} |", metric.title(), cells.join(" | "));
            }
            text.push('\n');
        }
        text
    }

    /// In ms for each GiB, how much longer a guest stands still when both sides compare, for each scenario
    /// that was measured with and without: the difference of the source's medians.
    pub fn verifying(&self) -> Vec<(String, f64)> {
        let gib = self.memory_mib as f64 / 1024.0;
        let mut costs = Vec::new();
        for (scenario, _) in &self.scenarios {
            for name in self.names().filter(|name| name.ends_with(VERIFIED)) {
                let plain = name.trim_end_matches(VERIFIED);
                let median = |name| self.find(scenario, name, Metric::Downtime).map(|s| s.median);
                if let (Some(plain), Some(verified)) = (median(plain), median(name)) {
                    costs.push((format!("{scenario}, {name}"), (verified - plain) / gib));
                }
            }
        }
        costs
    }

    /// How the medians changed since `old`, for what both have.
    pub fn changes(&self, old: &Results) -> String {
        let mut text = String::new();
        let where_and_what = |run: &Results| (run.machine.clone(), run.memory_mib, run.vcpus);
        if where_and_what(self) != where_and_what(old) {
            text.push_str("(another machine or size of guest: compare with care)\n");
        }
        for row in &self.rows {
            let Some(before) = old.find(&row.scenario, &row.rival, row.metric) else { continue };
            let digits = row.metric.digits();
            let (a, b) = (before.median, row.summary.median);
            // Within the other run's spread it may be chance.
            let clear =
                if (before.min..=before.max).contains(&b) { "" } else { "  outside of the spread" };
            let change =
                if a == 0.0 { String::new() } else { format!("{:+.0} %", (b / a - 1.0) * 100.0) };
            let _ = writeln!(
                text,
                "{:6} {:12} {:60} {a:10.digits$} -> {b:10.digits$} {change:>8}{clear}",
                row.scenario,
                row.rival,
                row.metric.title(),
            );
        }
        text
    }
}

/// Writes results of any kind as JSON.
pub(super) fn save(path: &Path, results: &impl Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(results).unwrap_or_default();
    fs::write(path, text + "\n").doing(|| format!("write {}", path.display()))
}

fn spread(summary: &Summary, digits: usize) -> String {
    let Summary { median, min, max, .. } = summary;
    format!("{median:.digits$} ({min:.digits$} .. {max:.digits$})")
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(crate) fn results(total: f64, theirs: f64) -> Results {
        let row = |rival: &str, metric, value| Row {
            scenario: "idle".into(),
            rival: rival.into(),
            metric,
            summary: Summary::of(&[value]).unwrap(),
        };
        let program = |name: &str, version: &str| Program {
            name: name.into(),
            version: version.into(),
            commands: vec![],
        };
        Results {
            machine: Machine { cpu: "c".into(), cpus: 1, memory_mib: 1, kernel: "k".into() },
            memory_mib: 64,
            vcpus: 1,
            prealloc: true,
            rounds: 1,
            scenarios: vec![("idle".into(), "set=0".into())],
            programs: vec![program("ours", "mini-vmm 1"), program("theirs", "QEMU 1")],
            migration: vec![],
            iperf3: Summary::of(&[100.0]).unwrap(),
            iperf3_unpaced: Summary::of(&[200.0]),
            rows: vec![
                row("ours", Metric::Total, total),
                row("theirs", Metric::Total, theirs),
                row("ours", Metric::FirstWord, 10.0),
            ],
            steps: vec![],
        }
    }

    #[test]
    fn the_table_has_a_column_for_each_rival_and_a_dash_for_what_was_not_measured() {
        let table = results(12.0, 15.0).table();
        assert!(table.contains("| | ours | theirs |\n|---|---|---|\n"), "{table}");
        assert!(table.contains("| total, ms | 12 (12 .. 12) | 15 (15 .. 15) |"), "{table}");
        assert!(table.contains("first word, ms | 10.0 (10.0 .. 10.0) | – |"), "{table}");
        assert!(!table.contains("throughput"), "{table}");
    }

    #[test]
    fn what_comparing_costs_is_told_for_each_gib() {
        let mut results = results(1.0, 1.0);
        results.memory_mib = 2048;
        results.programs[1].name = "ours --verify".into();
        assert!(results.verifying().is_empty(), "nothing was measured");
        for (rival, downtime) in [("ours", 10.0), ("ours --verify", 310.0)] {
            results.rows.push(Row {
                scenario: "idle".into(),
                rival: rival.into(),
                metric: Metric::Downtime,
                summary: Summary::of(&[downtime]).unwrap(),
            });
        }
        assert_eq!(results.verifying(), [("idle, ours --verify".to_owned(), 150.0)]);
    }

    #[test]
    fn what_changed_is_told_and_what_was_saved_is_loaded() {
        let (old, new) = (results(10.0, 15.0), results(5.0, 15.0));
        let text = new.changes(&old);
        let line =
            text.lines().find(|line| line.contains("total") && line.contains("ours")).unwrap();
        assert!(line.contains("-50 %") && line.contains("outside"), "{text}");
        assert!(!text.contains("another machine"));

        let file = tempfile::NamedTempFile::new().unwrap();
        new.save(file.path()).unwrap();
        assert_eq!(Results::load(file.path()).unwrap(), new);
        let text = fs::read_to_string(file.path()).unwrap();
        fs::write(file.path(), text.replace("\"vcpus\": 1,", "")).unwrap();
        assert_eq!(Results::load(file.path()).unwrap().vcpus, 1, "older ones don't say");
        fs::write(file.path(), "{}").unwrap();
        assert!(Results::load(file.path()).is_err());
    }
}
