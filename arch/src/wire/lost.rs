//! What of a vCPU's registers QEMU's layout would lose.
//!
//! No list of numbers decides it for the model-specific ones: they are written to QEMU's fields and read
//! back, and what has not come through is lost. That matters where a register holds something else than
//! after power-on. Of the extended state the components and control registers count that QEMU 7.2's
//! layout has no place for.

use std::ops::RangeInclusive;

use kvm_ioctls::VcpuFd;

use super::cpu::Cpu;
use super::{WireContext, fpu, msrs, nested};
use crate::error::{KvmError, vcpu_error};
use crate::host::KvmHost;
use crate::msr::{self, Msr};
use crate::sys;
use crate::vcpu_state::VcpuState;

/// Registers that hold what a processor is, and that every host sets for itself: microcode revision,
/// platform information, architecture capabilities, performance capabilities, and VMX's.
const OF_THE_HOST: &[RangeInclusive<u32>] =
    &[0x8b..=0x8b, 0xce..=0xce, 0x10a..=0x10a, 0x345..=0x345, 0x480..=0x493];

/// Registers that a guest can do without though it has set them, and why (docs/qemu.md has the same
/// table). QEMU loses them at each of its own migrations.
const HARMLESS: &[(u32, &str)] = &[
    (
        0xc001_1029,
        "DE_CFG: Linux on AMD sets bit 1, LFENCE waits for what was before it; a processor on which it \
         matters does so for the host's kernel already",
    ),
    (0x1fc, "POWER_CTL: KVM keeps the value, and nothing follows from it"),
    (0x1db, LAST_BRANCH),
    (0x1dc, LAST_BRANCH),
    (0x1dd, LAST_BRANCH),
    (0x1de, LAST_BRANCH),
];
const LAST_BRANCH: &str = "the last branch or interrupt, which the processor records for debuggers";

/// DEBUGCTL, and its bit that has a bus lock trapped (Intel SDM volume 3, 17.4.1), which Linux sets where a
/// split lock is not trapped already.
const DEBUGCTL: u32 = 0x1d9;
const BUS_LOCK_DETECT: u64 = 1 << 2;
const BUS_LOCK: &str = "the kernel's log no longer warns of programs that lock the bus";
/// Where events are stored, and which counters do so (Intel SDM volume 3, 19.6.2.4).
const DS_AREA: u32 = 0x600;
const PEBS_ENABLE: u32 = 0x3f1;
const NO_PEBS: &str = "an address for events that no counter stores";

/// AMD's performance monitor: the four selects and counters of the K7 (AMD APM volume 2, 13.2), the six
/// pairs of family 15h under other numbers, and version 2's global registers.
const AMD_SELECTS: &[u32] = &[
    0xc001_0000,
    0xc001_0001,
    0xc001_0002,
    0xc001_0003,
    0xc001_0200,
    0xc001_0202,
    0xc001_0204,
    0xc001_0206,
    0xc001_0208,
    0xc001_020a,
];
const AMD_PMU: &[RangeInclusive<u32>] =
    &[0xc001_0000..=0xc001_0007, 0xc001_0200..=0xc001_020b, 0xc000_0300..=0xc000_0303];
/// A select's bit that lets its counter count.
const SELECT_ENABLE: u64 = 1 << 22;
const PMU_IDLE: &str = "a performance monitor that counts nothing: Linux on AMD tries a counter out when it \
                        boots, and sets each before it lets it count";

/// The timer that a hypervisor in the guest gives its own guest on Intel, and what becomes of it.
const INNER_TIMER: &str = "the VMX preemption timer of the guest's own guest";
const INNER_TIMER_RESTARTS: &str =
    "it runs anew from its full length, so it is late by what had passed of it";

/// A register that would be lost.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Loss {
    /// Which, for example `MSR 0x140`.
    pub register: String,
    /// What it holds.
    pub value: u64,
    /// What it would hold over there: its value after power-on.
    pub power_on: u64,
    /// Why the guest can do without.
    pub harmless: Option<&'static str>,
}

/// The registers of a vCPU among which some may be lost.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Registers {
    msrs: Vec<Msr>,
    /// Extended control registers: number and value.
    xcrs: Vec<(u32, u64)>,
    /// The XSAVE area.
    xsave: Vec<u8>,
    /// See [`nested::preemption_timer`].
    inner_timer: Option<u64>,
}

impl From<&VcpuState> for Registers {
    fn from(state: &VcpuState) -> Self {
        let (xcrs, xsave) = (state.xcrs.clone(), state.xsave.clone());
        let inner_timer = state.nested.as_deref().and_then(nested::preemption_timer);
        Self { msrs: state.msrs.clone(), xcrs, xsave, inner_timer }
    }
}

impl Registers {
    /// Reads them from a vCPU that stands still; changes nothing.
    pub fn capture(index: u32, vcpu: &VcpuFd, host: &KvmHost) -> Result<Self, KvmError> {
        let xcrs = vcpu.get_xcrs().map_err(vcpu_error(index, "KVM_GET_XCRS"))?;
        let count = usize::try_from(xcrs.nr_xcrs).unwrap_or(0);
        let inner = match host.nested_state_size {
            0 => None,
            _ => Some(
                sys::get_nested_state(vcpu).map_err(vcpu_error(index, "KVM_GET_NESTED_STATE"))?,
            ),
        };
        Ok(Self {
            msrs: msr::read(index, vcpu, &host.msrs)?,
            xcrs: xcrs.xcrs.iter().take(count).map(|xcr| (xcr.xcr, xcr.value)).collect(),
            xsave: sys::get_xsave(vcpu, host.xsave_size)
                .map_err(vcpu_error(index, "KVM_GET_XSAVE2"))?,
            inner_timer: inner.as_deref().and_then(nested::preemption_timer),
        })
    }

    /// Those that a QEMU would lose, where they differ from `power_on`.
    pub fn lost(&self, power_on: &[Msr], context: &WireContext) -> Vec<Loss> {
        let mut lost = lost_msrs(&self.msrs, power_on, context);
        let loss = |register: String, value| Loss { register, value, power_on: 0, harmless: None };
        let beyond = self.xcrs.iter().filter(|(n, value)| *n != 0 && *value != 0);
        lost.extend(beyond.map(|(n, value)| loss(format!("XCR{n}"), *value)));
        let parts = fpu::inexpressible(&self.xsave, &context.xsave);
        lost.extend(parts.map(|n| loss(format!("XSAVE component {n}"), 1)));
        lost.extend(self.inner_timer.map(|ends| Loss {
            register: INNER_TIMER.into(),
            value: ends,
            power_on: 0,
            harmless: Some(INNER_TIMER_RESTARTS),
        }));
        lost
    }
}

fn lost_msrs(now: &[Msr], power_on: &[Msr], context: &WireContext) -> Vec<Loss> {
    let mut cpu = Cpu::default();
    msrs::to_wire(now, &mut cpu, context);
    // What can't be read back at all is lost altogether.
    let there = msrs::from_wire(&cpu, context).unwrap_or_default();
    let value = |list: &[Msr], index| list.iter().find(|msr| msr.index == index).map(|m| m.value);
    let counts = |msr: &Msr| AMD_SELECTS.contains(&msr.index) && msr.value & SELECT_ENABLE != 0;
    let idle = !now.iter().any(counts);
    let within = |ranges: &[RangeInclusive<u32>], index| ranges.iter().any(|r| r.contains(&index));
    let storing = value(now, PEBS_ENABLE).unwrap_or(0) != 0;
    let harmless = |msr: &Msr, power_on: u64| {
        let known = HARMLESS.iter().find(|(number, _)| *number == msr.index).map(|(_, why)| *why);
        known.or(match msr.index {
            DEBUGCTL => (msr.value & !BUS_LOCK_DETECT == power_on).then_some(BUS_LOCK),
            DS_AREA => (!storing).then_some(NO_PEBS),
            index => (idle && within(AMD_PMU, index)).then_some(PMU_IDLE),
        })
    };
    let lost = |msr: &Msr| {
        let power_on = value(power_on, msr.index).unwrap_or(0);
        let changed = msr.value != power_on && value(&there, msr.index) != Some(msr.value);
        (changed && !within(OF_THE_HOST, msr.index)).then(|| Loss {
            register: format!("MSR {:#x}", msr.index),
            value: msr.value,
            power_on,
            harmless: harmless(msr, power_on),
        })
    };
    now.iter().filter_map(lost).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpuid::CpuProfile;
    use crate::wire::XsaveLayout;

    fn context(msrs: &[u32]) -> WireContext {
        let host = KvmHost {
            sregs2: true,
            xsave_size: 0,
            nested_state_size: 0,
            tsc_scaling: false,
            tsc_offset: true,
            tsc_khz: None,
            exception_payload: true,
            triple_fault: true,
            kvmclock_ctrl: true,
            mcg_cap: 10,
            msrs: msrs.to_vec(),
        };
        WireContext { virtual_ns: 0, phys_bits: 40, xsave: XsaveLayout::default(), host }
    }

    fn of(numbers: &[u32], values: &[u64]) -> Vec<Msr> {
        numbers.iter().zip(values).map(|(&index, &value)| Msr { index, value }).collect()
    }

    fn names(lost: &[Loss]) -> Vec<(&str, bool)> {
        lost.iter().map(|loss| (loss.register.as_str(), loss.harmless.is_some())).collect()
    }

    #[test]
    fn what_has_no_field_and_has_changed_is_lost() {
        // The spec control register and a fixed MTRR have fields; 0x140 and DE_CFG have not.
        let numbers = [0x48, 0x8b, 0x10a, 0x140, 0x174, 0x250, 0xc001_1029];
        let power_on = of(&numbers, &[0, 1, 2, 0, 0, 0, 0]);
        let context = context(&numbers);
        assert_eq!(lost_msrs(&power_on, &power_on, &context), []);
        let lost = lost_msrs(&of(&numbers, &[1, 7, 7, 1, 0x10, 6, 2]), &power_on, &context);
        assert_eq!(names(&lost), [("MSR 0x140", false), ("MSR 0xc0011029", true)]);
        assert_eq!((lost[0].value, lost[0].power_on), (1, 0));
        // A field of 32 bits does not hold 64.
        let lost = lost_msrs(&of(&numbers, &[0, 1, 2, 0, 1 << 40, 0, 0]), &power_on, &context);
        assert_eq!(names(&lost), [("MSR 0x174", false)]);
    }

    #[test]
    fn what_warns_and_what_nobody_stores_does_no_harm() {
        let numbers = [0x1d9, 0x1db, 0x3f1, 0x600];
        let context = context(&numbers);
        let power_on = of(&numbers, &[0; 4]);
        let lost = |values: &[u64]| lost_msrs(&of(&numbers, values), &power_on, &context);
        let harmless = [("MSR 0x1d9", true), ("MSR 0x1db", true), ("MSR 0x600", true)];
        assert_eq!(names(&lost(&[4, 7, 0, 0xffff])), harmless);
        // Single steps on branches, and counters that store.
        let fatal = [("MSR 0x1d9", false), ("MSR 0x3f1", false), ("MSR 0x600", false)];
        assert_eq!(names(&lost(&[6, 0, 1, 0xffff])), fatal);
    }

    #[test]
    fn a_performance_monitor_without_fields_matters_while_it_counts() {
        let numbers = [0xc000_0301, 0xc001_0200, 0xc001_0201];
        let context = context(&numbers);
        let power_on = of(&numbers, &[0; 3]);
        let lost = |values: &[u64]| lost_msrs(&of(&numbers, values), &power_on, &context);
        // As Linux leaves it.
        assert_eq!(names(&lost(&[0, 0, 0xffff])), [("MSR 0xc0010201", true)]);
        let all = ["MSR 0xc0000301", "MSR 0xc0010200", "MSR 0xc0010201"];
        assert_eq!(names(&lost(&[0x3f, 0x76, 0xffff])), all.map(|name| (name, true)));
        assert_eq!(names(&lost(&[0x3f, 0x40_0076, 5])), all.map(|name| (name, false)));
    }

    #[test]
    fn extended_state_that_has_no_fields_is_lost_where_it_is_in_use() {
        let leaf = |index: u32, size: u32, offset: u32| {
            serde_json::json!({
                "function": 0xd, "index": index, "eax": size, "ebx": offset, "ecx": 0, "edx": 0
            })
        };
        let leaves = [leaf(2, 256, 576), leaf(17, 64, 832)];
        let profile: CpuProfile =
            serde_json::from_value(serde_json::json!({ "leaves": leaves })).unwrap();
        let context = WireContext { xsave: XsaveLayout::new(&profile), ..context(&[]) };
        let mut now = Registers { xcrs: vec![(0, 7), (1, 0)], ..Registers::default() };
        now.xsave = vec![0; 4096];
        now.xsave[576] = 1;
        now.xsave[832] = 1;
        // The bytes of a component that XSTATE_BV has not are nobody's.
        now.xsave[512] = 7;
        assert_eq!(now.lost(&[], &context), []);
        now.xsave[514] = 2;
        now.xcrs[1].1 = 4;
        let lost = now.lost(&[], &context);
        assert_eq!(names(&lost), [("XCR1", false), ("XSAVE component 17", false)]);
    }

    #[test]
    fn a_timer_of_the_inner_guest_is_lost_with_a_word() {
        let now = Registers { inner_timer: Some(77), ..Registers::default() };
        let lost = now.lost(&[], &context(&[]));
        assert_eq!(names(&lost), [(INNER_TIMER, true)]);
        assert_eq!(lost[0].value, 77);
    }
}
