//! When to stop the guest: what is left, at the rate that was measured, against the downtime that
//! is allowed. Pure arithmetic.
//!
//! The limit is what the guest may stand still at most, not what is aimed at: while each pass leaves
//! clearly less than the one before, one more makes the pause shorter and costs little.

use std::collections::VecDeque;
use std::time::Duration;

use crate::estimate::left_for_pages;
use crate::params::OnTimeout;

/// The stretch of sending over which the rate is measured. Long enough to see past what the
/// kernel's socket buffers swallow at once.
const RATE_WINDOW: Duration = Duration::from_secs(1);

/// Sending that takes no longer is not worth another pass: what else the hand-over has to do takes as
/// long.
const TRIFLE: Duration = Duration::from_millis(2);
/// A pass pays that leaves at most so many parts of four of what it had to send. At most so much is
/// left after each, so there are few such passes: 18 from 300 ms to 2 ms, and 1.2 s for all of them.
const PAYS: u64 = 3;

/// Whether another pass is worth it although what is left fits the limit: it takes more than a trifle to
/// send (`forecast`), and the pass that has ended left clearly less (`remaining`, in bytes) than it had
/// to send (`before`).
pub fn pays(forecast: Duration, remaining: u64, before: u64) -> bool {
    forecast > TRIFLE && remaining.saturating_mul(4) <= before.saturating_mul(PAYS)
}

/// The rate at which bytes have lately been sent.
#[derive(Debug, Clone, Default)]
pub struct Rate {
    samples: VecDeque<(Duration, u64)>,
    time: Duration,
    bytes: u64,
}

impl Rate {
    /// Notes that sending `bytes` took `time`.
    pub fn add(&mut self, time: Duration, bytes: u64) {
        self.samples.push_back((time, bytes));
        self.time += time;
        self.bytes += bytes;
        while let Some(&(time, bytes)) = self.samples.front() {
            // The last that has any bytes says more than nothing.
            if self.time - time < RATE_WINDOW || self.bytes == bytes {
                break;
            }
            self.samples.pop_front();
            self.time -= time;
            self.bytes -= bytes;
        }
    }

    /// Corrects the rate after a pass that sent `bytes` in the time `sending`, all of which the other side has
    /// taken in `settling` later; `before` it was that. A pass that is short, or of which the sockets have
    /// swallowed much, seemed to be sent faster than it was. In another the sockets were full, and what was
    /// measured at its end is right.
    pub fn of_pass(&mut self, before: Rate, sending: Duration, settling: Duration, bytes: u64) {
        let whole = sending.saturating_add(settling);
        let short = whole < RATE_WINDOW;
        if bytes == 0 || !(short || settling > whole / 4) {
            return;
        }
        *self = if short { before } else { Rate::default() };
        // Such that what is measured after it counts as always.
        let part = RATE_WINDOW.as_secs_f64() / whole.as_secs_f64().max(RATE_WINDOW.as_secs_f64());
        self.add(whole.min(RATE_WINDOW), (bytes as f64 * part) as u64);
    }

    /// Bytes per second; `None` before anything was sent.
    pub fn bytes_per_s(&self) -> Option<f64> {
        let seconds = self.time.as_secs_f64();
        (self.bytes > 0 && seconds > 0.0).then(|| self.bytes as f64 / seconds)
    }

    /// How long `bytes` would take; `None` before anything was sent.
    pub fn time_for(&self, bytes: u64) -> Option<Duration> {
        if bytes == 0 {
            return Some(Duration::ZERO);
        }
        self.bytes_per_s().and_then(|rate| Duration::try_from_secs_f64(bytes as f64 / rate).ok())
    }
}

/// What is known after a pass.
#[derive(Debug, Clone, Copy)]
pub struct Progress {
    /// How long what is left would take; `None` when that is unknown.
    pub forecast: Option<Duration>,
    /// What the guest would wait for beside that.
    pub hand_over: Duration,
    /// What is left, in bytes.
    pub remaining: u64,
    /// What was left before the pass, in bytes.
    pub before: u64,
    /// How long the guest may stand still.
    pub downtime_limit: Duration,
    /// How long the migration has run.
    pub elapsed: Duration,
    /// How long it may, if there is a limit.
    pub timeout: Option<Duration>,
    /// What to do when that is over.
    pub on_timeout: OnTimeout,
    /// What was left fitted the limit once, and after another pass it did not.
    pub missed: bool,
}

/// What to do next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// One more pass.
    GoOn,
    /// One more pass, although the rest fits the limit: it makes the pause shorter.
    Shorten,
    /// Stop the guest: the rest fits the limit.
    Switch,
    /// Stop the guest although the rest does not fit: time is over.
    Force,
    /// Give up: time is over.
    GiveUp,
}

/// Decides after a pass.
pub fn decide(progress: &Progress) -> Decision {
    let most = left_for_pages(progress.downtime_limit, progress.hand_over);
    let fits = progress.forecast.filter(|forecast| *forecast <= most);
    if let Some(forecast) = fits {
        let over = progress.timeout.is_some_and(|timeout| progress.elapsed >= timeout);
        // A guest that is quiet for less than a pass would be asked for one for ever.
        let no_more = over || progress.missed;
        return match no_more || !pays(forecast, progress.remaining, progress.before) {
            true => Decision::Switch,
            false => Decision::Shorten,
        };
    }
    match (progress.timeout, progress.on_timeout) {
        (Some(timeout), OnTimeout::Cancel) if progress.elapsed >= timeout => Decision::GiveUp,
        (Some(timeout), OnTimeout::Force) if progress.elapsed >= timeout => Decision::Force,
        _ => Decision::GoOn,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn the_rate_is_that_of_the_last_second() {
        let mut rate = Rate::default();
        assert_eq!(rate.bytes_per_s(), None);
        assert_eq!(rate.time_for(0), Some(Duration::ZERO));
        assert_eq!(rate.time_for(1), None);
        rate.add(1000 * MS, 1_000_000);
        assert_eq!(rate.bytes_per_s(), Some(1e6));
        for _ in 0..10 {
            rate.add(200 * MS, 1_000_000);
        }
        assert_eq!(rate.bytes_per_s(), Some(5e6));
        assert_eq!(rate.time_for(1_000_000), Some(200 * MS));
    }

    #[test]
    fn what_sockets_swallow_is_sent_when_the_other_side_has_it() {
        let steady = |rate: &mut Rate| (0..20).for_each(|_| rate.add(100 * MS, 1_000_000));
        let mut rate = Rate::default();
        steady(&mut rate);
        // A short pass of 2 MB, gone in a millisecond, which has arrived 199 ms later.
        let before = rate.clone();
        rate.add(MS, 2_000_000);
        rate.of_pass(before, MS, 199 * MS, 2_000_000);
        assert_eq!(rate.bytes_per_s(), Some(1e7));
        // The same of a slow link's first pass.
        let mut slow = Rate::default();
        slow.add(MS, 2_000_000);
        slow.of_pass(Rate::default(), MS, 3999 * MS, 2_000_000);
        assert_eq!(slow.bytes_per_s(), Some(5e5));
        // ... which is forgotten as soon as anything else.
        steady(&mut slow);
        assert_eq!(slow.bytes_per_s(), Some(1e7));
        // A long one is right as it was measured.
        let before = rate.clone();
        steady(&mut rate);
        rate.of_pass(before.clone(), 2000 * MS, 500 * MS, 20_000_000);
        assert_eq!(rate.bytes_per_s(), Some(1e7));
        // One that had nothing to send says nothing.
        rate.of_pass(before, MS, MS, 0);
        assert_eq!(rate.bytes_per_s(), Some(1e7));
    }

    #[test]
    fn time_alone_makes_nobody_forget_the_rate() {
        let mut rate = Rate::default();
        rate.add(100 * MS, 1_000_000);
        rate.add(3000 * MS, 0);
        assert!(rate.bytes_per_s().is_some());
    }

    #[test]
    fn a_burst_into_the_socket_buffer_does_not_look_like_a_fast_link() {
        let mut rate = Rate::default();
        rate.add(2000 * MS, 20_000_000);
        rate.add(MS, 4_000_000);
        assert!(rate.bytes_per_s().unwrap() < 13e6);
    }

    #[test]
    fn every_case_is_decided() {
        use Decision::*;
        let limit = 300 * MS;
        let case = |forecast, elapsed, timeout, on_timeout| {
            let (remaining, before) = (100, 100);
            decide(&Progress {
                forecast,
                hand_over: 10 * MS,
                remaining,
                before,
                downtime_limit: limit + 10 * MS,
                elapsed,
                timeout,
                on_timeout,
                missed: false,
            })
        };
        let (cancel, force) = (OnTimeout::Cancel, OnTimeout::Force);
        let second = 1000 * MS;
        assert_eq!(case(Some(limit), second, None, cancel), Switch);
        assert_eq!(case(Some(limit), second, Some(second), cancel), Switch);
        assert_eq!(case(Some(limit + MS), second, None, cancel), GoOn);
        assert_eq!(case(None, second, None, force), GoOn);
        assert_eq!(case(Some(second), second, Some(second + MS), force), GoOn);
        assert_eq!(case(Some(second), second, Some(second), cancel), GiveUp);
        assert_eq!(case(Some(second), second, Some(second), force), Force);
        assert_eq!(case(None, second, Some(second), force), Force);
    }

    #[test]
    fn the_limit_is_not_aimed_at_while_passes_pay() {
        use Decision::*;
        let case = |ms: u32, remaining, before, elapsed: u32| {
            progress(ms, remaining, before, elapsed, false)
        };
        let missed = |ms, remaining| progress(ms, remaining, 100, 0, true);
        fn progress(ms: u32, remaining: u64, before: u64, elapsed: u32, missed: bool) -> Decision {
            decide(&Progress {
                forecast: Some(ms * MS),
                hand_over: 10 * MS,
                remaining,
                before,
                downtime_limit: 310 * MS,
                elapsed: elapsed * MS,
                timeout: Some(1000 * MS),
                on_timeout: OnTimeout::Cancel,
                missed,
            })
        }
        assert_eq!(case(300, 75, 100, 0), Shorten, "clearly less than before");
        assert_eq!(case(300, 76, 100, 0), Switch, "nearly as much as before");
        assert_eq!(case(3, 75, 100, 0), Shorten);
        assert_eq!(case(2, 1, 100, 0), Switch, "a trifle");
        assert_eq!(case(300, 75, 100, 1000), Switch, "time is over, and it fits");
        assert_eq!(case(301, 75, 100, 1000), GiveUp);
        assert_eq!(missed(300, 1), Switch, "the second time that it fits");
        assert_eq!(missed(301, 1), GoOn);
        // However the guest writes, there is an end.
        let (mut remaining, mut passes, mut ms) = (1 << 30, 0, 300.0);
        while pays(Duration::from_secs_f64(ms / 1e3), remaining * 3 / 4, remaining) {
            (remaining, passes, ms) = (remaining * 3 / 4, passes + 1, ms * 0.75);
        }
        assert_eq!(passes, 18);
    }
}
