//! What QEMU's `cpu` has no place for: between two mini-vmms it travels in these subsections, raw.
//!
//! General registers, debug registers and MP state are exact in QEMU's fields, and are read from
//! there. All but `nested` are sent together or not at all.
#![allow(missing_docs)]

use migration::vmstate::{Blob, Bytes, Counted};
use serde::{Deserialize, Serialize};

/// More MSRs than any kernel lists.
pub const MAX_MSRS: usize = 1024;
/// More than any XSAVE area (AMX needs 11 KiB).
pub const MAX_XSAVE: usize = 32 * 1024;
/// KVM's nested state with header: 128 bytes and two pages.
pub const MAX_NESTED: usize = 128 + 2 * 4096;

macro_rules! parts {
    ($($(#[$doc:meta])* $name:ident { $($field:ident: $type:ty),* $(,)? })*) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
        pub struct $name {
            $(pub $field: $type,)*
        }
    )*};
}

parts! {
    /// One MSR.
    MsrEntry { index: u32, value: u64 }
    /// Every MSR of the source's list that it could read.
    Msrs { msrs: Counted<u16, MsrEntry, MAX_MSRS> }
    /// The time stamp counter, what KVM adds to the host's, its frequency, the timer's deadline.
    Tsc {
        tsc: u64,
        has_offset: bool,
        offset: u64,
        khz: u32,
        has_deadline: bool,
        deadline: u64,
    }
    /// An extended control register.
    Xcr { index: u32, value: u64 }
    /// The XSAVE area, and which of its components are on.
    Xsave { xcrs: Counted<u8, Xcr, 16>, area: Blob<u32, MAX_XSAVE> }
    /// The LAPIC's registers as `KVM_GET_LAPIC` gives them.
    Lapic { page: Bytes<1024> }
    /// `struct kvm_vcpu_events`.
    Events {
        exception_injected: u8,
        exception_nr: u8,
        exception_has_error_code: u8,
        exception_pending: u8,
        exception_error_code: u32,
        exception_has_payload: u8,
        exception_payload: u64,
        interrupt_injected: u8,
        interrupt_nr: u8,
        interrupt_soft: u8,
        interrupt_shadow: u8,
        nmi_injected: u8,
        nmi_pending: u8,
        nmi_masked: u8,
        sipi_vector: u32,
        flags: u32,
        smi_smm: u8,
        smi_pending: u8,
        smi_inside_nmi: u8,
        smi_latched_init: u8,
        triple_fault: u8,
    }
    /// `struct kvm_segment`.
    Segment {
        base: u64,
        limit: u32,
        selector: u16,
        type_: u8,
        present: u8,
        dpl: u8,
        db: u8,
        s: u8,
        l: u8,
        g: u8,
        avl: u8,
        unusable: u8,
    }
    /// `struct kvm_sregs2`: CS DS ES FS GS SS TR LDT, the two tables, control registers.
    Sregs {
        segments: [Segment; 8],
        gdt_base: u64,
        gdt_limit: u16,
        idt_base: u64,
        idt_limit: u16,
        cr0: u64,
        cr2: u64,
        cr3: u64,
        cr4: u64,
        cr8: u64,
        efer: u64,
        apic_base: u64,
        flags: u64,
        pdptrs: [u64; 4],
    }
    /// `struct kvm_nested_state` with its data.
    Nested { state: Blob<u32, MAX_NESTED> }
}
