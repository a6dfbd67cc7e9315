//! A vCPU's whole state goes from one VM into another on the real `/dev/kvm`.

mod common;

use arch::clock::ClockState;
use arch::cpuid::{Feature, Reg};
use arch::error::KvmError;
use common::{Vm, at_rest, scramble};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

#[test]
fn a_scrambled_vcpu_arrives_as_it_was() {
    let (source, destination) = (Vm::new(2), Vm::new(2));
    for index in 0..2 {
        let fresh = source.capture(index);
        let mut wanted = fresh.clone();
        scramble(&mut wanted);
        source.restore(&wanted);
        let captured = source.capture(index);
        assert_eq!(captured.regs, wanted.regs);
        assert_eq!(captured.sregs, wanted.sregs);
        assert_eq!(captured.xsave[..416], wanted.xsave[..416]);
        assert_eq!(captured.debug, wanted.debug);
        assert_eq!(captured.msrs, wanted.msrs);
        assert_eq!(captured.mp_state, wanted.mp_state);
        assert_ne!(captured.lapic.get(0x390), 0, "the timer's current count is captured");
        destination.restore(&captured);
        assert_eq!(at_rest(destination.capture(index)), at_rest(captured));
    }
}

#[test]
fn a_refused_msr_is_named_with_vcpu_and_value() {
    let vm = Vm::new(1);
    let mut state = vm.capture(0);
    common::set_msr(&mut state, 0xc000_0082, 1 << 63);
    let error = state.restore(&vm.vcpus[0], &vm.host).unwrap_err();
    assert!(matches!(
        error,
        KvmError::Msr { vcpu: 0, index: 0xc000_0082, value: 0x8000_0000_0000_0000, .. }
    ));
    let text = error.to_string();
    assert!(text.contains("failed to set MSR 0xc0000082 (LSTAR) to 0x8000000000000000"), "{text}");
    // The registers after the refused one are not lost on the next, right restore.
    vm.restore(&vm.capture(0));
}

#[test]
fn an_msr_that_the_host_lacks_matters_only_if_it_holds_something() {
    let vm = Vm::new(1);
    let mut state = vm.capture(0);
    let nowhere = 0x4b56_4dff;
    state.msrs.push(arch::msr::Msr { index: nowhere, value: 0 });
    vm.restore(&state);
    state.msrs.last_mut().unwrap().value = 7;
    let text = state.restore(&vm.vcpus[0], &vm.host).unwrap_err().to_string();
    assert!(text.contains("0x4b564dff to 0x7") && text.contains("no such MSR"), "{text}");
}

#[test]
fn hostile_states_are_refused_with_a_reason() {
    let vm = Vm::new(1);
    let good = vm.capture(0);
    let refuse = |what: &str, change: &dyn Fn(&mut arch::vcpu_state::VcpuState)| {
        let mut state = good.clone();
        change(&mut state);
        let text = state.restore(&vm.vcpus[0], &vm.host).unwrap_err().to_string();
        assert!(text.starts_with("vCPU 0: ") && text.contains(what), "{what}: {text}");
    };
    refuse("MP state", &|s| s.mp_state = 77);
    refuse("XSAVE area", &|s| s.xsave.resize(1 << 20, 1));
    refuse("KVM_SET_XSAVE", &|s| s.xsave[519] = 0x80);
    refuse("XCRs", &|s| s.xcrs = vec![(0, 1); 17]);
    refuse("KVM_SET_XCRS", &|s| s.xcrs = vec![(0, 0)]);
    refuse("KVM_SET_SREGS", &|s| s.sregs.efer = !0);
    refuse("nested state", &|s| s.nested = Some(vec![0; 10]));
    refuse("TSC frequency", &|s| s.tsc_khz /= 2);
    vm.restore(&good);
}

#[test]
fn clocks_go_on_by_the_time_that_has_passed() {
    let (source, destination) = (Vm::new(1), Vm::new(1));
    let clock = ClockState::capture(&source.fd).unwrap();
    let mut state = source.capture(0);
    // The source stood still two and a half seconds ago.
    let ago = ClockState { realtime: clock.realtime.map(|t| t - 2_500_000_000), ..clock };
    state.tsc_deadline = state.tsc_deadline.map(|_| 0);
    let settable = tsc_can_be_set(&destination);
    destination.restore(&state);
    let base = ago.restore(&destination.fd).unwrap();
    assert!((2_500_000_000..12_500_000_000).contains(&base.advanced), "{}", base.advanced);
    state.restore_tsc(&destination.vcpus[0], &destination.host, &base).unwrap();
    let after = destination.capture(0);
    let now = ClockState::capture(&destination.fd).unwrap();
    assert!(now.clock >= clock.clock + base.advanced);
    let ticks = after.tsc.wrapping_sub(state.tsc);
    let wanted = 2_500_000 * u64::from(state.tsc_khz) / 1000;
    if settable {
        assert!((wanted..wanted * 5).contains(&ticks), "{ticks} TSC ticks, wanted {wanted}");
    } else {
        // An interpreting KVM shows the host's own TSC; it must at least not go back.
        assert!(ticks < 1 << 63, "{ticks} TSC ticks");
    }

    // From a QEMU: no wall clock, nothing is added.
    let base = ClockState { realtime: None, ..clock }.restore(&destination.fd).unwrap();
    assert_eq!(base.advanced, 0);
    // Wall clocks that disagree are not believed.
    let far = ClockState { realtime: Some(0), ..clock };
    assert_eq!(far.advance_at(1_790_000_000_000_000_000), 0);
    assert_eq!(ClockState { realtime: Some(10), ..clock }.advance_at(9), 0);
    assert_eq!(ClockState { realtime: Some(10), ..clock }.advance_at(17), 7);
}

#[test]
fn a_guest_that_is_a_hypervisor_moves_or_is_refused() {
    const SVM: Feature = Feature { function: 0x8000_0001, index: 0, reg: Reg::Ecx, bit: 2 };
    let (source, destination) = (Vm::new(1), Vm::new(1));
    let mut state = source.capture(0);
    scramble(&mut state);
    state.sregs.efer |= 1 << 12; // SVME
    let tried = state.restore(&source.vcpus[0], &source.host);
    if source.profile.has(SVM) {
        tried.unwrap();
        let captured = source.capture(0);
        assert!(captured.nested.is_some());
        destination.restore(&captured);
        assert_eq!(at_rest(destination.capture(0)), at_rest(captured));
    } else {
        // No such feature, no such guest: the processor refuses the bit, or the capture the state.
        let refused = tried.err().or_else(|| {
            arch::vcpu_state::VcpuState::capture(0, &source.vcpus[0], &source.host).err()
        });
        let text = refused.unwrap().to_string();
        assert!(text.contains("KVM_SET_SREGS") || text.contains("nested state"), "{text}");
    }
}

#[test]
fn guest_memory_is_touched_only_when_the_clock_is_set() {
    const WALL_CLOCK: u64 = 0x2000;
    let vm = Vm::new(2);
    let ram = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
    let region = kvm_bindings::kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: 1 << 20,
        userspace_addr: ram.get_host_address(GuestAddress(0)).unwrap() as u64,
    };
    // SAFETY: `ram` is mapped for the whole region and outlives the last use of the VM.
    unsafe { vm.fd.set_user_memory_region(region) }.unwrap();
    let mut states = [vm.capture(0), vm.capture(1)];
    for state in &mut states {
        common::set_msr(state, 0x4b56_4d00, WALL_CLOCK);
        common::set_msr(state, 0x4b56_4d01, 0x3001 + 0x40 * u64::from(state.index));
        common::set_msr(state, 0x4b56_4d03, 0x4001 + 0x40 * u64::from(state.index));
        common::set_msr(state, 0x4b56_4d04, 0x5001 + 0x40 * u64::from(state.index));
        vm.restore(state);
    }
    let mut bytes = vec![0u8; 1 << 20];
    ram.read_slice(&mut bytes, GuestAddress(0)).unwrap();
    assert!(bytes.iter().all(|&byte| byte == 0), "memory was written too early");

    let clock = ClockState { clock: 3_600_000_000_000, ..ClockState::capture(&vm.fd).unwrap() };
    let base = clock.restore(&vm.fd).unwrap();
    for state in &states {
        state.restore_tsc(&vm.vcpus[state.index as usize], &vm.host, &base).unwrap();
    }
    // struct pvclock_wall_clock: version, then the seconds at which the guest booted.
    let version: u32 = ram.read_obj(GuestAddress(WALL_CLOCK)).unwrap();
    let booted: u32 = ram.read_obj(GuestAddress(WALL_CLOCK + 4)).unwrap();
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    assert!(version != 0 && version.is_multiple_of(2));
    assert!((3599..=3660).contains(&(now.as_secs() as u32 - booted)), "booted at {booted}");
    for index in 0..2 {
        assert_eq!(vm.capture(index).msrs, states[index as usize].msrs);
    }
}

fn tsc_can_be_set(vm: &Vm) -> bool {
    let before = vm.capture(0).tsc;
    let far = arch::msr::Msr { index: arch::msr::IA32_TSC, value: before.wrapping_add(1 << 50) };
    arch::msr::write(0, &vm.vcpus[0], &[far]).unwrap();
    let moved = vm.capture(0).tsc.wrapping_sub(before) >= 1 << 50;
    let back = arch::msr::Msr { value: before, ..far };
    arch::msr::write(0, &vm.vcpus[0], &[back]).unwrap();
    moved
}
