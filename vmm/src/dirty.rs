//! Which pages have changed: KVM's log (or rings) of what vCPUs wrote, and the bitmap of what devices wrote.

use std::sync::Arc;

use migration::dirty::DirtyBitmap;
use migration::guest::{DirtyTracker, VmError};
use vm_memory::bitmap::AtomicBitmap;

use crate::kvm::DirtyLog;
use crate::memory::{PAGE_SIZE, Ram};

/// `pc.ram`, the one block of the board that is ever written to: the others are ROM.
const BLOCK: usize = 0;

/// Tracks the writes to one machine's RAM.
pub struct RamTracker {
    ram: Ram,
    log: Arc<DirtyLog>,
}

impl RamTracker {
    /// A tracker that has not started.
    pub fn new(ram: Ram, log: Arc<DirtyLog>) -> Self {
        Self { ram, log }
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
        self.log
            .set_logging(true)
            .map_err(|e| VmError::with("cannot start to log the pages that the guest writes", e))?;
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
        if let Err(e) = self.log.set_logging(false) {
            tracing::warn!("cannot stop logging the pages that the guest writes: {e}");
        }
    }
}
