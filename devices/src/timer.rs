//! Devices that do something at a given time.
//!
//! A device doesn't run timers. It says when it wants to be called next; the machine's I/O thread
//! arms one timer per clock for the earliest deadline, and calls [`Timed::expire`] when it is
//! reached. When a guest's access moves a deadline, the device says so through [`TimerHost`].

/// Which clock a deadline is counted on (see [`Clock`](crate::clock::Clock)).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TimerClock {
    /// [`Clock::virtual_ns`](crate::clock::Clock::virtual_ns).
    Virtual,
    /// [`Clock::realtime_ns`](crate::clock::Clock::realtime_ns). It may be set by the host's
    /// administrator: whoever waits for it must look again when it jumps.
    Realtime,
}

/// A device with a deadline. Called only while the machine runs: a deadline that passes while it
/// is stopped is due as soon as it goes on.
pub trait Timed: Send {
    /// The clock of all this device's deadlines.
    fn timer_clock(&self) -> TimerClock;

    /// When [`expire`](Self::expire) wants to be called, in nanoseconds of that clock. May lie in
    /// the past: then at once. `None`: not before something changes.
    fn next_deadline(&self) -> Option<i64>;

    /// Does everything that is due at `now_ns`. Calling it too early does nothing.
    fn expire(&mut self, now_ns: i64);
}

/// The I/O thread, as a [`Timed`] device sees it. Called with the device's lock held: it may only
/// make a note or ring an eventfd.
pub trait TimerHost: Send + Sync {
    /// The device's deadline may have moved: ask [`Timed::next_deadline`] again, soon.
    fn deadline_changed(&self);
}
