//! The guest's memory as the host sees it through the balloon: how much is asked for, how much there
//! is, and who is told.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use devices::clock::Clock;
use devices::timer::{Timed, TimerClock, TimerHost};
use devices::virtio::BalloonControl;

use crate::clock::VirtualClock;
use crate::timers::TimerBell;

/// Bytes of a page of the balloon (virtio 1.2, 5.5.6).
const PAGE: u64 = 4096;
/// A guest says how much it has given with each request. News of it go out at most once in this
/// time, as QEMU's do: else a guest could fill every client's socket.
const PERIOD_NS: i64 = 1_000_000_000;

/// The machine's balloon.
pub struct GuestBalloon {
    control: BalloonControl,
    ram: u64,
    news: Arc<Mutex<News>>,
}

impl GuestBalloon {
    /// The balloon of a guest with `ram` bytes of memory.
    pub fn new(
        control: BalloonControl,
        ram: u64,
        clock: Arc<VirtualClock>,
        bell: Arc<TimerBell>,
    ) -> Self {
        let news = News { clock, bell, say: None, paced: Paced::default() };
        let news = Arc::new(Mutex::new(news));
        let told = news.clone();
        control.on_change(Box::new(move |pages| lock(&told).changed(left(ram, pages))));
        Self { control, ram, news }
    }

    /// What waits to be told, for the machine's timers.
    pub fn timed(&self) -> Arc<Mutex<dyn Timed>> {
        self.news.clone()
    }

    /// `say` is called with the bytes that the guest has left, when that has changed.
    pub fn on_change(&self, say: Box<dyn Fn(u64) + Send>) {
        lock(&self.news).say = Some(say);
    }

    /// Asks the guest to make do with `bytes` of memory; all that it has, if that is less.
    pub fn set_target(&self, bytes: u64) {
        let pages = self.ram.saturating_sub(bytes) / PAGE;
        self.control.set_target(u32::try_from(pages).unwrap_or(u32::MAX));
    }

    /// How many bytes of memory the guest says that it has left.
    pub fn actual(&self) -> u64 {
        left(self.ram, self.control.actual())
    }
}

fn left(ram: u64, pages: u32) -> u64 {
    ram.saturating_sub(u64::from(pages) * PAGE)
}

fn lock(news: &Mutex<News>) -> MutexGuard<'_, News> {
    news.lock().unwrap_or_else(PoisonError::into_inner)
}

struct News {
    clock: Arc<VirtualClock>,
    bell: Arc<TimerBell>,
    say: Option<Box<dyn Fn(u64) + Send>>,
    paced: Paced,
}

impl News {
    fn changed(&mut self, bytes: u64) {
        match self.paced.offer(self.clock.virtual_ns(), bytes) {
            Some(bytes) => self.say(bytes),
            None => self.bell.deadline_changed(),
        }
    }

    fn say(&self, bytes: u64) {
        if let Some(say) = &self.say {
            say(bytes);
        }
    }
}

impl Timed for News {
    fn timer_clock(&self) -> TimerClock {
        TimerClock::Virtual
    }

    fn next_deadline(&self) -> Option<i64> {
        self.paced.deadline()
    }

    fn expire(&mut self, now_ns: i64) {
        if let Some(bytes) = self.paced.due(now_ns) {
            self.say(bytes);
        }
    }
}

/// Lets the first of many news through at once, and the last of each period at its end.
#[derive(Debug, Default)]
struct Paced {
    quiet_until: Option<i64>,
    waiting: Option<u64>,
}

impl Paced {
    fn offer(&mut self, now_ns: i64, value: u64) -> Option<u64> {
        self.waiting = Some(value);
        match self.quiet_until {
            Some(until) if now_ns < until => None,
            _ => self.release(now_ns),
        }
    }

    fn deadline(&self) -> Option<i64> {
        self.quiet_until.filter(|_| self.waiting.is_some())
    }

    fn due(&mut self, now_ns: i64) -> Option<u64> {
        self.deadline().filter(|at| *at <= now_ns).and_then(|_| self.release(now_ns))
    }

    fn release(&mut self, now_ns: i64) -> Option<u64> {
        self.quiet_until = Some(now_ns.saturating_add(PERIOD_NS));
        self.waiting.take()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn news_come_once_in_a_period_and_the_last_one_always() {
        let mut paced = Paced::default();
        assert_eq!((paced.deadline(), paced.due(5)), (None, None));
        assert_eq!(paced.offer(10, 1), Some(1));
        assert_eq!(paced.deadline(), None, "nothing waits");
        assert_eq!((paced.offer(20, 2), paced.offer(30, 3)), (None, None));
        assert_eq!(paced.deadline(), Some(10 + PERIOD_NS));
        assert_eq!(paced.due(9 + PERIOD_NS), None, "too early");
        assert_eq!(paced.due(10 + PERIOD_NS), Some(3));
        assert_eq!(paced.offer(11 + PERIOD_NS, 4), None, "the next period has begun");
        assert_eq!(paced.due(10 + 2 * PERIOD_NS), Some(4));
        assert_eq!(paced.offer(10 + 3 * PERIOD_NS, 5), Some(5), "after a quiet one");
    }

    #[test]
    fn a_guest_that_gives_more_than_it_has_has_nothing_left() {
        assert_eq!(left(64 << 20, 0), 64 << 20);
        assert_eq!(left(64 << 20, 256), 63 << 20);
        assert_eq!(left(64 << 20, u32::MAX), 0);
    }
}
