//! What the host's KVM can do, asked once, and the VM-wide switches that a migratable VM needs.

use kvm_bindings::{
    KVM_CAP_EXCEPTION_PAYLOAD, KVM_CAP_SREGS2, KVM_CAP_VCPU_ATTRIBUTES,
    KVM_CAP_X86_TRIPLE_FAULT_EVENT, KVM_PIT_SPEAKER_DUMMY, kvm_pit_config,
};
use kvm_ioctls::{Cap, Kvm, VmFd};

use crate::cpuid::Lack;
use crate::error::{KvmError, vm_error};
use crate::msr::Msr;
use crate::vcpu_state::tsc_khz_close;
use crate::{layout, msr, sys};

/// `IA32_MCG_CAP` of the board's processors: ten banks, a control register (bit 8) and
/// software error recovery (bit 24), as far as KVM has them.
const MCE_BANKS: u64 = 10;
const MCG_CTL_P: u64 = 1 << 8;
const MCG_SER_P: u64 = 1 << 24;

/// What the kernel offers for vCPU state. All vCPUs of a VM share one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KvmHost {
    /// `KVM_GET_SREGS2` exists.
    pub sregs2: bool,
    /// Size of the XSAVE area in bytes; 0 where only the old call (4096 bytes) exists.
    pub xsave_size: usize,
    /// The largest nested state in bytes; 0 where it cannot be read.
    pub nested_state_size: usize,
    /// The TSC can be given any frequency.
    pub tsc_scaling: bool,
    /// What KVM adds to the host's TSC for a vCPU's can be read and set (Linux 5.16).
    pub tsc_offset: bool,
    /// Frequency of the host's TSC in kHz, which new vCPUs get; `None` on kernels before 5.17.
    pub tsc_khz: Option<u32>,
    /// `KVM_GET_VCPU_EVENTS` tells exceptions and their payload apart from injected ones.
    pub exception_payload: bool,
    /// `KVM_GET_VCPU_EVENTS` tells a pending triple fault.
    pub triple_fault: bool,
    /// `KVM_KVMCLOCK_CTRL` exists.
    pub kvmclock_ctrl: bool,
    /// `IA32_MCG_CAP` that new vCPUs get.
    pub mcg_cap: u64,
    /// The MSRs that make up a vCPU's state, ascending, without the TSC and its deadline.
    pub msrs: Vec<u32>,
}

impl KvmHost {
    /// Asks the kernel. Call it before vCPUs are made, and [`setup_vm`](Self::setup_vm) next.
    pub fn probe(kvm: &Kvm, vm: &VmFd) -> Result<Self, KvmError> {
        let size = |cap| usize::try_from(vm.check_extension_int(cap)).unwrap_or(0);
        let supported =
            sys::supported_mce_cap(kvm).map_err(vm_error("KVM_X86_GET_MCE_CAP_SUPPORTED"))?;
        let mcg_cap = MCE_BANKS | (supported & (MCG_CTL_P | MCG_SER_P));
        let listed = kvm.get_msr_index_list().map_err(vm_error("KVM_GET_MSR_INDEX_LIST"))?;
        Ok(Self {
            sregs2: vm.check_extension_raw(KVM_CAP_SREGS2.into()) > 0,
            xsave_size: size(Cap::Xsave2),
            nested_state_size: size(Cap::NestedState),
            tsc_scaling: vm.check_extension(Cap::TscControl),
            tsc_offset: vm.check_extension_raw(KVM_CAP_VCPU_ATTRIBUTES.into()) > 0,
            tsc_khz: sys::vm_tsc_khz(vm),
            exception_payload: vm.check_extension_raw(KVM_CAP_EXCEPTION_PAYLOAD.into()) > 0,
            triple_fault: vm.check_extension_raw(KVM_CAP_X86_TRIPLE_FAULT_EVENT.into()) > 0,
            kvmclock_ctrl: vm.check_extension(Cap::KvmclockCtrl),
            mcg_cap,
            msrs: msr::state_list(listed.as_slice(), mcg_cap),
        })
    }

    /// Prepares a VM that has no vCPU yet: Intel's private pages, PIC, IOAPIC, LAPICs and PIT in
    /// the kernel, and events told completely.
    pub fn setup_vm(&self, vm: &VmFd) -> Result<(), KvmError> {
        vm.set_identity_map_address(layout::KVM_IDENTITY_MAP)
            .map_err(vm_error("KVM_SET_IDENTITY_MAP_ADDR"))?;
        let tss = usize::try_from(layout::KVM_TSS).unwrap_or(usize::MAX);
        vm.set_tss_address(tss).map_err(vm_error("KVM_SET_TSS_ADDR"))?;
        vm.create_irq_chip().map_err(vm_error("KVM_CREATE_IRQCHIP"))?;
        // The dummy speaker makes the kernel answer port 61 for the PIT's channel 2.
        let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        vm.create_pit2(pit).map_err(vm_error("KVM_CREATE_PIT2"))?;
        if self.exception_payload {
            sys::enable_vm_cap(vm, KVM_CAP_EXCEPTION_PAYLOAD, 1)
                .map_err(vm_error("KVM_ENABLE_CAP(EXCEPTION_PAYLOAD)"))?;
        }
        if self.triple_fault {
            sys::enable_vm_cap(vm, KVM_CAP_X86_TRIPLE_FAULT_EVENT, 1)
                .map_err(vm_error("KVM_ENABLE_CAP(X86_TRIPLE_FAULT_EVENT)"))?;
        }
        Ok(())
    }

    /// What this host lacks to go on with vCPUs that ran on `source`: the speed of their TSC, room
    /// for their extended state. (A processor's features are [`CpuProfile::lacks`]'s.)
    ///
    /// [`CpuProfile::lacks`]: crate::cpuid::CpuProfile::lacks
    pub fn lacks(&self, source: &Self) -> Vec<Lack> {
        let mut lacks = Vec::new();
        if let (Some(wanted), Some(here)) = (source.tsc_khz, self.tsc_khz)
            && !self.tsc_scaling
            && !tsc_khz_close(wanted, here)
        {
            lacks.push(Lack::Value {
                what: "TSC frequency".into(),
                wanted: format!("{wanted} kHz"),
                found: format!("{here} kHz, and cannot scale it"),
            });
        }
        // The old call has 4096 bytes.
        let (wanted, here) = (source.xsave_size.max(4096), self.xsave_size.max(4096));
        if wanted > here {
            lacks.push(Lack::Value {
                what: "size of the XSAVE area".into(),
                wanted: format!("{wanted} bytes"),
                found: format!("{here} bytes"),
            });
        }
        lacks
    }

    /// Those of a vCPU's MSRs that this host does not know though they hold something: restoring
    /// them would fail. A list that is merely longer than this host's is no obstacle.
    pub fn unknown_msrs(&self, values: &[Msr]) -> Vec<Msr> {
        let unknown = |msr: &&Msr| msr.value != 0 && self.msrs.binary_search(&msr.index).is_err();
        values.iter().filter(unknown).copied().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host() -> KvmHost {
        KvmHost {
            sregs2: true,
            xsave_size: 0,
            nested_state_size: 0,
            tsc_scaling: false,
            tsc_offset: true,
            tsc_khz: Some(2_600_000),
            exception_payload: true,
            triple_fault: true,
            kvmclock_ctrl: true,
            mcg_cap: 10,
            msrs: vec![0x10, 0x277],
        }
    }

    #[test]
    fn what_a_host_lacks_is_named() {
        assert!(host().lacks(&KvmHost { tsc_khz: Some(2_600_600), ..host() }).is_empty());
        assert!(host().lacks(&KvmHost { xsave_size: 4096, tsc_khz: None, ..host() }).is_empty());
        let source = KvmHost { tsc_khz: Some(2_601_000), xsave_size: 11_008, ..host() };
        let texts: Vec<_> = host().lacks(&source).iter().map(ToString::to_string).collect();
        assert_eq!(texts.len(), 2);
        assert!(texts[0].contains("2601000 kHz") && texts[1].contains("11008 bytes"), "{texts:?}");
        assert_eq!(KvmHost { tsc_scaling: true, ..host() }.lacks(&source).len(), 1);
        let values = [(0x277, 7), (0x48, 0), (0xda0, 1)].map(|(index, value)| Msr { index, value });
        assert_eq!(host().unknown_msrs(&values), [values[2]]);
    }
}
