//! Model-specific registers: KVM's list and QEMU's fields.

use migration::vmstate::FieldError;

use super::cpu::{Cpu, MtrrVar};
use super::cpu_subs::{ArchLbr, CpuSubs, IntelPt, LbrRecord, Mpx, One32, One64, Pmu};
use super::{WireContext, hex};
use crate::msr::{self, Msr};

/// `IA32_MCG_CAP`: a control register exists.
const MCG_CTL_P: u64 = 1 << 8;
/// Banks that QEMU's layout has.
const WIRE_BANKS: u64 = 10;
const FEATURE_CONTROL: u32 = 0x3a;
const SMI_COUNT: u32 = 0x34;
const SMBASE: u32 = 0x9e;
const TSC_AUX: u32 = 0xc000_0103;
const VM_HSAVE_PA: u32 = 0xc001_0117;
const BNDCFGS: u32 = 0xd90;
const SYSTEM_TIME: u32 = 0x4b56_4d01;
const LBR_INFO: u32 = 0x1200;
const LBR_FROM: u32 = 0x1500;
const LBR_TO: u32 = 0x1600;

/// A field of `cpu` that is an MSR.
type Field = (u32, fn(&mut Cpu) -> &mut u64);

/// Registers with a field that is always there.
const FIELDS: &[Field] = &[
    (0x175, |c| &mut c.sysenter_esp),
    (0x176, |c| &mut c.sysenter_eip),
    (0xc000_0081, |c| &mut c.star),
    (0xc000_0082, |c| &mut c.lstar),
    (0xc000_0083, |c| &mut c.cstar),
    (0xc000_0084, |c| &mut c.fmask),
    (0xc000_0102, |c| &mut c.kernelgsbase),
    (0x277, |c| &mut c.pat),
    (VM_HSAVE_PA, |c| &mut c.vm_hsave),
    (msr::MTRR_DEF_TYPE, |c| &mut c.mtrr_deftype),
    (msr::IA32_MCG_STATUS, |c| &mut c.mcg_status),
    (TSC_AUX, |c| &mut c.tsc_aux),
    (SYSTEM_TIME, |c| &mut c.system_time_msr),
    (msr::KVM_WALL_CLOCK, |c| &mut c.wall_clock_msr),
];

/// A subsection that is one MSR.
type Sub<T> = (u32, u64, fn(&mut CpuSubs) -> &mut Option<T>);

/// Registers with a subsection of 64 bits: number, default, place.
const SUBS64: &[Sub<One64>] = &[
    (0x4b56_4d02, 0, |s| &mut s.async_pf),
    (0x4b56_4d06, 0, |s| &mut s.async_pf_int),
    (0x4b56_4d04, 0, |s| &mut s.pv_eoi),
    (0x4b56_4d03, 0, |s| &mut s.steal_time),
    (0x4b56_4d05, 1, |s| &mut s.poll_control),
    (msr::IA32_TSC_ADJUST, 0, |s| &mut s.tsc_adjust),
    (msr::IA32_MISC_ENABLE, 1, |s| &mut s.misc_enable),
    (FEATURE_CONTROL, 0, |s| &mut s.feature_control),
    (0xda0, 0, |s| &mut s.xss),
    (SMI_COUNT, 0, |s| &mut s.smi_count),
    (0x48, 0, |s| &mut s.spec_ctrl),
    (0xc001_011f, 0, |s| &mut s.virt_ssbd),
    (0x4d0, 0, |s| &mut s.mcg_ext_ctl),
    (0xc000_0104, 0x1_0000_0000, |s| &mut s.amd_tsc_scale),
];

/// Registers with a subsection of 32 bits.
const SUBS32: &[Sub<One32>] =
    &[(0xe1, 0, |s| &mut s.umwait), (0x6e1, 0, |s| &mut s.pkrs), (0x122, 0, |s| &mut s.tsx_ctrl)];

/// The general counters that processors have at most; QEMU's layout has room for more, whose numbers
/// would be those of other registers.
const PMU_COUNTERS: usize = 8;

/// The registers of the performance monitor, in the subsection's order.
fn pmu_registers(pmu: &mut Pmu) -> impl Iterator<Item = (u32, &mut u64)> {
    let head = [
        (0x38d, &mut pmu.fixed_ctr_ctrl),
        (0x38f, &mut pmu.global_ctrl),
        (0x38e, &mut pmu.global_status),
        (0x390, &mut pmu.global_ovf_ctrl),
    ];
    head.into_iter()
        .chain((0x309..).zip(&mut pmu.fixed_counters))
        .chain((0xc1..).zip(pmu.gp_counters.iter_mut().take(PMU_COUNTERS)))
        .chain((0x186..).zip(pmu.gp_evtsel.iter_mut().take(PMU_COUNTERS)))
}

fn trace_registers(pt: &mut IntelPt) -> impl Iterator<Item = (u32, &mut u64)> {
    let head = [
        (0x570, &mut pt.ctl),
        (0x571, &mut pt.status),
        (0x560, &mut pt.output_base),
        (0x561, &mut pt.output_mask),
        (0x572, &mut pt.cr3),
    ];
    head.into_iter().chain((0x580..).zip(&mut pt.addrs))
}

/// Fills QEMU's fields from a vCPU's MSRs. `top_bits` are the mask bits above the guest's address
/// width, which QEMU fills with ones.
pub(crate) fn to_wire(msrs: &[Msr], cpu: &mut Cpu, context: &WireContext) {
    let get = |index: u32| msrs.iter().find(|msr| msr.index == index).map(|msr| msr.value);
    let value = |index: u32| get(index).unwrap_or(0);
    cpu.sysenter_cs = value(0x174) as u32;
    for (index, field) in FIELDS {
        *field(cpu) = value(*index);
    }
    cpu.mtrr_fixed = msr::MTRR_FIXED.map(value);
    let top_bits = u64::MAX.checked_shl(context.phys_bits.into()).unwrap_or(0) & ((1 << 52) - 1);
    cpu.mtrr_var = std::array::from_fn(|n| MtrrVar {
        base: value(msr::MTRR_PHYS_BASE0 + 2 * n as u32),
        mask: value(msr::MTRR_PHYS_BASE0 + 2 * n as u32 + 1) | top_bits,
    });
    cpu.mcg_cap = context.host.mcg_cap;
    cpu.mcg_ctl = get(msr::IA32_MCG_CTL).unwrap_or(u64::MAX);
    for (n, bank) in (0..).zip(cpu.mce_banks.iter_mut()) {
        *bank = value(msr::IA32_MC0_CTL + n);
    }
    cpu.smbase = get(SMBASE).map_or(0x3_0000, |base| base as u32);
    for (index, default, place) in SUBS64 {
        let held = get(*index).filter(|value| value != default);
        *place(&mut cpu.subs) = held.map(|value| One64 { value });
    }
    for (index, default, place) in SUBS32 {
        let held = get(*index).filter(|value| value != default);
        *place(&mut cpu.subs) = held.map(|value| One32 { value: value as u32 });
    }
    let mut pmu = Pmu::default();
    pmu_registers(&mut pmu).for_each(|(index, slot)| *slot = value(index));
    cpu.subs.pmu = (pmu != Pmu::default()).then_some(pmu);
    let mut pt = IntelPt::default();
    trace_registers(&mut pt).for_each(|(index, slot)| *slot = value(index));
    cpu.subs.intel_pt = (pt != IntelPt::default()).then_some(pt);
    let xfd = [value(0x1c4), value(0x1c5)];
    cpu.subs.xfd = (xfd != [0; 2]).then_some(xfd);
    let lbr = ArchLbr {
        ctl: value(0x14ce),
        depth: value(0x14cf),
        records: std::array::from_fn(|n| LbrRecord {
            from: value(LBR_FROM + n as u32),
            to: value(LBR_TO + n as u32),
            info: value(LBR_INFO + n as u32),
        }),
    };
    cpu.subs.arch_lbr = (lbr != ArchLbr::default()).then_some(lbr);
    let cfgs = value(BNDCFGS);
    cpu.subs.mpx = (cfgs != 0).then(|| Mpx { cfgs, ..Mpx::default() });
}

/// The MSRs that QEMU's fields describe, ascending. A register that this host does not know is
/// there only if it holds something; writing it then fails with its name.
pub(crate) fn from_wire(cpu: &Cpu, context: &WireContext) -> Result<Vec<Msr>, FieldError> {
    let mut cpu = cpu.clone();
    let mut msrs = vec![Msr { index: 0x174, value: cpu.sysenter_cs.into() }];
    let mut put = |index: u32, value: u64| msrs.push(Msr { index, value });
    for (index, field) in FIELDS {
        put(*index, *field(&mut cpu));
    }
    for (index, value) in msr::MTRR_FIXED.into_iter().zip(cpu.mtrr_fixed) {
        put(index, value);
    }
    let address_bits = 1u64.checked_shl(context.phys_bits.into()).map_or(u64::MAX, |bit| bit - 1);
    for (n, var) in (0..).zip(cpu.mtrr_var) {
        put(msr::MTRR_PHYS_BASE0 + 2 * n, var.base);
        put(msr::MTRR_PHYS_BASE0 + 2 * n + 1, var.mask & address_bits);
    }
    let banks = cpu.mcg_cap & 0xff;
    if banks > WIRE_BANKS {
        return Err(FieldError::new("env.mcg_cap", "at most 10 banks", hex(cpu.mcg_cap)));
    }
    if cpu.mcg_cap & MCG_CTL_P != 0 {
        put(msr::IA32_MCG_CTL, cpu.mcg_ctl);
    }
    let bank_registers = usize::try_from(banks * 4).unwrap_or(0);
    for (n, value) in (0..).zip(cpu.mce_banks.iter().take(bank_registers)) {
        put(msr::IA32_MC0_CTL + n, *value);
    }
    for (index, default, place) in SUBS64 {
        put(*index, place(&mut cpu.subs).as_ref().map_or(*default, |sub| sub.value));
    }
    for (index, default, place) in SUBS32 {
        put(*index, place(&mut cpu.subs).as_ref().map_or(*default, |sub| sub.value.into()));
    }
    if let Some(pmu) = &cpu.subs.pmu {
        let beyond = [&pmu.gp_counters, &pmu.gp_evtsel].map(|regs| &regs[PMU_COUNTERS..]);
        if beyond.concat().iter().any(|value| *value != 0) {
            return Err(FieldError::new("env.msr_gp_counters", "at most 8 in use", "more"));
        }
    }
    pmu_registers(&mut cpu.subs.pmu.take().unwrap_or_default()).for_each(|(i, v)| put(i, *v));
    trace_registers(&mut cpu.subs.intel_pt.take().unwrap_or_default())
        .for_each(|(i, v)| put(i, *v));
    let xfd = cpu.subs.xfd.unwrap_or_default();
    put(0x1c4, xfd[0]);
    put(0x1c5, xfd[1]);
    put(BNDCFGS, cpu.subs.mpx.as_ref().map_or(0, |mpx| mpx.cfgs));
    for (n, value) in (0..).zip(cpu.subs.intel_sgx.unwrap_or_default()) {
        put(0x8c + n, value);
    }
    let lbr = cpu.subs.arch_lbr.take().unwrap_or_default();
    put(0x14ce, lbr.ctl);
    put(0x14cf, lbr.depth);
    for (n, record) in (0..).zip(&lbr.records) {
        put(LBR_FROM + n, record.from);
        put(LBR_TO + n, record.to);
        put(LBR_INFO + n, record.info);
    }
    put(SMBASE, cpu.smbase.into());
    // Registers at their default need not exist here. A count of SMIs and the place of SMM's memory
    // mean nothing to a guest on a host without SMM.
    let known = |index: u32| context.host.msrs.binary_search(&index).is_ok();
    msrs.retain(|msr| {
        known(msr.index)
            || (!matches!(msr.index, SMI_COUNT | SMBASE) && msr.value != default_of(msr.index))
    });
    msrs.sort_unstable_by_key(|msr| msr.index);
    Ok(msrs)
}

fn default_of(index: u32) -> u64 {
    SUBS64.iter().find(|(i, ..)| *i == index).map_or(0, |(_, default, _)| *default)
}

/// Refuses what has no counterpart on this machine: Hyper-V's interface is never offered, so a
/// guest that uses it comes from another machine.
pub(crate) fn check_absent(subs: &CpuSubs) -> Result<(), FieldError> {
    let one = |sub: &Option<One64>| sub.as_ref().is_some_and(|s| s.value != 0);
    let some = |values: Option<&[u64]>| values.is_some_and(|v| v.iter().any(|value| *value != 0));
    for (name, used) in [
        ("hypercall", some(subs.hyperv_hypercall.as_ref().map(|v| v.as_slice()))),
        ("vapic", one(&subs.hyperv_vapic)),
        ("time", one(&subs.hyperv_time)),
        ("crash", some(subs.hyperv_crash.as_ref().map(|v| v.as_slice()))),
        ("runtime", one(&subs.hyperv_runtime)),
        ("synic", some(subs.hyperv_synic.as_ref().map(|v| v.as_slice()))),
        ("stimer", some(subs.hyperv_stimer.as_ref().map(|v| v.as_slice()))),
        ("reenlightenment", some(subs.hyperv_reenlightenment.as_ref().map(|v| v.as_slice()))),
    ] {
        if used {
            return Err(FieldError::new(
                format!("cpu/msr_hyperv_{name}"),
                "a guest that does not use Hyper-V's interface",
                "values in use",
            ));
        }
    }
    Ok(())
}
