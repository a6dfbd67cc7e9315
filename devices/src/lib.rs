//! What the guest sees: buses, PCI, the PIIX chipset, legacy ISA devices, virtio.
//!
//! Devices know neither KVM nor each other; they reach the machine through the small traits of
//! [`bus`], [`irq`], [`clock`], [`memory`] and [`device`], which `vmm` implements and wires up.

pub mod bus;
pub mod chipset;
pub mod clock;
pub mod device;
pub mod irq;
pub mod isa;
pub mod memory;
pub mod pci;
pub mod timer;
pub mod virtio;
