//! The source's vCPUs, tried out on a spare one in a VM of its own: what this host's KVM would
//! refuse when it is too late is known before a page has come.
//!
//! A VM takes KVM milliseconds to make and more to end, so a destination that waits makes it before the source
//! comes, and ends it beside what follows.

use std::sync::Arc;
use std::thread;

use arch::host::KvmHost;
use arch::msr;
use arch::trial::{Refusal, VcpuNeeds};
use kvm_ioctls::{VcpuFd, VmFd};
use migration::problem::{Problem, kind};

use super::details::Details;
use crate::kvm;
use crate::machine::MachineError;
use crate::memory::Ram;
use crate::vm::Vm;

/// The spare vCPU, before it is tried on.
#[derive(Default)]
pub(super) struct Trial {
    spare: Option<Spare>,
}

impl Trial {
    /// Makes the spare vCPU, if there is none. What can't be had while nobody comes may be there later.
    pub(super) fn prepare(&mut self, vm: &Vm) {
        if self.spare.is_none() {
            self.spare = Spare::new(vm).ok();
        }
    }

    /// Everything that KVM refuses of the source's vCPUs.
    pub(super) fn run(&mut self, vm: &Vm, source: &Details) -> Vec<Problem> {
        if source.vcpus.is_empty() {
            return Vec::new();
        }
        match self.spare.take().map_or_else(|| Spare::new(vm), Ok) {
            Ok(spare) => {
                let problems = try_on(&spare, vm, source);
                end(vm, spare);
                problems
            }
            Err(e) => {
                let why = crate::error_chain(&e);
                vec![Problem::new(kind::TRIAL, "a spare vCPU", why, "vCPUs to try out", "")]
            }
        }
    }
}

/// Ends it, and waits for that no sooner than when the VM does.
fn end(vm: &Vm, spare: Spare) {
    let thread = thread::Builder::new().name("spare-vcpu".into()).spawn(|| drop(spare));
    match thread {
        Ok(thread) => vm.migration.lock().helps(thread),
        // It has been ended here then.
        Err(error) => tracing::debug!(%error, "no thread to end the spare vCPU"),
    }
}

fn try_on(spare: &Spare, vm: &Vm, source: &Details) -> Vec<Problem> {
    let count = vm.config().smp;
    // Another number of vCPUs is a problem that is named elsewhere.
    let vcpus = source.vcpus.iter().filter(|vcpu| vcpu.index < count).take(count as usize);
    let mut problems: Vec<_> = vcpus
        .flat_map(|vcpu| {
            let refusals = vcpu.try_out(count, &spare.vcpu, &source.cpu, &spare.host);
            refusals.into_iter().map(|refusal| problem(vcpu, refusal))
        })
        .collect();
    // What one vCPU's CPUID has against it, all others' have.
    let mut cpuid = false;
    problems.retain(|p| p.code != kind::CPUID_REFUSED.code || !std::mem::replace(&mut cpuid, true));
    problems
}

fn problem(vcpu: &VcpuNeeds, refusal: Refusal) -> Problem {
    let index = vcpu.index;
    let newer = "use a kernel that is as new as the source's, or a CPU model that all hosts have";
    match refusal {
        Refusal::Cpuid(why) => Problem::new(
            kind::CPUID_REFUSED,
            "the guest's CPUID",
            why,
            "a guest that has seen it",
            newer,
        )
        .of_vcpu(index, "CPUID"),
        Refusal::Msr { msr, held } => {
            let name = msr::name(msr.index).map_or(String::new(), |name| format!(" ({name})"));
            let kind = if held.is_some() { kind::MSR_REFUSED } else { kind::MSR_UNKNOWN };
            let field = format!("MSR {:#x}", msr.index);
            Problem::new(
                kind,
                format!("vCPU {index}: MSR {:#x}{name}", msr.index),
                held.map_or("no such MSR".into(), |held| format!("{held:#x}, and keeps that")),
                format!("{:#x}", msr.value),
                newer,
            )
            .of_vcpu(index, field)
            .known_as(format!("failed to set MSR {:#x} to {:#x}", msr.index, msr.value))
        }
        Refusal::Xsave(why) => Problem::new(
            kind::XSAVE_REFUSED,
            format!("vCPU {index}: the extended state"),
            why,
            format!("components {:#x}, MXCSR {:#x}", vcpu.xstate, vcpu.mxcsr),
            newer,
        )
        .of_vcpu(index, "XSAVE"),
        Refusal::Xcr0(why) => Problem::new(
            kind::XCR0_REFUSED,
            format!("vCPU {index}: XCR0"),
            why,
            format!("{:#x}", vcpu.xcr0),
            newer,
        )
        .of_vcpu(index, "XCR0"),
        Refusal::Other(why) => {
            Problem::new(kind::TRIAL, format!("vCPU {index} on a spare one"), why, "it", newer)
                .of_vcpu(index, "trial")
        }
    }
}

/// A vCPU that never runs, in a VM that is there for nothing else.
struct Spare {
    host: KvmHost,
    vcpu: VcpuFd,
    _vm: Arc<VmFd>,
    /// As large as the guest's, for registers that name an address in it; hardly any of it is ever
    /// touched. Last, since KVM points into it.
    _ram: Ram,
}

impl Spare {
    fn new(vm: &Vm) -> Result<Self, MachineError> {
        let kvm = kvm::open()?;
        let fd = kvm::create_vm(&kvm)?;
        let host = KvmHost::probe(&kvm, &fd)?;
        host.setup_vm(&fd)?;
        let ram = Ram::new(vm.config().memory.0, vm.machine.cpu.phys_bits())?;
        // SAFETY: `ram` is kept longer than anything that holds the VM's descriptor.
        unsafe { kvm::map_plainly(&fd, ram.slots()) }?;
        let vcpu = fd.create_vcpu(0).map_err(|e| kvm::KvmError::ioctl("KVM_CREATE_VCPU 0", e))?;
        Ok(Self { host, vcpu, _vm: fd, _ram: ram })
    }
}
