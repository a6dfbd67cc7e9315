//! A vCPU from a mini-vmm: exactly what was captured.

use kvm_bindings::{kvm_dtable, kvm_segment, kvm_sregs2, kvm_vcpu_events};
use migration::vmstate::FieldError;

use super::cpu_subs::CpuSubs;
use super::{VcpuWire, from_qemu, mini};
use crate::msr::Msr;
use crate::vcpu_state::{LapicPage, VcpuState};

/// Whether the peer was a mini-vmm. Its subsections come together or not at all.
pub(super) fn has_mini(subs: &CpuSubs) -> Result<bool, FieldError> {
    let there = [
        ("mini-vmm/msrs", subs.mini_msrs.is_some()),
        ("mini-vmm/tsc", subs.mini_tsc.is_some()),
        ("mini-vmm/xsave", subs.mini_xsave.is_some()),
        ("mini-vmm/lapic", subs.mini_lapic.is_some()),
        ("mini-vmm/events", subs.mini_events.is_some()),
        ("mini-vmm/sregs", subs.mini_sregs.is_some()),
    ];
    let any = there.iter().any(|(_, there)| *there) || subs.mini_nested.is_some();
    match there.iter().find(|(_, there)| !there) {
        Some((name, _)) if any => {
            Err(FieldError::new(*name, "the subsection, as others of mini-vmm's came", "none"))
        }
        Some(_) => Ok(false),
        None => Ok(true),
    }
}

pub(super) fn vcpu(wire: &VcpuWire, index: u32) -> Result<VcpuState, FieldError> {
    let subs = &wire.cpu.subs;
    let (Some(msrs), Some(tsc), Some(xsave), Some(lapic), Some(e), Some(s)) = (
        &subs.mini_msrs,
        &subs.mini_tsc,
        &subs.mini_xsave,
        &subs.mini_lapic,
        &subs.mini_events,
        &subs.mini_sregs,
    ) else {
        return Err(FieldError::new("mini-vmm/…", "all of mini-vmm's subsections", "some"));
    };
    let mut page = LapicPage::default();
    page.0.copy_from_slice(&lapic.page);
    Ok(VcpuState {
        index,
        regs: from_qemu::regs(&wire.cpu),
        sregs: sregs(s),
        xcrs: xsave.xcrs.0.iter().map(|xcr| (xcr.index, xcr.value)).collect(),
        xsave: xsave.area.0.clone(),
        debug: from_qemu::debug(&wire.cpu),
        msrs: msrs.msrs.0.iter().map(|m| Msr { index: m.index, value: m.value }).collect(),
        tsc: tsc.tsc,
        tsc_offset: tsc.has_offset.then_some(tsc.offset),
        tsc_khz: tsc.khz,
        tsc_deadline: tsc.has_deadline.then_some(tsc.deadline),
        lapic: page,
        mp_state: from_qemu::mp_state(&wire.cpu)?,
        events: events(e),
        nested: subs.mini_nested.as_ref().map(|nested| nested.state.0.clone()),
    })
}

fn events(e: &mini::Events) -> kvm_vcpu_events {
    let mut events = kvm_vcpu_events {
        sipi_vector: e.sipi_vector,
        flags: e.flags,
        exception_has_payload: e.exception_has_payload,
        exception_payload: e.exception_payload,
        ..Default::default()
    };
    events.exception.injected = e.exception_injected;
    events.exception.nr = e.exception_nr;
    events.exception.has_error_code = e.exception_has_error_code;
    events.exception.pending = e.exception_pending;
    events.exception.error_code = e.exception_error_code;
    events.interrupt.injected = e.interrupt_injected;
    events.interrupt.nr = e.interrupt_nr;
    events.interrupt.soft = e.interrupt_soft;
    events.interrupt.shadow = e.interrupt_shadow;
    events.nmi.injected = e.nmi_injected;
    events.nmi.pending = e.nmi_pending;
    events.nmi.masked = e.nmi_masked;
    events.smi.smm = e.smi_smm;
    events.smi.pending = e.smi_pending;
    events.smi.smm_inside_nmi = e.smi_inside_nmi;
    events.smi.latched_init = e.smi_latched_init;
    events.triple_fault.pending = e.triple_fault;
    events
}

fn sregs(s: &mini::Sregs) -> kvm_sregs2 {
    let [cs, ds, es, fs, gs, ss, tr, ldt] = s.segments.each_ref().map(|s| kvm_segment {
        base: s.base,
        limit: s.limit,
        selector: s.selector,
        type_: s.type_,
        present: s.present,
        dpl: s.dpl,
        db: s.db,
        s: s.s,
        l: s.l,
        g: s.g,
        avl: s.avl,
        unusable: s.unusable,
        padding: 0,
    });
    kvm_sregs2 {
        cs,
        ds,
        es,
        fs,
        gs,
        ss,
        tr,
        ldt,
        gdt: kvm_dtable { base: s.gdt_base, limit: s.gdt_limit, padding: [0; 3] },
        idt: kvm_dtable { base: s.idt_base, limit: s.idt_limit, padding: [0; 3] },
        cr0: s.cr0,
        cr2: s.cr2,
        cr3: s.cr3,
        cr4: s.cr4,
        cr8: s.cr8,
        efer: s.efer,
        apic_base: s.apic_base,
        flags: s.flags,
        pdptrs: s.pdptrs,
    }
}
