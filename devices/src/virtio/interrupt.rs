//! How a virtio device interrupts its driver: by MSI-X, or by INTx and the ISR register.

use std::sync::{Mutex, MutexGuard, PoisonError};

use super::queue::NO_VECTOR;
use crate::pci::{IntxPin, Msix};

/// ISR bit 0: a queue has something (virtio 1.2, 4.1.4.5).
const ISR_QUEUE: u8 = 1;
/// ISR bit 1: the configuration has changed.
const ISR_CONFIG: u8 = 2;

/// The interrupts of one function. Used by the transport, the I/O thread and workers alike.
pub struct Interrupts(Mutex<Inner>);

/// What [`Interrupts`] protects.
pub(super) struct Inner {
    pub(super) isr: u8,
    pub(super) config_vector: u16,
    /// Counts the changes of the configuration, so that a driver can tell a torn read.
    pub(super) generation: u8,
    pub(super) pin: IntxPin,
    pub(super) msix: Option<Msix>,
}

impl Interrupts {
    /// Nothing raised yet.
    pub fn new(pin: IntxPin, msix: Option<Msix>) -> Self {
        Self(Mutex::new(Inner { isr: 0, config_vector: NO_VECTOR, generation: 0, pin, msix }))
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A queue with this vector has something for its driver.
    pub fn queue(&self, vector: u16) {
        let mut inner = self.lock();
        inner.isr |= ISR_QUEUE;
        inner.raise(vector);
    }

    /// The configuration has changed.
    pub fn config(&self) {
        let mut inner = self.lock();
        inner.isr |= ISR_QUEUE | ISR_CONFIG;
        inner.generation = inner.generation.wrapping_add(1);
        let vector = inner.config_vector;
        inner.raise(vector);
    }
}

impl Inner {
    fn raise(&mut self, vector: u16) {
        match &mut self.msix {
            Some(msix) if msix.is_enabled() => msix.notify(vector),
            _ => self.pin.set(true),
        }
    }

    /// A guest's read of the ISR register clears it, and releases INTx.
    pub(super) fn take_isr(&mut self) -> u8 {
        self.pin.set(false);
        std::mem::take(&mut self.isr)
    }

    /// Back to nothing raised; the MSI-X table is the PCI function's and stays.
    pub(super) fn reset(&mut self) {
        self.isr = 0;
        self.config_vector = NO_VECTOR;
        self.pin.set(false);
    }

    /// Follows the MSI-X control register. INTx is released when MSI-X is switched on.
    pub(super) fn set_msix_control(&mut self, control: u16) {
        if let Some(msix) = &mut self.msix {
            msix.set_control(control);
            if msix.is_enabled() {
                self.pin.set(false);
            }
        }
    }
}
