//! Which vCPU must rest how much, where it is known how much each of them writes. Pure arithmetic.
//!
//! ```text
//! would write │ █                all may write      │          each rests for what of it
//!             │ █   █            half of that    ───┼─▓─── cap  is above the cap: the first
//!             │ █   █   ▁        together           │ █   █    most, the last not at all
//! ```
//! What all may write together is what the step of [`throttle`](crate::throttle) says; it is shared out so
//! that none of them gets more than another that wants it.

/// A vCPU of which so little of its time is left could not be judged by what it writes in it, percent.
const MOST: u8 = 99;

/// How much of the time each vCPU rests, percent, if all together shall write as much less as if each
/// rested for `percent` (1 to 99) of it. `wrote` is what each has written in the same time, resting for
/// `rested` percent of it: a vCPU that writes much by itself rests much, and one that writes less than
/// its part not at all. None rests for more than `most` percent, and nobody else does so in its place: it would
/// gain little, and stop those that do no harm.
pub fn shares(percent: u8, most: u8, wrote: &[u64], rested: &[u8]) -> Vec<u8> {
    let most = most.min(MOST);
    let percent = percent.min(most);
    // What each would write if it ran all of the time: in proportion to the time that it has.
    let rested = rested.iter().copied().chain(std::iter::repeat(0));
    let wants: Vec<f64> = wrote
        .iter()
        .zip(rested)
        .map(|(wrote, rested)| *wrote as f64 * 100.0 / f64::from(100 - rested.min(MOST)))
        .collect();
    let all: f64 = wants.iter().sum();
    if all <= 0.0 {
        // Nobody is to blame.
        return vec![percent; wants.len()];
    }
    let may = all * f64::from(100 - percent) / 100.0;
    // The cap under which all of them write what they may: it grows with the cap, and half a percent
    // of a want is nothing that anybody could measure.
    let (mut low, mut high) = (0.0, wants.iter().copied().fold(0.0, f64::max));
    for _ in 0..64 {
        let cap = (low + high) / 2.0;
        match wants.iter().map(|want| want.min(cap)).sum::<f64>() > may {
            true => high = cap,
            false => low = cap,
        }
    }
    let share = |want: &f64| match *want > 0.0 {
        true => ((1.0 - want.min(high) / want) * 100.0).round().clamp(0.0, f64::from(most)) as u8,
        false => 0,
    };
    wants.iter().map(share).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_that_writes_among_idle_ones_rests_alone() {
        assert_eq!(shares(20, 99, &[1_000_000, 0, 0, 0], &[]), [20, 0, 0, 0]);
        assert_eq!(shares(99, 99, &[0, 7], &[0, 0]), [0, 99]);
        // Nearly idle is as good.
        assert_eq!(shares(50, 99, &[1_000_000, 100, 200, 300], &[]), [50, 0, 0, 0]);
    }

    #[test]
    fn all_alike_rest_alike() {
        for percent in 1..=99 {
            assert_eq!(shares(percent, 99, &[5000; 5], &[0; 5]), [percent; 5]);
            assert_eq!(shares(percent, 99, &[1], &[]), [percent]);
        }
        // Also those that have rested already, and were seen to write as much less.
        assert_eq!(shares(50, 99, &[800, 800], &[20, 20]), [50, 50]);
    }

    #[test]
    fn who_writes_twice_as_much_rests_first_and_then_both_do() {
        // Of 3000 together 2400 may be: 1400 and 1000.
        assert_eq!(shares(20, 99, &[2000, 1000], &[]), [30, 0]);
        // Of 3000 together 1500: 750 and 750.
        assert_eq!(shares(50, 99, &[2000, 1000], &[]), [63, 25]);
    }

    #[test]
    fn one_that_begins_to_write_later_is_seen_and_one_that_has_ended_runs() {
        // The first has rested for half of its time, and wants 2000; now the second writes as much.
        assert_eq!(shares(60, 99, &[1000, 2000], &[50, 0]), [60, 60]);
        // And then the first no more.
        assert_eq!(shares(70, 99, &[0, 800], &[60, 60]), [0, 70]);
    }

    #[test]
    fn what_one_may_not_rest_nobody_else_does() {
        // The first would have to rest for 88 %.
        assert_eq!(shares(80, 80, &[1000, 50, 50], &[]), [80, 0, 0]);
        // Of 1200 together 360: 120 each.
        assert_eq!(shares(70, 80, &[1000, 100, 100], &[]), [80, 0, 0]);
        assert_eq!(shares(75, 80, &[1000, 110, 110], &[]), [80, 8, 8]);
    }

    #[test]
    fn where_nobody_has_written_all_rest_and_odd_numbers_are_none() {
        assert_eq!(shares(40, 99, &[0, 0], &[]), [40, 40]);
        assert_eq!(shares(40, 99, &[], &[1, 2]), [0; 0]);
        assert_eq!(shares(200, 250, &[u64::MAX, u64::MAX], &[255, 255]), [99, 99]);
        assert_eq!(shares(0, 99, &[10, 20], &[]), [0, 0]);
        // Who has not been told to rest has not rested.
        assert_eq!(shares(50, 99, &[10, 10, 10], &[0]), [50, 50, 50]);
    }

    /// Whatever they write: never more than may be, by rounding, and nobody rests beside one that wants
    /// more and rests less.
    #[test]
    fn together_they_write_as_much_less_and_who_wants_more_rests_more() {
        let mut seed = 1_u64;
        let mut random = |below: u64| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (seed >> 33) % below
        };
        for _ in 0..2000 {
            let wrote: Vec<u64> = (0..1 + random(8)).map(|_| random(100_000)).collect();
            let percent = 1 + random(99) as u8;
            let shares = shares(percent, 99, &wrote, &[]);
            let all: f64 = wrote.iter().map(|n| *n as f64).sum();
            let left: f64 = wrote
                .iter()
                .zip(&shares)
                .map(|(n, share)| *n as f64 * f64::from(100 - share) / 100.0)
                .sum();
            let may = all * f64::from(100 - percent) / 100.0;
            assert!((left - may).abs() <= all * 0.0051, "{wrote:?} {percent} {shares:?}");
            for (a, share_a) in wrote.iter().zip(&shares) {
                for (b, share_b) in wrote.iter().zip(&shares) {
                    assert!(a < b || share_a >= share_b, "{wrote:?} {percent} {shares:?}");
                }
            }
        }
    }
}
