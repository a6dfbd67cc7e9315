//! Model-specific registers: which make up a vCPU's state, and how they are read and written in
//! bulk.
//!
//! The kernel's index list (`KVM_GET_MSR_INDEX_LIST`) leaves out registers that it nevertheless
//! keeps for each vCPU: MTRRs and the machine-check banks. They are added here. The TSC and its
//! deadline are state too, but depend on the moment, and are handled with the clocks
//! ([`clock`](crate::clock)).

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

use crate::error::{KvmError, vcpu_error};

/// Registers that go through one ioctl; kvm-bindings allows 256.
const BATCH: usize = 128;
/// The architecture's limit of machine-check banks that KVM emulates.
const MAX_MCE_BANKS: u64 = 32;

/// Time stamp counter.
pub const IA32_TSC: u32 = 0x10;
/// APIC base; travels with the special registers.
pub const IA32_APICBASE: u32 = 0x1b;
/// What a guest has added to its TSC.
pub const IA32_TSC_ADJUST: u32 = 0x3b;
/// When the LAPIC timer fires in TSC-deadline mode.
pub const IA32_TSC_DEADLINE: u32 = 0x6e0;
/// Miscellaneous features; bit 0, fast strings, is set after reset.
pub const IA32_MISC_ENABLE: u32 = 0x1a0;
/// Default memory type: bits 7:0 type, 10 fixed enable, 11 enable.
pub const MTRR_DEF_TYPE: u32 = 0x2ff;
/// First of eight pairs (base, mask) of variable MTRRs.
pub const MTRR_PHYS_BASE0: u32 = 0x200;
/// The fixed-range MTRRs, ascending by the addresses that they rule.
pub const MTRR_FIXED: [u32; 11] =
    [0x250, 0x258, 0x259, 0x268, 0x269, 0x26a, 0x26b, 0x26c, 0x26d, 0x26e, 0x26f];
/// Machine-check capabilities; set up once, not state.
pub const IA32_MCG_CAP: u32 = 0x179;
/// Machine-check status.
pub const IA32_MCG_STATUS: u32 = 0x17a;
/// Machine-check control.
pub const IA32_MCG_CTL: u32 = 0x17b;
/// Where the guest keeps the wall clock of its boot. The old numbers of this register and of the
/// system time (0x11, 0x12) are other names for the same state, and are left out.
pub const KVM_WALL_CLOCK: u32 = 0x4b56_4d00;
/// First of four registers (control, status, address, misc) of machine-check bank 0.
pub const IA32_MC0_CTL: u32 = 0x400;

/// A register and its value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Msr {
    /// Its number.
    pub index: u32,
    /// Its value.
    pub value: u64,
}

/// The registers that make up a vCPU's state, ascending: what the kernel lists, and what it keeps
/// without listing it. `mcg_cap` tells the number of machine-check banks.
pub fn state_list(listed: &[u32], mcg_cap: u64) -> Vec<u32> {
    let banks = u32::try_from((mcg_cap & 0xff).min(MAX_MCE_BANKS)).unwrap_or(0);
    let mut list: Vec<u32> = listed
        .iter()
        .copied()
        .filter(|index| !handled_elsewhere(*index))
        .chain(MTRR_PHYS_BASE0..MTRR_PHYS_BASE0 + 16)
        .chain(MTRR_FIXED)
        .chain([MTRR_DEF_TYPE, IA32_MCG_STATUS, IA32_MCG_CTL])
        .chain(IA32_MC0_CTL..IA32_MC0_CTL + 4 * banks)
        .collect();
    list.sort_unstable();
    list.dedup();
    list
}

/// TSC and deadline belong to the clocks, the APIC base to the special registers, the old names of
/// kvmclock's registers to the new ones, and Hyper-V's registers (0x4000_0000 to 0x4000_01ff) to an
/// interface that no guest here is offered.
fn handled_elsewhere(index: u32) -> bool {
    matches!(
        index,
        IA32_TSC | IA32_TSC_DEADLINE | IA32_APICBASE | 0x11 | 0x12 | 0x4000_0000..=0x4000_01ff
    )
}

/// Reads `indices`, leaving out those that this vCPU does not have.
pub fn read(vcpu_index: u32, vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<Msr>, KvmError> {
    let mut values = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while !rest.is_empty() {
        let batch = &rest[..rest.len().min(BATCH)];
        let mut msrs = batch_of(vcpu_index, batch.iter().map(|&index| Msr { index, value: 0 }))?;
        // The kernel stops at the first register that it cannot read, and says how many it read.
        let read = vcpu
            .get_msrs(&mut msrs)
            .map_err(vcpu_error(vcpu_index, format_args!("KVM_GET_MSRS({:#x}…)", batch[0])))?
            .min(batch.len());
        values
            .extend(msrs.as_slice()[..read].iter().map(|e| Msr { index: e.index, value: e.data }));
        let skip = usize::from(read < batch.len());
        rest = &rest[read + skip..];
    }
    Ok(values)
}

/// Reads one register; `None` if the vCPU does not have it.
pub fn read_one(vcpu_index: u32, vcpu: &VcpuFd, index: u32) -> Result<Option<u64>, KvmError> {
    Ok(read(vcpu_index, vcpu, &[index])?.first().map(|msr| msr.value))
}

/// Writes all of `values`. A register that refuses its value is no error if it holds that value
/// already (read-only registers), or if the vCPU does not have it and the value is zero.
pub fn write(vcpu_index: u32, vcpu: &VcpuFd, values: &[Msr]) -> Result<(), KvmError> {
    write_each(vcpu_index, vcpu, values, &mut |Msr { index, value }, held| {
        Err(KvmError::Msr {
            vcpu: vcpu_index,
            index,
            value,
            found: held.map_or("nothing, this vCPU has no such MSR".into(), |v| format!("{v:#x}")),
        })
    })
}

/// Writes all of `values` that can be written, and gives those that can't, each with what the vCPU
/// holds instead; nothing if it has no such register.
pub fn refused(
    vcpu_index: u32,
    vcpu: &VcpuFd,
    values: &[Msr],
) -> Result<Vec<(Msr, Option<u64>)>, KvmError> {
    let mut all = Vec::new();
    write_each(vcpu_index, vcpu, values, &mut |msr, held| {
        all.push((msr, held));
        Ok(())
    })?;
    Ok(all)
}

fn write_each(
    vcpu_index: u32,
    vcpu: &VcpuFd,
    values: &[Msr],
    refused: &mut dyn FnMut(Msr, Option<u64>) -> Result<(), KvmError>,
) -> Result<(), KvmError> {
    let mut rest = values;
    while !rest.is_empty() {
        let batch = &rest[..rest.len().min(BATCH)];
        let msrs = batch_of(vcpu_index, batch.iter().copied())?;
        let written = vcpu
            .set_msrs(&msrs)
            .map_err(vcpu_error(
                vcpu_index,
                format_args!("KVM_SET_MSRS({:#x} to {:#x}…)", batch[0].index, batch[0].value),
            ))?
            .min(batch.len());
        rest = &rest[written..];
        if written < batch.len() {
            let msr = rest[0];
            match read_one(vcpu_index, vcpu, msr.index)? {
                Some(held) if held == msr.value => {}
                None if msr.value == 0 => {}
                held => refused(msr, held)?,
            }
            rest = &rest[1..];
        }
    }
    Ok(())
}

fn batch_of(vcpu: u32, msrs: impl Iterator<Item = Msr>) -> Result<Msrs, KvmError> {
    let entries: Vec<_> = msrs
        .map(|Msr { index, value }| kvm_msr_entry { index, data: value, ..Default::default() })
        .collect();
    Msrs::from_entries(&entries).map_err(|_| KvmError::Unsupported {
        vcpu,
        what: "MSRs in one call",
        expected: format!("at most {BATCH}"),
        found: entries.len().to_string(),
    })
}

/// A register's name as the manuals (Intel SDM volume 4, AMD APM volume 2) and Linux'
/// `asm/kvm_para.h` have it.
pub fn name(index: u32) -> Option<&'static str> {
    Some(match index {
        0x10 => "IA32_TSC",
        0x11 => "KVM_WALL_CLOCK",
        0x12 => "KVM_SYSTEM_TIME",
        0x1b => "IA32_APIC_BASE",
        0x34 => "SMI_COUNT",
        0x3a => "IA32_FEATURE_CONTROL",
        0x3b => "IA32_TSC_ADJUST",
        0x48 => "IA32_SPEC_CTRL",
        0x8b => "IA32_BIOS_SIGN_ID",
        0x9e => "IA32_SMBASE",
        0xce => "PLATFORM_INFO",
        0xe1 => "IA32_UMWAIT_CONTROL",
        0x10a => "IA32_ARCH_CAPABILITIES",
        0x122 => "IA32_TSX_CTRL",
        0x140 => "MISC_FEATURES_ENABLES",
        0x174 => "IA32_SYSENTER_CS",
        0x175 => "IA32_SYSENTER_ESP",
        0x176 => "IA32_SYSENTER_EIP",
        0x179 => "IA32_MCG_CAP",
        0x17a => "IA32_MCG_STATUS",
        0x17b => "IA32_MCG_CTL",
        0x1a0 => "IA32_MISC_ENABLE",
        0x1c4 => "IA32_XFD",
        0x1c5 => "IA32_XFD_ERR",
        0x1d9 => "IA32_DEBUGCTL",
        0x1fc => "POWER_CTL",
        0x200..=0x20f => "IA32_MTRR_PHYSBASE/PHYSMASK",
        0x250 => "IA32_MTRR_FIX64K_00000",
        0x258 | 0x259 => "IA32_MTRR_FIX16K",
        0x268..=0x26f => "IA32_MTRR_FIX4K",
        0x277 => "IA32_PAT",
        0x2ff => "IA32_MTRR_DEF_TYPE",
        0x345 => "IA32_PERF_CAPABILITIES",
        0x400..=0x47f => "IA32_MCi",
        0x6e0 => "IA32_TSC_DEADLINE",
        0x6e1 => "IA32_PKRS",
        0xd90 => "IA32_BNDCFGS",
        0xda0 => "IA32_XSS",
        0x4b56_4d00 => "KVM_WALL_CLOCK_NEW",
        0x4b56_4d01 => "KVM_SYSTEM_TIME_NEW",
        0x4b56_4d02 => "KVM_ASYNC_PF_EN",
        0x4b56_4d03 => "KVM_STEAL_TIME",
        0x4b56_4d04 => "KVM_PV_EOI_EN",
        0x4b56_4d05 => "KVM_POLL_CONTROL",
        0x4b56_4d06 => "KVM_ASYNC_PF_INT",
        0x4b56_4d07 => "KVM_ASYNC_PF_ACK",
        0xc000_0080 => "EFER",
        0xc000_0081 => "STAR",
        0xc000_0082 => "LSTAR",
        0xc000_0083 => "CSTAR",
        0xc000_0084 => "SYSCALL_MASK",
        0xc000_0100 => "FS_BASE",
        0xc000_0101 => "GS_BASE",
        0xc000_0102 => "KERNEL_GS_BASE",
        0xc000_0103 => "TSC_AUX",
        0xc000_0104 => "AMD64_TSC_RATIO",
        0xc001_0015 => "HWCR",
        0xc001_0117 => "VM_HSAVE_PA",
        0xc001_011f => "VIRT_SPEC_CTRL",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_has_what_the_kernel_keeps_but_does_not_list() {
        let list = state_list(&[0xc000_0081, IA32_TSC, IA32_TSC_DEADLINE, 0x277, 0x4000_0001], 2);
        assert!(list.is_sorted());
        for index in [0x200, 0x20f, 0x250, 0x26f, 0x2ff, 0x277, 0x17a, 0x400, 0x407, 0xc000_0081] {
            assert!(list.contains(&index), "{index:#x}");
        }
        for index in [IA32_TSC, IA32_TSC_DEADLINE, 0x408, 0x4000_0001] {
            assert!(!list.contains(&index), "{index:#x}");
        }
        assert!(state_list(&[], 0xff).contains(&(0x400 + 4 * 31 + 3)));
        assert!(!state_list(&[], 0xff).contains(&(0x400 + 4 * 32)));
    }
}
