//! Which pages have changed: KVM's log of what vCPUs wrote, and the bitmap of what devices wrote.

use std::sync::Arc;

use migration::dirty::DirtyBitmap;
use migration::guest::{DirtyTracker, VmError};

use crate::kvm::{DirtyLog, Slot};
use crate::memory::{PAGE_SIZE, Ram};

/// `pc.ram`, the one block of the board that is ever written to: the others are ROM.
const BLOCK: usize = 0;
const PAGES_PER_WORD: u64 = 64;

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

    fn slots(&self) -> impl Iterator<Item = (usize, &Slot)> {
        self.log.slots().iter().enumerate()
    }
}

fn first_page(slot: &Slot) -> u64 {
    slot.block_offset / PAGE_SIZE
}

impl DirtyTracker for RamTracker {
    fn start(&mut self) -> Result<(), VmError> {
        self.log
            .set_logging(true)
            .map_err(|e| VmError::with("cannot start to log the pages that the guest writes", e))?;
        // What devices wrote before is part of the first pass, as everything is.
        for (index, _) in self.slots() {
            if let Some(bitmap) = self.ram.device_bitmap(index) {
                bitmap.reset();
            }
        }
        Ok(())
    }

    fn fetch(&mut self, into: &mut DirtyBitmap) -> Result<(), VmError> {
        for (index, slot) in self.slots() {
            let log = self
                .log
                .fetch(slot)
                .map_err(|e| VmError::with("cannot read the log of written pages", e))?;
            into.or(BLOCK, first_page(slot), &log);
            if let Some(bitmap) = self.ram.device_bitmap(index) {
                into.or(BLOCK, first_page(slot), &bitmap.get_and_reset());
            }
        }
        Ok(())
    }

    fn clear(&mut self, block: usize, first: u64, bits: &[u64]) -> Result<(), VmError> {
        if block != BLOCK {
            return Ok(());
        }
        let end = first.saturating_add(bits.len() as u64 * PAGES_PER_WORD);
        for (_, slot) in self.slots() {
            // Slots begin at multiples of 64 pages, so no word belongs to two of them.
            let start = first_page(slot);
            let from = first.max(start);
            let to = end.min((start + slot.len / PAGE_SIZE).next_multiple_of(PAGES_PER_WORD));
            if from >= to {
                continue;
            }
            let words = ((from - first) / PAGES_PER_WORD) as usize
                ..((to - first) / PAGES_PER_WORD) as usize;
            let Some(bits) = bits.get(words) else { continue };
            self.log
                .clear(slot, from - start, bits)
                .map_err(|e| VmError::with("cannot clear the log of written pages", e))?;
        }
        Ok(())
    }

    fn stop(&mut self) {
        if let Err(e) = self.log.set_logging(false) {
            tracing::warn!("cannot stop logging the pages that the guest writes: {e}");
        }
    }
}
