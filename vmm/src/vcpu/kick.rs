//! The signal that brings a vCPU out of the kernel.

use std::cell::Cell;
use std::ptr;

use kvm_bindings::kvm_run;
use kvm_ioctls::VcpuFd;
use vmm_sys_util::signal::{Killable, register_signal_handler};

thread_local! {
    /// The page that this thread's vCPU shares with the kernel; null outside of a vCPU thread.
    static RUN: Cell<*mut kvm_run> = const { Cell::new(ptr::null_mut()) };
}

/// The first real-time signal that the C library leaves to programs.
fn kick_signal() -> i32 {
    libc::SIGRTMIN()
}

extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let run = RUN.get();
    if !run.is_null() {
        // SAFETY: the pointer is set only while this thread's `Armed` guard lives, which borrows
        // the vCPU whose mapping it is; the kernel reads the byte on entry to KVM_RUN.
        unsafe { ptr::write_volatile(&raw mut (*run).immediate_exit, 1) };
    }
}

/// Installs the handler, once for the process.
pub fn install_kick_handler() -> std::io::Result<()> {
    register_signal_handler(kick_signal(), on_kick).map_err(std::io::Error::from)
}

/// Kicks the vCPU that `thread` runs.
pub(super) fn kick<T>(thread: &std::thread::JoinHandle<T>) {
    if let Err(e) = thread.kill(kick_signal()) {
        tracing::warn!("cannot signal a vCPU thread: {e}");
    }
}

/// While it lives, a kick of this thread reaches the vCPU.
pub(super) struct Armed(());

impl Armed {
    pub(super) fn new(vcpu: &mut VcpuFd) -> Self {
        RUN.set(ptr::from_mut(vcpu.get_kvm_run()));
        Self(())
    }
}

impl Drop for Armed {
    fn drop(&mut self) {
        RUN.set(ptr::null_mut());
    }
}
