//! The conversions without KVM: whatever the stream says, no panic; whatever a vCPU holds, nothing
//! is lost.

use arch::cpuid::CpuProfile;
use arch::host::KvmHost;
use arch::msr::Msr;
use arch::vcpu_state::LapicPage;
use arch::wire::{
    Apic, Avx512, Cpu, ExceptionInfo, FpopIpDp, IrqchipWire, Mpx, One32, One64, Pmu, TscKhz,
    VcpuWire, WireContext, XsaveLayout,
};
use migration::vmstate::{Audience, SectionId, SliceSource, VmState, from_source, to_bytes};
use proptest::array::uniform32;
use proptest::collection::vec;
use proptest::prelude::*;

const NOW: i64 = 3_000_000_000;

/// An Intel processor with AVX-512, MPX and PKRU: component, size, offset.
const COMPONENTS: [(u32, u32, u32); 7] = [
    (2, 256, 576),
    (3, 64, 960),
    (4, 64, 1024),
    (5, 64, 1088),
    (6, 512, 1152),
    (7, 1024, 1664),
    (9, 8, 2688),
];

fn context() -> WireContext {
    let leaves: Vec<_> = COMPONENTS
        .iter()
        .map(|(index, size, offset)| {
            serde_json::json!({
                "function": 13, "index": index, "eax": size, "ebx": offset, "ecx": 0, "edx": 0
            })
        })
        .collect();
    let profile: CpuProfile =
        serde_json::from_value(serde_json::json!({ "leaves": leaves })).unwrap();
    let listed = [
        0x34,
        0x3a,
        0x3b,
        0x48,
        0x9e,
        0xe1,
        0x122,
        0x174,
        0x175,
        0x176,
        0x1a0,
        0x277,
        0x38d,
        0x38e,
        0x38f,
        0x390,
        0x309,
        0x30a,
        0x30b,
        0x6e1,
        0xd90,
        0xda0,
        0xc000_0081,
        0xc000_0082,
        0xc000_0083,
        0xc000_0084,
        0xc000_0102,
        0xc000_0103,
        0xc000_0104,
        0x4b56_4d00,
        0x4b56_4d01,
        0x4b56_4d02,
        0x4b56_4d03,
        0x4b56_4d04,
        0x4b56_4d05,
        0x4b56_4d06,
        0xc001_0117,
        0xc001_011f,
        0x4d0,
    ];
    let counters = (0xc1..0xc9).chain(0x186..0x18e);
    let listed: Vec<u32> = listed.into_iter().chain(counters).collect();
    let mcg_cap = 0x100_010a;
    WireContext {
        virtual_ns: NOW,
        phys_bits: 40,
        xsave: XsaveLayout::new(&profile),
        host: KvmHost {
            sregs2: true,
            xsave_size: 4096,
            nested_state_size: 0,
            tsc_scaling: false,
            tsc_offset: true,
            tsc_khz: None,
            exception_payload: true,
            triple_fault: true,
            kvmclock_ctrl: true,
            mcg_cap,
            msrs: arch::msr::state_list(&listed, mcg_cap),
        },
    }
}

fn decode<T: VmState>(bytes: &[u8]) -> Result<T, migration::vmstate::StateError> {
    from_source(&SectionId::new("x", 0), T::VERSION, &mut SliceSource::new(bytes))
}

fn encode<T: VmState>(state: &T) -> Vec<u8> {
    to_bytes(&SectionId::new("x", 0), state).unwrap()
}

/// The paths of the fields that differ, with both values.
fn differences<T: serde::Serialize>(found: &T, wanted: &T) -> Vec<String> {
    fn walk(path: String, a: &serde_json::Value, b: &serde_json::Value, out: &mut Vec<String>) {
        use serde_json::Value::{Array, Object};
        match (a, b) {
            (Object(x), Object(y)) => {
                x.keys().for_each(|k| walk(format!("{path}.{k}"), &x[k], &y[k], out));
            }
            (Array(x), Array(y)) if x.len() == y.len() => {
                (0..x.len()).for_each(|n| walk(format!("{path}[{n}]"), &x[n], &y[n], out));
            }
            _ if a != b => out.push(format!("{path}: found {a}, wanted {b}")),
            _ => {}
        }
    }
    let mut out = Vec::new();
    let json = |value: &T| serde_json::to_value(value).unwrap();
    walk(String::new(), &json(found), &json(wanted), &mut out);
    out
}

/// Any bytes in the fields that may hold any, right values in the others.
fn cpu() -> impl Strategy<Value = Cpu> {
    let subs =
        (any::<[bool; 12]>(), uniform32(1u64..), any::<[u64; 16]>(), vec(any::<u64>(), 64 + 128));
    (vec(any::<u8>(), 1817), subs).prop_map(|(bytes, (there, v, w, z))| {
        let mut cpu: Cpu = decode(&bytes).unwrap();
        for s in cpu.segs.iter_mut().chain([&mut cpu.ldt, &mut cpu.tr]) {
            s.selector &= 0xffff;
            // A segment that is not present is unusable, and has no flags on KVM.
            s.flags = if s.flags & 0x8000 == 0 { 0 } else { s.flags & 0x00f0_ff00 };
        }
        for s in [&mut cpu.gdt, &mut cpu.idt] {
            (s.selector, s.flags) = (0, 0);
            s.limit &= 0xffff;
        }
        cpu.eflags &= !(1 << 17);
        cpu.fptag &= 0xff;
        cpu.fpregs_format = 0;
        (cpu.dr[4], cpu.dr[5]) = (cpu.dr[6], cpu.dr[7]);
        cpu.a20_mask = -1;
        cpu.hflags2 &= 0x14;
        cpu.hflags2 |= 0x101;
        cpu.interrupt_injected = cpu.interrupt_injected.rem_euclid(257) - 1;
        cpu.exception_nr = cpu.exception_nr.rem_euclid(32);
        cpu.mp_state %= 5;
        cpu.sipi_vector &= 0xff;
        cpu.mcg_cap = 0x100_010a;
        cpu.xcr0 |= 1;
        // All components in use, so that none must be left out.
        cpu.xstate_bv = 0x2ff;
        for var in &mut cpu.mtrr_var {
            var.mask &= (1 << 40) - 1;
            var.mask |= 0xfff << 40;
        }
        // TCG's leftovers that KVM does not have.
        (cpu.vm_vmcb, cpu.tsc_offset, cpu.intercept, cpu.v_tpr) = (0, 0, 0, 0);
        (cpu.intercept_cr_read, cpu.intercept_cr_write) = (0, 0);
        (cpu.intercept_dr_read, cpu.intercept_dr_write, cpu.intercept_exceptions) = (0, 0, 0);

        let s = &mut cpu.subs;
        let one = |n: usize| there[n].then_some(One64 { value: v[n] });
        s.async_pf = one(0);
        s.steal_time = one(1);
        s.pv_eoi = one(2);
        s.poll_control = there[3].then_some(One64 { value: v[3] & !1 });
        s.tsc_adjust = one(4);
        s.tscdeadline = one(5);
        s.misc_enable = there[6].then_some(One64 { value: v[6] & !1 });
        s.spec_ctrl = one(7);
        s.xss = one(8);
        s.smi_count = one(9);
        s.umwait = there[10].then_some(One32 { value: v[10] as u32 | 1 });
        s.pkru = Some(One32 { value: v[11] as u32 | 1 });
        s.tsc_khz = Some(TscKhz { tsc_khz: i64::from(v[12] as u32 | 1) });
        s.fpop_ip_dp = Some(FpopIpDp { fpop: v[13] as u16, fpip: v[14], fpdp: v[15] });
        s.pdptrs = there[0].then_some([v[16], v[17], v[18], v[19]]);
        s.exception_info = there[1].then_some(ExceptionInfo {
            pending: 1,
            injected: u8::from(there[2]),
            has_payload: u8::from(there[3]),
            payload: v[20],
        });
        let mut pmu = Pmu { fixed_ctr_ctrl: v[21], ..Pmu::default() };
        pmu.gp_counters[..8].copy_from_slice(&w[..8]);
        pmu.gp_evtsel[..8].copy_from_slice(&w[8..]);
        pmu.fixed_counters = [v[22], v[23], v[24]];
        s.pmu = there[4].then_some(pmu);
        let mut mpx = Mpx { cfgu: v[25], status: v[26], cfgs: v[27], ..Mpx::default() };
        (mpx.bnd[0].lower, mpx.bnd[3].upper) = (v[28], v[29]);
        s.mpx = Some(mpx);
        let mut avx512 = Avx512 { opmask: [v[30]; 8], ..Avx512::default() };
        avx512.zmm_high.as_flattened_mut().copy_from_slice(&z[..64]);
        avx512.zmm16.as_flattened_mut().copy_from_slice(&z[64..]);
        s.avx512 = Some(avx512);
        cpu
    })
}

fn apic() -> impl Strategy<Value = Apic> {
    vec(any::<u8>(), 181).prop_map(|bytes| {
        let mut apic: Apic = decode(&bytes).unwrap();
        apic.id = 0;
        apic.arb_id = 0;
        apic.dest_mode &= 0xf;
        // Not in TSC-deadline mode, and just started.
        apic.lvt[0] &= !(1 << 18);
        apic.initial_count_load_time = NOW;
        apic
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    /// QEMU's fields → vCPU → QEMU's fields: what KVM cannot keep is known, all else is the same.
    #[test]
    fn qemus_fields_come_back(mut cpu in cpu(), apic in apic()) {
        let context = context();
        cpu.hflags &= 0x8_0008;
        let wire = VcpuWire { cpu, apic, ..VcpuWire::default() };
        let state = wire.to_state(0, &context).unwrap();
        let mut back = VcpuWire::from_state(&state, Audience::Qemu, &context).unwrap();
        let mut wanted = wire.clone();
        // A summary of other fields, but for two bits that are state.
        prop_assert_eq!(back.cpu.hflags & 0x8_0008, wanted.cpu.hflags);
        back.cpu.hflags = wanted.cpu.hflags;
        if wanted.cpu.hflags & 0x8_0000 == 0 {
            wanted.cpu.hflags2 &= !0x10; // not in SMM: not in SMM inside an NMI either
        }
        wanted.common.halted = u32::from(wanted.cpu.mp_state == 3);
        prop_assert_eq!(differences(&back.cpu, &wanted.cpu), Vec::<String>::new());
        prop_assert_eq!(back.common, wanted.common);
        // Derived from the others when written.
        let apic = &mut wanted.apic;
        apic.count_shift = back.apic.count_shift;
        apic.next_time = back.apic.next_time;
        apic.timer_expiry = back.apic.timer_expiry;
        prop_assert_eq!(differences(&back.apic, &*apic), Vec::<String>::new());
        // And once more, now exactly.
        prop_assert_eq!(back.to_state(0, &context).unwrap(), state);
    }

    /// Between mini-vmms everything is the same, whatever it is.
    #[test]
    fn a_mini_vmm_keeps_everything(
        cpu in cpu(),
        apic in apic(),
        page in vec(any::<u8>(), 1024),
        xsave in vec(any::<u8>(), 0..9000),
        msrs in vec(any::<(u32, u64)>(), 0..300),
        nested in proptest::option::of(vec(any::<u8>(), 128..8320)),
        tsc_offset in any::<Option<u64>>(),
        tsc_deadline in any::<Option<u64>>(),
        error_code in any::<u32>(),
    ) {
        let context = context();
        let mut state = VcpuWire { cpu, apic, ..VcpuWire::default() }.to_state(0, &context).unwrap();
        state.lapic = LapicPage(page.try_into().unwrap());
        state.msrs = msrs.into_iter().map(|(index, value)| Msr { index, value }).collect();
        state.nested = nested;
        (state.tsc_offset, state.tsc_deadline) = (tsc_offset, tsc_deadline);
        state.events.exception.error_code = error_code;
        state.sregs.cs.type_ = 0x1b;
        state.sregs.gs.unusable = 1;
        state.xsave = xsave;
        let wire = VcpuWire::from_state(&state, Audience::MiniVmm, &context).unwrap();
        let carried = VcpuWire {
            cpu: decode(&encode(&wire.cpu)).unwrap(),
            common: decode(&encode(&wire.common)).unwrap(),
            apic: decode(&encode(&wire.apic)).unwrap(),
        };
        prop_assert_eq!(carried.to_state(0, &context).unwrap(), state);
    }

    /// Any bytes give a state or an error.
    #[test]
    fn hostile_bytes_never_panic(
        cpu in prop_oneof![vec(any::<u8>(), 1817), vec(any::<u8>(), 0..2500)],
        apic in vec(any::<u8>(), 181),
        chips in vec(any::<u8>(), 16 + 16 + 206 + 108),
        virtual_ns in any::<i64>(),
        monotonic_ns in any::<i64>(),
    ) {
        let context = WireContext { virtual_ns, ..context() };
        let apic: Apic = decode(&apic).unwrap();
        if let Ok(cpu) = decode::<Cpu>(&cpu) {
            let index = apic.id.into();
            let wire = VcpuWire { cpu, apic, ..VcpuWire::default() };
            if let Ok(state) = wire.to_state(index, &context) {
                let _ = VcpuWire::from_state(&state, Audience::Qemu, &context);
            }
        }
        let (master, rest) = chips.split_at(16);
        let (slave, rest) = rest.split_at(16);
        let (ioapic, pit) = rest.split_at(206);
        let wire = IrqchipWire {
            pic: [decode(master).unwrap(), decode(slave).unwrap()],
            ioapic: decode(ioapic).unwrap(),
            pit: decode(pit).unwrap(),
        };
        if let Ok(state) = wire.to_state(virtual_ns, monotonic_ns) {
            IrqchipWire::from_state(&state, Audience::MiniVmm, virtual_ns, monotonic_ns);
        }
    }
}
