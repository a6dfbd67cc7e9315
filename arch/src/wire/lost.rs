//! Which of a vCPU's model-specific registers QEMU's layout would lose.
//!
//! No list of numbers decides it: the registers are written to QEMU's fields and read back, and what has
//! not come through is lost. That matters where a register holds something else than after power-on.

use std::fmt;

use super::cpu::Cpu;
use super::{WireContext, msrs};
use crate::msr::Msr;

/// Registers that hold what a processor is, and that every host sets for itself: microcode revision,
/// platform information, architecture capabilities, performance capabilities, and VMX's.
const OF_THE_HOST: &[std::ops::RangeInclusive<u32>] =
    &[0x8b..=0x8b, 0xce..=0xce, 0x10a..=0x10a, 0x345..=0x345, 0x480..=0x491];

/// Registers that a guest can do without though it has set them, and why (docs/qemu.md has the same
/// table). QEMU loses them at each of its own migrations.
const HARMLESS: &[(u32, &str)] = &[(
    0xc001_1029,
    "DE_CFG: Linux on AMD sets bit 1, LFENCE waits for what was before it; a processor on which it \
     mattered does so for the host's kernel already",
)];

/// A register that would be lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LostMsr {
    /// Number and value.
    pub msr: Msr,
    /// Its value after power-on, which it would have over there.
    pub power_on: u64,
    /// Why the guest can do without.
    pub harmless: Option<&'static str>,
}

impl fmt::Display for LostMsr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { msr, power_on, .. } = self;
        write!(f, "MSR {:#x} = {:#x} ({power_on:#x} after power-on)", msr.index, msr.value)
    }
}

/// The registers of `now` that a QEMU would lose, where they differ from `power_on`.
pub fn lost_msrs(now: &[Msr], power_on: &[Msr], context: &WireContext) -> Vec<LostMsr> {
    let mut cpu = Cpu::default();
    msrs::to_wire(now, &mut cpu, context);
    // What can't be read back at all is lost altogether.
    let there = msrs::from_wire(&cpu, context).unwrap_or_default();
    let value = |list: &[Msr], index| list.iter().find(|msr| msr.index == index).map(|m| m.value);
    let lost = |msr: &Msr| {
        let power_on = value(power_on, msr.index).unwrap_or(0);
        let changed = msr.value != power_on && value(&there, msr.index) != Some(msr.value);
        let of_host = OF_THE_HOST.iter().any(|range| range.contains(&msr.index));
        let harmless = HARMLESS.iter().find(|(index, _)| *index == msr.index).map(|(_, why)| *why);
        (changed && !of_host).then_some(LostMsr { msr: *msr, power_on, harmless })
    };
    now.iter().filter_map(lost).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::KvmHost;
    use crate::wire::XsaveLayout;

    fn context(msrs: &[u32]) -> WireContext {
        let host = KvmHost {
            sregs2: true,
            xsave_size: 0,
            nested_state_size: 0,
            tsc_scaling: false,
            tsc_khz: None,
            exception_payload: true,
            triple_fault: true,
            kvmclock_ctrl: true,
            mcg_cap: 10,
            msrs: msrs.to_vec(),
        };
        WireContext { virtual_ns: 0, phys_bits: 40, xsave: XsaveLayout::default(), host }
    }

    #[test]
    fn what_has_no_field_and_has_changed_is_lost() {
        // The spec control register and a fixed MTRR have fields; 0x140 and DE_CFG have not.
        let numbers = [0x48, 0x8b, 0x10a, 0x140, 0x174, 0x250, 0xc001_1029];
        let of = |values: [u64; 7]| {
            let pairs = numbers.into_iter().zip(values);
            pairs.map(|(index, value)| Msr { index, value }).collect::<Vec<_>>()
        };
        let power_on = of([0, 1, 2, 0, 0, 0, 0]);
        let context = context(&numbers);
        assert_eq!(lost_msrs(&power_on, &power_on, &context), []);
        let lost = lost_msrs(&of([1, 7, 7, 1, 0x10, 6, 2]), &power_on, &context);
        let numbers: Vec<_> = lost.iter().map(|l| (l.msr.index, l.harmless.is_some())).collect();
        assert_eq!(numbers, [(0x140, false), (0xc001_1029, true)]);
        assert_eq!(lost[0].to_string(), "MSR 0x140 = 0x1 (0x0 after power-on)");
        // A field of 32 bits does not hold 64.
        let lost = lost_msrs(&of([0, 1, 2, 0, 1 << 40, 0, 0]), &power_on, &context);
        assert_eq!(lost.iter().map(|l| l.msr.index).collect::<Vec<_>>(), [0x174]);
    }
}
