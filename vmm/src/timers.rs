//! Timers of devices: the I/O thread arms one timer of the host for each of the two clocks.

use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use devices::clock::Clock;
use devices::timer::{Timed, TimerClock, TimerHost};
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::clock::VirtualClock;

/// What devices and the machine ring.
pub struct TimerBell {
    changed: EventFd,
    running: AtomicBool,
}

impl TimerBell {
    /// A bell for a machine that stands still.
    pub fn new() -> std::io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            changed: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            running: AtomicBool::new(false),
        }))
    }

    /// Says whether the machine runs: deadlines of one that does not wait until it does.
    pub fn set_running(&self, running: bool) {
        self.running.store(running, Ordering::Release);
        self.ring();
    }

    fn ring(&self) {
        // Full only if it has been rung 2^64 times: it is heard either way.
        let _ = self.changed.write(1);
    }
}

impl TimerHost for TimerBell {
    fn deadline_changed(&self) {
        // While the machine stands still nothing expires, and what changed is looked at when it begins to run:
        // each device that is loaded would wake the I/O thread, and the guest waits for that.
        if self.running.load(Ordering::Acquire) {
            self.ring();
        }
    }
}

/// Serves the deadlines of all devices.
pub struct Timers {
    bell: Arc<TimerBell>,
    clock: Arc<VirtualClock>,
    devices: Vec<Arc<Mutex<dyn Timed>>>,
    virtual_timer: TimerFd,
    realtime_timer: TimerFd,
}

impl Timers {
    /// Timers for these devices.
    pub fn new(
        bell: Arc<TimerBell>,
        clock: Arc<VirtualClock>,
        devices: Vec<Arc<Mutex<dyn Timed>>>,
    ) -> std::io::Result<Self> {
        let flags = TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC;
        Ok(Self {
            bell,
            clock,
            devices,
            virtual_timer: TimerFd::new(ClockId::CLOCK_MONOTONIC, flags)?,
            realtime_timer: TimerFd::new(ClockId::CLOCK_REALTIME, flags)?,
        })
    }

    /// Expires what is due and arms the host's timers for what comes next.
    fn serve(&self) {
        let mut next = [None::<i64>; 2];
        let running = || self.bell.running.load(Ordering::Acquire);
        if running() {
            for device in &self.devices {
                let mut device = device.lock().unwrap_or_else(PoisonError::into_inner);
                // Looked at with the lock that a machine that stops takes of each device: what one did behind that
                // would be seen by some of what is saved then, and not by all.
                if !running() {
                    break;
                }
                let clock = device.timer_clock();
                let now = self.now(clock);
                if device.next_deadline().is_some_and(|at| at <= now) {
                    device.expire(now);
                }
                let Some(at) = device.next_deadline() else { continue };
                let slot = &mut next[usize::from(clock == TimerClock::Realtime)];
                *slot = Some(slot.map_or(at, |other| other.min(at)));
            }
        }
        let [virtual_ns, realtime_ns] = next;
        // The two clocks tick alike; only the zero differs, so the way to go is armed for both.
        let arm = |timer: &TimerFd, at: Option<i64>, now: i64| match at {
            Some(at) => {
                let wait = Duration::from_nanos(at.saturating_sub(now).max(1) as u64);
                timer.set(Expiration::OneShot(TimeSpec::from(wait)), TimerSetTimeFlags::empty())
            }
            None => timer.unset(),
        };
        for (timer, at, clock) in [
            (&self.virtual_timer, virtual_ns, TimerClock::Virtual),
            (&self.realtime_timer, realtime_ns, TimerClock::Realtime),
        ] {
            if let Err(e) = arm(timer, at, self.now(clock)) {
                tracing::error!("cannot arm a device's timer: {e}");
            }
        }
    }

    fn now(&self, clock: TimerClock) -> i64 {
        match clock {
            TimerClock::Virtual => self.clock.virtual_ns(),
            TimerClock::Realtime => self.clock.realtime_ns(),
        }
    }
}

impl MutEventSubscriber for Timers {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        for fd in [
            self.bell.changed.as_raw_fd(),
            self.virtual_timer.as_fd().as_raw_fd(),
            self.realtime_timer.as_fd().as_raw_fd(),
        ] {
            if let Err(e) = ops.add(Events::new_raw(fd, EventSet::IN)) {
                tracing::error!("cannot watch the devices' timers: {e}");
            }
        }
    }

    fn process(&mut self, events: Events, _: &mut EventOps<'_>) {
        let fd = events.fd();
        if fd == self.bell.changed.as_raw_fd() {
            let _ = self.bell.changed.read();
        } else if fd == self.virtual_timer.as_fd().as_raw_fd() {
            let _ = self.virtual_timer.wait();
        } else {
            let _ = self.realtime_timer.wait();
        }
        self.serve();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Is always due; when it expires, the machine stops.
    struct Stops {
        bell: Arc<TimerBell>,
        expired: usize,
    }

    impl Timed for Stops {
        fn timer_clock(&self) -> TimerClock {
            TimerClock::Virtual
        }
        fn next_deadline(&self) -> Option<i64> {
            Some(0)
        }
        fn expire(&mut self, _: i64) {
            self.expired += 1;
            self.bell.set_running(false);
        }
    }

    /// What a device does when the state of others has been read already is lost.
    #[test]
    fn nothing_expires_once_the_machine_stands_still() {
        let bell = TimerBell::new().unwrap();
        let devices: [Arc<Mutex<Stops>>; 2] =
            std::array::from_fn(|_| Arc::new(Mutex::new(Stops { bell: bell.clone(), expired: 0 })));
        let timed = devices.iter().map(|d| d.clone() as Arc<Mutex<dyn Timed>>).collect();
        let timers = Timers::new(bell.clone(), Arc::default(), timed).unwrap();
        timers.serve();
        let expired = || devices.each_ref().map(|d| d.lock().unwrap().expired);
        assert_eq!(expired(), [0, 0]);
        bell.set_running(true);
        timers.serve();
        assert_eq!(expired(), [1, 0]);
        bell.set_running(true);
        timers.serve();
        assert_eq!(expired(), [2, 0]);
    }
}
