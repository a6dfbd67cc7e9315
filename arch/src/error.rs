//! What can go wrong between this crate and KVM, in words that name the call, the vCPU and the value.

use std::fmt::Display;

/// The operating system's reason for refusing an ioctl.
pub type Errno = vmm_sys_util::errno::Error;

/// KVM refused something.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// An ioctl on the VM or on `/dev/kvm` failed.
    #[error("{what} failed: {source}")]
    Vm {
        /// The ioctl, and the value if one matters.
        what: String,
        /// The kernel's reason.
        source: Errno,
    },
    /// An ioctl on a vCPU failed.
    #[error("vCPU {vcpu}: {what} failed: {source}")]
    Vcpu {
        /// The vCPU's index.
        vcpu: u32,
        /// The ioctl, and the value if one matters.
        what: String,
        /// The kernel's reason.
        source: Errno,
    },
    /// KVM would not write a model-specific register.
    #[error(
        "vCPU {vcpu}: failed to set MSR {index:#x}{} to {value:#x}; it holds {found}",
        msr_name(*index)
    )]
    Msr {
        /// The vCPU's index.
        vcpu: u32,
        /// The register.
        index: u32,
        /// The value that was refused.
        value: u64,
        /// What the vCPU has instead: a number, or that it has no such register.
        found: String,
    },
    /// The host cannot hold or give part of a vCPU's state.
    #[error("vCPU {vcpu}: {what}: expected {expected}, found {found}")]
    Unsupported {
        /// The vCPU's index.
        vcpu: u32,
        /// Which part.
        what: &'static str,
        /// What would have been right.
        expected: String,
        /// What stands there.
        found: String,
    },
}

fn msr_name(index: u32) -> String {
    match crate::msr::name(index) {
        Some(name) => format!(" ({name})"),
        None => String::new(),
    }
}

/// Turns an ioctl's error into one that says what was being done, and to which vCPU. `what` is made into text only if
/// there is an error: a guest waits for most of these calls.
pub(crate) fn vcpu_error(vcpu: u32, what: impl Display) -> impl FnOnce(Errno) -> KvmError {
    move |source| KvmError::Vcpu { vcpu, what: what.to_string(), source }
}

/// Turns an ioctl's error into one that says what was being done; its text is made as late as that.
pub(crate) fn vm_error(what: impl Display) -> impl FnOnce(Errno) -> KvmError {
    move |source| KvmError::Vm { what: what.to_string(), source }
}
