//! Can this host run a guest that has seen that processor?
//!
//! A running guest goes on using what `CPUID` told it when it booted. So every feature of the
//! source's profile must be there, and what it says about sizes must be true here too.

use std::fmt;

use crate::cpuid::{CpuProfile, Feature, Reg};

/// One thing that a destination lacks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Lack {
    /// A feature bit.
    Feature(Feature),
    /// A number that is not the same, or too small.
    Value {
        /// What it is, for example the vendor.
        what: String,
        /// What the guest has been told.
        wanted: String,
        /// What this host has.
        found: String,
    },
}

impl fmt::Display for Lack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Feature(feature) => write!(f, "CPU feature {feature}"),
            Self::Value { what, wanted, found } => {
                write!(f, "{what}: the guest has seen {wanted}, this host has {found}")
            }
        }
    }
}

/// Registers that are nothing but feature bits (leaf, sub-leaf, register).
const FEATURE_REGISTERS: &[(u32, u32, Reg)] = &[
    (1, 0, Reg::Ecx),
    (1, 0, Reg::Edx),
    (6, 0, Reg::Eax),
    (7, 0, Reg::Ebx),
    (7, 0, Reg::Ecx),
    (7, 0, Reg::Edx),
    (7, 1, Reg::Eax),
    (7, 1, Reg::Ebx),
    (7, 1, Reg::Ecx),
    (7, 1, Reg::Edx),
    (7, 2, Reg::Edx),
    (0xd, 0, Reg::Eax),
    (0xd, 0, Reg::Edx),
    (0xd, 1, Reg::Eax),
    (0xd, 1, Reg::Ecx),
    (0xd, 1, Reg::Edx),
    (0x4000_0001, 0, Reg::Eax),
    (0x8000_0001, 0, Reg::Ecx),
    (0x8000_0001, 0, Reg::Edx),
    (0x8000_0007, 0, Reg::Edx),
    (0x8000_0008, 0, Reg::Ebx),
    (0x8000_000a, 0, Reg::Edx),
    (0x8000_0021, 0, Reg::Eax),
];

/// Bits that the machine's shape or the kernel sets, whatever the host has: HTT, CMP_LEGACY,
/// OSXSAVE, OSPKE.
fn follows_the_machine(feature: Feature) -> bool {
    matches!(
        (feature.function, feature.reg, feature.bit),
        (1, Reg::Edx, 28) | (0x8000_0001, Reg::Ecx, 1) | (1, Reg::Ecx, 27) | (7, Reg::Ecx, 4)
    )
}

impl CpuProfile {
    /// What `self`, all that a destination's host can give, lacks to run a guest that has seen
    /// `guest`. Empty when nothing is missing.
    pub fn lacks(&self, guest: &CpuProfile) -> Vec<Lack> {
        let mut lacks = Vec::new();
        let mut value = |what: String, wanted: String, found: String| {
            lacks.push(Lack::Value { what, wanted, found });
        };
        if self.vendor() != guest.vendor() {
            value("CPU vendor".into(), guest.vendor(), self.vendor());
        }
        if self.phys_bits() < guest.phys_bits() {
            value(
                "physical address bits".into(),
                guest.phys_bits().to_string(),
                self.phys_bits().to_string(),
            );
        }
        // Where each extended-state component lies is in the guest's memory by now.
        let components = guest.leaf(0xd, 0).eax;
        for n in (2..32).filter(|n| components >> n & 1 != 0) {
            let (wanted, found) = (guest.leaf(0xd, n), self.leaf(0xd, n));
            if found.eax != 0 && (wanted.eax, wanted.ebx) != (found.eax, found.ebx) {
                value(
                    format!("place of XSAVE component {n}"),
                    format!("{} bytes at {}", wanted.eax, wanted.ebx),
                    format!("{} bytes at {}", found.eax, found.ebx),
                );
            }
        }
        // Performance monitoring: version, counters and their width, fixed counters.
        let (wanted, found) = (guest.leaf(0xa, 0), self.leaf(0xa, 0));
        for (what, wanted, found) in [
            ("PMU version", wanted.eax & 0xff, found.eax & 0xff),
            ("PMU counters", wanted.eax >> 8 & 0xff, found.eax >> 8 & 0xff),
            ("PMU fixed counters", wanted.edx & 0x1f, found.edx & 0x1f),
        ] {
            if found < wanted {
                value(what.into(), wanted.to_string(), found.to_string());
            }
        }
        for &(function, index, reg) in FEATURE_REGISTERS {
            let missing =
                guest.leaf(function, index).reg(reg) & !self.leaf(function, index).reg(reg);
            let bits = (0..32u8).filter(|bit| missing >> bit & 1 != 0);
            lacks.extend(
                bits.map(|bit| Feature { function, index, reg, bit })
                    .filter(|feature| !follows_the_machine(*feature))
                    .map(Lack::Feature),
            );
        }
        lacks
    }
}
