//! A VM on the real `/dev/kvm`, and a vCPU in a state that is not its first one.
#![allow(dead_code)]

use arch::cpu_model::CpuModel;
use arch::cpuid::CpuProfile;
use arch::host::KvmHost;
use arch::vcpu_init;
use arch::vcpu_state::VcpuState;
use kvm_ioctls::{Kvm, VcpuFd, VmFd};

/// A VM with its interrupt controllers and `N` vCPUs.
pub(crate) struct Vm {
    pub(crate) kvm: Kvm,
    pub(crate) fd: VmFd,
    pub(crate) host: KvmHost,
    pub(crate) profile: CpuProfile,
    pub(crate) vcpus: Vec<VcpuFd>,
}

impl Vm {
    pub(crate) fn new(count: u32) -> Self {
        let kvm = Kvm::new().expect("these tests need /dev/kvm");
        let fd = kvm.create_vm().unwrap();
        let host = KvmHost::probe(&kvm, &fd).unwrap();
        host.setup_vm(&fd).unwrap();
        let profile = CpuProfile::host(&kvm).unwrap().for_model(CpuModel::default()).unwrap();
        let vcpus = (0..count)
            .map(|index| {
                let vcpu = fd.create_vcpu(index.into()).unwrap();
                vcpu_init::init_vcpu(index, count, &vcpu, &profile, &host).unwrap();
                vcpu_init::reset_msrs(index, &vcpu).unwrap();
                vcpu
            })
            .collect();
        Self { kvm, fd, host, profile, vcpus }
    }

    pub(crate) fn capture(&self, index: u32) -> VcpuState {
        VcpuState::capture(index, &self.vcpus[index as usize], &self.host).unwrap()
    }

    pub(crate) fn restore(&self, state: &VcpuState) {
        state.restore(&self.vcpus[state.index as usize], &self.host).unwrap();
    }
}

/// Puts values of their own into every part of a captured state that a running guest may change.
pub(crate) fn scramble(state: &mut VcpuState) {
    let n = u64::from(state.index) + 1;
    let r = &mut state.regs;
    for (k, reg) in [
        &mut r.rax, &mut r.rbx, &mut r.rcx, &mut r.rdx, &mut r.rsi, &mut r.rdi, &mut r.rsp,
        &mut r.rbp, &mut r.r8, &mut r.r9, &mut r.r10, &mut r.r11, &mut r.r12, &mut r.r13,
        &mut r.r14, &mut r.r15,
    ]
    .into_iter()
    .enumerate()
    {
        *reg = 0x1111_2222_3333_0000 * n + k as u64;
    }
    r.rip = 0xffff_ffff_8100_1234;
    r.rflags = 0x246;

    // A 64-bit kernel: long mode, paging, user segments left from the last process.
    let s = &mut state.sregs;
    s.cr0 = 0x8005_0033;
    s.cr2 = 0x7fff_1234_5678;
    s.cr3 = 0x0432_1000;
    s.cr4 = 0x6f0;
    s.cr8 = 5;
    s.efer = 0xd01;
    s.cs = segment(0x10, 0, 0xffff_ffff, 0xb, 1, 0, 0);
    s.ss = segment(0x18, 0, 0xffff_ffff, 0x3, 0, 1, 0);
    s.ds = segment(0x2b, 0, 0xffff_ffff, 0x3, 0, 1, 3);
    s.es = unusable(0);
    s.fs = unusable(0x7f00_1234_5000);
    s.gs = unusable(0xffff_8880_0001_0000);
    s.tr = segment(0x40, 0xffff_fe00_0000_3000, 0x4087, 0xb, 0, 0, 0);
    s.tr.s = 0;
    s.tr.g = 0;
    s.ldt = unusable(0);
    s.gdt.base = 0xffff_fe00_0000_1000;
    s.gdt.limit = 0x7f;
    s.idt.base = 0xffff_fe00_0000_0000;
    s.idt.limit = 0xfff;

    state.debug.db = [0x1000, 0x2000, 0x3000, 0x4000];
    state.debug.dr6 = 0xffff_4ff1;
    state.debug.dr7 = 0x0000_0401;
    state.mp_state = 3;

    // x87 and SSE (and AVX, where XCR0 may have it): legacy area, then XSTATE_BV at 512.
    let area = &mut state.xsave;
    area[0..2].copy_from_slice(&0x027fu16.to_le_bytes());
    area[2..4].copy_from_slice(&0x3800u16.to_le_bytes());
    area[4] = 0x81;
    area[6..8].copy_from_slice(&0x07a5u16.to_le_bytes());
    area[8..16].copy_from_slice(&0x0000_7fff_0000_1111u64.to_le_bytes());
    area[16..24].copy_from_slice(&0x0000_7fff_0000_2222u64.to_le_bytes());
    area[24..28].copy_from_slice(&0x1fa0u32.to_le_bytes());
    for reg in 0..8 {
        area[32 + 16 * reg..42 + 16 * reg].fill(0x10 + reg as u8);
    }
    for (k, byte) in area[160..416].iter_mut().enumerate() {
        *byte = k as u8 ^ 0x5a;
    }
    area[512..520].copy_from_slice(&3u64.to_le_bytes());

    state.lapic.set(0x80, 0x50);
    state.lapic.set(0xd0, 0x0400_0000);
    state.lapic.set(0xf0, 0x1ff);
    state.lapic.set(0x320, 0x200ec); // periodic timer, vector 0xec
    state.lapic.set(0x350, 0x0001_0700);
    state.lapic.set(0x370, 0xfe);
    state.lapic.set(0x380, 0x7fff_ffff);
    state.lapic.set(0x390, 0x7fff_0000);
    state.lapic.set(0x3e0, 0xb); // count at bus speed

    set_msr(state, 0xc000_0081, 0x0023_0010_0000_0000);
    set_msr(state, 0xc000_0082, 0xffff_ffff_8180_0080);
    set_msr(state, 0xc000_0083, 0xffff_ffff_8180_1870);
    set_msr(state, 0xc000_0084, 0x0025_7fd5);
    set_msr(state, 0xc000_0102, 0xffff_8880_0002_0000);
    set_msr(state, 0x174, 0x10);
    // KVM on AMD keeps 32 bits of these two.
    set_msr(state, 0x175, 0x3000);
    set_msr(state, 0x176, 0x8180_17b0);
    set_msr(state, 0x277, 0x0407_0506_0007_0106);
    set_msr(state, 0x3b, 0x1234_5678);
    set_msr(state, 0x200, 0x8000_0000);
    set_msr(state, 0x201, 0x00ff_8000_0800);
    set_msr(state, 0x250, 0x0606_0606_0606_0600);
    set_msr(state, 0x26f, 0x0505_0505_0505_0505);
    set_msr(state, 0x404, 0);
}

/// Sets an MSR that the state has; nothing happens where the host does not have it.
pub(crate) fn set_msr(state: &mut VcpuState, index: u32, value: u64) {
    if let Some(msr) = state.msrs.iter_mut().find(|msr| msr.index == index) {
        msr.value = value;
    }
}

fn segment(
    selector: u16,
    base: u64,
    limit: u32,
    type_: u8,
    l: u8,
    db: u8,
    dpl: u8,
) -> kvm_bindings::kvm_segment {
    kvm_bindings::kvm_segment {
        base,
        limit,
        selector,
        type_,
        present: 1,
        dpl,
        db,
        s: 1,
        l,
        g: 1,
        avl: 0,
        unusable: 0,
        padding: 0,
    }
}

fn unusable(base: u64) -> kvm_bindings::kvm_segment {
    kvm_bindings::kvm_segment { base, unusable: 1, ..Default::default() }
}

/// The state without what goes on by itself while nobody looks: TSC, LAPIC timer's current count.
pub(crate) fn at_rest(mut state: VcpuState) -> VcpuState {
    state.tsc = 0;
    state.tsc_offset = None;
    state.lapic.set(0x390, 0);
    state
}
