//! The processor that an operator asks for: `--cpu host`, or one of the levels of the x86-64 psABI.
//!
//! `host` gives the guest everything that KVM can give. A level gives exactly the same features on
//! every host, so that a guest may move between all hosts that have them. Either way no feature
//! that cannot be migrated (`invtsc`) reaches the guest, unless `migratable=off` asks for it.

use std::fmt;
use std::str::FromStr;

use crate::cpuid::{Feature, Reg};

/// Which processor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CpuModelName {
    /// All that this host has.
    Host,
    /// psABI level 2: SSE4.2, POPCNT, CMPXCHG16B.
    X86_64V2,
    /// psABI level 3: AVX2, BMI, FMA, MOVBE.
    X86_64V3,
}

/// A processor as it is asked for on the command line: `host`, `x86-64-v2,migratable=off`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CpuModel {
    /// Which processor.
    pub name: CpuModelName,
    /// Features that cannot be migrated are kept from the guest.
    pub migratable: bool,
}

impl Default for CpuModel {
    fn default() -> Self {
        Self { name: CpuModelName::Host, migratable: true }
    }
}

/// A `--cpu` argument that means nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CpuModelError {
    /// No such model.
    #[error("unknown CPU model {0:?}; there are host, x86-64-v2 and x86-64-v3")]
    Name(String),
    /// No such property, or a value that it can't have.
    #[error("unknown CPU property {0:?}; there are migratable=on and migratable=off")]
    Property(String),
}

impl FromStr for CpuModel {
    type Err = CpuModelError;

    fn from_str(s: &str) -> Result<Self, CpuModelError> {
        let mut parts = s.split(',');
        let name = match parts.next().unwrap_or_default() {
            "host" => CpuModelName::Host,
            "x86-64-v2" => CpuModelName::X86_64V2,
            "x86-64-v3" => CpuModelName::X86_64V3,
            other => return Err(CpuModelError::Name(other.into())),
        };
        let mut model = Self { name, migratable: true };
        for property in parts {
            model.migratable = match property {
                "migratable=on" => true,
                "migratable=off" => false,
                other => return Err(CpuModelError::Property(other.into())),
            };
        }
        Ok(model)
    }
}

impl fmt::Display for CpuModelName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Host => "host",
            Self::X86_64V2 => "x86-64-v2",
            Self::X86_64V3 => "x86-64-v3",
        })
    }
}

impl fmt::Display for CpuModel {
    /// The whole of it, the default written out.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{},migratable={}", self.name, if self.migratable { "on" } else { "off" })
    }
}

impl CpuModelName {
    /// The features that the guest gets, all of which the host must have; `None` for `host`.
    pub(crate) fn features(self) -> Option<Vec<Feature>> {
        let levels: &[&[Feature]] = match self {
            Self::Host => return None,
            Self::X86_64V2 => &[BASE, V2],
            Self::X86_64V3 => &[BASE, V2, V3],
        };
        Some(levels.concat())
    }
}

const fn f(function: u32, reg: Reg, bit: u8) -> Feature {
    Feature { function, index: 0, reg, bit }
}

/// What every x86-64 processor under KVM has: the psABI's baseline, what a 64-bit kernel needs
/// (Intel SDM volume 2, CPUID), and KVM's own x2APIC and TSC deadline timer.
const BASE: &[Feature] = &[
    f(1, Reg::Edx, 0),            // fpu
    f(1, Reg::Edx, 2),            // de
    f(1, Reg::Edx, 3),            // pse
    f(1, Reg::Edx, 4),            // tsc
    f(1, Reg::Edx, 5),            // msr
    f(1, Reg::Edx, 6),            // pae
    f(1, Reg::Edx, 7),            // mce
    f(1, Reg::Edx, 8),            // cx8
    f(1, Reg::Edx, 9),            // apic
    f(1, Reg::Edx, 11),           // sep
    f(1, Reg::Edx, 12),           // mtrr
    f(1, Reg::Edx, 13),           // pge
    f(1, Reg::Edx, 14),           // mca
    f(1, Reg::Edx, 15),           // cmov
    f(1, Reg::Edx, 16),           // pat
    f(1, Reg::Edx, 17),           // pse36
    f(1, Reg::Edx, 19),           // clflush
    f(1, Reg::Edx, 23),           // mmx
    f(1, Reg::Edx, 24),           // fxsr
    f(1, Reg::Edx, 25),           // sse
    f(1, Reg::Edx, 26),           // sse2
    f(1, Reg::Ecx, 21),           // x2apic
    f(1, Reg::Ecx, 24),           // tsc-deadline
    f(1, Reg::Ecx, 31),           // hypervisor
    f(6, Reg::Eax, 2),            // arat: the LAPIC timer never stops
    f(0x8000_0001, Reg::Edx, 11), // syscall
    f(0x8000_0001, Reg::Edx, 20), // nx
    f(0x8000_0001, Reg::Edx, 29), // lm
];

/// What level 2 adds (x86-64 psABI, "Micro-Architecture Levels").
const V2: &[Feature] = &[
    f(1, Reg::Ecx, 0),           // sse3
    f(1, Reg::Ecx, 9),           // ssse3
    f(1, Reg::Ecx, 13),          // cx16
    f(1, Reg::Ecx, 19),          // sse4.1
    f(1, Reg::Ecx, 20),          // sse4.2
    f(1, Reg::Ecx, 23),          // popcnt
    f(0x8000_0001, Reg::Ecx, 0), // lahf-lm
];

/// What level 3 adds.
const V3: &[Feature] = &[
    f(1, Reg::Ecx, 12),          // fma
    f(1, Reg::Ecx, 22),          // movbe
    f(1, Reg::Ecx, 26),          // xsave
    f(1, Reg::Ecx, 28),          // avx
    f(1, Reg::Ecx, 29),          // f16c
    f(7, Reg::Ebx, 3),           // bmi1
    f(7, Reg::Ebx, 5),           // avx2
    f(7, Reg::Ebx, 8),           // bmi2
    f(0x8000_0001, Reg::Ecx, 5), // lzcnt
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_read_and_written_whole() {
        for (given, whole) in [
            ("host", "host,migratable=on"),
            ("x86-64-v2", "x86-64-v2,migratable=on"),
            ("x86-64-v3,migratable=off", "x86-64-v3,migratable=off"),
        ] {
            let model: CpuModel = given.parse().unwrap();
            assert_eq!(model.to_string(), whole);
            assert_eq!(whole.parse(), Ok(model));
        }
        assert_eq!("hots".parse::<CpuModel>(), Err(CpuModelError::Name("hots".into())));
        assert_eq!("host,+avx".parse::<CpuModel>(), Err(CpuModelError::Property("+avx".into())));
    }

    #[test]
    fn levels_contain_each_other_and_never_invtsc() {
        let v2 = CpuModelName::X86_64V2.features().unwrap();
        let v3 = CpuModelName::X86_64V3.features().unwrap();
        assert!(v2.iter().all(|feature| v3.contains(feature)));
        assert!(v3.len() > v2.len());
        assert!(!v3.iter().any(|feature| feature.function == 0x8000_0007));
    }
}
