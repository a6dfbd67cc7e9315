//! The results as pictures.

use std::fs;
use std::path::{Path, PathBuf};

use super::figures::{Metric, StepRow};
use super::plot;
use super::report::Results;
use crate::error::{Doing, Result};

/// What is drawn of all rivals, and how the file is called.
const DRAWN: [(Metric, &str); 2] =
    [(Metric::Throughput, "throughput"), (Metric::Downtime, "downtime")];

impl Results {
    /// Draws medians as bars into files of a directory, and says which files these are. For each scenario:
    /// throughput and downtime (the source's figure) of all, and the steps of each mini-vmm's pause.
    ///
    /// # Errors
    /// If the files can't be written.
    pub fn draw(&self, dir: &Path) -> Result<Vec<PathBuf>> {
        fs::create_dir_all(dir).doing(|| format!("create {}", dir.display()))?;
        let mut drawn = Vec::new();
        let mut draw = |name: String, x: &str, digits, bars: &[(String, f64)]| {
            if !bars.is_empty() {
                let path = dir.join(format!("bench-{name}.svg"));
                plot::bars(&path, x, digits, bars)?;
                drawn.push(path);
            }
            Ok(())
        };
        for (scenario, _) in &self.scenarios {
            for (metric, name) in DRAWN {
                let bar = |rival: &str| {
                    Some((rival.to_owned(), self.find(scenario, rival, metric)?.median))
                };
                let bars: Vec<_> = self.names().filter_map(bar).collect();
                let x = format!("{}: {}", scenario, metric.title());
                draw(format!("{scenario}-{name}"), &x, metric.digits(), &bars)?;
            }
            for rival in self.names() {
                let own = |row: &&StepRow| row.scenario == *scenario && row.rival == rival;
                let bars: Vec<_> = self
                    .steps
                    .iter()
                    .filter(own)
                    .map(|row| (format!("{}: {}", row.side, row.step), row.summary.median))
                    .collect();
                let x = format!("{scenario}, {rival}: steps of the pause, ms");
                draw(format!("{scenario}-steps-{}", file_name(rival)), &x, 2, &bars)?;
            }
        }
        Ok(drawn)
    }
}

/// A rival's name in the name of a file.
fn file_name(rival: &str) -> String {
    let kept = |c: char| if c.is_ascii_alphanumeric() { c } else { '-' };
    rival.chars().map(kept).collect()
}

#[cfg(test)]
mod tests {
    use super::super::figures::Summary;
    use super::super::report::tests::results;
    use super::*;

    #[test]
    fn what_was_measured_is_drawn_and_nothing_else() {
        let mut results = results(1.0, 2.0);
        for (row, value) in results.rows.iter_mut().zip([123.0, 45.0]) {
            row.metric = Metric::Throughput;
            row.summary = Summary::of(&[value]).unwrap();
        }
        results.steps.push(StepRow {
            scenario: "idle".into(),
            rival: "ours".into(),
            side: "source".into(),
            step: "drain".into(),
            summary: Summary::of(&[0.25]).unwrap(),
        });
        let dir = tempfile::TempDir::new().unwrap();
        let files = results.draw(&dir.path().join("new")).unwrap();
        let names: Vec<_> = files.iter().map(|path| path.file_name().unwrap()).collect();
        assert_eq!(names, ["bench-idle-throughput.svg", "bench-idle-steps-ours.svg"]);
        for (file, words) in files.iter().zip([["theirs", "123"], ["source: drain", "0.25"]]) {
            let svg = fs::read_to_string(file).unwrap();
            assert!(words.iter().all(|word| svg.contains(word)), "{svg}");
        }
    }

    #[test]
    fn a_file_is_called_by_letters_and_digits() {
        assert_eq!(file_name("mini-vmm×4 --local"), "mini-vmm-4---local");
    }
}
