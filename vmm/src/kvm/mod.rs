//! The machine's half that lives in the kernel: opening KVM, memory slots and their dirty logs or rings,
//! interrupt routing, doorbells.

mod dirty_log;
mod dirty_ring;
#[cfg(test)]
mod dirty_tests;
mod ioevents;
mod routing;
mod shadow;

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd};
use std::sync::Arc;

use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_INITIALLY_SET,
    KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, kvm_enable_cap,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};

pub use dirty_log::{DirtyLog, Slot, map_plainly};
pub use ioevents::KvmIoEvents;
pub use routing::{GsiLine, KvmMsi, KvmRouting};
pub use shadow::{BelowOneMib, RomMemory, SEGMENTS, View};

/// The device file of KVM.
const DEV_KVM: &str = "/dev/kvm";

/// The only version of the KVM API that there has been since 2007 (Linux,
/// Documentation/virt/kvm/api.rst, 4.1).
const KVM_API_VERSION: i32 = 12;

/// KVM refused.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// There is no device file: no module, or a host without virtualization.
    #[error(
        "{DEV_KVM} does not exist: load the kvm_intel or kvm_amd module, and enable virtualization \
         in the host's firmware (or nested virtualization in its hypervisor)"
    )]
    Missing,
    /// The device file is there, but not for this user.
    #[error(
        "no permission to open {DEV_KVM}: run as root, or add this user to the group that owns it \
         (usually `kvm`)"
    )]
    Permission,
    /// The device file could not be opened for another reason.
    #[error("cannot open {DEV_KVM}")]
    Open(#[source] io::Error),
    /// It is not the API that everyone knows.
    #[error("{DEV_KVM} speaks KVM API version {0}, expected {KVM_API_VERSION}")]
    ApiVersion(i32),
    /// The kernel lacks something that mini-vmm cannot do without.
    #[error("this host's KVM lacks {0}, which mini-vmm needs; use a newer kernel")]
    Capability(&'static str),
    /// It has no dirty rings.
    #[error(
        "this host's KVM has no dirty rings (KVM_CAP_DIRTY_LOG_RING): leave out --dirty-ring, and the \
         pages that the guest writes are logged without, or use a newer kernel (Linux 5.11)"
    )]
    NoDirtyRing,
    /// Its dirty rings are shorter than that.
    #[error(
        "this host's KVM has dirty rings of {most} entries at most, and {wanted} are wanted: give less \
         with --dirty-ring"
    )]
    DirtyRingTooLarge {
        /// Entries for each vCPU.
        wanted: u32,
        /// Entries that a ring may have.
        most: u64,
    },
    /// A dirty ring has run over, so no page can be said to be clean.
    #[error(
        "a dirty ring (of vCPU {vcpu}, or of more) has run over, which a host's KVM must not let happen: \
         what was written cannot be known any more, and this VM cannot be migrated until it is started anew: \
         with more entries, or without --dirty-ring"
    )]
    DirtyRingOverrun {
        /// Whose ring, as far as it is known.
        vcpu: usize,
    },
    /// A dirty ring has an entry that makes no sense, so no page can be said to be clean.
    #[error(
        "the dirty ring of vCPU {vcpu} names page {offset:#x} of memory slot {slot:#x}, which this VM \
         has not: a fault of the host's kernel; without --dirty-ring it does not matter"
    )]
    DirtyRingEntry {
        /// Whose ring.
        vcpu: usize,
        /// KVM's number of the slot, with the address space in the upper half.
        slot: u32,
        /// The page in it.
        offset: u64,
    },
    /// An ioctl failed.
    #[error("{what} failed")]
    Ioctl {
        /// The ioctl and its subject, for example `KVM_CREATE_VCPU 3`.
        what: String,
        /// The kernel's reason.
        #[source]
        source: io::Error,
    },
}

impl KvmError {
    /// A failed ioctl, named.
    pub fn ioctl(what: impl Into<String>, source: kvm_ioctls::Error) -> Self {
        Self::Ioctl { what: what.into(), source: source.into() }
    }
}

/// Opens `/dev/kvm` and checks that what mini-vmm cannot do without is there.
pub fn open() -> Result<Kvm, KvmError> {
    let file =
        OpenOptions::new().read(true).write(true).open(DEV_KVM).map_err(|e| match e.kind() {
            io::ErrorKind::NotFound => KvmError::Missing,
            io::ErrorKind::PermissionDenied => KvmError::Permission,
            _ => KvmError::Open(e),
        })?;
    // SAFETY: the descriptor comes from a file that was opened just now and is given up here.
    let kvm = unsafe { Kvm::from_raw_fd(file.into_raw_fd()) };
    match kvm.get_api_version() {
        KVM_API_VERSION => {}
        other => return Err(KvmError::ApiVersion(other)),
    }
    for (cap, name) in [
        (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
        (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
        (Cap::ReadonlyMem, "KVM_CAP_READONLY_MEM"),
        (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
        (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
        (Cap::Irqfd, "KVM_CAP_IRQFD"),
        (Cap::Pit2, "KVM_CAP_PIT2"),
        (Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK"),
        (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
        (Cap::Debugregs, "KVM_CAP_DEBUGREGS"),
        (Cap::Xsave, "KVM_CAP_XSAVE"),
        (Cap::Xcrs, "KVM_CAP_XCRS"),
    ] {
        if !kvm.check_extension(cap) {
            return Err(KvmError::Capability(name));
        }
    }
    Ok(kvm)
}

/// A VM with nothing in it yet.
pub fn create_vm(kvm: &Kvm) -> Result<Arc<VmFd>, KvmError> {
    // A pending signal makes KVM_CREATE_VM fail with EINTR on a busy host.
    loop {
        match kvm.create_vm() {
            Err(e) if e.errno() == libc::EINTR => {}
            r => return r.map(Arc::new).map_err(|e| KvmError::ioctl("KVM_CREATE_VM", e)),
        }
    }
}

/// A second handle on a vCPU, with which other threads read and set it while it stands still.
pub fn second_handle(vm: &VmFd, vcpu: &VcpuFd) -> Result<VcpuFd, KvmError> {
    let failed = |what: &str, source: io::Error| KvmError::Ioctl {
        what: format!("{what} of a vCPU's descriptor"),
        source,
    };
    // SAFETY: the descriptor is the vCPU's, and open as long as it is borrowed.
    let own = unsafe { BorrowedFd::borrow_raw(vcpu.as_raw_fd()) };
    let copy = own.try_clone_to_owned().map_err(|source| failed("dup", source))?;
    // SAFETY: the descriptor is a copy that nobody else has.
    let second = unsafe { vm.create_vcpu_from_rawfd(copy.into_raw_fd()) };
    second.map_err(|e| failed("mmap", e.into()))
}

/// Asks for dirty logging in which pages are protected again only when the log is cleared, and
/// all pages count as dirty at the start (Linux, api.rst, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2).
/// Gives whether the log has to be cleared by hand, and whether it starts all set.
pub fn enable_manual_dirty_log(vm: &VmFd) -> Result<(bool, bool), KvmError> {
    let offered = vm.check_extension_raw(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.into());
    let wanted = (KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET) as i32;
    let flags = offered & wanted;
    if flags & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE as i32 == 0 {
        return Ok((false, false));
    }
    set_manual_dirty_log(vm, flags as u32)?;
    Ok((true, flags & KVM_DIRTY_LOG_INITIALLY_SET as i32 != 0))
}

/// Chooses among what is offered of manual protection; counts when logging begins.
fn set_manual_dirty_log(vm: &VmFd, flags: u32) -> Result<(), KvmError> {
    let mut cap = kvm_enable_cap { cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, ..Default::default() };
    cap.args[0] = flags.into();
    vm.enable_cap(&cap).map_err(|e| KvmError::ioctl("KVM_ENABLE_CAP(MANUAL_DIRTY_LOG_PROTECT2)", e))
}
