//! The KVM ioctls that `kvm-ioctls` does not wrap, each wrapped once.
//!
//! Numbers are those of Linux' `include/uapi/linux/kvm.h`.

use std::mem::size_of;

use kvm_bindings::nested::KvmNestedStateBuffer;
use kvm_bindings::{
    KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, KVMIO, Xsave, kvm_device_attr, kvm_nested_state,
    kvm_sregs2, kvm_xsave,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use vmm_sys_util::ioctl::{ioctl, ioctl_with_mut_ref, ioctl_with_ref};
use vmm_sys_util::{ioctl_io_nr, ioctl_ior_nr, ioctl_iow_nr};

use crate::error::Errno;

ioctl_ior_nr!(KVM_GET_SREGS2, KVMIO, 0xcc, kvm_sregs2);
ioctl_iow_nr!(KVM_SET_SREGS2, KVMIO, 0xcd, kvm_sregs2);
ioctl_iow_nr!(KVM_X86_SETUP_MCE, KVMIO, 0x9c, u64);
ioctl_ior_nr!(KVM_X86_GET_MCE_CAP_SUPPORTED, KVMIO, 0x9d, u64);
ioctl_io_nr!(KVM_GET_TSC_KHZ, KVMIO, 0xa3);
ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);

/// Size of the nested state's header in bytes.
pub(crate) const NESTED_HEADER: usize = size_of::<kvm_nested_state>();
/// The largest nested state in bytes.
pub(crate) const NESTED_MAX: usize = size_of::<KvmNestedStateBuffer>();

fn done(ret: i32) -> Result<(), Errno> {
    if ret < 0 { Err(Errno::last()) } else { Ok(()) }
}

/// `KVM_GET_SREGS2`: segments, control registers, and the PDPTEs of a PAE guest.
pub(crate) fn get_sregs2(vcpu: &VcpuFd) -> Result<kvm_sregs2, Errno> {
    let mut sregs = kvm_sregs2::default();
    // SAFETY: the kernel writes exactly one kvm_sregs2 behind a reference that outlives the call.
    done(unsafe { ioctl_with_mut_ref(vcpu, KVM_GET_SREGS2(), &mut sregs) })?;
    Ok(sregs)
}

/// `KVM_SET_SREGS2`.
pub(crate) fn set_sregs2(vcpu: &VcpuFd, sregs: &kvm_sregs2) -> Result<(), Errno> {
    // SAFETY: the kernel reads exactly one kvm_sregs2 behind a reference that outlives the call.
    done(unsafe { ioctl_with_ref(vcpu, KVM_SET_SREGS2(), sregs) })
}

/// The machine-check capabilities that KVM can emulate (the upper bits of `IA32_MCG_CAP`).
pub(crate) fn supported_mce_cap(kvm: &Kvm) -> Result<u64, Errno> {
    let mut cap = 0u64;
    // SAFETY: the kernel writes exactly one u64 behind a reference that outlives the call.
    done(unsafe { ioctl_with_mut_ref(kvm, KVM_X86_GET_MCE_CAP_SUPPORTED(), &mut cap) })?;
    Ok(cap)
}

/// Gives a vCPU its machine-check banks: `cap` is its `IA32_MCG_CAP`.
pub(crate) fn setup_mce(vcpu: &VcpuFd, cap: u64) -> Result<(), Errno> {
    // SAFETY: the kernel reads exactly one u64 behind a reference that outlives the call.
    done(unsafe { ioctl_with_ref(vcpu, KVM_X86_SETUP_MCE(), &cap) })
}

/// The whole XSAVE area. `size` is what `KVM_CHECK_EXTENSION(KVM_CAP_XSAVE2)` says on the VM, or 0
/// where the host has only the old call with its fixed 4096 bytes.
pub(crate) fn get_xsave(vcpu: &VcpuFd, size: usize) -> Result<Vec<u8>, Errno> {
    let fixed = size_of::<kvm_xsave>();
    let mut words = Vec::with_capacity(size.max(fixed) / 4);
    if size == 0 {
        words.extend_from_slice(&vcpu.get_xsave()?.region);
    } else {
        let extra = size.saturating_sub(fixed).div_ceil(size_of::<u32>());
        let mut xsave = Xsave::new(extra).map_err(|_| Errno::new(libc::ENOMEM))?;
        // SAFETY: the area has the size that the kernel asked for, and this process enables no
        // dynamic XSTATE feature (arch_prctl) that could make it grow afterwards.
        unsafe { vcpu.get_xsave2(&mut xsave)? };
        words.extend_from_slice(&xsave.as_fam_struct_ref().xsave.region);
        words.extend_from_slice(xsave.as_slice());
    }
    Ok(words.iter().flat_map(|w| w.to_le_bytes()).collect())
}

/// Gives the vCPU an XSAVE area; bytes that `area` does not have are zero. `size` as in
/// [`get_xsave`]; the caller has checked that `area` is not larger.
pub(crate) fn set_xsave(vcpu: &VcpuFd, size: usize, area: &[u8]) -> Result<(), Errno> {
    let fixed = size_of::<kvm_xsave>() / size_of::<u32>();
    let extra = (size / size_of::<u32>()).saturating_sub(fixed);
    let mut xsave = Xsave::new(extra).map_err(|_| Errno::new(libc::ENOMEM))?;
    let words = area.chunks(4).map(|chunk| {
        let mut word = [0u8; 4];
        word[..chunk.len()].copy_from_slice(chunk);
        u32::from_le_bytes(word)
    });
    for (n, word) in words.enumerate() {
        if n < fixed {
            // SAFETY: only the plain array `region` is written; the length of the flexible part,
            // on which the wrapper's soundness rests, stays as it is.
            unsafe { xsave.as_mut_fam_struct() }.xsave.region[n] = word;
        } else if let Some(slot) = xsave.as_mut_slice().get_mut(n - fixed) {
            *slot = word;
        }
    }
    // SAFETY: the area has the size that the kernel asked for (see get_xsave).
    unsafe { vcpu.set_xsave2(&xsave) }
}

/// The frequency in kHz that new vCPUs' TSCs get, unscaled; `None` on kernels before 5.17.
pub(crate) fn vm_tsc_khz(vm: &VmFd) -> Option<u32> {
    // SAFETY: the call takes no argument; the kernel only answers a number.
    let khz = unsafe { ioctl(vm, KVM_GET_TSC_KHZ()) };
    u32::try_from(khz).ok().filter(|khz| *khz != 0)
}

fn tsc_offset_attr(value: &mut u64) -> kvm_device_attr {
    kvm_device_attr {
        flags: 0,
        group: KVM_VCPU_TSC_CTRL,
        attr: u64::from(KVM_VCPU_TSC_OFFSET),
        addr: std::ptr::from_mut(value) as u64,
    }
}

/// What KVM adds to the (scaled) host TSC for this vCPU. Only where `KVM_CAP_VCPU_ATTRIBUTES` is there.
pub(crate) fn tsc_offset(vcpu: &VcpuFd) -> Result<u64, Errno> {
    let mut value = 0u64;
    let attr = tsc_offset_attr(&mut value);
    // SAFETY: the kernel writes one u64 at `addr`, which points at `value`, alive until the end.
    done(unsafe { ioctl_with_ref(vcpu, KVM_GET_DEVICE_ATTR(), &attr) })?;
    Ok(value)
}

/// Sets what [`tsc_offset`] reads.
pub(crate) fn set_tsc_offset(vcpu: &VcpuFd, mut value: u64) -> Result<(), Errno> {
    let attr = tsc_offset_attr(&mut value);
    // SAFETY: the kernel reads one u64 at `addr`, which points at `value`, alive until the end.
    done(unsafe { ioctl_with_ref(vcpu, KVM_SET_DEVICE_ATTR(), &attr) })
}

/// Switches on a capability of the VM whose first argument is `arg`.
pub(crate) fn enable_vm_cap(vm: &VmFd, cap: u32, arg: u64) -> Result<(), Errno> {
    let mut request = kvm_bindings::kvm_enable_cap { cap, ..Default::default() };
    request.args[0] = arg;
    vm.enable_cap(&request)
}

/// The nested state as the kernel gives it, header first. Only where `KVM_CAP_NESTED_STATE` is there.
pub(crate) fn get_nested_state(vcpu: &VcpuFd) -> Result<Vec<u8>, Errno> {
    let mut buffer = KvmNestedStateBuffer::empty();
    let held = vcpu.nested_state(&mut buffer)?;
    let used = held.map_or(NESTED_HEADER, |n| n.get()).min(size_of::<KvmNestedStateBuffer>());
    // SAFETY: the buffer is plain old data, wholly initialised (zeroed, then written by the
    // kernel), and `used` is at most its size.
    Ok(unsafe { std::slice::from_raw_parts((&raw const buffer).cast::<u8>(), used) }.to_vec())
}

/// Gives the vCPU a nested state that [`get_nested_state`] made on another host. The size in its
/// header is replaced by the true one.
pub(crate) fn set_nested_state(vcpu: &VcpuFd, state: &[u8]) -> Result<(), Errno> {
    if state.len() < NESTED_HEADER || state.len() > size_of::<KvmNestedStateBuffer>() {
        return Err(Errno::new(libc::EINVAL));
    }
    let mut buffer = KvmNestedStateBuffer::empty();
    // SAFETY: plain old data for which every bit pattern is valid; the length was checked above.
    unsafe { std::slice::from_raw_parts_mut((&raw mut buffer).cast::<u8>(), state.len()) }
        .copy_from_slice(state);
    buffer.size = u32::try_from(state.len()).unwrap_or(0);
    vcpu.set_nested_state(&buffer)
}
