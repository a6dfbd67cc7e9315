//! Section `cpu`, version 12: a vCPU as QEMU 7.2 writes it.
//!
//! Names of fields are QEMU's where they are clear enough, and are explained where they are not.
//! Order and widths are the wire's.

use migration::vmstate::{FixedVec, Form, VmState, Word, Words};
use serde::{Deserialize, Serialize};

use super::cpu_subs::CpuSubs;

/// A segment register. `flags` is the upper half of a descriptor: type in bits 8 to 11, S 12,
/// DPL 13 and 14, P 15, AVL 20, L 21, D/B 22, G 23; 0 when the segment is unusable.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
#[serde(rename = "segment")]
pub struct Segment {
    pub selector: u32,
    pub base: u64,
    pub limit: u32,
    pub flags: u32,
}

/// An x87 register: 64 bits of mantissa, then sign and exponent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
#[serde(rename = "fpreg@0")]
pub struct FpReg {
    pub mantissa: u64,
    pub exponent: u16,
}

/// 128 bits, the low half first.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Q2 {
    pub low: u64,
    pub high: u64,
}

/// A variable-range MTRR.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
#[serde(rename = "mtrr_var")]
pub struct MtrrVar {
    pub base: u64,
    pub mask: u64,
}

/// The section; `instance` is the vCPU's index.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Cpu {
    /// RAX RCX RDX RBX RSP RBP RSI RDI R8 to R15.
    pub regs: [u64; 16],
    pub eip: u64,
    pub eflags: u64,
    /// QEMU's own summary of the other fields; see [`hflags`](super::hflags).
    pub hflags: u32,
    pub fpuc: u16,
    /// Status word with TOP.
    pub fpus: u16,
    /// Abridged: a set bit is a register in use.
    pub fptag: u16,
    /// Always 0.
    pub fpregs_format: u16,
    /// ST0 to ST7.
    pub fpregs: [FpReg; 8],
    /// ES CS SS DS FS GS.
    pub segs: [Segment; 6],
    pub ldt: Segment,
    pub tr: Segment,
    /// Only base and limit, as `idt`.
    pub gdt: Segment,
    pub idt: Segment,
    pub sysenter_cs: u32,
    pub sysenter_esp: u64,
    pub sysenter_eip: u64,
    pub cr0: u64,
    pub cr2: u64,
    pub cr3: u64,
    pub cr4: u64,
    /// DR0 to DR7; 4 and 5 mirror 6 and 7.
    pub dr: [u64; 8],
    /// -1: the A20 line is on.
    pub a20_mask: i32,
    pub mxcsr: u32,
    /// XMM0 to XMM15.
    pub xmm: [Q2; 16],
    pub efer: u64,
    pub star: u64,
    pub lstar: u64,
    pub cstar: u64,
    pub fmask: u64,
    pub kernelgsbase: u64,
    pub smbase: u32,
    pub pat: u64,
    /// Bit 0 GIF, 2 NMIs masked, 4 SMM entered inside an NMI, 8 virtual GIF.
    pub hflags2: u32,
    pub vm_hsave: u64,
    pub vm_vmcb: u64,
    pub tsc_offset: u64,
    pub intercept: u64,
    pub intercept_cr_read: u16,
    pub intercept_cr_write: u16,
    pub intercept_dr_read: u16,
    pub intercept_dr_write: u16,
    pub intercept_exceptions: u32,
    pub v_tpr: u8,
    /// 64 KiB at 0, 16 KiB at 0x80000 and 0xa0000, 4 KiB from 0xc0000 on.
    pub mtrr_fixed: [u64; 11],
    pub mtrr_deftype: u64,
    pub mtrr_var: [MtrrVar; 8],
    /// The vector of an interrupt that is being delivered, or -1.
    pub interrupt_injected: i32,
    /// KVM's numbers.
    pub mp_state: u32,
    /// When the VM stopped.
    pub tsc: u64,
    /// The exception that is being delivered, or -1.
    pub exception_nr: i32,
    pub soft_interrupt: u8,
    pub nmi_injected: u8,
    pub nmi_pending: u8,
    /// The code itself is not on the wire.
    pub has_error_code: u8,
    pub sipi_vector: u32,
    pub mcg_cap: u64,
    pub mcg_status: u64,
    pub mcg_ctl: u64,
    /// Ten banks of control, status, address, misc.
    pub mce_banks: FixedVec<u64, 40>,
    pub tsc_aux: u64,
    pub system_time_msr: u64,
    pub wall_clock_msr: u64,
    #[serde(rename = "xcr0@12", default)]
    pub xcr0: u64,
    #[serde(rename = "xstate_bv@12", default)]
    pub xstate_bv: u64,
    /// Bits 128 to 255 of YMM0 to YMM15.
    #[serde(rename = "ymmh@12", default)]
    pub ymm_high: [Q2; 16],
    /// What is not always there.
    pub subs: CpuSubs,
}

impl VmState for Cpu {
    const VERSION: u32 = 12;
    const MIN_VERSION: u32 = 11;
    const WORDS: Words = Words { prefix: "env.", fields: &[FIELDS] };
}

/// QEMU's words for what is called otherwise here.
const FIELDS: &[Word] = &[
    Word::new("cpu", "fpus", "env.fpus_vmstate"),
    Word::new("cpu", "fptag", "env.fptag_vmstate"),
    Word::new("cpu", "fpregs_format", "env.fpregs_format_vmstate"),
    Word::new("cpu", "cr0", "env.cr[0]"),
    Word::new("cpu", "cr2", "env.cr[2]"),
    Word::new("cpu", "cr3", "env.cr[3]"),
    Word::new("cpu", "cr4", "env.cr[4]"),
    Word::new("cpu", "xmm", "env.xmm_regs[0]").as_form(Form::Struct("xmm_reg")),
    Word::new("xmm_reg", "low", "_q_ZMMReg[0]"),
    Word::new("xmm_reg", "high", "_q_ZMMReg[1]"),
    Word::new("cpu", "ymmh", "env.xmm_regs[1]").as_form(Form::Struct("ymmh_reg")),
    Word::new("ymmh_reg", "low", "_q_ZMMReg[2]"),
    Word::new("ymmh_reg", "high", "_q_ZMMReg[3]"),
    Word::new("cpu/async_pf_msr", "value", "env.async_pf_en_msr"),
    Word::new("cpu/async_pf_int_msr", "value", "env.async_pf_int_msr"),
    Word::new("cpu/async_pv_eoi_msr", "value", "env.pv_eoi_en_msr"),
    Word::new("cpu/steal_time_msr", "value", "env.steal_time_msr"),
    Word::new("cpu/poll_control_msr", "value", "env.poll_control_msr"),
    Word::new("cpu/msr_tscdeadline", "value", "env.tsc_deadline"),
    Word::new("cpu/msr_smi_count", "value", "env.msr_smi_count"),
    Word::new("cpu/pkru", "value", "env.pkru"),
];

/// Section `cpu_common`, version 1: whether the vCPU waits.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuCommon {
    /// 1: executed HLT (under KVM the same as MP state 3).
    pub halted: u32,
    /// QEMU's own interrupt bits; 0 under KVM.
    pub interrupt_request: u32,
    /// Only from an emulating QEMU.
    pub subs: CpuCommonSubs,
}

impl VmState for CpuCommon {
    const VERSION: u32 = 1;
}

/// Subsections of `cpu_common`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename = "@subsections")]
pub struct CpuCommonSubs {
    /// An exception that TCG has not taken yet.
    #[serde(rename = "cpu_common/exception_index")]
    pub exception_index: Option<ExceptionIndex>,
    /// The guest has told that it crashed.
    #[serde(rename = "cpu_common/crash_occurred")]
    pub crash_occurred: Option<CrashOccurred>,
}

/// `cpu_common/exception_index`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct ExceptionIndex {
    pub exception_index: i32,
}

/// `cpu_common/crash_occurred`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct CrashOccurred {
    pub crash_occurred: bool,
}
