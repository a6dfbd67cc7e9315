//! A vCPU's state on the wire and back: with KVM at both ends, and without.

mod common;

use arch::clock::ClockState;
use arch::irqchip::{IrqchipState, monotonic_ns};
use arch::vcpu_state::VcpuState;
use arch::wire::{
    Apic, Cpu, CpuCommon, I8254, I8259, Ioapic, IrqchipWire, Kvmclock, VcpuWire, WireContext,
    XsaveLayout,
};
use common::{Vm, at_rest, scramble};
use migration::vmstate::{
    Audience, FieldError, SectionId, SliceSource, VmState, from_source, to_bytes,
};

fn context(vm: &Vm) -> WireContext {
    let all = arch::cpuid::CpuProfile::host(&vm.kvm).unwrap();
    WireContext {
        virtual_ns: 5_000_000_000,
        phys_bits: vm.profile.phys_bits(),
        xsave: XsaveLayout::new(&all),
        host: vm.host.clone(),
    }
}

/// Through the bytes of the stream.
fn carried<T: VmState>(name: &str, instance: u32, state: &T) -> T {
    let id = SectionId::new(name, instance);
    let bytes = to_bytes(&id, state).unwrap();
    let mut source = SliceSource::new(&bytes);
    let back = from_source(&id, T::VERSION, &mut source).unwrap();
    assert!(source.rest().is_empty(), "{name}: bytes left over");
    back
}

fn carried_vcpu(wire: &VcpuWire, index: u32) -> VcpuWire {
    let back = VcpuWire {
        cpu: carried("cpu", index, &wire.cpu),
        common: carried("cpu_common", index, &wire.common),
        apic: carried("apic", index, &wire.apic),
    };
    assert_eq!(&back, wire);
    back
}

fn captured(vm: &Vm, index: u32) -> VcpuState {
    let mut state = vm.capture(index);
    scramble(&mut state);
    vm.restore(&state);
    vm.capture(index)
}

#[test]
fn sections_have_qemus_sizes() {
    let id = SectionId::new("x", 0);
    assert_eq!(to_bytes(&id, &Cpu::default()).unwrap().len(), 1817);
    assert_eq!(to_bytes(&id, &CpuCommon::default()).unwrap().len(), 8);
    assert_eq!(to_bytes(&id, &Apic::default()).unwrap().len(), 181);
    assert_eq!(to_bytes(&id, &Kvmclock::default()).unwrap().len(), 8);
    assert_eq!(to_bytes(&id, &I8259::default()).unwrap().len(), 16);
    assert_eq!(to_bytes(&id, &Ioapic::default()).unwrap().len(), 206);
    assert_eq!(to_bytes(&id, &I8254::default()).unwrap().len(), 108);
    assert_eq!(to_bytes(&id, &arch::wire::KvmTprOpt::default()).unwrap().len(), 144);
    assert_eq!(to_bytes(&id, &arch::wire::TimerSection::default()).unwrap().len(), 24);
}

#[test]
fn between_mini_vmms_nothing_of_a_vcpu_changes() {
    let (source, destination) = (Vm::new(2), Vm::new(2));
    for index in 0..2 {
        let mut state = captured(&source, index);
        // What a page fault on its way looks like: QEMU's layout has no error code.
        state.events.exception.injected = 1;
        state.events.exception.nr = 14;
        state.events.exception.has_error_code = 1;
        state.events.exception.error_code = 6;
        state.mp_state = 0;
        let wire = VcpuWire::from_state(&state, Audience::MiniVmm, &context(&source)).unwrap();
        let back = carried_vcpu(&wire, index).to_state(index, &context(&destination)).unwrap();
        assert_eq!(back, state);
        destination.restore(&back);
        assert_eq!(at_rest(destination.capture(index)), at_rest(state));
    }
}

#[test]
fn through_qemus_layouts_a_vcpu_arrives_as_kvm_had_it() {
    let (source, destination) = (Vm::new(2), Vm::new(2));
    for index in 0..2 {
        let mut state = captured(&source, index);
        common::set_msr(&mut state, 0x4b56_4d01, 0x360_1001);
        common::set_msr(&mut state, 0x4b56_4d05, 0);
        let context = context(&source);
        let wire = VcpuWire::from_state(&state, Audience::Qemu, &context).unwrap();
        let subs = &wire.cpu.subs;
        assert!(subs.mini_msrs.is_none() && subs.mini_lapic.is_none());
        assert!(subs.fpop_ip_dp.is_some() && subs.tsc_adjust.is_some() && subs.tsc_khz.is_some());
        assert!(subs.poll_control.is_some() && subs.steal_time.is_none());
        assert_eq!(wire.common.halted, 1);
        let back = carried_vcpu(&wire, index).to_state(index, &context).unwrap();
        destination.restore(&back);

        let arrived = destination.capture(index);
        assert_eq!(arrived.regs, state.regs);
        assert_eq!(arrived.debug, state.debug);
        // Bytes 28 to 31 are the processor's MXCSR mask, not the guest's state.
        for range in [0..28, 32..416] {
            assert_eq!(arrived.xsave[range.clone()], state.xsave[range]);
        }
        assert_eq!(arrived.xcrs, state.xcrs);
        assert_eq!(arrived.mp_state, state.mp_state);
        assert_eq!(arrived.events, state.events);
        assert_eq!(arrived.msrs, state.msrs);
        assert_eq!(arrived.tsc_khz, state.tsc_khz);
        let mut sregs = state.sregs;
        // An unusable segment has only selector, base and limit on the wire.
        for (there, here) in [
            (&mut sregs.es, arrived.sregs.es),
            (&mut sregs.fs, arrived.sregs.fs),
            (&mut sregs.gs, arrived.sregs.gs),
            (&mut sregs.ldt, arrived.sregs.ldt),
        ] {
            assert_eq!((there.unusable, there.base), (here.unusable, here.base));
            *there = here;
        }
        assert_eq!(arrived.sregs, sregs);
        // The current count starts anew; the rest of the LAPIC is the same.
        assert_eq!(at_rest(arrived).lapic, at_rest(state).lapic);
    }
}

#[test]
fn fields_are_where_qemu_has_them() {
    let vm = Vm::new(1);
    let state = captured(&vm, 0);
    let wire = VcpuWire::from_state(&state, Audience::Qemu, &context(&vm)).unwrap();
    let cpu = &wire.cpu;
    // The same long-mode kernel as in a captured stream of QEMU's: CS 0xa09b00, SS 0xc09300,
    // TR 0x8b00, CPL 0.
    let flags = [1, 2].map(|n| cpu.segs[n].flags);
    assert_eq!(flags, [0xa0_9b00, 0xc0_9300]);
    assert_eq!(cpu.tr.flags, 0x8b00);
    assert_eq!(cpu.segs[0].flags, 0);
    assert_eq!(cpu.hflags, 0x40_c2b0);
    assert_eq!(cpu.hflags2, 0x101);
    assert_eq!(cpu.dr[4..], [0xffff_4ff1, 0x401, 0xffff_4ff1, 0x401]);
    assert_eq!((cpu.interrupt_injected, cpu.exception_nr, cpu.a20_mask), (-1, -1, -1));
    assert_eq!(cpu.regs[1], state.regs.rcx);
    assert_eq!(cpu.regs[3], state.regs.rbx);
    assert_eq!((cpu.fpuc, cpu.fpus, cpu.fptag), (0x27f, 0x3800, 0x81));
    assert_eq!(cpu.fpregs[2].mantissa, 0x1212_1212_1212_1212);
    assert_eq!(cpu.fpregs[2].exponent, 0x1212);
    assert_eq!(cpu.xmm[0].low, 0x5d5c_5f5e_5958_5b5a);
    assert_eq!(cpu.mcg_cap & 0xff, 10);
    assert_eq!(cpu.mce_banks[0], u64::MAX);
    assert_eq!(cpu.mtrr_var[1].mask, !0 << vm.profile.phys_bits() & ((1 << 52) - 1));
    assert_eq!(wire.apic.apicbase, 0xfee0_0900);
    assert_eq!(wire.apic.lvt[0], 0x200ec);
    assert_eq!((wire.apic.count_shift, wire.apic.initial_count), (0, 0x7fff_ffff));
    assert_eq!(wire.apic.next_time, 5_000_000_000 + 0x8000_0000);
    let bytes = to_bytes(&SectionId::new("cpu", 0), cpu).unwrap();
    assert_eq!(bytes[128..136], state.regs.rip.to_be_bytes());
    assert_eq!(bytes[456..464], state.sregs.cr0.to_be_bytes());
    assert_eq!(bytes[816..824], 0xd01u64.to_be_bytes());
    assert_eq!(bytes[925..933], 0x0606_0606_0606_0600u64.to_be_bytes());
}

#[test]
fn a_real_mode_vcpu_has_qemus_summary() {
    let vm = Vm::new(1);
    let fresh = vm.capture(0);
    assert_eq!(arch::wire::hflags(&fresh), 0x40);
}

#[test]
fn chips_keep_their_state_on_either_wire() {
    let (source, destination) = (Vm::new(1), Vm::new(1));
    let mut wanted = IrqchipState::capture(&source.fd).unwrap();
    wanted.pic[0].imr = 0xb8;
    wanted.pic[0].irq_base = 0x30;
    wanted.pic[0].auto_eoi = 1;
    wanted.pic[0].init4 = 1;
    wanted.pic[1].irq_base = 0x38;
    wanted.pic[1].imr = 0x8e;
    wanted.pic[1].elcr = 0x0c;
    wanted.ioapic.select = 0x24;
    for (n, entry) in wanted.ioapic.redirection.iter_mut().enumerate() {
        *entry = 0x1_0000 | (0x20 + n as u64) | ((n as u64) << 56);
    }
    let now = monotonic_ns();
    for (n, channel) in wanted.pit.channels.iter_mut().enumerate() {
        channel.count = 0x1000 * (n as u32 + 1);
        channel.mode = 2 + n as u8 % 2;
        channel.rw_mode = 3;
        channel.read_state = 3;
        channel.write_state = 3;
        channel.gate = 1;
        channel.count_load_time = now - 1_000_000 * n as i64;
    }
    wanted.pit.flags = 2;
    wanted.restore(&source.fd).unwrap();
    let state = IrqchipState::capture(&source.fd).unwrap();
    assert_eq!(state.ioapic, wanted.ioapic);
    assert_eq!(state.pic, wanted.pic);

    for audience in [Audience::MiniVmm, Audience::Qemu] {
        let wire = IrqchipWire::from_state(&state, audience, 7_000_000, 1_000_000_000_000);
        let back = IrqchipWire {
            pic: [carried("i8259", 0, &wire.pic[0]), carried("i8259", 1, &wire.pic[1])],
            ioapic: carried("ioapic", 0, &wire.ioapic),
            pit: carried("i8254", 0, &wire.pit),
        };
        assert_eq!(back, wire);
        let mut arrived = back.to_state(7_000_000, 1_000_000_000_000).unwrap();
        if audience == Audience::Qemu {
            // The speaker's bit belongs to another section.
            assert_eq!(arrived.pit.flags, 0);
            arrived.pit.flags = state.pit.flags;
        }
        assert_eq!(arrived, state);
        arrived.restore(&destination.fd).unwrap();
        let mut there = IrqchipState::capture(&destination.fd).unwrap();
        // The kernel starts the counters anew.
        for (there, here) in there.pit.channels.iter_mut().zip(&state.pit.channels) {
            there.count_load_time = here.count_load_time;
        }
        assert_eq!(there.pit, state.pit);
        assert_eq!(there, state);
    }
}

#[test]
fn hostile_chips_are_refused() {
    let good = IrqchipWire::from_state(&IrqchipState::default(), Audience::MiniVmm, 0, 0);
    good.to_state(0, 0).unwrap();
    let refuse = |field: &str, change: &dyn Fn(&mut IrqchipWire)| {
        let mut wire = good.clone();
        change(&mut wire);
        assert_eq!(wire.to_state(i64::MIN, i64::MAX).unwrap_err().field, field);
    };
    refuse("channels[1].count", &|w| w.pit.channels[1].count = -1);
    refuse("channels[2].count", &|w| w.pit.channels[2].count = 0x10001);
    refuse("channels[0].mode", &|w| w.pit.channels[0].mode = 6);
    refuse("channels[0].rw_mode", &|w| w.pit.channels[0].rw_mode = 200);
    refuse("mini-vmm/pit.flags", &|w| w.pit.subs.mini.as_mut().unwrap().flags = 0x80);
    refuse("i8259[1].priority_add", &|w| w.pic[1].priority_add = 8);
    refuse("i8259[0].init_state", &|w| w.pic[0].init_state = 4);
    refuse("i8259[0].single_mode", &|w| w.pic[0].single_mode = 1);
}

#[test]
fn clocks_keep_their_state() {
    let vm = Vm::new(1);
    let state = ClockState::capture(&vm.fd).unwrap();
    let mini = carried("kvmclock", 0, &Kvmclock::from_state(&state, Audience::MiniVmm));
    assert_eq!(mini.to_state(), state);
    let qemu = carried("kvmclock", 0, &Kvmclock::from_state(&state, Audience::Qemu));
    assert_eq!(
        qemu.to_state(),
        ClockState { realtime: None, host_tsc: None, stable: false, ..state }
    );
    assert!(qemu.subs.reliable.unwrap().clock_is_reliable);
}

#[test]
fn hostile_vcpus_are_refused_by_field() {
    let vm = Vm::new(1);
    let context = context(&vm);
    let good = VcpuWire::from_state(&captured(&vm, 0), Audience::Qemu, &context).unwrap();
    let refuse = |field: &str, change: &dyn Fn(&mut VcpuWire)| {
        let mut wire = good.clone();
        change(&mut wire);
        let error: FieldError = wire.to_state(0, &context).unwrap_err();
        assert_eq!(error.field, field, "{error}");
    };
    refuse("env.mp_state", &|w| w.cpu.mp_state = 5);
    refuse("env.segs[CS].selector", &|w| w.cpu.segs[1].selector = 0x10000);
    refuse("env.gdt.limit", &|w| w.cpu.gdt.limit = 0x10000);
    refuse("env.exception_nr", &|w| w.cpu.exception_nr = 256);
    refuse("env.interrupt_injected", &|w| w.cpu.interrupt_injected = -2);
    refuse("env.sipi_vector", &|w| w.cpu.sipi_vector = 0x100);
    refuse("env.mcg_cap", &|w| w.cpu.mcg_cap = 11);
    refuse("env.fpregs_format_vmstate", &|w| w.cpu.fpregs_format = 1);
    refuse("env.fptag_vmstate", &|w| w.cpu.fptag = 0x100);
    refuse("env.tsc_khz", &|w| w.cpu.subs.tsc_khz.as_mut().unwrap().tsc_khz = -1);
    refuse("apic.id", &|w| w.apic.id = 1);
    refuse("cpu/msr_hyperv_crash", &|w| w.cpu.subs.hyperv_crash = Some([0, 0, 1, 0, 0]));
    refuse("env.bnd_regs", &|w| {
        let mut mpx = arch::wire::Mpx::default();
        mpx.bnd[1].upper = 1;
        w.cpu.subs.mpx = Some(mpx);
    });

    let mut part = good.clone();
    part.cpu.subs.mini_tsc = Some(arch::wire::mini::Tsc::default());
    assert_eq!(part.to_state(0, &context).unwrap_err().field, "mini-vmm/msrs");

    // An exception with an error code cannot be told to a QEMU, only to a mini-vmm.
    let mut state = captured(&vm, 0);
    state.events.exception.pending = 1;
    state.events.exception.error_code = 4;
    let error = VcpuWire::from_state(&state, Audience::Qemu, &context).unwrap_err();
    assert!(error.to_string().contains("0x4"), "{error}");
    VcpuWire::from_state(&state, Audience::MiniVmm, &context).unwrap();
}
