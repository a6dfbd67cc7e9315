//! One split virtqueue: the registers that a driver sets, and the ring behind them.

use std::num::Wrapping;
use std::sync::atomic::{Ordering, fence};

use virtio_queue::{Error as RingError, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemory, Permissions};

use super::chain::{Chain, ChainError};
use crate::memory::GuestRam;

/// The largest queue that QEMU lets a driver set up.
pub const MAX_QUEUE_SIZE: u16 = 1024;
/// "No vector" in every vector register.
pub const NO_VECTOR: u16 = 0xffff;
/// VIRTQ_AVAIL_F_NO_INTERRUPT (virtio 1.2, 2.7.6).
const AVAIL_NO_INTERRUPT: u16 = 1;

/// A driver has set up or filled a queue in a way that no device can follow.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// The size is not a power of two, or too large.
    #[error("a queue of {0} entries: a power of two of at most {MAX_QUEUE_SIZE} was expected")]
    Size(u16),
    /// A part of the ring is not where it may be.
    #[error("the {part} of {size} entries at {address:#x} is not aligned, or not in guest memory")]
    Address {
        /// Which part.
        part: &'static str,
        /// Its first byte.
        address: u64,
        /// The queue's size.
        size: u16,
    },
    /// The available ring cannot be followed.
    #[error("the ring cannot be followed")]
    Ring(#[source] RingError),
    /// A request cannot be followed.
    #[error(transparent)]
    Chain(#[from] ChainError),
}

/// Where a queue's three parts are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RingAddresses {
    /// The descriptor table.
    pub desc: u64,
    /// The available ring.
    pub avail: u64,
    /// The used ring.
    pub used: u64,
}

impl RingAddresses {
    /// Where they are when a legacy driver says where the first one is (virtio 1.2, 2.7.2).
    pub fn legacy(desc: u64, size: u16) -> Self {
        let size = u64::from(size);
        let avail = desc.saturating_add(16 * size);
        let used = avail.saturating_add(6 + 2 * size).saturating_add(0xfff) & !0xfff;
        Self { desc, avail, used }
    }

    /// Checks that a ring of `size` entries can be here.
    pub fn check(&self, ram: &GuestRam, size: u16) -> Result<(), QueueError> {
        if size > MAX_QUEUE_SIZE || !size.is_power_of_two() {
            return Err(QueueError::Size(size));
        }
        let entries = usize::from(size);
        // Flags, index and event in front of and behind the entries (virtio 1.2, 2.7.6, 2.7.8).
        for (part, address, align, len) in [
            ("descriptor table", self.desc, 16, 16 * entries),
            ("available ring", self.avail, 2, 6 + 2 * entries),
            ("used ring", self.used, 4, 6 + 8 * entries),
        ] {
            let place = GuestAddress(address);
            if address == 0
                || !address.is_multiple_of(align)
                || !ram.check_range(place, len, Permissions::ReadWrite)
            {
                return Err(QueueError::Address { part, address, size });
            }
        }
        Ok(())
    }
}

/// One queue.
#[derive(Debug)]
pub struct VirtQueue {
    ring: Queue,
    /// The size after a reset.
    default_size: u16,
    /// The MSI-X vector.
    pub vector: u16,
    /// VIRTIO_F_NOTIFY_ON_EMPTY was negotiated.
    notify_on_empty: bool,
    /// It goes on where another device stopped. What that one has still told its driver is not known,
    /// so the first interrupt is one too many rather than one too few: with event indices, a driver
    /// that has missed one is never interrupted again.
    first_here: bool,
    /// Requests that the device where it stopped had taken and kept, and that this one has not taken again
    /// yet: it does so when it goes on.
    to_take_again: u16,
}

impl VirtQueue {
    /// A queue that is not set up yet. `default_size` must be a power of two, at most 1024.
    pub fn new(default_size: u16) -> Result<Self, QueueError> {
        let mut ring = Queue::new(MAX_QUEUE_SIZE).map_err(QueueError::Ring)?;
        ring.try_set_size(default_size).map_err(|_| QueueError::Size(default_size))?;
        Ok(Self {
            ring,
            default_size,
            vector: NO_VECTOR,
            notify_on_empty: false,
            first_here: false,
            to_take_again: 0,
        })
    }

    /// Where in guest memory a loaded queue's position is looked up: flags and index of the used ring, in
    /// one word. None while it is not set up.
    pub fn position_at(&self) -> Option<u64> {
        self.ring.ready().then(|| self.ring.used_ring())
    }

    /// The size that the driver chose, or the default.
    pub fn size(&self) -> u16 {
        self.ring.size()
    }

    /// The size after a reset.
    pub fn default_size(&self) -> u16 {
        self.default_size
    }

    /// Takes a size from the driver; one that no ring can have changes nothing.
    pub fn set_size(&mut self, size: u16) {
        if let Err(error) = self.ring.try_set_size(size) {
            tracing::debug!("a driver sets a queue's size to {size}: {error}");
        }
    }

    /// Whether the driver has said where the ring is.
    pub fn is_ready(&self) -> bool {
        self.ring.ready()
    }

    /// Where the ring is; zeros when it is nowhere.
    pub fn addresses(&self) -> RingAddresses {
        if !self.ring.ready() {
            return RingAddresses::default();
        }
        RingAddresses {
            desc: self.ring.desc_table(),
            avail: self.ring.avail_ring(),
            used: self.ring.used_ring(),
        }
    }

    /// Puts the ring where the driver says.
    pub fn enable(&mut self, ram: &GuestRam, at: RingAddresses) -> Result<(), QueueError> {
        at.check(ram, self.ring.size())?;
        let set = |ring: &mut Queue| {
            ring.try_set_desc_table_address(GuestAddress(at.desc))?;
            ring.try_set_avail_ring_address(GuestAddress(at.avail))?;
            ring.try_set_used_ring_address(GuestAddress(at.used))
        };
        set(&mut self.ring).map_err(QueueError::Ring)?;
        self.ring.set_ready(true);
        Ok(())
    }

    /// What was negotiated about notifications.
    pub fn set_features(&mut self, event_idx: bool, notify_on_empty: bool) {
        self.ring.set_event_idx(event_idx);
        self.notify_on_empty = notify_on_empty;
    }

    /// Back to what it was after power-on.
    pub fn reset(&mut self) {
        self.ring.reset();
        self.set_size(self.default_size);
        self.vector = NO_VECTOR;
        self.notify_on_empty = false;
        self.first_here = false;
        self.to_take_again = 0;
    }

    /// The next request, if there is one.
    pub(super) fn pop<'a>(&mut self, ram: &'a GuestRam) -> Result<Option<Chain<'a>>, QueueError> {
        if !self.ring.ready() {
            return Ok(None);
        }
        let next = self.ring.iter(ram).map_err(QueueError::Ring)?.next();
        if next.is_some() {
            self.to_take_again = self.to_take_again.saturating_sub(1);
        }
        Ok(next.map(|descriptors| Chain::new(ram, descriptors)).transpose()?)
    }

    /// Whether there is a next request.
    pub(super) fn has_request(&self, ram: &GuestRam) -> Result<bool, QueueError> {
        Ok(self.ring.ready() && self.avail_idx(ram)? != self.ring.next_avail())
    }

    /// Puts the request that was popped last back.
    pub(super) fn unpop(&mut self) {
        self.ring.go_to_previous_position();
    }

    /// Gives a request back to the driver; `written` bytes of it were written.
    pub(super) fn push(
        &mut self,
        ram: &GuestRam,
        head: u16,
        written: u32,
    ) -> Result<(), QueueError> {
        // A queue that was reset in between has forgotten its requests.
        if !self.ring.ready() {
            return Ok(());
        }
        self.ring.add_used(ram, head, written).map_err(QueueError::Ring)
    }

    /// Whether the driver wants to be interrupted for what was pushed since the last call.
    pub(super) fn wants_interrupt(&mut self, ram: &GuestRam) -> Result<bool, QueueError> {
        if !self.ring.ready() {
            return Ok(false);
        }
        let wanted = self.ring.needs_notification(ram).map_err(QueueError::Ring)?;
        if self.notify_on_empty && self.avail_idx(ram)? == self.ring.next_avail() {
            return Ok(true);
        }
        let first = std::mem::take(&mut self.first_here);
        if self.ring.event_idx_enabled() {
            return Ok(wanted || first);
        }
        fence(Ordering::SeqCst);
        let flags: u16 = self.load(ram, self.ring.avail_ring())?;
        Ok(flags & AVAIL_NO_INTERRUPT == 0)
    }

    /// Asks the driver to ring, or to stop ringing. True when something came in while it was asked
    /// to ring.
    pub(super) fn set_notification(
        &mut self,
        ram: &GuestRam,
        on: bool,
    ) -> Result<bool, QueueError> {
        if !self.ring.ready() {
            return Ok(false);
        }
        if on {
            self.ring.enable_notification(ram).map_err(QueueError::Ring)
        } else {
            self.ring.disable_notification(ram).map(|()| false).map_err(QueueError::Ring)
        }
    }

    fn avail_idx(&self, ram: &GuestRam) -> Result<u16, QueueError> {
        let Wrapping(idx) =
            self.ring.avail_idx(ram, Ordering::Acquire).map_err(QueueError::Ring)?;
        Ok(idx)
    }

    fn load(&self, ram: &GuestRam, address: u64) -> Result<u16, QueueError> {
        ram.load(GuestAddress(address), Ordering::Relaxed)
            .map(u16::from_le)
            .map_err(|e| QueueError::Ring(RingError::GuestMemory(e)))
    }

    /// How far the device has followed the available ring.
    pub fn last_avail(&self) -> u16 {
        self.ring.next_avail()
    }

    /// The same as the other side of a migration shall see it: what is to be taken again counts as
    /// taken.
    pub(super) fn saved_last_avail(&self) -> u16 {
        self.last_avail().wrapping_add(self.to_take_again)
    }

    /// How many requests were popped and not pushed.
    pub fn in_flight(&self) -> u16 {
        self.ring.next_avail().wrapping_sub(self.ring.next_used())
    }

    /// The used ring's index, as it stands in guest memory at `used`.
    pub(super) fn used_idx(ram: &GuestRam, used: u64) -> Option<u16> {
        let address = used.checked_add(2)?;
        ram.load(GuestAddress(address), Ordering::Acquire).map(u16::from_le).ok()
    }

    /// Goes on where another device stopped.
    pub(super) fn set_position(&mut self, last_avail: u16, used: u16) {
        self.ring.set_next_avail(last_avail);
        self.ring.set_next_used(used);
        self.first_here = true;
        self.to_take_again = 0;
    }

    /// Says how many of the requests behind that position a device has taken there and keeps.
    pub(super) fn set_to_take_again(&mut self, requests: u16) {
        self.to_take_again = requests;
    }
}
