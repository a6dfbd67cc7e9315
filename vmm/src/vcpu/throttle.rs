//! Slows a guest: its vCPUs rest for a share of every few milliseconds.
//!
//! ```text
//! 20 %   run 8 ms │rest 2│run 8 ms │rest 2│…
//! 90 %   run 1│rest 9 ms            │run 1│…
//! 99 %   run 1│rest 99 ms …
//! ```
//! Those with the same share rest together, and so do all where it is not known which of them is to be slowed:
//! one that waits for a lock would find its holder resting otherwise, and burn its own time.

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

/// One vCPU's turns, by the clock, so that what one takes too long is made up for in the next.
#[derive(Debug, Clone, Copy)]
struct Turning {
    vcpu: usize,
    turns: Turns,
    resting: bool,
    /// When this turn ends.
    end: Instant,
}

impl Turning {
    /// What the vCPUs with a share do from `now` on; `percent` are the shares, by index.
    fn begin(percent: &[u8], now: Instant) -> Vec<Self> {
        let one = |(vcpu, percent): (usize, &u8)| {
            let turns = Turns::new(*percent);
            Self { vcpu, turns, resting: false, end: now + turns.run }
        };
        percent.iter().enumerate().filter(|(_, percent)| **percent > 0).map(one).collect()
    }

    /// The next turn, if this one is over; gives until when the vCPU must rest, if that is what it is.
    fn turn(&mut self, now: Instant) -> Option<Instant> {
        if now < self.end {
            return None;
        }
        let late = now - self.end;
        if self.resting && late > self.turns.run + self.turns.rest {
            // The host was busy with other things; nothing is to be caught up with.
            self.end = now;
        }
        self.resting = !self.resting;
        self.end += if self.resting { self.turns.rest } else { self.turns.run };
        self.resting.then_some(self.end)
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
    /// Of each vCPU, by its index.
    percent: Vec<u8>,
    /// Counts the changes.
    change: u64,
    closing: bool,
}

impl Throttle {
    /// Begins: each vCPU rests for its share of the time, percent, by index. `rest` keeps a vCPU out of the
    /// guest until a time, or lets it back in; it must return at once.
    pub fn start(
        percent: Vec<u8>,
        rest: impl Fn(usize, Option<Instant>) + Send + 'static,
    ) -> std::io::Result<Self> {
        let state = State { percent, change: 0, closing: false };
        let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() });
        let theirs = shared.clone();
        let thread =
            thread::Builder::new().name("throttle".into()).spawn(move || theirs.work(&rest))?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Changes the shares; one of 0 ends it for that vCPU. Returns at once, and it is so at once.
    pub fn set(&self, percent: Vec<u8>) {
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

    fn work(&self, rest: &dyn Fn(usize, Option<Instant>)) {
        let mut state = self.lock();
        let mut vcpus = Vec::new();
        'idle: loop {
            // Whatever was begun with another share ends.
            vcpus.iter().for_each(|turning: &Turning| rest(turning.vcpu, None));
            vcpus = Turning::begin(&state.percent, Instant::now());
            let change = state.change;
            loop {
                let next = vcpus.iter().map(|turning| turning.end).min();
                while next.is_none_or(|next| Instant::now() < next) {
                    if state.closing || state.change != change {
                        break;
                    }
                    let woken = match next {
                        None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
                        Some(next) => {
                            let left = next.saturating_duration_since(Instant::now());
                            let woken = self.changed.wait_timeout(state, left);
                            woken.unwrap_or_else(PoisonError::into_inner).0
                        }
                    };
                    state = woken;
                }
                if state.closing {
                    vcpus.iter().for_each(|turning| rest(turning.vcpu, None));
                    return;
                }
                if state.change != change {
                    continue 'idle;
                }
                // All whose turn it is at one moment, so that those with one share stay together.
                let now = Instant::now();
                for turning in &mut vcpus {
                    if let Some(until) = turning.turn(now) {
                        rest(turning.vcpu, Some(until));
                    }
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
    fn those_with_one_share_turn_together_and_the_others_by_their_own() {
        let start = Instant::now();
        let mut vcpus = Turning::begin(&[50, 0, 50, 20], start);
        assert_eq!(vcpus.iter().map(|turning| turning.vcpu).collect::<Vec<_>>(), [0, 2, 3]);
        let mut rested = [Duration::ZERO; 4];
        // As its thread does, waking up a bit late each time.
        for _ in 0..1000 {
            let now = vcpus.iter().map(|turning| turning.end).min().unwrap() + MS / 10;
            let turned: Vec<_> = vcpus
                .iter_mut()
                .filter_map(|t| Some((t.vcpu, t.turn(now)?, t.turns.rest)))
                .collect();
            for (vcpu, until, rest) in &turned {
                assert!(*until > now && *until - now <= *rest);
                rested[*vcpu] += *rest;
            }
            let until = |vcpu| turned.iter().find(|(v, ..)| *v == vcpu).map(|(_, until, _)| *until);
            assert_eq!(until(0), until(2));
        }
        let time = vcpus[0].end - start;
        for (vcpu, percent) in [(0, 50.0), (1, 0.0), (2, 50.0), (3, 20.0)] {
            let share = rested[vcpu].as_secs_f64() / time.as_secs_f64() * 100.0;
            assert!((share - percent).abs() < 1.0, "vCPU {vcpu}: {share}");
        }
        // One that comes much too late catches up with nothing.
        let late = vcpus[0].end + 1000 * MS;
        vcpus[0].resting = true;
        assert_eq!(vcpus[0].turn(late), None);
        assert_eq!(vcpus[0].end, late + vcpus[0].turns.run);
    }

    #[test]
    fn a_change_and_the_end_come_at_once_and_nothing_rests_afterwards() {
        let (tx, rx) = mpsc::channel();
        let rest = move |vcpu, until| tx.send((vcpu, until)).unwrap();
        let throttle = Throttle::start(vec![0, 50], rest).unwrap();
        let wait = |what: &str| rx.recv_timeout(60_000 * MS).unwrap_or_else(|_| panic!("{what}"));
        let (first, second) = (wait("a rest"), wait("the next"));
        assert_eq!((first.0, second.0), (1, 1), "the other never rests");
        assert!(second.1.zip(first.1).is_some_and(|(b, a)| b - a >= 10 * MS));
        throttle.set(vec![0, 0]);
        // What was on its way, and the end.
        while wait("the end").1.is_some() {}
        assert!(rx.recv_timeout(50 * MS).is_err(), "it goes on");
        throttle.set(vec![99]);
        assert!(matches!(wait("a rest"), (0, Some(_))));
        drop(throttle);
        let last = std::iter::from_fn(|| rx.recv().ok()).last();
        assert_eq!(last, Some((0, None)), "its end lets the vCPUs back in");
    }
}
