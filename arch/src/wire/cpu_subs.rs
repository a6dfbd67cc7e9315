//! What section `cpu` carries only when there is something to carry.
//!
//! All versions are 1. QEMU sends each of these when its values are not the default; a destination
//! that does not get one takes the default.
#![allow(missing_docs)]

use migration::vmstate::FixedVec;
use serde::{Deserialize, Serialize};

use super::mini;

/// A subsection's fields, in the wire's order.
macro_rules! parts {
    ($($(#[$doc:meta])* $name:ident { $($field:ident: $type:ty),* $(,)? })*) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
        pub struct $name {
            $(pub $field: $type,)*
        }
    )*};
}

/// The set of subsections: field, name on the wire, type.
macro_rules! subsections {
    ($(#[$doc:meta])* $set:ident { $($field:ident = $wire:literal: $type:ty,)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(rename = "@subsections")]
        pub struct $set {
            $(#[serde(rename = $wire)] pub $field: Option<$type>,)*
        }
    };
}

subsections! {
    /// Subsections of `cpu`.
    CpuSubs {
        exception_info = "cpu/exception_info": ExceptionInfo,
        async_pf = "cpu/async_pf_msr": One64,
        async_pf_int = "cpu/async_pf_int_msr": One64,
        pv_eoi = "cpu/async_pv_eoi_msr": One64,
        steal_time = "cpu/steal_time_msr": One64,
        poll_control = "cpu/poll_control_msr": One64,
        fpop_ip_dp = "cpu/fpop_ip_dp": FpopIpDp,
        tsc_adjust = "cpu/msr_tsc_adjust": One64,
        tscdeadline = "cpu/msr_tscdeadline": One64,
        misc_enable = "cpu/msr_ia32_misc_enable": One64,
        feature_control = "cpu/msr_ia32_feature_control": One64,
        pmu = "cpu/msr_architectural_pmu": Pmu,
        mpx = "cpu/mpx": Mpx,
        hyperv_hypercall = "cpu/msr_hyperv_hypercall": [u64; 2],
        hyperv_vapic = "cpu/msr_hyperv_vapic": One64,
        hyperv_time = "cpu/msr_hyperv_time": One64,
        hyperv_crash = "cpu/msr_hyperv_crash": [u64; 5],
        hyperv_runtime = "cpu/msr_hyperv_runtime": One64,
        hyperv_synic = "cpu/msr_hyperv_synic": [u64; 19],
        hyperv_stimer = "cpu/msr_hyperv_stimer": [u64; 8],
        hyperv_reenlightenment = "cpu/msr_hyperv_reenlightenment": [u64; 3],
        avx512 = "cpu/avx512": Avx512,
        xss = "cpu/xss": One64,
        umwait = "cpu/umwait": One32,
        tsc_khz = "cpu/tsc_khz": TscKhz,
        smi_count = "cpu/msr_smi_count": One64,
        pkru = "cpu/pkru": One32,
        pkrs = "cpu/pkrs": One32,
        spec_ctrl = "cpu/spec_ctrl": One64,
        virt_ssbd = "cpu/virt_ssbd": One64,
        mcg_ext_ctl = "cpu/mcg_ext_ctl": One64,
        amd_tsc_scale = "cpu/amd_tsc_scale_msr": One64,
        intel_pt = "cpu/intel_pt": IntelPt,
        svm_npt = "cpu/svn_npt": SvmNpt,
        svm_guest = "cpu/svm_guest": One32,
        nested_state = "cpu/nested_state": Nested,
        tsx_ctrl = "cpu/msr_tsx_ctrl": One32,
        intel_sgx = "cpu/intel_sgx": [u64; 4],
        xfd = "cpu/msr_xfd": [u64; 2],
        amx_xtile = "cpu/intel_amx_xtile": AmxTile,
        arch_lbr = "cpu/arch_lbr": ArchLbr,
        pdptrs = "cpu/pdptrs": [u64; 4],
        triple_fault = "cpu/triple_fault": One8,
        mini_msrs = "mini-vmm/msrs": mini::Msrs,
        mini_tsc = "mini-vmm/tsc": mini::Tsc,
        mini_xsave = "mini-vmm/xsave": mini::Xsave,
        mini_lapic = "mini-vmm/lapic": mini::Lapic,
        mini_events = "mini-vmm/events": mini::Events,
        mini_sregs = "mini-vmm/sregs": mini::Sregs,
        mini_nested = "mini-vmm/nested": mini::Nested,
    }
}

parts! {
    /// One register of 64 bits.
    One64 { value: u64 }
    /// One register of 32 bits.
    One32 { value: u32 }
    /// One byte.
    One8 { value: u8 }
    /// An exception that is pending while an inner guest runs.
    ExceptionInfo { pending: u8, injected: u8, has_payload: u8, payload: u64 }
    /// The last x87 instruction: opcode, its address, its operand's.
    FpopIpDp { fpop: u16, fpip: u64, fpdp: u64 }
    /// Architectural performance monitoring.
    Pmu {
        fixed_ctr_ctrl: u64,
        global_ctrl: u64,
        global_status: u64,
        global_ovf_ctrl: u64,
        fixed_counters: [u64; 3],
        gp_counters: [u64; 18],
        gp_evtsel: [u64; 18],
    }
    /// One bounds register.
    Bound { lower: u64, upper: u64 }
    /// Memory protection extensions: BND0 to BND3, BNDCFGU, BNDSTATUS, BNDCFGS.
    Mpx { bnd: [Bound; 4], cfgu: u64, status: u64, cfgs: u64 }
    /// Opmasks K0 to K7, bits 256 to 511 of ZMM0 to ZMM15, all of ZMM16 to ZMM31.
    Avx512 { opmask: [u64; 8], zmm_high: [[u64; 4]; 16], zmm16: [[u64; 8]; 16] }
    /// TSC frequency.
    TscKhz { tsc_khz: i64 }
    /// Processor trace.
    IntelPt { ctl: u64, status: u64, output_base: u64, output_mask: u64, cr3: u64, addrs: [u64; 8] }
    /// Nested paging of TCG.
    SvmNpt { cr3: u64, mode: u32 }
    /// AMX tile configuration and data.
    AmxTile { config: FixedVec<u8, 64>, data: FixedVec<u8, 8192> }
    /// One last-branch record.
    LbrRecord { from: u64, to: u64, info: u64 }
    /// Last-branch records.
    ArchLbr { ctl: u64, depth: u64, records: [LbrRecord; 32] }
    /// A hypervisor inside the guest: KVM's header, then what belongs to the vendor.
    Nested { flags: u16, format: u16, size: u32, subs: NestedSubs }
    /// VMX: addresses of the VMXON region and of the current VMCS.
    NestedVmx { vmxon_pa: u64, vmcs12_pa: u64, smm_flags: u16, subs: NestedVmxSubs }
    /// SVM: the address of the VMCB, and its contents.
    NestedSvm { vmcb_pa: u64, vmcb12: FixedVec<u8, 4096> }
    /// A VMCS as KVM keeps it.
    Vmcs { bytes: FixedVec<u8, 4096> }
}

subsections! {
    /// Subsections of `cpu/kvm_nested_state`.
    NestedSubs {
        vmx = "cpu/kvm_nested_state/vmx": NestedVmx,
        svm = "cpu/kvm_nested_state/svm": NestedSvm,
    }
}

subsections! {
    /// Subsections of `cpu/kvm_nested_state/vmx`.
    NestedVmxSubs {
        vmcs12 = "cpu/kvm_nested_state/vmx/vmcs12": Vmcs,
        shadow_vmcs12 = "cpu/kvm_nested_state/vmx/shadow_vmcs12": Vmcs,
    }
}
