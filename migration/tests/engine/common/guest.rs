//! What is inside of a VM: devices that are structs, and a guest that is a thread.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use migration::guest::PAGE_SIZE;
use migration::vmstate::{Audience, FieldError, Migratable, VmState};
use serde::{Deserialize, Serialize};

use super::memory::FakeRam;

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct FakeState {
    pub(crate) counter: u64,
    pub(crate) mode: u8,
    pub(crate) regs: [u32; 4],
}

impl VmState for FakeState {
    const VERSION: u32 = 3;
    const MIN_VERSION: u32 = 2;
}

#[derive(Debug, Default)]
pub(crate) struct FakeDevice {
    pub(crate) state: FakeState,
    /// What happens to the state when it is restored, for a device with a defect.
    pub(crate) forgetful: bool,
    /// Whom the state was saved for.
    pub(crate) saved_for: Mutex<Vec<Audience>>,
}

impl Migratable for FakeDevice {
    type State = FakeState;
    fn save(&self, audience: Audience) -> Result<FakeState, FieldError> {
        self.saved_for.lock().unwrap().push(audience);
        Ok(self.state.clone())
    }
    fn check(&self, state: &FakeState) -> Result<(), FieldError> {
        if state.mode > 7 { Err(FieldError::new("mode", "0 to 7", state.mode)) } else { Ok(()) }
    }
    fn restore(&mut self, state: FakeState) -> Result<(), FieldError> {
        self.state = state;
        if self.forgetful {
            self.state.regs[2] = 0;
        }
        Ok(())
    }
}

/// A device of the same version with another layout.
#[derive(Debug)]
pub(super) struct OtherDevice;

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct OtherState {
    counter: u32,
}

impl VmState for OtherState {
    const VERSION: u32 = FakeState::VERSION;
    const MIN_VERSION: u32 = FakeState::MIN_VERSION;
}

impl Migratable for OtherDevice {
    type State = OtherState;
    fn save(&self, _: Audience) -> Result<OtherState, FieldError> {
        Ok(OtherState { counter: 0 })
    }
    fn check(&self, _: &OtherState) -> Result<(), FieldError> {
        Ok(())
    }
    fn restore(&mut self, _: OtherState) -> Result<(), FieldError> {
        Ok(())
    }
}

/// A guest that does nothing but write.
pub(super) struct Guest {
    gate: Arc<(Mutex<(bool, bool)>, Condvar)>,
    /// How much of the time it rests, percent.
    rest: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl Guest {
    pub(super) fn new(ram: Arc<FakeRam>, pages: u64, pause_us: u64, count: Arc<AtomicU64>) -> Self {
        let gate = Arc::new((Mutex::new((true, false)), Condvar::new()));
        let theirs = gate.clone();
        let rest = Arc::new(AtomicU64::new(0));
        let share = rest.clone();
        let thread = thread::Builder::new()
            .name("fake-guest".into())
            .spawn(move || {
                let (state, wake) = &*theirs;
                loop {
                    let guard = state.lock().unwrap();
                    let guard =
                        wake.wait_while(guard, |(running, ended)| !*running && !*ended).unwrap();
                    if guard.1 {
                        return;
                    }
                    let n = count.fetch_add(1, Ordering::Relaxed) + 1;
                    ram.write(0, (n % pages) * PAGE_SIZE + 8, &n.to_le_bytes());
                    drop(guard);
                    let rest = share.load(Ordering::Relaxed);
                    let pause_us = pause_us + 100 * rest / (100 - rest);
                    if pause_us > 0 {
                        thread::sleep(Duration::from_micros(pause_us));
                    }
                }
            })
            .unwrap();
        Self { gate, rest, thread: Some(thread) }
    }

    pub(super) fn throttle(&self, percent: u8) {
        self.rest.store(percent.into(), Ordering::Relaxed);
    }

    pub(super) fn set_running(&self, running: bool) {
        self.gate.0.lock().unwrap().0 = running;
        self.gate.1.notify_all();
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.gate.0.lock().unwrap().1 = true;
        self.gate.1.notify_all();
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}
