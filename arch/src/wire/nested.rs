//! A hypervisor inside the guest: `struct kvm_nested_state` and QEMU's subsection.
//!
//! The kernel's structure (Linux `arch/x86/include/uapi/asm/kvm.h`): flags u16, format u16, size
//! u32; at 8 the vendor's header (VMX: vmxon_pa u64, vmcs12_pa u64, SMM flags u16, two bytes
//! unused, flags u32, preemption timer deadline u64; SVM: vmcb_pa u64); at 128 the data.

use migration::vmstate::{FieldError, FixedVec};

use super::cpu_subs::{Nested, NestedSubs, NestedSvm, NestedVmx, NestedVmxSubs, Vmcs};

const HEADER: usize = 128;
const PAGE: usize = 4096;
const FORMAT_VMX: u16 = 0;
const FORMAT_SVM: u16 = 1;
/// The inner guest is running.
const GUEST_MODE: u16 = 1;
/// VMX's flag for a preemption timer that runs (`KVM_STATE_VMX_PREEMPTION_TIMER_DEADLINE`).
const TIMER_RUNS: u32 = 1;

fn page(state: &[u8], n: usize) -> Option<FixedVec<u8, PAGE>> {
    let start = HEADER + n * PAGE;
    FixedVec::try_from(state.get(start..start + PAGE)?.to_vec()).ok()
}

fn u64_at(state: &[u8], at: usize) -> u64 {
    state.get(at..).and_then(|b| b.first_chunk()).map_or(0, |b| u64::from_le_bytes(*b))
}

fn u32_at(state: &[u8], at: usize) -> u32 {
    state.get(at..).and_then(|b| b.first_chunk()).map_or(0, |b| u32::from_le_bytes(*b))
}

fn u16_at(state: &[u8], at: usize) -> u16 {
    state.get(at..).and_then(|b| b.first_chunk()).map_or(0, |b| u16::from_le_bytes(*b))
}

/// Whether the vCPU is inside the inner guest.
pub(crate) fn in_guest_mode(state: &[u8]) -> bool {
    u16_at(state, 0) & GUEST_MODE != 0
}

/// When the preemption timer of an inner guest on Intel ends, in units of 32 ticks of the outer guest's TSC,
/// while it runs. QEMU's subsection has no place for it.
pub(super) fn preemption_timer(state: &[u8]) -> Option<u64> {
    let runs = u16_at(state, 2) == FORMAT_VMX && u32_at(state, 28) & TIMER_RUNS != 0;
    runs.then(|| u64_at(state, 32))
}

/// QEMU's subsection for the kernel's state.
pub(crate) fn to_wire(state: &[u8]) -> Nested {
    let format = u16_at(state, 2);
    let subs = if format == FORMAT_VMX {
        let vmcs = |n| page(state, n).map(|bytes| Vmcs { bytes });
        let vmx = NestedVmx {
            vmxon_pa: u64_at(state, 8),
            vmcs12_pa: u64_at(state, 16),
            smm_flags: u16_at(state, 24),
            subs: NestedVmxSubs { vmcs12: vmcs(0), shadow_vmcs12: vmcs(1) },
        };
        NestedSubs { vmx: (vmx.vmxon_pa != u64::MAX).then_some(vmx), svm: None }
    } else {
        let svm = page(state, 0).map(|vmcb12| NestedSvm { vmcb_pa: u64_at(state, 8), vmcb12 });
        NestedSubs { vmx: None, svm }
    };
    let size = u32::try_from(state.len()).unwrap_or(u32::MAX);
    Nested { flags: u16_at(state, 0), format, size, subs }
}

/// The kernel's state for QEMU's subsection. Its size is that of the parts that came.
pub(crate) fn from_wire(nested: &Nested) -> Result<Vec<u8>, FieldError> {
    let mut state = vec![0; HEADER];
    let mut set = |at: usize, bytes: &[u8]| state[at..at + bytes.len()].copy_from_slice(bytes);
    set(0, &nested.flags.to_le_bytes());
    set(2, &nested.format.to_le_bytes());
    let wrong_vendor =
        |vendor| FieldError::new("cpu/kvm_nested_state.format", vendor, nested.format);
    match (nested.format, &nested.subs) {
        (FORMAT_VMX, NestedSubs { svm: None, vmx }) => {
            // No subsection: VMX is off, which the kernel writes as all ones.
            let off = NestedVmx { vmxon_pa: !0, vmcs12_pa: !0, ..NestedVmx::default() };
            let vmx = vmx.as_ref().unwrap_or(&off);
            set(8, &vmx.vmxon_pa.to_le_bytes());
            set(16, &vmx.vmcs12_pa.to_le_bytes());
            set(24, &vmx.smm_flags.to_le_bytes());
            if let Some(vmcs) = &vmx.subs.vmcs12 {
                state.extend_from_slice(&vmcs.bytes);
                if let Some(shadow) = &vmx.subs.shadow_vmcs12 {
                    state.extend_from_slice(&shadow.bytes);
                }
            }
        }
        (FORMAT_SVM, NestedSubs { vmx: None, svm }) => {
            if let Some(svm) = svm {
                set(8, &svm.vmcb_pa.to_le_bytes());
                state.extend_from_slice(&svm.vmcb12);
            }
        }
        (FORMAT_VMX, _) => return Err(wrong_vendor("1 (SVM), as the subsection says")),
        (FORMAT_SVM, _) => return Err(wrong_vendor("0 (VMX), as the subsection says")),
        _ => return Err(wrong_vendor("0 (VMX) or 1 (SVM)")),
    }
    let size = u32::try_from(state.len()).unwrap_or(0);
    state[4..8].copy_from_slice(&size.to_le_bytes());
    Ok(state)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_vendors_round_trip() {
        let mut vmx: Vec<u8> = vec![0; HEADER];
        vmx[0] = 1;
        vmx[8..16].copy_from_slice(&0x1234_5000u64.to_le_bytes());
        vmx[16..24].copy_from_slice(&0x1234_6000u64.to_le_bytes());
        vmx[24] = 2;
        vmx.extend((0..2 * PAGE).map(|n| (n % 251) as u8));
        let size = vmx.len() as u32;
        vmx[4..8].copy_from_slice(&size.to_le_bytes());
        assert_eq!(from_wire(&to_wire(&vmx)).unwrap(), vmx);
        assert!(in_guest_mode(&vmx));

        let mut svm: Vec<u8> = vec![0; HEADER];
        svm[1] = 1;
        svm[2] = 1;
        svm[8..16].copy_from_slice(&0x9876_5000u64.to_le_bytes());
        svm.extend((0..PAGE).map(|n| (n % 241) as u8));
        let size = svm.len() as u32;
        svm[4..8].copy_from_slice(&size.to_le_bytes());
        assert_eq!(from_wire(&to_wire(&svm)).unwrap(), svm);

        assert_eq!((preemption_timer(&vmx), preemption_timer(&svm)), (None, None));
        vmx[28] = 1;
        vmx[32..40].copy_from_slice(&0x1234_5678_9abc_u64.to_le_bytes());
        assert_eq!(preemption_timer(&vmx), Some(0x1234_5678_9abc));
        // SVM's header is another.
        svm[28] = 1;
        assert_eq!(preemption_timer(&svm), None);

        let mut wrong = to_wire(&svm);
        wrong.format = 0;
        assert!(from_wire(&wrong).unwrap_err().to_string().contains("format"));
        wrong.format = 7;
        assert!(from_wire(&wrong).is_err());
    }
}
