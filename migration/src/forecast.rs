//! How a migration would go, from what was measured before it: the bandwidth of the connection, and
//! how many different pages the guest writes in so much time. Pure arithmetic.
//!
//! A pass sends what the guest has written during the one before. How much that is follows from how
//! long that one took, by a curve through the points that were measured: a guest that writes the
//! same pages again and again has a curve that gets flat, and converges although it writes much.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::converge::pays;
use crate::estimate::{HandOver, left_for_pages};

/// A migration that needs more passes than this is not going to end.
const MAX_PASSES: u64 = 1000;
/// How finely a sufficient bandwidth is looked for, and how far: up to 1.05^200, or 17,000 times as
/// much.
const STEP: f64 = 1.05;
const STEPS: u32 = 200;

/// What was measured.
#[derive(Debug, Clone, PartialEq)]
pub struct Measured {
    /// All of RAM in bytes, zero pages included.
    pub ram_bytes: u64,
    /// About how much of it is not zero, and travels in the first pass.
    pub data_bytes: u64,
    /// Bytes per second that the connection has carried.
    pub bandwidth: u64,
    /// How long an answer takes.
    pub round_trip: Duration,
    /// What the guest waits for beside the last pages.
    pub hand_over: HandOver,
    /// How many bytes' worth of different pages the guest had written after so much time,
    /// ascending.
    pub dirtied: Vec<(Duration, u64)>,
}

/// How the migration would go.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Forecast {
    /// Bytes per second that the connection carries.
    pub bandwidth: u64,
    /// Bytes per second that will be used: `max-bandwidth` may be less.
    pub used_bandwidth: u64,
    /// How long an answer takes, in µs.
    pub round_trip_us: u64,
    /// All of RAM in bytes.
    pub ram_bytes: u64,
    /// About how much of it the first pass sends.
    pub data_bytes: u64,
    /// How long the guest was watched, in ms.
    pub sample_ms: u64,
    /// Bytes' worth of different pages that it wrote meanwhile.
    pub dirtied_bytes: u64,
    /// The same, for a second.
    pub dirty_bytes_per_s: u64,
    /// How long the guest may stand still, in ms.
    pub downtime_limit_ms: u64,
    /// Whether it gets there by itself.
    pub converges: bool,
    /// Passes over RAM until the guest is stopped; 0 if that never happens.
    pub passes: u64,
    /// How long it takes altogether, in ms.
    pub total_ms: u64,
    /// How long the guest stands still, in ms. If it does not converge: when it is forced.
    pub downtime_ms: u64,
    /// If it does not converge: bytes per second that would do.
    pub needed_bandwidth: Option<u64>,
    /// If it does not converge: a `downtime-limit` in ms that would do.
    pub needed_downtime_ms: Option<u64>,
}

/// How it goes with one bandwidth.
struct Course {
    passes: u64,
    seconds: f64,
    left: f64,
    converges: bool,
}

impl Measured {
    /// Bytes' worth of different pages that are written in `seconds`.
    fn written_in(&self, seconds: f64) -> f64 {
        let all = self.ram_bytes as f64;
        let (mut from, mut slope) = ((0.0, 0.0), 0.0);
        for (time, bytes) in &self.dirtied {
            let point = (time.as_secs_f64(), *bytes as f64);
            if point.0 <= from.0 {
                continue;
            }
            slope = (point.1 - from.1).max(0.0) / (point.0 - from.0);
            if seconds <= point.0 {
                break;
            }
            from = point;
        }
        // Behind the last point it goes on as it did before.
        (from.1 + slope * (seconds - from.0)).clamp(0.0, all)
    }

    fn course(&self, bandwidth: f64, limit: f64) -> Course {
        let mut course =
            Course { passes: 0, seconds: 0.0, left: self.data_bytes as f64, converges: false };
        while course.passes < MAX_PASSES {
            let pass = course.left / bandwidth + self.round_trip.as_secs_f64();
            let left = self.written_in(pass);
            course.passes = course.passes.saturating_add(1);
            course.seconds += pass;
            let rest = left / bandwidth;
            course.converges = rest <= limit;
            // More time never means fewer pages: what does not shrink once never will.
            let hopeless = left >= course.left;
            let forecast = Duration::try_from_secs_f64(rest).unwrap_or(Duration::MAX);
            let pays = pays(forecast, left as u64, course.left as u64);
            course.left = left;
            if hopeless || (course.converges && !pays) {
                break;
            }
        }
        course
    }

    /// How the migration would go with at most `max_bandwidth` bytes per second (0 is no limit) and a
    /// downtime of `limit` allowed.
    pub fn forecast(&self, max_bandwidth: u64, limit: Duration) -> Forecast {
        let used = match max_bandwidth {
            0 => self.bandwidth,
            most => most.min(self.bandwidth),
        };
        let rate = used.max(1) as f64;
        let course = |rate: f64| {
            let most = left_for_pages(limit, self.hand_over.at(Some(rate)));
            self.course(rate, most.as_secs_f64())
        };
        let hand_over = self.hand_over.at(Some(rate)).as_secs_f64();
        let enough = (1..=STEPS)
            .map(|n| rate * STEP.powi(n as i32))
            .find(|faster| course(*faster).converges);
        let course = course(rate);
        let still = hand_over + course.left / rate;
        let (sample, dirtied) = self.dirtied.last().copied().unwrap_or_default();
        Forecast {
            bandwidth: self.bandwidth,
            used_bandwidth: used,
            round_trip_us: u64::try_from(self.round_trip.as_micros()).unwrap_or(u64::MAX),
            ram_bytes: self.ram_bytes,
            data_bytes: self.data_bytes,
            sample_ms: ms(sample.as_secs_f64()),
            dirtied_bytes: dirtied,
            dirty_bytes_per_s: (dirtied as f64 / sample.as_secs_f64().max(1e-3)) as u64,
            downtime_limit_ms: ms(limit.as_secs_f64()),
            converges: course.converges,
            passes: if course.converges { course.passes } else { 0 },
            total_ms: ms(course.seconds + still),
            downtime_ms: ms(still),
            needed_bandwidth: enough.filter(|_| !course.converges).map(|rate| rate as u64),
            // What is left when it stops to shrink must be sent with the guest stopped. A little more
            // than that, for what was measured is never exact.
            needed_downtime_ms: (!course.converges)
                .then(|| ms(hand_over + course.left / rate * 1.2)),
        }
    }
}

impl Measured {
    /// How it would go on after a pass that had `before` bytes to send and left
    /// [`data_bytes`](Self::data_bytes): how much longer until the guest runs on the other side, and how much
    /// of that it stands still. `None` if it would not come to an end.
    pub fn from_here(&self, before: u64, limit: Duration) -> Option<(Duration, Duration)> {
        let rate = self.bandwidth.max(1) as f64;
        let hand_over = self.hand_over.at(Some(rate));
        let pages = Duration::try_from_secs_f64(self.data_bytes as f64 / rate).ok()?;
        if pages <= left_for_pages(limit, hand_over) && !pays(pages, self.data_bytes, before) {
            return Some((pages.saturating_add(hand_over), pages.saturating_add(hand_over)));
        }
        let forecast = self.forecast(0, limit);
        let ms = Duration::from_millis;
        forecast.converges.then(|| (ms(forecast.total_ms), ms(forecast.downtime_ms)))
    }
}

/// Whole milliseconds, rounded up. (A cast from a float saturates.)
fn ms(seconds: f64) -> u64 {
    (seconds * 1e3).ceil() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn measured(dirtied: &[(u64, u64)]) -> Measured {
        Measured {
            ram_bytes: 1024 * MIB,
            data_bytes: 512 * MIB,
            bandwidth: 100 * MIB,
            round_trip: Duration::from_millis(1),
            hand_over: HandOver { fixed: Duration::from_millis(10), bytes: 0 },
            dirtied: dirtied.iter().map(|(t, n)| (Duration::from_millis(*t), n * MIB)).collect(),
        }
    }

    const LIMIT: Duration = Duration::from_millis(300);

    #[test]
    fn an_idle_guest_takes_one_pass() {
        let forecast = measured(&[(500, 0), (1000, 0)]).forecast(0, LIMIT);
        assert!(forecast.converges);
        assert_eq!((forecast.passes, forecast.needed_bandwidth), (1, None));
        assert!((5120..5300).contains(&forecast.total_ms), "{forecast:?}");
        assert!((10..20).contains(&forecast.downtime_ms), "{forecast:?}");
    }

    #[test]
    fn a_guest_that_writes_half_as_fast_as_is_sent_needs_some_passes() {
        let forecast = measured(&[(500, 25), (1000, 50)]).forecast(0, LIMIT);
        assert!(forecast.converges);
        // 512 MiB, 256, 128, 64, 32, which take 320 ms, and 16, which fit. But each pass halves it, and so
        // it goes on, until it is hardly more than what is written in a round trip.
        assert_eq!(forecast.passes, 13, "{forecast:?}");
        assert!((10..20).contains(&forecast.downtime_ms), "{forecast:?}");
        assert_eq!(forecast.dirty_bytes_per_s, 50 * MIB);
    }

    #[test]
    fn in_the_middle_of_a_migration_it_goes_on_from_what_is_left() {
        let ms = Duration::from_millis;
        let left = |mib: u64| Measured { data_bytes: mib * MIB, ..measured(&[(1000, 50)]) };
        // Hardly less than before: it ends here, and 10 MiB take 100 ms.
        assert_eq!(left(10).from_here(11 * MIB, LIMIT), Some((ms(110), ms(110))));
        // Another pass pays, and some more after it: 100 ms, 50, 25 and so on.
        let (total, still) = left(10).from_here(20 * MIB, LIMIT).unwrap();
        assert!(ms(200) < total && total < ms(240), "{total:?}");
        assert!(ms(10) < still && still < ms(15), "{still:?}");
        let (total, _) = left(200).from_here(512 * MIB, LIMIT).unwrap();
        assert!(ms(4000) < total && total < ms(4100), "{total:?}");
        let faster = Measured { data_bytes: 200 * MIB, ..measured(&[(1000, 200)]) };
        assert_eq!(faster.from_here(512 * MIB, LIMIT), None);
    }

    #[test]
    fn one_that_writes_faster_does_not_converge_and_what_would_do_is_named() {
        let measured = measured(&[(500, 100), (1000, 200)]);
        let forecast = measured.forecast(0, LIMIT);
        assert!(!forecast.converges);
        let (faster, longer) =
            (forecast.needed_bandwidth.unwrap(), forecast.needed_downtime_ms.unwrap());
        assert!((200 * MIB..300 * MIB).contains(&faster), "{forecast:?}");
        assert!(Measured { bandwidth: faster, ..measured.clone() }.forecast(0, LIMIT).converges);
        assert!(measured.forecast(0, Duration::from_millis(longer)).converges);
    }

    #[test]
    fn one_that_writes_the_same_pages_again_and_again_converges() {
        // Fast, but never more than 20 MiB.
        let forecast = measured(&[(10, 20), (500, 20), (1000, 20)]).forecast(0, LIMIT);
        assert!(forecast.converges, "{forecast:?}");
        // The second pass makes it no less.
        assert_eq!(forecast.passes, 2);
        assert!((200..250).contains(&forecast.downtime_ms), "{forecast:?}");
    }

    #[test]
    fn a_limit_of_the_bandwidth_counts() {
        let measured = measured(&[(500, 25), (1000, 50)]);
        let forecast = measured.forecast(10 * MIB, LIMIT);
        assert_eq!(forecast.used_bandwidth, 10 * MIB);
        assert!(!forecast.converges);
    }

    #[test]
    fn absurd_measurements_are_no_trouble() {
        for dirtied in [&[][..], &[(0, 5)], &[(5, 5), (5, 9)], &[(5, 9), (6, 1)]] {
            for bandwidth in [0, 1, u64::MAX] {
                let measured = Measured { bandwidth, ..measured(dirtied) };
                let forecast = measured.forecast(0, Duration::ZERO);
                assert!(forecast.converges || forecast.needed_downtime_ms.is_some());
            }
        }
    }
}
