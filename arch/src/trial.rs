//! Would this host's KVM take that vCPU? Tried out on a spare one, before any of the guest comes.
//!
//! What is tried is what hosts differ in: CPUID, the model-specific registers with their values, the
//! extended-state components and XCR0. A value that the guest changes afterwards may still be
//! refused; the restore finds that.

use kvm_bindings::{kvm_xcr, kvm_xcrs};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

use crate::cpuid::CpuProfile;
use crate::error::{KvmError, vcpu_error};
use crate::host::KvmHost;
use crate::msr::{self, Msr};
use crate::sys;
use crate::vcpu_init::init_vcpu;
use crate::vcpu_state::xstate_bv;

/// CR4.LA57: linear addresses have 57 bits, not 48.
const CR4_LA57: u64 = 1 << 12;
/// CR4.VMXE and EFER.SVME: the guest is a hypervisor.
const CR4_VMXE: u64 = 1 << 13;
const EFER_SVME: u64 = 1 << 12;
/// Offsets in an XSAVE area (Intel SDM volume 1, 13.4.1 and 13.4.2): MXCSR, and which components
/// are there.
const MXCSR: usize = 24;
const XSTATE_BV: usize = 512;
/// Legacy area and header: the smallest XSAVE area.
const XSAVE_HEAD: usize = 576;
/// More registers than any KVM has; what a source lists beyond is not tried.
const MAX_MSRS: usize = 4096;

/// What a running vCPU needs of a host.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct VcpuNeeds {
    /// Its index.
    pub index: u32,
    /// Its model-specific registers, number and value.
    pub msrs: Vec<(u32, u64)>,
    /// Which extended-state components the guest has enabled.
    pub xcr0: u64,
    /// Which of them hold something. What they hold can't be refused, and stays here.
    pub xstate: u64,
    /// The SSE control register, of which a host may refuse bits.
    pub mxcsr: u32,
    /// The TSC's frequency in kHz; 0 if the kernel does not say.
    pub tsc_khz: u32,
    /// It has switched on the processor's support for hypervisors.
    pub hypervisor: bool,
    /// It has switched on addresses of 57 bits, which decides what registers that hold one may hold.
    #[serde(default)]
    pub long_addresses: bool,
}

/// What KVM did not take.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    /// The CPUID leaves, and KVM's reason.
    Cpuid(String),
    /// A register.
    Msr {
        /// Number and value.
        msr: Msr,
        /// What the vCPU holds instead; nothing if it has no such register.
        held: Option<u64>,
    },
    /// The components of the extended state, and KVM's reason.
    Xsave(String),
    /// XCR0, and KVM's reason.
    Xcr0(String),
    /// Something that has nothing to do with what was tried.
    Other(String),
}

impl VcpuNeeds {
    /// Reads them from a vCPU that stands still; changes nothing.
    pub fn capture(index: u32, vcpu: &VcpuFd, host: &KvmHost) -> Result<Self, KvmError> {
        let msrs = msr::read(index, vcpu, &host.msrs)?;
        let xsave =
            sys::get_xsave(vcpu, host.xsave_size).map_err(vcpu_error(index, "KVM_GET_XSAVE2"))?;
        let xcrs = vcpu.get_xcrs().map_err(vcpu_error(index, "KVM_GET_XCRS"))?;
        let sregs = vcpu.get_sregs().map_err(vcpu_error(index, "KVM_GET_SREGS"))?;
        let mxcsr = xsave.get(MXCSR..).and_then(|tail| tail.first_chunk());
        let xcr0 = xcrs.xcrs.iter().take(usize::try_from(xcrs.nr_xcrs).unwrap_or(0)).next();
        Ok(Self {
            index,
            msrs: msrs.into_iter().map(|Msr { index, value }| (index, value)).collect(),
            xcr0: xcr0.map_or(0, |xcr| xcr.value),
            xstate: xstate_bv(&xsave),
            mxcsr: mxcsr.map_or(0, |bytes| u32::from_le_bytes(*bytes)),
            tsc_khz: vcpu.get_tsc_khz().unwrap_or(0),
            long_addresses: sregs.cr4 & CR4_LA57 != 0,
            hypervisor: sregs.cr4 & CR4_VMXE != 0 || sregs.efer & EFER_SVME != 0,
        })
    }

    /// Gives them to a spare vCPU with the guest's CPUID, one of `count`, and names everything that is
    /// refused. Guest memory must be mapped: some registers name an address in it, and one of them
    /// makes KVM write there.
    pub fn try_out(
        &self,
        count: u32,
        spare: &VcpuFd,
        cpu: &CpuProfile,
        host: &KvmHost,
    ) -> Vec<Refusal> {
        let index = self.index;
        if let Err(e) = init_vcpu(index, count, spare, cpu, host) {
            // Without it nothing below would say anything of the host.
            return vec![Refusal::Cpuid(e.to_string())];
        }
        let mut refusals = Vec::new();
        if let Err(e) = self.set_addresses(spare) {
            refusals.push(Refusal::Other(e.to_string()));
        }
        if let Err(e) = self.try_fpu(spare, host) {
            refusals.push(Refusal::Xsave(e.to_string()));
        }
        let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..kvm_xcrs::default() };
        xcrs.xcrs[0] = kvm_xcr { xcr: 0, value: self.xcr0, ..kvm_xcr::default() };
        // 0 is no value that a processor can have: the source has no XCRs.
        if self.xcr0 != 0
            && let Err(e) = spare.set_xcrs(&xcrs)
        {
            refusals.push(Refusal::Xcr0(e.to_string()));
        }
        let msrs: Vec<_> =
            self.msrs.iter().take(MAX_MSRS).map(|&(index, value)| Msr { index, value }).collect();
        match msr::refused(index, spare, &msrs) {
            Ok(refused) => {
                refusals.extend(refused.into_iter().map(|(msr, held)| Refusal::Msr { msr, held }));
            }
            Err(e) => refusals.push(Refusal::Other(e.to_string())),
        }
        refusals
    }

    /// Lets the spare vCPU have addresses as long as the guest's.
    fn set_addresses(&self, spare: &VcpuFd) -> Result<(), KvmError> {
        let mut sregs = spare.get_sregs().map_err(vcpu_error(self.index, "KVM_GET_SREGS"))?;
        let wanted = if self.long_addresses { CR4_LA57 } else { 0 };
        if sregs.cr4 & CR4_LA57 == wanted {
            return Ok(());
        }
        sregs.cr4 = sregs.cr4 & !CR4_LA57 | wanted;
        let what = format!("KVM_SET_SREGS(CR4 {:#x})", sregs.cr4);
        spare.set_sregs(&sregs).map_err(vcpu_error(self.index, what))
    }

    /// An area with the same components, all zero.
    fn try_fpu(&self, spare: &VcpuFd, host: &KvmHost) -> Result<(), KvmError> {
        let mut area = vec![0; XSAVE_HEAD];
        area[MXCSR..MXCSR + 4].copy_from_slice(&self.mxcsr.to_le_bytes());
        area[XSTATE_BV..XSTATE_BV + 8].copy_from_slice(&self.xstate.to_le_bytes());
        sys::set_xsave(spare, host.xsave_size, &area).map_err(vcpu_error(
            self.index,
            format_args!("KVM_SET_XSAVE2(components {:#x}, MXCSR {:#x})", self.xstate, self.mxcsr),
        ))
    }
}
