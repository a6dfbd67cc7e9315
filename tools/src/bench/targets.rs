//! The results against the targets.

use std::fmt;

use super::figures::Metric;
use super::report::Results;
use super::rival::{Kind, LOCAL, kind_of};
use super::scenario::WORK;

/// An idle guest's memory goes through one connection at least so fast as this part of `iperf3`'s stream.
const MIN_OF_IPERF: f64 = 0.85;
/// Through several connections it takes at most this part of the best other program's time.
const MAX_OF_BEST: f64 = 0.75;
/// Between two of an idle guest's ticks is at most this, in ms, of which [`TICK_MS`](super::scenario::TICK_MS) would be
/// there without a move: across the hand-over, which is what it feels of the downtime, and in all of the move, where
/// it is the host's scheduler that it feels.
const MAX_GAP_MS: f64 = 5.0;
/// The downtime that the source reports, which is what an operator reads, contradicts what an idle guest felt by at
/// most this, in ms. The destination does not see its beginning.
const MAX_OFF_MS: f64 = 1.0;
/// A guest that writes as fast as it can stands still for at most this long, in ms.
const MAX_HOT_MS: f64 = 30.0;
/// One whose memory itself changes hands stands still for at most this long, in ms.
const MAX_LOCAL_MS: f64 = 10.0;
/// A guest that is moved does at least this part of the work that it does else.
const MIN_WORK: f64 = 0.85;
/// VMM memory beside guest RAM may be at most this while nothing migrates, in MiB.
const MAX_MEMORY_MIB: f64 = 8.0;
/// ... and this on either side while the guest is moved.
const MAX_MEMORY_MOVING_MIB: f64 = 16.0;
/// The guest's first instruction may come at most this long after exec, in ms.
const MAX_FIRST_INSTRUCTION_MS: f64 = 15.0;
/// The guest's first word may come at most this long after exec, in ms.
const MAX_FIRST_WORD_MS: f64 = 50.0;

/// What is wanted of a figure.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Wanted {
    /// It may be so much.
    AtMost(f64),
    /// It must be so much.
    AtLeast(f64),
}

/// A figure for which there is a target, and what was found.
#[derive(Debug, Clone, PartialEq)]
pub struct Target {
    /// The figure.
    pub what: String,
    /// Medians of its rounds, or what was computed of these; none where nothing was measured.
    pub found: Option<f64>,
    /// The least and the most of the rounds.
    pub spread: Option<(f64, f64)>,
    /// What is wanted.
    pub wanted: Wanted,
    /// Digits behind the point that mean something.
    pub digits: usize,
}

impl Target {
    /// Whether it is met; what was not measured is not.
    pub fn is_met(&self) -> bool {
        self.found.is_some_and(|found| match self.wanted {
            Wanted::AtMost(most) => found <= most,
            Wanted::AtLeast(least) => found >= least,
        })
    }

    fn found(&self) -> String {
        let digits = self.digits;
        self.found.map_or("not measured".to_owned(), |found| format!("{found:.digits$}"))
    }

    fn wanted(&self) -> String {
        let digits = self.digits;
        match self.wanted {
            Wanted::AtMost(most) => format!("at most {most:.digits$}"),
            Wanted::AtLeast(least) => format!("at least {least:.digits$}"),
        }
    }
}

/// As a sentence about one that is missed.
impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}, {} is wanted", self.what, self.found(), self.wanted())
    }
}

/// Those that are missed, each a sentence.
pub fn missed(targets: &[Target]) -> Vec<String> {
    targets.iter().filter(|target| !target.is_met()).map(Target::to_string).collect()
}

/// All of them in Markdown.
pub fn table(targets: &[Target]) -> String {
    let mut text = "| | measured | wanted | |\n|---|---|---|---|\n".to_owned();
    for target in targets {
        let digits = target.digits;
        let spread = target.spread.map_or(String::new(), |(least, most)| {
            format!(" ({least:.digits$} .. {most:.digits$})")
        });
        let (found, wanted) = (target.found(), target.wanted());
        let met = if target.is_met() { "met" } else { "**missed**" };
        text.push_str(&format!("| {} | {found}{spread} | {wanted} | {met} |\n", target.what));
    }
    text
}

impl Results {
    /// The targets that `ours` misses, each a sentence.
    pub fn missed(&self, ours: &str, theirs: &str) -> Vec<String> {
        missed(&self.targets(ours, theirs))
    }

    /// What was measured that there is a target for; all are for medians. Total time, downtime and gap may be at
    /// most those of `theirs`.
    pub fn targets(&self, ours: &str, theirs: &str) -> Vec<Target> {
        let mut targets = Vec::new();
        for (scenario, _) in &self.scenarios {
            let idle = scenario == "idle";
            let median = |name: &str, metric| self.find(scenario, name, metric).map(|s| s.median);
            let mut add = |name: &str, metric: Metric, wanted: Option<Wanted>, whose: &str| {
                if let Some((found, wanted)) = self.find(scenario, name, metric).zip(wanted) {
                    let who = if name == ours { String::new() } else { format!("{name}: ") };
                    targets.push(Target {
                        what: format!("{scenario}: {who}{}{whose}", metric.title()),
                        found: Some(found.median),
                        spread: Some((found.min, found.max)),
                        wanted,
                        digits: metric.digits(),
                    });
                }
            };
            let mut at_most = |name: &str, metric: Metric, most: Option<f64>| {
                add(name, metric, most.map(Wanted::AtMost), "");
            };
            if idle {
                at_most(ours, Metric::HandOver, Some(MAX_GAP_MS));
                at_most(ours, Metric::Gap, Some(MAX_GAP_MS));
                at_most(ours, Metric::OffSource, Some(MAX_OFF_MS));
            }
            if scenario == "hot" {
                at_most(ours, Metric::Downtime, Some(MAX_HOT_MS));
            }
            for name in self.names().filter(|name| name.ends_with(LOCAL)) {
                at_most(name, Metric::Downtime, Some(MAX_LOCAL_MS));
            }
            at_most(ours, Metric::MemorySource, Some(MAX_MEMORY_MIB));
            at_most(ours, Metric::MemoryDestination, Some(MAX_MEMORY_MIB));
            at_most(ours, Metric::MemorySourceMoving, Some(MAX_MEMORY_MOVING_MIB));
            at_most(ours, Metric::MemoryDestinationMoving, Some(MAX_MEMORY_MOVING_MIB));
            at_most(ours, Metric::FirstInstruction, Some(MAX_FIRST_INSTRUCTION_MS));
            at_most(ours, Metric::FirstWord, Some(MAX_FIRST_WORD_MS));
            // The socket's speed.
            if idle && self.prealloc {
                add(ours, Metric::OfIperf, Some(Wanted::AtLeast(MIN_OF_IPERF)), "");
            }
            if idle {
                let best = self.best_other(scenario);
                let whose = format!(", {MAX_OF_BEST} of the best other program's");
                let most = best.map(|best| Wanted::AtMost(best * MAX_OF_BEST));
                for name in self.names().filter(|name| is_several(name, ours)) {
                    add(name, Metric::Total, most, &whose);
                }
            }
            // Where the rate is limited, all take as long as the limit says.
            if scenario != WORK {
                let whose = format!(", {theirs}'s");
                for metric in [Metric::Total, Metric::Downtime, Metric::Gap] {
                    add(ours, metric, median(theirs, metric).map(Wanted::AtMost), &whose);
                }
            } else if median(ours, Metric::Work).is_some() {
                add(ours, Metric::Work, Some(Wanted::AtLeast(MIN_WORK)), "");
            } else {
                targets.push(Target {
                    what: format!("{scenario}: {}", Metric::Work.title()),
                    found: None,
                    spread: None,
                    wanted: Wanted::AtLeast(MIN_WORK),
                    digits: Metric::Work.digits(),
                });
            }
        }
        targets
    }

    /// The least total time of those who are no mini-vmm, whatever their connections, in ms.
    fn best_other(&self, scenario: &str) -> Option<f64> {
        let others = self.programs.iter().filter(|p| kind_of(&p.version) == Some(Kind::Qemu));
        let totals = others.filter_map(|p| self.find(scenario, &p.name, Metric::Total));
        totals.map(|total| total.median).min_by(f64::total_cmp)
    }
}

/// Whether `name` is `ours` with several connections, and nothing else.
fn is_several(name: &str, ours: &str) -> bool {
    let count = name.strip_prefix(ours).and_then(|rest| rest.strip_prefix('×'));
    count.is_some_and(|count| count.parse::<u8>().is_ok())
}

#[cfg(test)]
mod tests {
    use super::super::figures::{Row, Summary};
    use super::super::report::Program;
    use super::super::report::tests::results;
    use super::*;

    /// Results of one scenario with just these figures, whatever it is called by.
    fn with(scenario: &str, figures: &[(&str, Metric, f64)]) -> Results {
        let mut results = results(1.0, 1.0);
        results.scenarios[0].0 = scenario.into();
        let row = |&(rival, metric, value): &(&str, Metric, f64)| Row {
            scenario: scenario.into(),
            rival: rival.into(),
            metric,
            summary: Summary::of(&[value]).unwrap(),
        };
        results.rows = figures.iter().map(row).collect();
        for (rival, ..) in figures {
            if results.programs.iter().all(|program| program.name != *rival) {
                let version = if rival.starts_with("ours") { "mini-vmm 1" } else { "QEMU 1" };
                let (name, version) = ((*rival).to_owned(), version.to_owned());
                results.programs.push(Program { name, version, commands: vec![] });
            }
        }
        results
    }

    #[test]
    fn a_target_that_is_missed_is_named_and_one_that_is_met_is_not() {
        assert_eq!(results(15.0, 15.0).missed("ours", "theirs"), Vec::<String>::new());
        let missed = results(16.0, 15.0).missed("ours", "theirs");
        assert_eq!(missed, ["idle: total, ms, theirs's: 16, at most 15 is wanted"]);
    }

    #[test]
    fn each_target_is_met_at_its_bound_and_missed_beyond_it() {
        for (scenario, rival, metric, met, not) in [
            ("idle", "ours", Metric::FirstWord, 50.0, 50.1),
            ("dirty", "ours", Metric::FirstInstruction, 15.0, 15.1),
            ("idle", "ours", Metric::MemorySource, 8.0, 8.1),
            ("idle", "ours", Metric::MemoryDestination, 8.0, 8.1),
            ("idle", "ours", Metric::MemorySourceMoving, 16.0, 16.1),
            ("idle", "ours", Metric::MemoryDestinationMoving, 16.0, 16.1),
            ("idle", "ours", Metric::OfIperf, 0.85, 0.84),
            ("idle", "ours", Metric::Gap, 5.0, 5.1),
            ("idle", "ours", Metric::HandOver, 5.0, 5.1),
            ("idle", "ours", Metric::OffSource, 1.0, 1.1),
            ("hot", "ours", Metric::Downtime, 30.0, 31.0),
            ("dirty", "ours --local", Metric::Downtime, 10.0, 11.0),
            ("work", "ours", Metric::Work, 0.85, 0.84),
        ] {
            for (value, count) in [(met, 0), (not, 1)] {
                let missed = with(scenario, &[(rival, metric, value)]).missed("ours", "theirs");
                assert_eq!(missed.len(), count, "{scenario} {metric:?}: {missed:?}");
            }
        }
    }

    #[test]
    fn a_target_of_another_scenario_is_not_missed() {
        for (scenario, metric) in
            [("dirty", Metric::Gap), ("dirty", Metric::OffSource), ("idle", Metric::Downtime)]
        {
            let missed = with(scenario, &[("ours", metric, 1e3)]).missed("ours", "theirs");
            assert!(missed.is_empty(), "{missed:?}");
        }
    }

    #[test]
    fn the_table_says_of_each_whether_it_is_met() {
        let results = with("idle", &[("ours", Metric::Gap, 4.0), ("ours", Metric::OffSource, 2.0)]);
        let table = table(&results.targets("ours", "theirs"));
        let gap = "| idle: longest gap the guest felt, ms | 4.0 (4.0 .. 4.0) | at most 5.0 | met |";
        assert!(table.contains(gap), "{table}");
        assert!(table.contains("ms | 2.0 (2.0 .. 2.0) | at most 1.0 | **missed** |"), "{table}");
    }

    #[test]
    fn a_guest_that_told_nothing_of_its_work_misses_the_target() {
        let missed = with("work", &[]).missed("ours", "theirs");
        assert!(missed[0].contains("not measured"), "{missed:?}");
    }

    #[test]
    fn several_connections_are_compared_with_the_best_program_of_others() {
        let run = |ours: f64| {
            let total = Metric::Total;
            let all = [("theirs", total, 120.0), ("theirs×4", total, 100.0), ("old", total, 130.0)];
            let own =
                [("ours", total, 90.0), ("ours×4", total, ours), ("ours×4 --verify", total, 99.0)];
            with("idle", &[all, own].concat()).missed("ours", "theirs")
        };
        assert!(run(75.0).is_empty(), "{:?}", run(75.0));
        let whose = "total, ms, 0.75 of the best other program's";
        assert_eq!(run(76.0), [format!("idle: ours×4: {whose}: 76, at most 75 is wanted")]);
    }
}
