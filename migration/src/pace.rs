//! Keeps to a limit on bytes per second. Pure arithmetic over a clock that is handed in.
//!
//! What has been sent is owed to the clock and is paid back by time. Time in which nothing was to be
//! sent is no credit, but for a moment: a limit is there for the others on the network, who must not
//! meet a burst after every pause.

use std::time::{Duration, Instant};

/// For so long the sender may have been late (asleep for too long, waiting for a slow reader) and still
/// catch up.
const CREDIT: Duration = Duration::from_millis(100);

/// What has been sent and is not yet paid for.
#[derive(Debug, Clone)]
pub(crate) struct Pace {
    /// Bytes; negative is credit.
    owed: f64,
    seen: Instant,
    sent: u64,
}

impl Pace {
    /// Begins now, when `sent` bytes have been sent.
    pub(crate) fn new(now: Instant, sent: u64) -> Self {
        Self { owed: 0.0, seen: now, sent }
    }

    /// How long to wait before more is sent, now that `sent` bytes have been sent in all, when `limit`
    /// bytes per second are allowed; 0 is no limit. The limit may be another one at every call.
    pub(crate) fn ahead(&mut self, now: Instant, sent: u64, limit: u64) -> Duration {
        let elapsed = now.saturating_duration_since(self.seen).as_secs_f64();
        // It may be less than before: what compressed pages take is an estimate until they have gone.
        self.owed += sent as f64 - self.sent as f64;
        (self.seen, self.sent) = (now, sent);
        if limit == 0 {
            self.owed = 0.0;
            return Duration::ZERO;
        }
        let limit = limit as f64;
        self.owed = (self.owed - elapsed * limit).max(-limit * CREDIT.as_secs_f64());
        Duration::try_from_secs_f64(self.owed / limit).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// A sender with a clock of its own.
    struct Sender {
        now: Instant,
        sent: u64,
        pace: Pace,
        /// Its waits take so much longer than they should.
        oversleeps: Duration,
    }

    impl Sender {
        fn new(oversleeps: Duration) -> Self {
            let now = Instant::now();
            Self { now, sent: 0, pace: Pace::new(now, 0), oversleeps }
        }

        /// Sends pieces of these sizes, over and over, on a link of `link` bytes per second, for
        /// `seconds` at least; gives bytes per second.
        fn send(&mut self, pieces: &[u64], link: u64, limit: u64, seconds: u64) -> f64 {
            let (begin, before) = (self.now, self.sent);
            for piece in pieces.iter().cycle() {
                self.now += Duration::from_secs_f64(*piece as f64 / link as f64);
                self.sent += piece;
                let ahead = self.pace.ahead(self.now, self.sent, limit);
                if !ahead.is_zero() {
                    self.now += ahead + self.oversleeps;
                }
                if self.now - begin > Duration::from_secs(seconds) {
                    break;
                }
            }
            (self.sent - before) as f64 / (self.now - begin).as_secs_f64()
        }
    }

    fn near(rate: f64, limit: u64) {
        let off = rate / limit as f64 - 1.0;
        assert!(off.abs() < 0.02, "{:.2} % off {limit}", off * 100.0);
    }

    #[test]
    fn the_limit_holds_within_two_percent_whatever_is_sent_and_however_sleepy_the_host_is() {
        for limit in [MIB, 12_500_000, 125_000_000, 3_000_000_000] {
            let tenth = limit / 10;
            for pieces in [&[tenth][..], &[4096], &[tenth, 9, 4096, tenth / 3], &[tenth / 2, 1]] {
                for oversleeps in [0, 50, 5000, 40_000] {
                    let mut sender = Sender::new(Duration::from_micros(oversleeps));
                    near(sender.send(pieces, 12_000_000_000, limit, 10), limit);
                }
            }
        }
    }

    #[test]
    fn an_estimate_that_was_too_high_is_given_back() {
        let limit = 10 * MIB;
        let mut sender = Sender::new(Duration::ZERO);
        let begin = sender.now;
        for n in 0..1000 {
            // Half of it is expected, and it is nearly all or hardly anything.
            let done = sender.sent + if n % 2 == 0 { MIB / 10 } else { MIB * 9 / 10 };
            sender.sent += MIB / 2;
            sender.now += sender.pace.ahead(sender.now, sender.sent, limit);
            sender.sent = done;
            sender.now += sender.pace.ahead(sender.now, sender.sent, limit);
        }
        near(sender.sent as f64 / (sender.now - begin).as_secs_f64(), limit);
    }

    #[test]
    fn a_link_that_is_slower_than_the_limit_is_never_waited_for() {
        let mut sender = Sender::new(Duration::from_millis(5));
        near(sender.send(&[MIB], 50_000_000, 60_000_000, 10), 50_000_000);
    }

    #[test]
    fn a_change_holds_from_now_on_and_forgives_nothing() {
        let mut sender = Sender::new(Duration::ZERO);
        for limit in [10 * MIB, 80 * MIB, MIB, 20 * MIB] {
            near(sender.send(&[MIB / 10], 12_000_000_000, limit, 10), limit);
        }
        // One that is changed back and forth at every write is as good as their mean.
        let (now, mut time) = (Instant::now(), Duration::ZERO);
        let mut pace = Pace::new(now, 0);
        for n in 1..=1000 {
            let limit = if n % 2 == 0 { 10 * MIB } else { 20 * MIB };
            let ahead = pace.ahead(now + time, n * MIB, limit);
            time += ahead / 2;
        }
        let rate = (1000.0 * MIB as f64) / time.as_secs_f64();
        assert!(rate < 21.0 * MIB as f64, "{rate}");
    }

    #[test]
    fn time_in_which_nothing_was_sent_is_no_licence_for_a_burst() {
        let mut sender = Sender::new(Duration::ZERO);
        sender.send(&[MIB], 12_000_000_000, 10 * MIB, 2);
        sender.now += Duration::from_secs(60);
        let before = sender.sent;
        let begin = sender.now;
        sender.send(&[MIB], 12_000_000_000, 10 * MIB, 5);
        let seconds = (sender.now - begin).as_secs_f64();
        let extra = (sender.sent - before) as f64 - seconds * (10 * MIB) as f64;
        // A tenth of a second's worth, and the piece that ended the pause.
        assert!(extra <= 2.01 * MIB as f64, "{extra}");
        // No limit owes nothing to the one that follows.
        sender.send(&[MIB], 12_000_000_000, 0, 1);
        near(sender.send(&[MIB], 12_000_000_000, 10 * MIB, 10), 10 * MIB);
    }
}
