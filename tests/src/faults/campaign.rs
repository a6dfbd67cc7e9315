//! Many cases, some at a time.

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::case::{Case, Map};
use super::run::{self, Outcome};
use super::table::Table;

/// Which cases.
#[derive(Debug, Clone)]
pub struct Campaign {
    /// Decides all.
    pub seed: u64,
    /// Their numbers.
    pub cases: Range<u64>,
    /// How many at a time.
    pub jobs: usize,
    /// No case is begun after so long.
    pub budget: Option<Duration>,
    /// Says something about each.
    pub verbose: bool,
}

impl Campaign {
    /// Runs them. Whatever fails is said at once, with the words to do it again.
    ///
    /// # Errors
    /// A migration without any fault does not even succeed.
    pub fn run(&self) -> Result<Table, String> {
        let map = run::survey()?;
        let start = Instant::now();
        let (next, table) = (AtomicU64::new(self.cases.start), Mutex::new(Table::default()));
        let work = || {
            while self.budget.is_none_or(|budget| start.elapsed() < budget) {
                let number = next.fetch_add(1, Ordering::Relaxed);
                if number >= self.cases.end {
                    return;
                }
                let (case, result) = self.one(number, &map);
                table.lock().unwrap_or_else(PoisonError::into_inner).add(&case, result);
            }
        };
        thread::scope(|scope| {
            for _ in 0..self.jobs.max(1) {
                scope.spawn(work);
            }
        });
        Ok(table.into_inner().unwrap_or_else(PoisonError::into_inner))
    }

    fn one(&self, number: u64, map: &Map) -> (Case, Result<Outcome, String>) {
        let case = Case::new(self.seed, number, map);
        // What waits in vain, or finds a guest that is not whole, panics.
        let result = catch_unwind(AssertUnwindSafe(|| run::run(&case))).unwrap_or_else(|panic| {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
            Err(text.unwrap_or("a panic without words").to_owned())
        });
        match &result {
            Ok(outcome) if self.verbose => {
                let Outcome { end, at, took, .. } = outcome;
                let at = at.as_deref().unwrap_or("never");
                println!("{number}: {case}: {end:?} ({at}; {:.1} s)", took.as_secs_f64());
            }
            Ok(_) => {}
            Err(why) => println!(
                "WRONG: {case}\n  {:?}\n  again: cargo xtask faults --seed {} --case {number}\n{why}",
                case.variant, self.seed
            ),
        }
        (case, result)
    }
}
