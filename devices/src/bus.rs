//! The I/O buses: who answers at which port and which guest-physical address.
//!
//! Devices implement `vm_device::{DevicePio, DeviceMmio}`. The tables' locks are held only to look
//! a device up, never while it answers, so that a device may move its own BARs from inside an
//! access.

use std::sync::{Arc, PoisonError, RwLock};

use vm_device::bus::{MmioAddress, MmioBus, MmioRange, PioAddress, PioBus, PioRange};
use vm_device::{DeviceMmio, DevicePio};

/// A range could not be claimed: it is empty, wraps, or somebody else answers there.
#[derive(Debug, thiserror::Error)]
#[error("{kind} range {base:#x}+{size:#x} cannot be claimed: {reason}")]
pub struct BusError {
    kind: &'static str,
    base: u64,
    size: u64,
    reason: String,
}

/// Port and memory-mapped I/O of one machine. Cheap to share: wrap it in an [`Arc`].
#[derive(Default)]
pub struct IoBus {
    pio: RwLock<PioBus<Arc<dyn DevicePio + Send + Sync>>>,
    mmio: RwLock<MmioBus<Arc<dyn DeviceMmio + Send + Sync>>>,
}

impl IoBus {
    /// A bus on which nobody answers.
    pub fn new() -> Self {
        Self::default()
    }

    /// Gives `size` ports from `base` on to `device`.
    pub fn map_pio(
        &self,
        base: u16,
        size: u16,
        device: Arc<dyn DevicePio + Send + Sync>,
    ) -> Result<(), BusError> {
        let error = |e: vm_device::bus::Error| BusError {
            kind: "port",
            base: base.into(),
            size: size.into(),
            reason: e.to_string(),
        };
        let range = PioRange::new(PioAddress(base), size).map_err(error)?;
        let mut bus = self.pio.write().unwrap_or_else(PoisonError::into_inner);
        bus.register(range, device).map_err(error)
    }

    /// Takes away the port range that begins at `base`; nothing happens if there is none.
    pub fn unmap_pio(&self, base: u16) {
        let mut bus = self.pio.write().unwrap_or_else(PoisonError::into_inner);
        if bus.device(PioAddress(base)).is_some_and(|(range, _)| range.base().0 == base) {
            bus.deregister(PioAddress(base));
        }
    }

    /// Gives `size` bytes of guest-physical address space from `base` on to `device`.
    pub fn map_mmio(
        &self,
        base: u64,
        size: u64,
        device: Arc<dyn DeviceMmio + Send + Sync>,
    ) -> Result<(), BusError> {
        let error = |e: vm_device::bus::Error| BusError {
            kind: "memory",
            base,
            size,
            reason: e.to_string(),
        };
        let range = MmioRange::new(MmioAddress(base), size).map_err(error)?;
        let mut bus = self.mmio.write().unwrap_or_else(PoisonError::into_inner);
        bus.register(range, device).map_err(error)
    }

    /// Takes away the memory range that begins at `base`; nothing happens if there is none.
    pub fn unmap_mmio(&self, base: u64) {
        let mut bus = self.mmio.write().unwrap_or_else(PoisonError::into_inner);
        if bus.device(MmioAddress(base)).is_some_and(|(range, _)| range.base().0 == base) {
            bus.deregister(MmioAddress(base));
        }
    }

    fn at_port(&self, port: u16) -> Option<(PioRange, Arc<dyn DevicePio + Send + Sync>)> {
        let bus = self.pio.read().unwrap_or_else(PoisonError::into_inner);
        bus.device(PioAddress(port)).map(|(range, device)| (*range, device.clone()))
    }

    fn at_address(&self, address: u64) -> Option<(MmioRange, Arc<dyn DeviceMmio + Send + Sync>)> {
        let bus = self.mmio.read().unwrap_or_else(PoisonError::into_inner);
        bus.device(MmioAddress(address)).map(|(range, device)| (*range, device.clone()))
    }

    /// A guest's `in`: ports where nobody answers read as all ones, as on a real bus.
    pub fn pio_read(&self, port: u16, data: &mut [u8]) {
        match self.at_port(port) {
            Some((range, device)) => {
                device.pio_read(range.base(), port.wrapping_sub(range.base().0), data)
            }
            None => data.fill(0xff),
        }
    }

    /// A guest's `out`; lost where nobody answers.
    pub fn pio_write(&self, port: u16, data: &[u8]) {
        if let Some((range, device)) = self.at_port(port) {
            device.pio_write(range.base(), port.wrapping_sub(range.base().0), data);
        }
    }

    /// A guest's load from device memory; all ones where nobody answers.
    pub fn mmio_read(&self, address: u64, data: &mut [u8]) {
        match self.at_address(address) {
            Some((range, device)) => {
                device.mmio_read(range.base(), address.wrapping_sub(range.base().0), data)
            }
            None => data.fill(0xff),
        }
    }

    /// A guest's store to device memory; lost where nobody answers.
    pub fn mmio_write(&self, address: u64, data: &[u8]) {
        if let Some((range, device)) = self.at_address(address) {
            device.mmio_write(range.base(), address.wrapping_sub(range.base().0), data);
        }
    }
}
