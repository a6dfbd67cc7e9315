//! The machine's own clock.
//!
//! It goes on while the VM is stopped, as kvmclock, the TSC and the PIT in the kernel do: a guest
//! that compares the PM timer with its TSC must not find that one of them stood still. A migration
//! moves all of them on by the same time (`arch::clock`).

use std::sync::atomic::{AtomicI64, Ordering};

use devices::clock::Clock;
use nix::time::{ClockId, clock_gettime};

const NS_PER_S: i64 = 1_000_000_000;

fn now_ns(clock: ClockId) -> i64 {
    // The kernel knows both clocks; it can refuse neither.
    clock_gettime(clock)
        .map(|t| t.tv_sec().saturating_mul(NS_PER_S).saturating_add(t.tv_nsec()))
        .unwrap_or(0)
}

/// The host's monotonic clock in nanoseconds.
pub fn monotonic_ns() -> i64 {
    now_ns(ClockId::CLOCK_MONOTONIC)
}

/// Nanoseconds since the machine was first switched on, wherever that was.
pub struct VirtualClock {
    /// What is added to the host's monotonic clock.
    offset: AtomicI64,
}

impl Default for VirtualClock {
    /// A clock that starts at 0 now.
    fn default() -> Self {
        Self { offset: AtomicI64::new(monotonic_ns().saturating_neg()) }
    }
}

impl VirtualClock {
    /// Lets the clock go on from `ns`.
    pub fn set(&self, ns: i64) {
        self.offset.store(ns.saturating_sub(monotonic_ns()), Ordering::Release);
    }
}

impl Clock for VirtualClock {
    fn virtual_ns(&self) -> i64 {
        monotonic_ns().saturating_add(self.offset.load(Ordering::Acquire))
    }

    fn realtime_ns(&self) -> i64 {
        now_ns(ClockId::CLOCK_REALTIME)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn starts_at_zero_goes_on_from_where_it_is_set_and_never_back() {
        let clock = VirtualClock::default();
        assert!((0..NS_PER_S).contains(&clock.virtual_ns()));
        clock.set(5 * NS_PER_S);
        let first = clock.virtual_ns();
        let second = clock.virtual_ns();
        assert!(5 * NS_PER_S <= first && first <= second && second < 6 * NS_PER_S);
    }
}
