//! A new vCPU, as the machine type starts it.

use kvm_ioctls::VcpuFd;

use crate::cpuid::{CpuProfile, CpuidError};
use crate::error::{KvmError, vcpu_error};
use crate::host::KvmHost;
use crate::msr::{self, Msr};
use crate::sys;

/// Memory types as firmware leaves them: everything write-back (6), MTRRs on (bit 11), fixed ranges
/// on (bit 10).
const MTRR_WRITE_BACK: u64 = 0xc06;

/// Gives vCPU `index` of `count` its CPUID and its machine-check banks. What comes next is either a
/// guest's entry state with [`reset_msrs`], or a restore. Must be called before the vCPU runs.
pub fn init_vcpu(
    index: u32,
    count: u32,
    vcpu: &VcpuFd,
    profile: &CpuProfile,
    host: &KvmHost,
) -> Result<(), CpuidError> {
    let cpuid = profile.for_vcpu(index, count)?;
    vcpu.set_cpuid2(&cpuid).map_err(vcpu_error(
        index,
        format_args!("KVM_SET_CPUID2({} leaves)", cpuid.as_slice().len()),
    ))?;
    sys::setup_mce(vcpu, host.mcg_cap)
        .map_err(vcpu_error(index, format_args!("KVM_X86_SETUP_MCE({:#x})", host.mcg_cap)))?;
    Ok(())
}

/// What a processor of this board has after power-on, and KVM's may not: fast strings.
pub fn reset_misc(index: u32, vcpu: &VcpuFd) -> Result<(), KvmError> {
    msr::write(index, vcpu, &[Msr { index: msr::IA32_MISC_ENABLE, value: 1 }])
}

/// Registers that firmware would have set before it starts an operating system. All vCPUs alike.
pub fn reset_msrs(index: u32, vcpu: &VcpuFd) -> Result<(), CpuidError> {
    let mut msrs = vec![Msr { index: msr::IA32_MISC_ENABLE, value: 1 }];
    // The fixed ranges below 1 MiB are write-back too; 8 bytes of one type each.
    let write_back = u64::from_le_bytes([6; 8]);
    msrs.extend(msr::MTRR_FIXED.map(|index| Msr { index, value: write_back }));
    msrs.push(Msr { index: msr::MTRR_DEF_TYPE, value: MTRR_WRITE_BACK });
    Ok(msr::write(index, vcpu, &msrs)?)
}
