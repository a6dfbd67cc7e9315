//! Which pages have changed: KVM's log (or rings) of what vCPUs wrote, and the bitmap of what devices wrote.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use migration::dirty::DirtyBitmap;
use migration::guest::{DirtyTracker, VmError};
use vm_memory::bitmap::AtomicBitmap;

use crate::kvm::DirtyLog;
use crate::memory::{PAGE_SIZE, Ram};

/// `pc.ram`, the one block of the board that is ever written to: the others are ROM.
const BLOCK: usize = 0;

/// How often the rings are looked at: a guest that writes to a new page in every microsecond writes half of
/// a ring of 4096 entries in that time.
const LOOK: Duration = Duration::from_millis(2);

/// Tracks the writes to one machine's RAM.
pub struct RamTracker {
    ram: Ram,
    log: Arc<DirtyLog>,
    /// While rings are written.
    emptier: Option<Emptier>,
}

/// A thread that empties the rings when they are half full, so that the vCPUs need not leave the guest for it.
struct Emptier {
    closing: Arc<(Mutex<bool>, Condvar)>,
    thread: Option<JoinHandle<()>>,
}

impl Emptier {
    fn start(log: Arc<DirtyLog>) -> std::io::Result<Self> {
        let closing = Arc::new((Mutex::new(false), Condvar::new()));
        let theirs = closing.clone();
        let thread = thread::Builder::new().name("dirty-rings".into()).spawn(move || {
            let (closing, changed) = &*theirs;
            let mut closed = closing.lock().unwrap_or_else(PoisonError::into_inner);
            while !*closed {
                if log.rings_fill()
                    && let Err(e) = log.empty_rings()
                {
                    // Whoever fetches finds out too, and vCPUs that have to.
                    tracing::warn!("cannot empty the dirty rings: {}", crate::error_chain(&e));
                    return;
                }
                let woken = changed.wait_timeout(closed, LOOK);
                closed = woken.unwrap_or_else(PoisonError::into_inner).0;
            }
        })?;
        Ok(Self { closing, thread: Some(thread) })
    }
}

impl Drop for Emptier {
    fn drop(&mut self) {
        *self.closing.0.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.closing.1.notify_all();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that empties the dirty rings panicked");
        }
    }
}

impl RamTracker {
    /// A tracker that has not started.
    pub fn new(ram: Ram, log: Arc<DirtyLog>) -> Self {
        Self { ram, log, emptier: None }
    }

    /// What devices wrote: of each stretch of RAM its first page in the block, and its bitmap.
    fn devices(&self) -> impl Iterator<Item = (u64, &AtomicBitmap)> {
        let slots = self.ram.slots().iter().enumerate();
        slots.filter_map(|(index, slot)| {
            Some((slot.block_offset / PAGE_SIZE, self.ram.device_bitmap(index)?))
        })
    }
}

impl DirtyTracker for RamTracker {
    fn start(&mut self) -> Result<(), VmError> {
        let failed = |e| VmError::with("cannot start to log the pages that the guest writes", e);
        // What an earlier end has left on would go on as it began, whatever is chosen now.
        self.log.set_logging(false).map_err(failed)?;
        self.log.protect_at_once(self.ram.is_sparse()).map_err(failed)?;
        self.log.set_logging(true).map_err(|e| {
            self.stop();
            failed(e)
        })?;
        if self.log.has_rings() {
            let emptier = Emptier::start(self.log.clone()).map_err(|e| {
                self.stop();
                VmError::with("the thread that empties the dirty rings does not start", e)
            })?;
            self.emptier = Some(emptier);
        }
        // What devices wrote before is part of the first pass, as everything is.
        self.devices().for_each(|(_, bitmap)| bitmap.reset());
        Ok(())
    }

    fn fetch(&mut self, into: &mut DirtyBitmap) -> Result<(), VmError> {
        self.log
            .fetch(|first_page, log| into.or(BLOCK, first_page, log))
            .map_err(|e| VmError::with("cannot read the log of written pages", e))?;
        for (first_page, bitmap) in self.devices() {
            into.or(BLOCK, first_page, &bitmap.get_and_reset());
        }
        Ok(())
    }

    fn clear(&mut self, block: usize, first: u64, bits: &[u64]) -> Result<(), VmError> {
        if block != BLOCK {
            return Ok(());
        }
        self.log
            .clear(first, bits)
            .map_err(|e| VmError::with("cannot clear the log of written pages", e))
    }

    fn by_vcpu(&self) -> Option<Vec<u64>> {
        self.log.by_vcpu()
    }

    fn stop(&mut self) {
        self.emptier = None;
        if let Err(e) = self.log.set_logging(false) {
            tracing::warn!("cannot stop logging the pages that the guest writes: {e}");
        }
    }
}
