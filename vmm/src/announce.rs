//! Tells the networks where the guest is, several times over: a switch that has lost one frame, or a
//! guest's driver that was not listening yet, hears the next one.

use std::sync::{Arc, Mutex, PoisonError};

use devices::clock::Clock;
use devices::timer::{Timed, TimerClock, TimerHost};
use devices::virtio::VirtioPci;
use migration::params::Parameters;

use crate::clock::VirtualClock;
use crate::timers::TimerBell;

const NS_PER_MS: i64 = 1_000_000;

/// How often, and how far apart: QEMU's `announce-*` parameters, by default five times with 50, 150,
/// 250 and 350 ms between.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rounds {
    /// How many.
    pub count: u64,
    /// Between the first and the second, in ms.
    pub initial_ms: u64,
    /// How much longer each pause is than the one before, in ms.
    pub step_ms: u64,
    /// The longest pause, in ms.
    pub max_ms: u64,
}

impl From<&Parameters> for Rounds {
    fn from(parameters: &Parameters) -> Self {
        let value = |name| parameters.carried(name).unwrap_or_default();
        Self {
            count: value("announce-rounds"),
            initial_ms: value("announce-initial"),
            step_ms: value("announce-step"),
            max_ms: value("announce-max"),
        }
    }
}

impl Rounds {
    /// The pause after round `done`, the first of which is 1; nothing after the last.
    fn pause_ns(&self, done: u64) -> Option<i64> {
        if done >= self.count {
            return None;
        }
        let longer = self.step_ms.saturating_mul(done.saturating_sub(1));
        let ms = self.initial_ms.saturating_add(longer).min(self.max_ms);
        Some(i64::try_from(ms).unwrap_or(i64::MAX).saturating_mul(NS_PER_MS))
    }
}

/// The rounds that are under way. They stand still while the VM does.
pub struct Announcer {
    /// The network interfaces and their identifiers.
    interfaces: Vec<(String, Arc<Mutex<VirtioPci>>)>,
    clock: Arc<VirtualClock>,
    bell: Arc<TimerBell>,
    rounds: Rounds,
    done: u64,
    /// The identifiers of those that are announced; nothing means all.
    only: Option<Vec<String>>,
    next_ns: Option<i64>,
}

impl Announcer {
    /// For these network interfaces.
    pub fn new(
        interfaces: Vec<(String, Arc<Mutex<VirtioPci>>)>,
        clock: Arc<VirtualClock>,
        bell: Arc<TimerBell>,
    ) -> Self {
        let rounds = Rounds { count: 0, initial_ms: 0, step_ms: 0, max_ms: 0 };
        Self { interfaces, clock, bell, rounds, done: 0, only: None, next_ns: None }
    }

    /// The identifiers of all interfaces.
    pub fn ids(&self) -> impl Iterator<Item = &str> {
        self.interfaces.iter().map(|(id, _)| id.as_str())
    }

    /// Begins the first round at once, for those interfaces `only` or for all; rounds of an earlier
    /// call end.
    pub fn start(&mut self, rounds: Rounds, only: Option<Vec<String>>) {
        (self.rounds, self.only, self.done, self.next_ns) = (rounds, only, 0, None);
        if rounds.count > 0 {
            self.round(self.clock.virtual_ns(), true);
        }
        self.bell.deadline_changed();
    }

    fn round(&mut self, now_ns: i64, though_paused: bool) {
        let wanted = |id| self.only.as_ref().is_none_or(|only| only.contains(id));
        for (_, function) in self.interfaces.iter().filter(|(id, _)| wanted(id)) {
            let mut function = function.lock().unwrap_or_else(PoisonError::into_inner);
            // A timer that rang just before the VM stopped must not change what is being saved.
            if though_paused || !function.is_paused() {
                function.device().announce();
            }
        }
        self.done = self.done.saturating_add(1);
        self.next_ns = self.rounds.pause_ns(self.done).map(|pause| now_ns.saturating_add(pause));
    }
}

impl Timed for Announcer {
    fn timer_clock(&self) -> TimerClock {
        TimerClock::Virtual
    }

    fn next_deadline(&self) -> Option<i64> {
        self.next_ns
    }

    fn expire(&mut self, now_ns: i64) {
        if self.next_ns.is_some_and(|at| at <= now_ns) {
            self.round(now_ns, false);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_up_to_the_longest_and_end() {
        let default = Rounds::from(&Parameters::default());
        let pauses = |rounds: Rounds| -> Vec<i64> {
            (1..).map_while(|done| rounds.pause_ns(done)).map(|ns| ns / NS_PER_MS).collect()
        };
        assert_eq!(pauses(default), [50, 150, 250, 350]);
        assert_eq!(pauses(Rounds { max_ms: 200, ..default }), [50, 150, 200, 200]);
        assert_eq!(pauses(Rounds { count: 1, ..default }), [0; 0]);
        assert_eq!(pauses(Rounds { count: 0, ..default }), [0; 0]);
    }
}
