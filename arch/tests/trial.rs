//! What a host's KVM refuses is found on a spare vCPU, all of it at once.

mod common;

use arch::msr::Msr;
use arch::trial::{Refusal, VcpuNeeds};
use common::Vm;

#[test]
fn a_host_takes_its_own_vcpus_and_names_all_that_it_does_not_take() {
    let source = Vm::new(2);
    let spare = Vm::new(1);
    for (index, vcpu) in source.vcpus.iter().enumerate() {
        let needs = VcpuNeeds::capture(index as u32, vcpu, &source.host).unwrap();
        assert!(!needs.msrs.is_empty() && !needs.hypervisor, "{needs:?}");
        let refusals = needs.try_out(2, &spare.vcpus[0], &source.profile, &spare.host);
        assert_eq!(refusals, []);
    }
    let mut needs = VcpuNeeds::capture(1, &source.vcpus[1], &source.host).unwrap();
    // A register that there is not, a memory type that there is not, a component that there is not,
    // x87 switched off.
    needs.msrs.push((0x4b56_50df, 5));
    needs.msrs.push((0x2ff, 0x2376));
    needs.msrs.push((0x4b56_50de, 0));
    needs.xstate = 1 << 40;
    needs.xcr0 = 2;
    let refusals = needs.try_out(2, &spare.vcpus[0], &source.profile, &spare.host);
    assert!(matches!(&refusals[..2], [Refusal::Xsave(_), Refusal::Xcr0(_)]), "{refusals:?}");
    let Refusal::Msr { msr, held: None } = refusals[2] else { panic!("{refusals:?}") };
    assert_eq!(msr, Msr { index: 0x4b56_50df, value: 5 });
    let Refusal::Msr { msr, held: Some(_) } = refusals[3] else { panic!("{refusals:?}") };
    assert_eq!(msr.index, 0x2ff);
    assert_eq!(refusals.len(), 4);
}
