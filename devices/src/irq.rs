//! How a device gets the attention of a vCPU.

use std::io;

use vmm_sys_util::eventfd::EventFd;

/// One input of the interrupt controllers (an ISA IRQ, that is the global system interrupt of the
/// same number).
pub trait IrqLine: Send + Sync {
    /// Drives the line. Setting the level that it already has does nothing.
    fn set_level(&self, high: bool);
}

/// A message-signalled interrupt, as the guest programmed it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MsiMessage {
    /// Where to write.
    pub address: u64,
    /// What to write.
    pub data: u32,
}

/// A source of [`MsiVector`]s: the interrupt routing of the machine.
pub trait MsiController: Send + Sync {
    /// A vector with no message yet.
    fn allocate(&self) -> io::Result<Box<dyn MsiVector>>;
}

/// One MSI-X vector.
pub trait MsiVector: Send + Sync {
    /// Routes the vector to `message`, from the next [`trigger`](Self::trigger) on.
    fn set_message(&self, message: MsiMessage);
    /// Sends the message.
    fn trigger(&self) -> io::Result<()>;
}

/// Where a guest's write can be turned into an eventfd by the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IoAddress {
    /// A port.
    Pio(u16),
    /// A guest-physical address.
    Mmio(u64),
}

/// Doorbells that ring without leaving the kernel.
pub trait IoEvents: Send + Sync {
    /// Rings `fd` on a two-byte write at `address` (any value when `value` is `None`).
    fn register(&self, fd: &EventFd, address: IoAddress, value: Option<u16>) -> io::Result<()>;
    /// Takes a registration back; the arguments are those of `register`.
    fn unregister(&self, fd: &EventFd, address: IoAddress, value: Option<u16>) -> io::Result<()>;
}
