//! A captured vCPU as QEMU's sections.

use kvm_bindings::{KVM_SREGS2_FLAGS_PDPTRS_VALID, kvm_segment};
use migration::vmstate::{Audience, FieldError};

use super::apic::Apic;
use super::cpu::{Cpu, CpuCommon};
use super::cpu_subs::{ExceptionInfo, One8, One64, TscKhz};
use super::{VcpuWire, WireContext, fpu, hex, mini, msrs, nested, segments};
use crate::vcpu_state::VcpuState;

/// MP state of a vCPU that has executed HLT.
const HALTED: u32 = 3;
/// HFLAGS2: global interrupt flag, NMIs masked, SMM entered inside an NMI, virtual GIF.
pub(super) const GIF: u32 = 1 << 0;
pub(super) const NMI_MASKED: u32 = 1 << 2;
pub(super) const SMM_INSIDE_NMI: u32 = 1 << 4;
const VGIF: u32 = 1 << 8;
/// HFLAGS: interrupts inhibited for one instruction, system management mode, inner guest.
pub(super) const INHIBIT_IRQ: u32 = 1 << 3;
pub(super) const SMM: u32 = 1 << 19;
const GUEST: u32 = 1 << 21;

/// `flags` of KVM's nested state: GIF is set.
const NESTED_GIF: u16 = 0x100;

pub(super) fn vcpu(
    state: &VcpuState,
    audience: Audience,
    context: &WireContext,
) -> Result<VcpuWire, FieldError> {
    if audience == Audience::Qemu {
        expressible(state)?;
        fpu::expressible(&state.xsave, &context.xsave)?;
    }
    let s = &state.sregs;
    let r = &state.regs;
    let e = &state.events;
    let exception = e.exception.injected | e.exception.pending != 0;
    let db = state.debug.db;
    let (dr6, dr7) = (state.debug.dr6, state.debug.dr7);
    let nested_state = state.nested.as_ref().map(|state| nested::to_wire(state));
    let gif = nested_state.as_ref().is_none_or(|n| n.format == 0 || n.flags & NESTED_GIF != 0);
    let mut cpu = Cpu {
        regs: [
            r.rax, r.rcx, r.rdx, r.rbx, r.rsp, r.rbp, r.rsi, r.rdi, r.r8, r.r9, r.r10, r.r11,
            r.r12, r.r13, r.r14, r.r15,
        ],
        eip: r.rip,
        eflags: r.rflags,
        hflags: hflags(state),
        segs: [&s.es, &s.cs, &s.ss, &s.ds, &s.fs, &s.gs].map(segments::to_wire),
        ldt: segments::to_wire(&s.ldt),
        tr: segments::to_wire(&s.tr),
        gdt: segments::table_to_wire(&s.gdt),
        idt: segments::table_to_wire(&s.idt),
        cr0: s.cr0,
        cr2: s.cr2,
        cr3: s.cr3,
        cr4: s.cr4,
        dr: [db[0], db[1], db[2], db[3], dr6, dr7, dr6, dr7],
        a20_mask: -1,
        efer: s.efer,
        hflags2: VGIF
            | if gif { GIF } else { 0 }
            | if e.nmi.masked != 0 { NMI_MASKED } else { 0 }
            | if e.smi.smm_inside_nmi != 0 { SMM_INSIDE_NMI } else { 0 },
        interrupt_injected: if e.interrupt.injected != 0 { e.interrupt.nr.into() } else { -1 },
        mp_state: state.mp_state,
        tsc: state.tsc,
        exception_nr: if exception { e.exception.nr.into() } else { -1 },
        soft_interrupt: e.interrupt.soft,
        nmi_injected: e.nmi.injected,
        nmi_pending: e.nmi.pending,
        has_error_code: e.exception.has_error_code,
        sipi_vector: e.sipi_vector,
        xcr0: state.xcrs.iter().find(|(n, _)| *n == 0).map_or(1, |(_, value)| *value),
        ..Cpu::default()
    };
    msrs::to_wire(&state.msrs, &mut cpu, context);
    fpu::to_wire(&state.xsave, &context.xsave, &mut cpu);
    let subs = &mut cpu.subs;
    let pending = e.exception.pending != 0;
    subs.exception_info = pending.then_some(ExceptionInfo {
        pending: e.exception.pending,
        injected: e.exception.injected,
        has_payload: e.exception_has_payload,
        payload: e.exception_payload,
    });
    let deadline = state.tsc_deadline.filter(|deadline| *deadline != 0);
    subs.tscdeadline = deadline.map(|value| One64 { value });
    subs.tsc_khz = (state.tsc_khz != 0).then(|| TscKhz { tsc_khz: state.tsc_khz.into() });
    subs.nested_state = nested_state;
    subs.pdptrs = (s.flags & u64::from(KVM_SREGS2_FLAGS_PDPTRS_VALID) != 0).then_some(s.pdptrs);
    subs.triple_fault = (e.triple_fault.pending != 0).then_some(One8 { value: 1 });
    if audience != Audience::Qemu {
        add_mini(state, &mut cpu);
    }
    Ok(VcpuWire {
        cpu,
        common: CpuCommon { halted: u32::from(state.mp_state == HALTED), ..CpuCommon::default() },
        apic: Apic::from_page(&state.lapic, s.apic_base, context.virtual_ns),
    })
}

/// What QEMU 7.2's layouts cannot say of a vCPU. All of it passes when the guest runs on for a
/// moment.
fn expressible(state: &VcpuState) -> Result<(), FieldError> {
    let e = &state.events;
    let lost = |what: &str, found: String| {
        Err(FieldError::new(
            what,
            "a state that QEMU 7.2's layout can hold (let the guest run on and try again)",
            found,
        ))
    };
    if e.exception.injected | e.exception.pending != 0 && e.exception.error_code != 0 {
        return lost("error code of the exception in flight", hex(e.exception.error_code));
    }
    if e.smi.pending != 0 || e.smi.latched_init != 0 {
        return lost("SMI or INIT in flight", "one".into());
    }
    if let Some((n, value)) = state.xcrs.iter().find(|(n, value)| *n != 0 && *value != 0) {
        return lost("extended control register", format!("XCR{n} = {value:#x}"));
    }
    Ok(())
}

/// QEMU's summary of a vCPU's mode. Bits: 0-1 CPL, 3 interrupts inhibited, 4 CS32, 5 SS32, 6 ADDSEG,
/// 7 PE, 8 TF, 9 MP, 10 EM, 11 TS, 12-13 IOPL, 14 LMA, 15 CS64, 17 VM, 19 SMM, 20 SVME, 21 GUEST,
/// 22 OSFXSR. A KVM destination looks at CPL, SMM and the inhibition.
pub fn hflags(state: &VcpuState) -> u32 {
    const LMA: u64 = 1 << 10;
    const SVME: u64 = 1 << 12;
    const RFLAGS: u64 = 1 << 8 | 3 << 12 | 1 << 17; // TF, IOPL, VM: the same bits
    const VM: u64 = 1 << 17;
    let s = &state.sregs;
    let bit = |set: bool, n: u32| u32::from(set) << n;
    let usable = |seg: &kvm_segment| seg.unusable == 0;
    let mut flags = u32::from(s.ss.dpl & 3)
        | ((s.cr0 & 1) as u32) << 7
        | ((s.cr0 & 0xe) as u32) << 8
        | (state.regs.rflags & RFLAGS) as u32
        | bit(s.cr4 & 1 << 9 != 0, 22)
        | bit(s.efer & SVME != 0, 20);
    let protected = s.cr0 & 1 != 0;
    let long = s.efer & LMA != 0;
    let cs64 = long && s.cs.l != 0;
    flags |= bit(long, 14) | bit(cs64, 15);
    let cs32 = cs64 || (usable(&s.cs) && s.cs.db != 0);
    let ss32 = cs64 || (usable(&s.ss) && s.ss.db != 0);
    flags |= bit(cs32, 4) | bit(ss32, 5);
    if !cs64 {
        let flat = protected && state.regs.rflags & VM == 0 && cs32;
        let based = (s.ds.base | s.es.base | s.ss.base) != 0;
        flags |= bit(!flat || based, 6);
    }
    flags |= if state.events.interrupt.shadow != 0 { INHIBIT_IRQ } else { 0 };
    flags |= if state.events.smi.smm != 0 { SMM } else { 0 };
    let inner = state.nested.as_ref().is_some_and(|state| nested::in_guest_mode(state));
    flags | if inner { GUEST } else { 0 }
}

fn add_mini(state: &VcpuState, cpu: &mut Cpu) {
    let e = &state.events;
    let s = &state.sregs;
    let subs = &mut cpu.subs;
    subs.mini_msrs = Some(mini::Msrs {
        msrs: state
            .msrs
            .iter()
            .map(|msr| mini::MsrEntry { index: msr.index, value: msr.value })
            .collect::<Vec<_>>()
            .into(),
    });
    subs.mini_tsc = Some(mini::Tsc {
        tsc: state.tsc,
        has_offset: state.tsc_offset.is_some(),
        offset: state.tsc_offset.unwrap_or(0),
        khz: state.tsc_khz,
        has_deadline: state.tsc_deadline.is_some(),
        deadline: state.tsc_deadline.unwrap_or(0),
    });
    subs.mini_xsave = Some(mini::Xsave {
        xcrs: state
            .xcrs
            .iter()
            .map(|&(index, value)| mini::Xcr { index, value })
            .collect::<Vec<_>>()
            .into(),
        area: state.xsave.clone().into(),
    });
    subs.mini_lapic = migration::vmstate::Bytes::try_from(state.lapic.0.to_vec())
        .ok()
        .map(|page| mini::Lapic { page });
    subs.mini_events = Some(mini::Events {
        exception_injected: e.exception.injected,
        exception_nr: e.exception.nr,
        exception_has_error_code: e.exception.has_error_code,
        exception_pending: e.exception.pending,
        exception_error_code: e.exception.error_code,
        exception_has_payload: e.exception_has_payload,
        exception_payload: e.exception_payload,
        interrupt_injected: e.interrupt.injected,
        interrupt_nr: e.interrupt.nr,
        interrupt_soft: e.interrupt.soft,
        interrupt_shadow: e.interrupt.shadow,
        nmi_injected: e.nmi.injected,
        nmi_pending: e.nmi.pending,
        nmi_masked: e.nmi.masked,
        sipi_vector: e.sipi_vector,
        flags: e.flags,
        smi_smm: e.smi.smm,
        smi_pending: e.smi.pending,
        smi_inside_nmi: e.smi.smm_inside_nmi,
        smi_latched_init: e.smi.latched_init,
        triple_fault: e.triple_fault.pending,
    });
    let segment = |s: &kvm_segment| mini::Segment {
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
    };
    subs.mini_sregs = Some(mini::Sregs {
        segments: [&s.cs, &s.ds, &s.es, &s.fs, &s.gs, &s.ss, &s.tr, &s.ldt].map(segment),
        gdt_base: s.gdt.base,
        gdt_limit: s.gdt.limit,
        idt_base: s.idt.base,
        idt_limit: s.idt.limit,
        cr0: s.cr0,
        cr2: s.cr2,
        cr3: s.cr3,
        cr4: s.cr4,
        cr8: s.cr8,
        efer: s.efer,
        apic_base: s.apic_base,
        flags: s.flags,
        pdptrs: s.pdptrs,
    });
    subs.mini_nested =
        state.nested.as_ref().map(|state| mini::Nested { state: state.clone().into() });
}
