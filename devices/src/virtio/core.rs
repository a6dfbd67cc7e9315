//! What the transport of a device, the device itself and its worker thread share: guest memory,
//! the queues, and the interrupts.
//!
//! Locks are taken in this order: the transport, the device's own, a queue, the interrupts.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::chain::Chain;
use super::features;
use super::interrupt::Interrupts;
use super::queue::{QueueError, VirtQueue};
use crate::memory::{GuestRam, GuestRamRef};

/// Device status bits (virtio 1.2, 2.1).
pub mod status {
    /// The driver is ready.
    pub const DRIVER_OK: u8 = 4;
    /// The driver has accepted the features.
    pub const FEATURES_OK: u8 = 8;
    /// The device has found something that it cannot recover from.
    pub const NEEDS_RESET: u8 = 0x40;
}

/// How many requests are served in a row before others on the same thread have a turn.
const BUDGET: usize = 256;

/// A device's queues and their surroundings.
pub struct Core {
    name: &'static str,
    ram: GuestRamRef,
    queues: Vec<Slot>,
    interrupts: Interrupts,
    features: AtomicU64,
    status: AtomicU8,
    broken: AtomicBool,
    disabled: AtomicBool,
    paused: AtomicBool,
}

struct Slot {
    queue: Mutex<VirtQueue>,
    kick: EventFd,
}

/// A device cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum VirtioError {
    /// No eventfd, thread or interrupt vector could be had.
    #[error("{name}: cannot make {what}")]
    Resource {
        /// The device.
        name: &'static str,
        /// What was wanted.
        what: &'static str,
        /// The operating system's reason.
        #[source]
        source: io::Error,
    },
    /// The queues cannot be as large as was asked.
    #[error("{name}: bad queue size")]
    Queue {
        /// The device.
        name: &'static str,
        /// Why.
        #[source]
        source: QueueError,
    },
}

impl Core {
    /// Queues of the given sizes. The device is paused until its first resume.
    pub fn new(
        name: &'static str,
        ram: GuestRamRef,
        sizes: &[u16],
        interrupts: Interrupts,
    ) -> Result<Self, VirtioError> {
        let mut queues = Vec::with_capacity(sizes.len());
        for size in sizes {
            let queue =
                VirtQueue::new(*size).map_err(|source| VirtioError::Queue { name, source })?;
            let kick = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)
                .map_err(|source| VirtioError::Resource { name, what: "an eventfd", source })?;
            queues.push(Slot { queue: Mutex::new(queue), kick });
        }
        Ok(Self {
            name,
            ram,
            queues,
            interrupts,
            features: AtomicU64::new(0),
            status: AtomicU8::new(0),
            broken: AtomicBool::new(false),
            disabled: AtomicBool::new(true),
            paused: AtomicBool::new(true),
        })
    }

    /// Guest memory.
    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// How many queues there are.
    pub fn len(&self) -> usize {
        self.queues.len()
    }

    /// Whether there are no queues.
    pub fn is_empty(&self) -> bool {
        self.queues.is_empty()
    }

    /// The interrupts.
    pub fn interrupts(&self) -> &Interrupts {
        &self.interrupts
    }

    /// The features that the driver has accepted.
    pub fn features(&self) -> u64 {
        self.features.load(Ordering::Acquire)
    }

    /// Whether the driver has accepted all bits of `mask`.
    pub fn has(&self, mask: u64) -> bool {
        self.features() & mask == mask
    }

    pub(super) fn set_features(&self, accepted: u64) {
        self.features.store(accepted, Ordering::Release);
        for index in 0..self.len() {
            if let Some(mut queue) = self.queue(index) {
                self.apply_features(&mut queue);
            }
        }
    }

    pub(super) fn apply_features(&self, queue: &mut VirtQueue) {
        queue.set_features(self.has(features::EVENT_IDX), self.has(features::NOTIFY_ON_EMPTY));
    }

    /// The status register.
    pub fn status(&self) -> u8 {
        self.status.load(Ordering::Acquire)
    }

    pub(super) fn set_status(&self, status: u8) {
        self.status.store(status, Ordering::Release);
    }

    /// Whether the device gave up on its driver, until the next reset.
    pub fn is_broken(&self) -> bool {
        self.broken.load(Ordering::Acquire)
    }

    pub(super) fn set_broken(&self, broken: bool) {
        self.broken.store(broken, Ordering::Release);
    }

    /// Whether the function may not write to memory, since it is not a bus master.
    pub(super) fn set_disabled(&self, disabled: bool) {
        self.disabled.store(disabled, Ordering::Release);
    }

    pub(super) fn is_disabled(&self) -> bool {
        self.disabled.load(Ordering::Acquire)
    }

    pub(super) fn set_paused(&self, paused: bool) {
        self.paused.store(paused, Ordering::Release);
    }

    /// Whether the VM stands still: nothing may be taken from a queue.
    pub fn is_paused(&self) -> bool {
        self.paused.load(Ordering::Acquire)
    }

    /// Whether requests may be taken from the queues. Old legacy drivers use them before they say
    /// that they are ready.
    pub fn is_live(&self) -> bool {
        let ready = self.status() & status::DRIVER_OK != 0 || !self.has(features::VERSION_1);
        ready && !self.is_broken() && !self.is_disabled() && !self.is_paused()
    }

    /// Queue `index`, locked.
    pub fn queue(&self, index: usize) -> Option<MutexGuard<'_, VirtQueue>> {
        let slot = self.queues.get(index)?;
        Some(slot.queue.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The eventfd that a driver's notice for queue `index` rings.
    pub fn kick_fd(&self, index: usize) -> Option<&EventFd> {
        self.queues.get(index).map(|slot| &slot.kick)
    }

    /// Rings for queue `index`.
    pub fn kick(&self, index: usize) {
        // A full counter means that it rings already.
        if let Some(Err(error)) = self.kick_fd(index).map(|fd| fd.write(1))
            && error.kind() != io::ErrorKind::WouldBlock
        {
            tracing::error!("{}: cannot ring for queue {index}: {error}", self.name);
        }
    }

    /// Takes the next request from queue `index`.
    pub fn pop(&self, index: usize) -> Option<Chain<'_>> {
        if !self.is_live() {
            return None;
        }
        let popped = self.queue(index)?.pop(&self.ram);
        self.checked(index, popped).flatten()
    }

    /// Whether there is a request to take from queue `index`.
    pub fn has_request(&self, index: usize) -> bool {
        if !self.is_live() {
            return false;
        }
        let Some(queue) = self.queue(index) else { return false };
        let waits = queue.has_request(&self.ram);
        drop(queue);
        self.checked(index, waits) == Some(true)
    }

    /// Puts back the request that was taken last.
    pub fn unpop(&self, index: usize) {
        if let Some(mut queue) = self.queue(index) {
            queue.unpop();
        }
    }

    /// Gives a request back with `written` bytes in it. The driver does not notice until
    /// [`interrupt`](Self::interrupt).
    pub fn push(&self, index: usize, head: u16, written: usize) {
        let written = u32::try_from(written).unwrap_or(u32::MAX);
        let Some(mut queue) = self.queue(index) else { return };
        let pushed = queue.push(&self.ram, head, written);
        drop(queue);
        self.checked(index, pushed);
    }

    /// Interrupts the driver for what was pushed, if it wants that.
    pub fn interrupt(&self, index: usize) {
        let Some(mut queue) = self.queue(index) else { return };
        let (wanted, vector) = (queue.wants_interrupt(&self.ram), queue.vector);
        drop(queue);
        if self.checked(index, wanted) == Some(true) {
            self.interrupts.queue(vector);
        }
    }

    /// Asks the driver to ring for queue `index`, or not to. True when there is something already.
    pub fn set_notification(&self, index: usize, on: bool) -> bool {
        if !self.is_live() {
            return false;
        }
        let Some(mut queue) = self.queue(index) else { return false };
        let set = queue.set_notification(&self.ram, on);
        drop(queue);
        self.checked(index, set) == Some(true)
    }

    /// Serves every request of queue `index` with `serve`, which returns how many bytes it wrote.
    pub fn serve(&self, index: usize, serve: impl FnMut(&mut Chain<'_>) -> usize) {
        self.serve_in_turns(index, BUDGET, serve);
    }

    /// The same with `turn` requests in a row, for those that take long.
    pub fn serve_in_turns(
        &self,
        index: usize,
        turn: usize,
        mut serve: impl FnMut(&mut Chain<'_>) -> usize,
    ) {
        let mut left = turn;
        loop {
            self.set_notification(index, false);
            let mut served = false;
            while left > 0
                && let Some(mut chain) = self.pop(index)
            {
                let written = serve(&mut chain);
                self.push(index, chain.head, written);
                served = true;
                left -= 1;
            }
            if served {
                self.interrupt(index);
            }
            if left == 0 {
                self.kick(index);
                return;
            }
            if !self.set_notification(index, true) {
                return;
            }
        }
    }

    fn checked<T>(&self, index: usize, result: Result<T, QueueError>) -> Option<T> {
        result.map_err(|error| self.fail(&format_args!("queue {index}: {}", chain_of(&error)))).ok()
    }

    /// The driver has done something that the device cannot follow: it stops until it is reset.
    pub fn fail(&self, why: &dyn std::fmt::Display) {
        if self.broken.swap(true, Ordering::AcqRel) {
            return;
        }
        tracing::warn!(
            "{}: the guest's driver is wrong, the device waits for a reset: {why}",
            self.name
        );
        if self.has(features::VERSION_1) {
            self.status.fetch_or(status::NEEDS_RESET, Ordering::AcqRel);
            self.interrupts.config();
        }
    }
}

/// An error and its causes, in one line.
fn chain_of(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}
