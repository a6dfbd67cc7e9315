//! PCI: configuration space, functions, bus 0, INTx and MSI-X.
//!
//! - [`PciConfig`]: the 256 bytes of a function, what of them a guest may write, and what a
//!   migration compares;
//! - [`PciFunction`]: what a device is to the bus;
//! - [`PciBus`]: ports 0xcf8 and 0xcfc, and where the BARs are mapped;
//! - [`IntxLines`] and [`IntxPin`]: the level-triggered interrupts;
//! - [`Msix`]: the message-signalled ones.
//!
//! The authority is the PCI Local Bus Specification 3.0; sections are given as "PCI 3.0, 6.1".

mod bus;
mod config;
mod function;
mod intx;
mod msix;

pub use bus::{PciBus, PciBusError, PciBusLines, PciBusState, PciHost, PciHostState, ResetControl};
pub use config::{
    BarKind, BarRange, CONFIG_SIZE, PCI_DEVICE_WORDS, PciConfig, PciDeviceState, PciIdentity,
    command,
};
pub use function::PciFunction;
pub use intx::{IntxLines, IntxPin, IntxRouter, PIRQ_LINES};
pub use msix::{Msix, PBA_OFFSET, msix_capability};
