//! A vCPU from a QEMU: what its layouts say, and for the rest what QEMU itself would give KVM.

use kvm_bindings::{
    KVM_MP_STATE_SIPI_RECEIVED, KVM_SREGS2_FLAGS_PDPTRS_VALID, KVM_VCPUEVENT_VALID_NMI_PENDING,
    KVM_VCPUEVENT_VALID_PAYLOAD, KVM_VCPUEVENT_VALID_SHADOW, KVM_VCPUEVENT_VALID_SIPI_VECTOR,
    KVM_VCPUEVENT_VALID_SMM, KVM_VCPUEVENT_VALID_TRIPLE_FAULT, kvm_debugregs, kvm_regs, kvm_sregs2,
    kvm_vcpu_events,
};
use migration::vmstate::FieldError;

use super::cpu::Cpu;
use super::to_wire::{INHIBIT_IRQ, NMI_MASKED, SMM, SMM_INSIDE_NMI};
use super::{VcpuWire, WireContext, fpu, hex, msrs, nested, segments};
use crate::vcpu_state::VcpuState;

const RFLAGS_VM: u64 = 1 << 17;

pub(super) fn vcpu(
    wire: &VcpuWire,
    index: u32,
    context: &WireContext,
) -> Result<VcpuState, FieldError> {
    let cpu = &wire.cpu;
    msrs::check_absent(&cpu.subs)?;
    if u32::from(wire.apic.id) != index {
        return Err(FieldError::new("apic.id", index, wire.apic.id));
    }
    if cpu.subs.svm_npt.is_some() || cpu.subs.svm_guest.is_some() {
        return Err(FieldError::new(
            "cpu/svn_npt, cpu/svm_guest",
            "a source that runs on KVM, or a guest that is no hypervisor",
            "an emulated inner guest",
        ));
    }
    let tsc_khz = match &cpu.subs.tsc_khz {
        None => 0,
        Some(sub) => u32::try_from(sub.tsc_khz)
            .map_err(|_| FieldError::new("env.tsc_khz", "0 to 0xffffffff", sub.tsc_khz))?,
    };
    let nested = cpu.subs.nested_state.as_ref().map(nested::from_wire).transpose()?;
    Ok(VcpuState {
        index,
        regs: regs(cpu),
        sregs: sregs(wire)?,
        // A stream of version 11 has no XCR0; then x87 alone is on, as after reset.
        xcrs: vec![(0, if cpu.xcr0 == 0 { 1 } else { cpu.xcr0 })],
        xsave: fpu::from_wire(cpu, &context.xsave)?,
        debug: debug(cpu),
        msrs: msrs::from_wire(cpu, context)?,
        tsc: cpu.tsc,
        tsc_offset: None,
        tsc_khz,
        tsc_deadline: cpu.subs.tscdeadline.as_ref().map(|sub| sub.value),
        lapic: wire.apic.to_page(context.virtual_ns),
        mp_state: mp_state(cpu)?,
        events: events(cpu)?,
        nested,
    })
}

pub(super) fn regs(cpu: &Cpu) -> kvm_regs {
    let [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15] = cpu.regs;
    kvm_regs {
        rax,
        rbx,
        rcx,
        rdx,
        rsi,
        rdi,
        rsp,
        rbp,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
        rip: cpu.eip,
        rflags: cpu.eflags,
    }
}

pub(super) fn debug(cpu: &Cpu) -> kvm_debugregs {
    let [db0, db1, db2, db3, _, _, dr6, dr7] = cpu.dr;
    kvm_debugregs { db: [db0, db1, db2, db3], dr6, dr7, ..Default::default() }
}

pub(super) fn mp_state(cpu: &Cpu) -> Result<u32, FieldError> {
    if cpu.mp_state > KVM_MP_STATE_SIPI_RECEIVED {
        return Err(FieldError::new("env.mp_state", "0 to 4", cpu.mp_state));
    }
    Ok(cpu.mp_state)
}

fn sregs(wire: &VcpuWire) -> Result<kvm_sregs2, FieldError> {
    let cpu = &wire.cpu;
    let segment =
        if cpu.eflags & RFLAGS_VM != 0 { segments::from_wire_v86 } else { segments::from_wire };
    let [es, cs, ss, ds, fs, gs] = &cpu.segs;
    let (flags, pdptrs) = match cpu.subs.pdptrs {
        Some(pdptrs) => (KVM_SREGS2_FLAGS_PDPTRS_VALID.into(), pdptrs),
        None => (0, [0; 4]),
    };
    Ok(kvm_sregs2 {
        cs: segment("env.segs[CS]", cs)?,
        ds: segment("env.segs[DS]", ds)?,
        es: segment("env.segs[ES]", es)?,
        fs: segment("env.segs[FS]", fs)?,
        gs: segment("env.segs[GS]", gs)?,
        ss: segment("env.segs[SS]", ss)?,
        tr: segments::from_wire("env.tr", &cpu.tr)?,
        ldt: segments::from_wire("env.ldt", &cpu.ldt)?,
        gdt: segments::table_from_wire("env.gdt", &cpu.gdt)?,
        idt: segments::table_from_wire("env.idt", &cpu.idt)?,
        cr0: cpu.cr0,
        cr2: cpu.cr2,
        cr3: cpu.cr3,
        cr4: cpu.cr4,
        cr8: u64::from(wire.apic.tpr >> 4),
        efer: cpu.efer,
        apic_base: wire.apic.apicbase.into(),
        flags,
        pdptrs,
    })
}

fn vector(name: &str, value: i32) -> Result<Option<u8>, FieldError> {
    match value {
        -1 => Ok(None),
        _ => u8::try_from(value)
            .map(Some)
            .map_err(|_| FieldError::new(name, "-1 (none) to 255", value)),
    }
}

fn events(cpu: &Cpu) -> Result<kvm_vcpu_events, FieldError> {
    let mut events = kvm_vcpu_events {
        sipi_vector: cpu.sipi_vector,
        flags: KVM_VCPUEVENT_VALID_NMI_PENDING
            | KVM_VCPUEVENT_VALID_SIPI_VECTOR
            | KVM_VCPUEVENT_VALID_SHADOW,
        ..Default::default()
    };
    if cpu.sipi_vector > 0xff {
        return Err(FieldError::new("env.sipi_vector", "at most 0xff", hex(cpu.sipi_vector)));
    }
    if let Some(nr) = vector("env.exception_nr", cpu.exception_nr)? {
        events.exception.nr = nr;
        events.exception.has_error_code = cpu.has_error_code;
        events.exception.injected = 1;
        if let Some(info) = &cpu.subs.exception_info {
            events.exception.injected = info.injected;
            events.exception.pending = info.pending;
            events.exception_has_payload = info.has_payload;
            events.exception_payload = info.payload;
            events.flags |= KVM_VCPUEVENT_VALID_PAYLOAD;
        }
    }
    if let Some(nr) = vector("env.interrupt_injected", cpu.interrupt_injected)? {
        events.interrupt.injected = 1;
        events.interrupt.nr = nr;
    }
    events.interrupt.soft = cpu.soft_interrupt;
    events.interrupt.shadow = u8::from(cpu.hflags & INHIBIT_IRQ != 0);
    events.nmi.injected = cpu.nmi_injected;
    events.nmi.pending = cpu.nmi_pending;
    events.nmi.masked = u8::from(cpu.hflags2 & NMI_MASKED != 0);
    if cpu.hflags & SMM != 0 {
        events.smi.smm = 1;
        events.smi.smm_inside_nmi = u8::from(cpu.hflags2 & SMM_INSIDE_NMI != 0);
        events.flags |= KVM_VCPUEVENT_VALID_SMM;
    }
    if cpu.subs.triple_fault.as_ref().is_some_and(|sub| sub.value != 0) {
        events.triple_fault.pending = 1;
        events.flags |= KVM_VCPUEVENT_VALID_TRIPLE_FAULT;
    }
    Ok(events)
}
