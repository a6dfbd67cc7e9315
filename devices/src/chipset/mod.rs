//! The board's own PCI functions: the i440FX host bridge, and the PIIX3 with its ISA bridge, its
//! IDE function (without drives) and PIIX4's power management.
//!
//! Register numbers are those of Intel's data sheets 290549 (82441FX), 290550 (82371SB, PIIX3)
//! and 290562 (82371AB, PIIX4).

pub mod holders;
pub mod i440fx;
pub mod ide;
pub mod piix3;
pub mod piix4_pm;
pub mod pirq;

use crate::pci::PciIdentity;

/// Intel.
const INTEL: u16 = 0x8086;
/// The subsystem of every function of this board.
const SUBSYSTEM: (u16, u16) = (0x1af4, 0x1100);

/// One of Intel's functions on this board.
fn identity(device: u16, revision: u8, class: u16, prog_if: u8) -> PciIdentity {
    PciIdentity { id: (INTEL, device), revision, class, prog_if, subsystem: SUBSYSTEM }
}
