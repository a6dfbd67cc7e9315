//! How much of its time a guest must rest that writes faster than its pages can be sent. Pure
//! arithmetic; how vCPUs are made to rest is the machine's business
//! ([`SourceVm::throttle`](crate::guest::SourceVm::throttle)).
//!
//! ```text
//! not needed ──two looks in a row at which the passes shrink too little──→ initial ──the same──→ + increment … → max
//! ```
//! A *look* is as many passes as take `LOOK` (0.2 s) together. The share never falls while the migration
//! lasts: a guest that writes little because it rests would write more again. Where it is known how much
//! each vCPU writes, it is the share of all of them together, and at each look that shows that it is needed
//! [`shares`] says anew who rests for it.

use std::time::Duration;

use crate::shares::shares;

/// The least time that is judged at once: a vCPU's turns of running and resting have to be many in
/// it.
const LOOK: Duration = Duration::from_millis(200);
/// So many looks in a row must show that it is needed, as QEMU has it.
const LOOKS: u32 = 2;
/// A migration that would converge within so many more passes is left to it.
const PASSES_TO_GO: i32 = 8;

/// What the user allows; QEMU's parameters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// `cpu-throttle-initial`: the first step, percent of the time. 20.
    pub initial: u8,
    /// `cpu-throttle-increment`: each further step, in percent points. 10.
    pub increment: u8,
    /// `max-cpu-throttle`: the most, percent; up to 99, which is the default.
    pub max: u8,
    /// `cpu-throttle-tailslow`: no step longer than what seems to be needed. Off.
    pub tailslow: bool,
    /// `throttle-trigger-threshold`: a pass shrinks too little when what was written meanwhile is more
    /// than this percentage of what was sent. 50.
    pub trigger: u8,
}

impl Default for Limits {
    fn default() -> Self {
        Self { initial: 20, increment: 10, max: 99, tailslow: false, trigger: 50 }
    }
}

/// How much of the time vCPUs rest, percent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Rest {
    /// All of them.
    All(u8),
    /// Each, by its index; those behind the end not at all.
    Each(Vec<u8>),
}

impl Rest {
    /// Nobody rests.
    pub const NONE: Self = Self::All(0);

    /// The share of the one that rests most.
    pub fn most(&self) -> u8 {
        match self {
            Self::All(percent) => *percent,
            Self::Each(all) => all.iter().copied().max().unwrap_or(0),
        }
    }

    /// The share of one vCPU.
    pub fn of(&self, vcpu: usize) -> u8 {
        match self {
            Self::All(percent) => *percent,
            Self::Each(all) => all.get(vcpu).copied().unwrap_or(0),
        }
    }
}

impl Default for Rest {
    fn default() -> Self {
        Self::NONE
    }
}

/// What a pass has shown.
#[derive(Debug, Clone)]
pub struct Pass {
    /// How long it took.
    pub time: Duration,
    /// Bytes that it has sent.
    pub sent: u64,
    /// Bytes that it would take to send what was written meanwhile.
    pub dirtied: u64,
    /// How long what is left would take; `None` when that is unknown.
    pub forecast: Option<Duration>,
    /// How long the guest may stand still.
    pub downtime_limit: Duration,
    /// Pages that each vCPU has written meanwhile, by its index; empty where that is not known.
    pub by_vcpu: Vec<u64>,
}

/// The guest's share of rest.
#[derive(Debug, Clone, Default)]
pub struct Throttle {
    percent: u8,
    /// Looks in a row that have shown that it is needed.
    needed: u32,
    time: Duration,
    sent: u64,
    dirtied: u64,
    /// Over the looks in a row that have shown that it is needed.
    by_vcpu: Vec<u64>,
    rest: Rest,
}

impl Throttle {
    /// How much of the time the guest rests now, percent.
    pub fn percent(&self) -> u8 {
        self.percent
    }

    /// Who rests for how much of it.
    pub fn rest(&self) -> &Rest {
        &self.rest
    }

    /// Notes a pass after which the rest did not fit the downtime limit. `Some` is who must rest for how
    /// much of the time from now on, if that is another than before; all together for no less.
    pub fn after(&mut self, pass: &Pass, limits: &Limits) -> Option<Rest> {
        self.time += pass.time;
        self.sent = self.sent.saturating_add(pass.sent);
        self.dirtied = self.dirtied.saturating_add(pass.dirtied);
        self.by_vcpu.resize(pass.by_vcpu.len(), 0);
        for (sum, more) in self.by_vcpu.iter_mut().zip(&pass.by_vcpu) {
            *sum = sum.saturating_add(*more);
        }
        if self.time < LOOK {
            return None;
        }
        let ratio = self.dirtied as f64 / self.sent.max(1) as f64;
        (self.time, self.sent, self.dirtied) = (Duration::ZERO, 0, 0);
        self.needed = if is_needed(ratio, pass, limits) { self.needed + 1 } else { 0 };
        if self.needed == 0 {
            self.by_vcpu.clear();
        }
        if self.needed < LOOKS {
            return None;
        }
        self.needed = 0;
        self.percent = self.percent.max(self.next(ratio, limits));
        let wrote = std::mem::take(&mut self.by_vcpu);
        let rest = match wrote.is_empty() {
            true => Rest::All(self.percent),
            false => {
                let rested: Vec<_> = (0..wrote.len()).map(|vcpu| self.rest.of(vcpu)).collect();
                Rest::Each(shares(self.percent, limits.max, &wrote, &rested))
            }
        };
        let other = rest != self.rest;
        self.rest = rest;
        other.then(|| self.rest.clone())
    }

    fn next(&self, ratio: f64, limits: &Limits) -> u8 {
        let max = limits.max.min(99);
        if self.percent == 0 {
            return limits.initial.min(max);
        }
        let mut step = limits.increment;
        if limits.tailslow {
            // What it writes is taken to be in proportion to the time that it has.
            let share = f64::from(100 - self.percent.min(99));
            let enough = share * f64::from(limits.trigger) / 100.0 / ratio;
            step = step.min((share - enough).ceil().clamp(1.0, 99.0) as u8);
        }
        self.percent.saturating_add(step).min(max)
    }
}

/// Whether passes that leave `ratio` of what they send come to an end too late.
fn is_needed(ratio: f64, pass: &Pass, limits: &Limits) -> bool {
    let Some(forecast) = pass.forecast else { return false };
    let later = forecast.as_secs_f64() * ratio.powi(PASSES_TO_GO);
    ratio * 100.0 > f64::from(limits.trigger) && later > pass.downtime_limit.as_secs_f64()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);
    const LIMITS: Limits =
        Limits { initial: 20, increment: 10, max: 99, tailslow: false, trigger: 50 };

    /// A pass of a second that leaves `percent` of what it has sent.
    fn pass(percent: u64) -> Pass {
        Pass {
            time: 1000 * MS,
            sent: 1 << 30,
            dirtied: (1 << 30) / 100 * percent,
            forecast: Some(1000 * MS / 100 * percent as u32),
            downtime_limit: 300 * MS,
            by_vcpu: Vec::new(),
        }
    }

    #[test]
    fn one_bad_pass_is_none_and_a_good_one_between_begins_anew() {
        let mut throttle = Throttle::default();
        assert_eq!(throttle.after(&pass(100), &LIMITS), None);
        assert_eq!(throttle.after(&pass(10), &LIMITS), None);
        assert_eq!(throttle.after(&pass(100), &LIMITS), None);
        assert_eq!(throttle.percent(), 0);
        assert_eq!(throttle.after(&pass(100), &LIMITS), Some(Rest::All(20)));
        assert_eq!(throttle.percent(), 20);
    }

    #[test]
    fn each_step_is_watched_for_two_passes_and_the_last_is_the_most() {
        let mut throttle = Throttle::default();
        let limits = Limits { max: 45, ..LIMITS };
        let steps: Vec<_> = (0..10).filter_map(|_| throttle.after(&pass(100), &limits)).collect();
        assert_eq!(steps, [20, 30, 40, 45].map(Rest::All));
        let low = Limits { initial: 90, max: 50, ..LIMITS };
        let mut throttle = Throttle::default();
        let steps: Vec<_> = (0..10).filter_map(|_| throttle.after(&pass(100), &low)).collect();
        assert_eq!(steps, [Rest::All(50)]);
        let mut throttle = Throttle::default();
        for _ in 0..100 {
            throttle.after(&pass(100), &LIMITS);
        }
        assert_eq!(throttle.percent(), 99);
    }

    #[test]
    fn what_converges_by_itself_is_left_alone() {
        // 60 % of each pass is left: 0.6^8 of 600 ms is 10 ms.
        let mut throttle = Throttle::default();
        assert!((0..20).all(|_| throttle.after(&pass(60), &LIMITS).is_none()));
        // The same with far to go.
        let far = Pass { forecast: Some(60_000 * MS), ..pass(60) };
        throttle.after(&far, &LIMITS);
        assert_eq!(throttle.after(&far, &LIMITS), Some(Rest::All(20)));
        // Less than the threshold is never too much.
        let far = Pass { forecast: Some(600_000 * MS), ..pass(49) };
        let mut throttle = Throttle::default();
        assert!((0..20).all(|_| throttle.after(&far, &LIMITS).is_none()));
        let strict = Limits { trigger: 40, ..LIMITS };
        throttle.after(&far, &strict);
        assert_eq!(throttle.after(&far, &strict), Some(Rest::All(20)));
    }

    #[test]
    fn nothing_is_done_where_nothing_is_known() {
        let mut throttle = Throttle::default();
        let unknown = Pass { forecast: None, ..pass(100) };
        let nothing = Pass { sent: 0, dirtied: 0, ..pass(100) };
        for pass in [unknown, nothing] {
            assert!((0..10).all(|_| throttle.after(&pass, &LIMITS).is_none()), "{pass:?}");
        }
        // Nothing sent and something written is as bad as can be.
        let stuck = Pass { sent: 0, ..pass(100) };
        throttle.after(&stuck, &LIMITS);
        assert_eq!(throttle.after(&stuck, &LIMITS), Some(Rest::All(20)));
    }

    #[test]
    fn short_passes_are_judged_together() {
        let mut throttle = Throttle::default();
        let short = Pass { time: 20 * MS, ..pass(100) };
        let steps = (0..100).filter(|_| throttle.after(&short, &LIMITS).is_some()).count();
        // Two seconds are ten looks.
        assert_eq!(steps, 5);
    }

    #[test]
    fn a_slow_tail_steps_no_further_than_needed() {
        let limits = Limits { tailslow: true, ..LIMITS };
        let mut throttle = Throttle::default();
        throttle.after(&pass(100), &limits);
        assert_eq!(throttle.after(&pass(100), &limits), Some(Rest::All(20)));
        // It would have to write 50/52 of what it does: 80 % of the time becomes 76.9 %.
        let nearly = Pass { forecast: Some(60_000 * MS), ..pass(52) };
        throttle.after(&nearly, &limits);
        assert_eq!(throttle.after(&nearly, &limits), Some(Rest::All(24)));
        throttle.after(&pass(100), &limits);
        assert_eq!(throttle.after(&pass(100), &limits), Some(Rest::All(34)));
    }

    #[test]
    fn only_who_writes_rests_and_others_are_seen_when_they_begin() {
        let mut throttle = Throttle::default();
        let by = |by_vcpu: [u64; 3]| Pass { by_vcpu: by_vcpu.into(), ..pass(100) };
        let mut step = |by_vcpu| {
            // What a first look says does not go under.
            assert_eq!(throttle.after(&by(by_vcpu), &LIMITS), None);
            throttle.after(&by(by_vcpu), &LIMITS)
        };
        assert_eq!(step([0, 9000, 0]), Some(Rest::Each(vec![0, 20, 0])));
        assert_eq!(step([0, 7200, 0]), Some(Rest::Each(vec![0, 30, 0])));
        // The first does now as the second would.
        assert_eq!(step([9000, 6300, 0]), Some(Rest::Each(vec![40, 40, 0])));
        // None of the guest's: the devices'.
        assert_eq!(step([0, 0, 0]), Some(Rest::Each(vec![50; 3])));
        assert_eq!(throttle.percent(), 50);
        assert_eq!(throttle.rest().most(), 50);
    }

    #[test]
    fn when_all_have_done_their_most_who_rests_still_changes() {
        let mut throttle = Throttle::default();
        let limits = Limits { initial: 80, max: 80, ..LIMITS };
        let mut step = |by_vcpu: [u64; 2]| {
            let pass = Pass { by_vcpu: by_vcpu.into(), ..pass(100) };
            let first = throttle.after(&pass, &limits);
            assert_eq!(first, None);
            throttle.after(&pass, &limits)
        };
        assert_eq!(step([5000, 0]), Some(Rest::Each(vec![80, 0])));
        assert_eq!(step([1000, 0]), None, "as before");
        assert_eq!(step([0, 5000]), Some(Rest::Each(vec![0, 80])));
    }

    #[test]
    fn what_was_written_before_it_was_needed_is_forgotten() {
        let mut throttle = Throttle::default();
        let by = |percent, by_vcpu: [u64; 2]| Pass { by_vcpu: by_vcpu.into(), ..pass(percent) };
        throttle.after(&by(10, [1_000_000, 0]), &LIMITS);
        throttle.after(&by(100, [0, 5000]), &LIMITS);
        let rest = throttle.after(&by(100, [0, 5000]), &LIMITS);
        assert_eq!(rest, Some(Rest::Each(vec![0, 20])));
        // And where it is not known any more, all rest.
        throttle.after(&pass(100), &LIMITS);
        assert_eq!(throttle.after(&pass(100), &LIMITS), Some(Rest::All(30)));
        assert_eq!([Rest::All(30).of(7), Rest::Each(vec![1]).of(7)], [30, 0]);
    }
}
