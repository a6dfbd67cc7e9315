//! The outside world of the devices, for their tests.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use crate::clock::Clock;
use crate::device::{PowerControl, PowerRequest};
use crate::irq::IrqLine;
use crate::timer::TimerHost;

/// An interrupt line that can be looked at.
#[derive(Default)]
pub(crate) struct FakeLine {
    level: AtomicBool,
}

impl FakeLine {
    pub(crate) fn new() -> Arc<Self> {
        Arc::default()
    }

    pub(crate) fn is_high(&self) -> bool {
        self.level.load(Ordering::SeqCst)
    }
}

impl IrqLine for FakeLine {
    fn set_level(&self, high: bool) {
        self.level.store(high, Ordering::SeqCst);
    }
}

/// Two clocks that stand still unless moved, and a count of moved deadlines.
#[derive(Default)]
pub(crate) struct FakeClock {
    pub(crate) virtual_ns: AtomicI64,
    pub(crate) realtime_ns: AtomicI64,
    pub(crate) changes: AtomicUsize,
}

impl FakeClock {
    pub(crate) fn at(realtime_ns: i64) -> Arc<Self> {
        let clock = Self::default();
        clock.realtime_ns.store(realtime_ns, Ordering::SeqCst);
        Arc::new(clock)
    }

    pub(crate) fn advance(&self, ns: i64) {
        self.virtual_ns.fetch_add(ns, Ordering::SeqCst);
        self.realtime_ns.fetch_add(ns, Ordering::SeqCst);
    }
}

impl Clock for FakeClock {
    fn virtual_ns(&self) -> i64 {
        self.virtual_ns.load(Ordering::SeqCst)
    }

    fn realtime_ns(&self) -> i64 {
        self.realtime_ns.load(Ordering::SeqCst)
    }
}

impl TimerHost for FakeClock {
    fn deadline_changed(&self) {
        self.changes.fetch_add(1, Ordering::SeqCst);
    }
}

/// Remembers what was asked of the machine.
#[derive(Default)]
pub(crate) struct FakePower(pub(crate) Mutex<Vec<PowerRequest>>);

impl FakePower {
    pub(crate) fn new() -> Arc<Self> {
        Arc::default()
    }

    pub(crate) fn requests(&self) -> Vec<PowerRequest> {
        self.0.lock().unwrap().clone()
    }
}

impl PowerControl for FakePower {
    fn request(&self, request: PowerRequest) {
        self.0.lock().unwrap().push(request);
    }
}

/// An output whose reader can stop reading.
#[derive(Clone, Default)]
pub(crate) struct FakeOutput {
    pub(crate) bytes: Arc<Mutex<Vec<u8>>>,
    pub(crate) stuck: Arc<AtomicBool>,
}

impl FakeOutput {
    pub(crate) fn text(&self) -> Vec<u8> {
        self.bytes.lock().unwrap().clone()
    }
}

impl io::Write for FakeOutput {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        if self.stuck.load(Ordering::SeqCst) {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        self.bytes.lock().unwrap().extend_from_slice(buf);
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
