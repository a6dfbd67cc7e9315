//! vCPUs, interrupt controllers and clocks as sections of QEMU's migration stream, and back.
//!
//! QEMU's layouts are declared in `cpu`, `cpu_subs`, `apic` and `platform`; `mini` declares what
//! they have no place for. The conversions are pure: bytes in, state out, no KVM.
//!
//! | state | sections | conversions |
//! |---|---|---|
//! | [`VcpuState`] | `cpu`, `cpu_common`, `apic` | [`VcpuWire::from_state`], [`VcpuWire::to_state`] |
//! | [`IrqchipState`](crate::irqchip::IrqchipState) | `i8259` ×2, `ioapic`, `i8254` | [`IrqchipWire`] |
//! | [`ClockState`](crate::clock::ClockState) | `kvmclock` | [`Kvmclock::from_state`], [`Kvmclock::to_state`] |
//!
//! Between two mini-vmms the `mini-vmm/…` subsections are the truth, and QEMU's fields of the same
//! meaning are not looked at. From a QEMU, whatever its layouts do not say takes the value that
//! QEMU itself gives it.

mod apic;
mod chips;
mod cpu;
mod cpu_subs;
mod fpu;
mod from_mini;
mod from_qemu;
mod lost;
pub mod mini;
mod msrs;
mod nested;
mod platform;
mod segments;
mod to_wire;

use migration::vmstate::{Audience, FieldError};

use crate::host::KvmHost;
use crate::vcpu_state::VcpuState;

pub use apic::{Apic, ApicSipi, ApicSubs};
pub use chips::IrqchipWire;
pub use cpu::{
    Cpu, CpuCommon, CpuCommonSubs, CrashOccurred, ExceptionIndex, FpReg, MtrrVar, Q2, Segment,
};
pub use cpu_subs::*;
pub use fpu::XsaveLayout;
pub use lost::{Loss, Registers};
pub use platform::*;
pub use to_wire::hflags;

/// What the conversions need to know of the machine that a vCPU is in.
#[derive(Debug, Clone)]
pub struct WireContext {
    /// The virtual clock when the VM stopped (`timer.cpu_clock_offset`), nanoseconds.
    pub virtual_ns: i64,
    /// The guest's physical address width.
    pub phys_bits: u8,
    /// Where this host's processor keeps its extended state.
    pub xsave: XsaveLayout,
    /// What this host's KVM has.
    pub host: KvmHost,
}

/// The sections of one vCPU.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct VcpuWire {
    /// Section `cpu`.
    pub cpu: Cpu,
    /// Section `cpu_common`.
    pub common: CpuCommon,
    /// Section `apic`.
    pub apic: Apic,
}

impl VcpuWire {
    /// The sections for a captured vCPU. For a QEMU, a state that its layouts cannot say (an
    /// exception's error code on its way, an SMI that is pending) is an error: the guest should run
    /// on for a moment.
    pub fn from_state(
        state: &VcpuState,
        audience: Audience,
        context: &WireContext,
    ) -> Result<Self, FieldError> {
        to_wire::vcpu(state, audience, context)
    }

    /// The vCPU that the sections describe; `index` is their instance. Every value is checked that
    /// sizes or selects something here; what only the processor can judge is left to KVM.
    pub fn to_state(&self, index: u32, context: &WireContext) -> Result<VcpuState, FieldError> {
        if from_mini::has_mini(&self.cpu.subs)? {
            from_mini::vcpu(self, index)
        } else {
            from_qemu::vcpu(self, index, context)
        }
    }
}

/// A number as messages show it.
pub(crate) fn hex(value: impl std::fmt::LowerHex) -> String {
    format!("{value:#x}")
}
