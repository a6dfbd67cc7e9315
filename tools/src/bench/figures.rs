//! What is measured, and what many measurements come to.

use serde::{Deserialize, Serialize};

/// One thing that is measured of each rival in each scenario.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Metric {
    /// From the order to migrate to its completion, as the source's `query-migrate` says.
    Total,
    /// How long the guest stood still, as the source says.
    Downtime,
    /// The same as the destination says; only a mini-vmm does.
    DowntimeDestination,
    /// The longest time between two of the guest's timer interrupts, the move included, by the
    /// host's real time as the guest reads it.
    Gap,
    /// The time between the two of them between which the guest was handed over.
    HandOver,
    /// How far the source's figure of the downtime is from what the guest may have felt of the hand-over; a QEMU's
    /// is in whole milliseconds, so up to 1 of it is rounding.
    OffSource,
    /// How far the destination's figure is from it.
    OffDestination,
    /// Bytes on the wire by total time.
    Throughput,
    /// The same, as a part of what one `iperf3` stream reached in the same round.
    OfIperf,
    /// As a part of that of one which is not paced, whatever the host's congestion control is.
    OfUnpaced,
    /// The source's memory beside guest RAM (proportional set size), its guest idle.
    MemorySource,
    /// The destination's, when the guest has arrived and the source has gone.
    MemoryDestination,
    /// The source's (resident set) while its guest's memory is sent: the most of several looks.
    MemorySourceMoving,
    /// The destination's at the same moments.
    MemoryDestinationMoving,
    /// How fast the guest does its own work while its memory is sent, as a part of how fast it does it before.
    Work,
    /// From the start of the process to the guest's first instruction; only a mini-vmm says when that is.
    FirstInstruction,
    /// From the start of the process to the guest's first word on its serial port.
    FirstWord,
}

impl Metric {
    /// All, in the order of the table.
    pub const ALL: [Metric; 17] = [
        Metric::Total,
        Metric::Downtime,
        Metric::DowntimeDestination,
        Metric::Gap,
        Metric::HandOver,
        Metric::OffSource,
        Metric::OffDestination,
        Metric::Throughput,
        Metric::OfIperf,
        Metric::OfUnpaced,
        Metric::MemorySource,
        Metric::MemoryDestination,
        Metric::MemorySourceMoving,
        Metric::MemoryDestinationMoving,
        Metric::Work,
        Metric::FirstInstruction,
        Metric::FirstWord,
    ];

    /// Its name in the table, with the unit that its figures have everywhere.
    pub fn title(self) -> &'static str {
        match self {
            Metric::Total => "total, ms",
            Metric::Downtime => "downtime, source's figure, ms",
            Metric::DowntimeDestination => "downtime, destination's figure, ms",
            Metric::Gap => "longest gap the guest felt, ms",
            Metric::HandOver => "gap the guest felt across the hand-over, ms",
            Metric::OffSource => "source's figure off what the guest felt, ms",
            Metric::OffDestination => "destination's figure off what the guest felt, ms",
            Metric::Throughput => "throughput, MiB/s",
            Metric::OfIperf => "throughput, part of iperf3's",
            Metric::OfUnpaced => "throughput, part of iperf3's with -C reno",
            Metric::MemorySource => "memory beside guest RAM, source, MiB",
            Metric::MemoryDestination => "memory beside guest RAM, destination, MiB",
            Metric::MemorySourceMoving => "memory beside guest RAM, source, while migrating, MiB",
            Metric::MemoryDestinationMoving => {
                "memory beside guest RAM, destination, while migrating, MiB"
            }
            Metric::Work => "guest's own work while its memory is sent, part of before",
            Metric::FirstInstruction => "exec to the guest's first instruction, ms",
            Metric::FirstWord => "exec to the guest's first word, ms",
        }
    }

    /// Digits behind the point that mean something.
    pub fn digits(self) -> usize {
        match self {
            Metric::Total | Metric::Throughput => 0,
            Metric::OfIperf | Metric::OfUnpaced | Metric::Work => 2,
            _ => 1,
        }
    }
}

/// Median and spread of the rounds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// The middle one; of an even number, the mean of the middle two.
    pub median: f64,
    /// The least.
    pub min: f64,
    /// The most.
    pub max: f64,
    /// All, in the order of the rounds.
    pub values: Vec<f64>,
}

impl Summary {
    /// Of at least one value.
    pub fn of(values: &[f64]) -> Option<Summary> {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let (min, max) = (*sorted.first()?, *sorted.last()?);
        let middle = sorted.len() / 2;
        let median = if sorted.len() % 2 == 1 {
            sorted[middle]
        } else {
            (sorted[middle - 1] + sorted[middle]) / 2.0
        };
        Some(Summary { median, min, max, values: values.to_vec() })
    }
}

/// One line of the results.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// The scenario's name.
    pub scenario: String,
    /// The rival's name.
    pub rival: String,
    /// What was measured.
    pub metric: Metric,
    /// What came of it.
    pub summary: Summary,
}

/// One step of a guest's standstill, of those that a mini-vmm tells.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StepRow {
    /// The scenario's name.
    pub scenario: String,
    /// The rival's name.
    pub rival: String,
    /// Who says so: `source` or `destination`. What they do at the same time, both count.
    pub side: String,
    /// The step's name, as in the report.
    pub step: String,
    /// How long it took, in ms.
    pub summary: Summary,
}

/// All single measurements of a run.
#[derive(Debug, Default)]
pub struct Samples {
    figures: Vec<(String, String, Metric, f64)>,
    /// Scenario, rival, side and step, in the order in which they were first noted.
    steps: Vec<([String; 4], Vec<f64>)>,
}

impl Samples {
    /// Notes one.
    pub fn add(&mut self, scenario: &str, rival: &str, metric: Metric, value: f64) {
        self.figures.push((scenario.to_owned(), rival.to_owned(), metric, value));
    }

    /// Notes how long a step took on a side, in ms.
    pub fn add_step(&mut self, scenario: &str, rival: &str, side: &str, step: &str, ms: f64) {
        let key = [scenario, rival, side, step].map(str::to_owned);
        match self.steps.iter_mut().find(|(known, _)| *known == key) {
            Some((_, values)) => values.push(ms),
            None => self.steps.push((key, vec![ms])),
        }
    }

    /// What the steps come to, in the order in which they were first noted.
    pub fn steps(&self) -> Vec<StepRow> {
        let row = |([scenario, rival, side, step], values): &([String; 4], Vec<f64>)| {
            Some(StepRow {
                scenario: scenario.clone(),
                rival: rival.clone(),
                side: side.clone(),
                step: step.clone(),
                summary: Summary::of(values)?,
            })
        };
        self.steps.iter().filter_map(row).collect()
    }

    /// What they come to, in the order of scenarios, metrics and rivals.
    pub fn rows(&self, scenarios: &[&str], rivals: &[&str]) -> Vec<Row> {
        let mut rows = Vec::new();
        for scenario in scenarios {
            for metric in Metric::ALL {
                for rival in rivals {
                    let same = |(s, r, m, v): &(String, String, Metric, f64)| {
                        (s == scenario && r == rival && *m == metric).then_some(*v)
                    };
                    let values: Vec<f64> = self.figures.iter().filter_map(same).collect();
                    rows.extend(Summary::of(&values).map(|summary| Row {
                        scenario: (*scenario).to_owned(),
                        rival: (*rival).to_owned(),
                        metric,
                        summary,
                    }));
                }
            }
        }
        rows
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle_one_whatever_the_order() {
        assert_eq!(Summary::of(&[]), None);
        let odd = Summary::of(&[9.0, 1.0, 2.0]).unwrap();
        assert_eq!((odd.median, odd.min, odd.max), (2.0, 1.0, 9.0));
        assert_eq!(odd.values, [9.0, 1.0, 2.0]);
        assert_eq!(Summary::of(&[4.0, 1.0, 2.0, 8.0]).unwrap().median, 3.0);
    }

    #[test]
    fn a_steps_rounds_are_one_row() {
        let mut samples = Samples::default();
        for (step, ms) in [("pause", 1.0), ("drain", 9.0), ("pause", 3.0)] {
            samples.add_step("idle", "a", "source", step, ms);
        }
        samples.add_step("idle", "a", "destination", "pause", 7.0);
        let rows = samples.steps();
        let short: Vec<_> =
            rows.iter().map(|r| (r.side.as_str(), r.step.as_str(), r.summary.median)).collect();
        assert_eq!(
            short,
            [("source", "pause", 2.0), ("source", "drain", 9.0), ("destination", "pause", 7.0)]
        );
    }

    #[test]
    fn rows_are_sorted_into_scenarios_metrics_and_rivals() {
        let mut samples = Samples::default();
        for (rival, value) in [("b", 5.0), ("a", 1.0), ("b", 7.0), ("a", 3.0)] {
            samples.add("idle", rival, Metric::Total, value);
        }
        samples.add("idle", "b", Metric::FirstWord, 2.0);
        let rows = samples.rows(&["idle", "dirty"], &["a", "b"]);
        let short: Vec<_> =
            rows.iter().map(|r| (r.rival.as_str(), r.metric, r.summary.median)).collect();
        assert_eq!(
            short,
            [("a", Metric::Total, 2.0), ("b", Metric::Total, 6.0), ("b", Metric::FirstWord, 2.0)]
        );
    }
}
