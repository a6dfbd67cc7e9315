//! x86-64 and KVM: memory layout, boot, ACPI, CPUID, vCPU and interrupt controller state.
//!
//! [`layout`] says where everything is. [`host`] asks KVM what it can do and prepares a VM. A
//! vCPU's state is [`vcpu_state`], the interrupt controllers' and the PIT's [`irqchip`], time's
//! [`clock`]; [`trial`] finds out whether a host would take it; [`wire`] turns them into the sections of QEMU's migration stream and back.

pub mod acpi;
pub mod boot;
pub mod clock;
pub mod cpu_model;
pub mod cpuid;
mod cpuid_compare;
mod cpuid_names;
mod cpuid_topology;
pub mod error;
pub mod host;
pub mod irqchip;
pub mod layout;
pub mod msr;
mod sys;
pub mod trial;
pub mod vcpu_init;
pub mod vcpu_state;
pub mod wire;
