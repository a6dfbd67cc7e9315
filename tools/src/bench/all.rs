//! `cargo xtask bench --all`: everything that there is a target for, one after the other on one machine, and one table
//! at its end.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::growth::{self, Growth, Series};
use super::report::{self, Results};
use super::rival::Size;
use super::targets::{self, Target};
use super::{OURS, Options, Report, THEIRS, measure, tell_missed};
use crate::error::Result;

/// Connections of the runs with several.
const SEVERAL: u8 = 2;
/// vCPUs of the run with several.
const VCPUS: u64 = 4;

/// What came of a whole run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct All {
    /// Each part's name, and what was measured.
    pub parts: Vec<(String, Results)>,
    /// What a move costs more for each MiB, vCPU and disk; measured last.
    pub growth: Option<Growth>,
}

/// The parts of a whole run, which differ from `common` in what they measure. The first is the largest.
fn parts(common: &Options) -> Vec<(&'static str, Options)> {
    let scenarios = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect();
    let only = |names: &[&str]| Options { scenarios: scenarios(names), ..common.clone() };
    let size = Size { vcpus: VCPUS, ..common.size };
    vec![
        ("one vCPU", Options { channels: Some(SEVERAL), beside: true, ..only(&["idle", "hot"]) }),
        ("a guest that works", only(&["work"])),
        ("four vCPUs", Options { size, ..only(&["idle"]) }),
        ("inside a host", Options { local: true, ..only(&["idle"]) }),
    ]
}

/// Measures everything, prints each part's table when it is there, and all targets at the end. What `common` says of
/// scenarios and of what to measure with and without does not count.
///
/// # Errors
/// Also if a guest was not what it was after a move, and with `report.check` for a missed target.
pub fn run(common: &Options, report: &Report) -> Result<()> {
    let mut all = All { parts: vec![], growth: None };
    for (name, options) in parts(common) {
        println!("\n=== {name}");
        let results = measure(&options)?;
        println!("\n{}\n{}", results.preface(), results.table());
        if let (Some(dir), true) = (&report.plots, all.parts.is_empty()) {
            results.draw(dir)?;
        }
        all.parts.push((name.to_owned(), results));
        all.save(report)?;
    }
    println!("\n=== growth");
    all.growth = Some(growth::found(&growth_options(common, report.plots.clone()))?);
    all.save(report)?;
    let targets = all.targets();
    println!("\n=== all targets, {} rounds\n\n{}", common.rounds, targets::table(&targets));
    tell_missed(&targets::missed(&targets), report.check)
}

fn growth_options(common: &Options, plots: Option<PathBuf>) -> growth::Options {
    growth::Options {
        program: common.program.clone(),
        rounds: common.rounds,
        series: Series::ALL.to_vec(),
        plots,
        json: None,
        check: false,
    }
}

impl All {
    /// Writes what there is, if it is wanted: an hour is long to lose all for the last part.
    fn save(&self, report: &Report) -> Result<()> {
        report.json.as_ref().map_or(Ok(()), |path| report::save(path, self))
    }

    /// The targets of all parts, in order, each with its part's name.
    pub fn targets(&self) -> Vec<Target> {
        let part = |(name, results): &(String, Results)| {
            let targets = results.targets(OURS, THEIRS);
            let named = |target: Target| {
                let what = format!("{name}, {}", target.what);
                Target { what, ..target }
            };
            targets.into_iter().map(named).collect::<Vec<_>>()
        };
        let growth = self.growth.iter().flat_map(Growth::targets);
        self.parts.iter().flat_map(part).chain(growth).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::super::figures::{Metric, Row, Summary};
    use super::super::host::Machine;
    use super::super::report::tests::results;
    use super::*;

    fn common() -> Options {
        Options {
            program: PathBuf::from("/bin/true"),
            rivals: vec![],
            scenarios: vec![],
            channels: None,
            verify: false,
            dirty_ring: None,
            local: false,
            prealloc: true,
            beside: false,
            rounds: 3,
            size: Size { memory_mib: 64, vcpus: 1 },
            iperf_seconds: 1,
        }
    }

    #[test]
    fn every_scenario_with_a_target_is_in_some_part() {
        let parts = parts(&common());
        let has = |wanted: fn(&Options) -> bool| parts.iter().any(|(_, part)| wanted(part));
        assert!(has(|p| p.beside && p.channels == Some(2) && p.scenarios == ["idle", "hot"]));
        assert!(has(|p| p.scenarios == ["work"]));
        assert!(has(|p| p.size.vcpus == 4 && p.scenarios == ["idle"]));
        assert!(has(|p| p.local));
        assert!(parts.iter().all(|(_, p)| p.prealloc && p.rounds == 3 && p.size.memory_mib == 64));
        assert_eq!(growth_options(&common(), None).series, Series::ALL);
    }

    #[test]
    fn targets_bear_the_names_of_their_parts() {
        let mut four = results(1.0, 1.0);
        four.programs[0].name = OURS.into();
        four.rows = vec![Row {
            scenario: "idle".into(),
            rival: OURS.into(),
            metric: Metric::Gap,
            summary: Summary::of(&[6.0]).unwrap(),
        }];
        let machine = Machine { cpu: "c".into(), cpus: 1, memory_mib: 1, kernel: "k".into() };
        let growth = Growth { machine, version: "1".into(), rounds: 1, points: vec![] };
        let all = All { parts: vec![("four vCPUs".into(), four)], growth: Some(growth) };
        let text: Vec<String> = all.targets().iter().map(Target::to_string).collect();
        assert_eq!(
            text,
            ["four vCPUs, idle: longest gap the guest felt, ms: 6.0, at most 5.0 is wanted"]
        );
        let json = serde_json::to_string(&all).unwrap();
        assert_eq!(serde_json::from_str::<All>(&json).unwrap(), all);
    }
}
