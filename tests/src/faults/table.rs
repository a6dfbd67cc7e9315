//! What came of many cases, as tables.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use super::case::Case;
use super::run::{End, Outcome};

/// Counts by what was done, and by where.
#[derive(Debug, Default)]
pub struct Table {
    by_action: BTreeMap<&'static str, Row>,
    by_stage: BTreeMap<&'static str, Row>,
    /// Those that were not as they must be, with their reasons.
    pub failures: Vec<(Case, String)>,
    records: u64,
    worked: Duration,
}

#[derive(Debug, Default, Clone)]
struct Row {
    cases: u64,
    done: u64,
    ends: BTreeMap<End, u64>,
    failed: u64,
    longest: Duration,
}

const ENDS: [(End, &str); 5] = [
    (End::Moved, "moved"),
    (End::Stayed, "stayed"),
    (End::DoubtResumed, "doubt, resumed"),
    (End::DoubtMoved, "doubt, runs there"),
    (End::Died, "died with its process"),
];

impl Table {
    /// One more case.
    pub fn add(&mut self, case: &Case, result: Result<Outcome, String>) {
        let at = result.as_ref().ok().and_then(|outcome| outcome.at.clone());
        let stage = match &result {
            Ok(_) => stage_of(at.as_deref()),
            Err(_) => "failed",
        };
        let rows = [
            self.by_action.entry(case.action.group()).or_default(),
            self.by_stage.entry(stage).or_default(),
        ];
        for row in rows {
            row.cases += 1;
            match &result {
                Ok(outcome) => {
                    row.done += u64::from(at.is_some());
                    *row.ends.entry(outcome.end).or_default() += 1;
                    row.longest = row.longest.max(outcome.told.unwrap_or_default());
                }
                Err(_) => row.failed += 1,
            }
        }
        match result {
            Ok(outcome) => {
                self.records += outcome.records;
                self.worked += outcome.took;
            }
            Err(why) => self.failures.push((case.clone(), why)),
        }
    }

    /// How many cases there were.
    pub fn cases(&self) -> u64 {
        self.by_action.values().map(|row| row.cases).sum()
    }

    /// In how many of them the fault's place came.
    pub fn done(&self) -> u64 {
        self.by_action.values().map(|row| row.done).sum()
    }

    /// As Markdown.
    pub fn markdown(&self) -> String {
        let mut text = String::new();
        for (title, rows) in [("what", &self.by_action), ("where", &self.by_stage)] {
            let ends = ENDS.map(|(_, name)| name).join(" | ");
            let _ = writeln!(text, "| {title} | cases | done | {ends} | wrong | told after |");
            let _ = writeln!(text, "|---|{}", "--:|".repeat(ENDS.len() + 4));
            let mut all = Row::default();
            for (name, row) in rows {
                let _ = writeln!(text, "{}", row.line(name));
                all.cases += row.cases;
                all.done += row.done;
                all.failed += row.failed;
                all.longest = all.longest.max(row.longest);
                for (end, n) in &row.ends {
                    *all.ends.entry(*end).or_default() += n;
                }
            }
            let _ = writeln!(text, "{}\n", all.line("**all**"));
        }
        let _ = writeln!(
            text,
            "{} records on the guests' disks, each written once; {:.0} s of work.",
            self.records,
            self.worked.as_secs_f64()
        );
        text
    }
}

impl Row {
    fn line(&self, name: &str) -> String {
        let ends = ENDS.map(|(end, _)| self.ends.get(&end).copied().unwrap_or(0).to_string());
        format!(
            "| {name} | {} | {} | {} | {} | {:.1} s |",
            self.cases,
            self.done,
            ends.join(" | "),
            self.failed,
            self.longest.as_secs_f64()
        )
    }
}

/// The stage of a migration to which a piece belongs.
fn stage(at: &str) -> &'static str {
    match at {
        "header" | "configuration" | "open return path" | "hello" | "manifest" | "verdict" => {
            "greeting"
        }
        "ping" | "pong" => "pings",
        "prepared" => "prepared",
        "commit" => "commit",
        "running" | "shut" | "settled" => "last word",
        _ if at.starts_with("ram") || at.ends_with("page") || at.ends_with("pages") => "memory",
        _ => "devices",
    }
}

/// The place of a case as its table has it.
fn stage_of(at: Option<&str>) -> &'static str {
    at.map_or("its place never came", stage)
}
