//! Slows a guest: its vCPUs rest for a share of every few milliseconds.
//!
//! ```text
//! 20 %   run 8 ms │rest 2│run 8 ms │rest 2│…        all vCPUs at the same time
//! 90 %   run 1│rest 9 ms            │run 1│…
//! 99 %   run 1│rest 99 ms …
//! ```
//! All rest together: one that waits for a lock would find its holder resting otherwise, and burn its
//! own time.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// How long running and resting take together, as long as each turn of running is not shorter than
/// `LEAST_RUN`; QEMU's vCPUs run for so long at a time.
const PERIOD: Duration = Duration::from_millis(10);
/// The shortest turn of running: long against what a kick costs.
const LEAST_RUN: Duration = Duration::from_millis(1);
/// The largest share of resting, percent.
const MOST: u8 = 99;

/// How long vCPUs run and rest in turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Turns {
    run: Duration,
    rest: Duration,
}

impl Turns {
    /// For `percent` of resting, from 1 to `MOST`.
    fn new(percent: u8) -> Self {
        let percent = u32::from(percent.clamp(1, MOST));
        let run = (PERIOD * (100 - percent) / 100).max(LEAST_RUN);
        Self { run, rest: run * percent / (100 - percent) }
    }
}

/// Makes vCPUs rest, by a thread of its own. They run all of the time again when it is dropped.
pub struct Throttle {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    percent: u8,
    /// Counts the changes.
    change: u64,
    closing: bool,
}

impl Throttle {
    /// Begins. `rest` keeps the vCPUs out of the guest until a time, or lets them back in; it must
    /// return at once.
    pub fn start(
        percent: u8,
        rest: impl Fn(Option<Instant>) + Send + 'static,
    ) -> std::io::Result<Self> {
        let state = State { percent, change: 0, closing: false };
        let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() });
        let theirs = shared.clone();
        let thread =
            thread::Builder::new().name("throttle".into()).spawn(move || theirs.work(&rest))?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Changes the share of resting, percent; 0 ends it. Returns at once, and it is so at once.
    pub fn set(&self, percent: u8) {
        let mut state = self.shared.lock();
        state.percent = percent;
        state.change += 1;
        drop(state);
        self.shared.changed.notify_all();
    }
}

impl Drop for Throttle {
    fn drop(&mut self) {
        self.shared.lock().closing = true;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that makes vCPUs rest panicked");
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self, rest: &dyn Fn(Option<Instant>)) {
        let mut state = self.lock();
        'idle: loop {
            // Whatever was begun with another share ends.
            rest(None);
            while state.percent == 0 && !state.closing {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            if state.closing {
                return;
            }
            let turns = Turns::new(state.percent);
            let change = state.change;
            // By the clock, so that what a turn takes too long is made up for in the next.
            let mut end = Instant::now();
            loop {
                for (turn, resting) in [(turns.run, false), (turns.rest, true)] {
                    end += turn;
                    if resting {
                        rest(Some(end));
                    }
                    while let Some(left) = end.checked_duration_since(Instant::now()) {
                        if state.closing || state.change != change {
                            continue 'idle;
                        }
                        let woken = self.changed.wait_timeout(state, left);
                        state = woken.unwrap_or_else(PoisonError::into_inner).0;
                    }
                }
                let late = end.elapsed();
                if late > turns.run + turns.rest {
                    // The host was busy with other things; nothing is to be caught up with.
                    end += late;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn turns_have_the_share_and_are_short() {
        for percent in 1..=MOST {
            let Turns { run, rest } = Turns::new(percent);
            let share = rest.as_secs_f64() / (run + rest).as_secs_f64();
            assert!((share * 100.0 - f64::from(percent)).abs() < 0.01, "{percent}: {share}");
            assert!(run >= LEAST_RUN && run <= PERIOD, "{percent}: {run:?}");
            assert!(percent > 90 || run + rest <= PERIOD, "{percent}: {rest:?}");
        }
        assert_eq!(Turns::new(99), Turns { run: MS, rest: 99 * MS });
        assert_eq!(Turns::new(20), Turns { run: 8 * MS, rest: 2 * MS });
        assert_eq!(Turns::new(200), Turns::new(99));
    }

    #[test]
    fn a_change_and_the_end_come_at_once_and_nothing_rests_afterwards() {
        let (tx, rx) = mpsc::channel();
        let throttle = Throttle::start(50, move |until| tx.send(until).unwrap()).unwrap();
        let wait = |what: &str| rx.recv_timeout(60_000 * MS).unwrap_or_else(|_| panic!("{what}"));
        assert_eq!(wait("the beginning"), None);
        let (first, second) = (wait("a rest"), wait("the next"));
        assert!(second.zip(first).is_some_and(|(b, a)| b - a >= 10 * MS));
        throttle.set(0);
        // What was on its way, and the end.
        while wait("the end").is_some() {}
        assert!(rx.recv_timeout(50 * MS).is_err(), "it goes on");
        throttle.set(99);
        assert!(wait("a rest").is_some());
        drop(throttle);
        let last = std::iter::from_fn(|| rx.recv().ok()).last();
        assert_eq!(last, Some(None), "its end lets the vCPUs back in");
    }
}
