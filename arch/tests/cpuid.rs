//! CPUID on the real `/dev/kvm`.

mod common;

use arch::cpu_model::CpuModel;
use arch::cpuid::{CpuProfile, CpuidError, Feature, Lack, Reg};
use common::Vm;
use kvm_ioctls::Kvm;

const INVTSC: Feature = Feature { function: 0x8000_0007, index: 0, reg: Reg::Edx, bit: 8 };

#[test]
fn host_is_migratable_unless_asked_otherwise() {
    let kvm = Kvm::new().unwrap();
    let all = CpuProfile::host(&kvm).unwrap();
    let host = all.for_model("host".parse().unwrap()).unwrap();
    let off = all.for_model("host,migratable=off".parse().unwrap()).unwrap();
    assert!(!host.has(INVTSC));
    assert_eq!(off.has(INVTSC), all.has(INVTSC));
    assert!(host.has(Feature { function: 1, index: 0, reg: Reg::Ecx, bit: 31 }), "hypervisor");
    let signature = host.leaf(0x4000_0000, 0);
    let text = [signature.ebx, signature.ecx, signature.edx].map(u32::to_le_bytes).concat();
    assert_eq!(text, b"KVMKVMKVM\0\0\0");
    assert!(all.lacks(&host).is_empty(), "{:?}", all.lacks(&host));
    assert!(all.lacks(&off).is_empty());
}

#[test]
fn levels_are_offered_whole_or_refused_by_name() {
    let kvm = Kvm::new().unwrap();
    let all = CpuProfile::host(&kvm).unwrap();
    for name in ["x86-64-v2", "x86-64-v3"] {
        let model: CpuModel = name.parse().unwrap();
        match all.for_model(model) {
            Ok(profile) => {
                assert!(all.lacks(&profile).is_empty());
                assert!(profile.has(Feature { function: 1, index: 0, reg: Reg::Ecx, bit: 20 }));
                profile.for_vcpu(0, 4).unwrap();
            }
            Err(error @ CpuidError::Missing { .. }) => {
                let text = error.to_string();
                assert!(text.contains(name) && text.contains("lacks "), "{text}");
                let CpuidError::Missing { missing, .. } = error else { unreachable!() };
                assert!(!missing.is_empty());
                assert!(missing.iter().all(|feature| !feature.starts_with("CPUID ")));
            }
            Err(error) => panic!("{error}"),
        }
    }
}

#[test]
fn every_vcpu_is_one_core_of_one_socket() {
    let vm = Vm::new(3);
    for (index, vcpu) in vm.vcpus.iter().enumerate() {
        let cpuid = vcpu.get_cpuid2(256).unwrap();
        let leaf = |function, index| {
            cpuid.as_slice().iter().find(|e| e.function == function && e.index == index).copied()
        };
        let one = leaf(1, 0).unwrap();
        assert_eq!((one.ebx >> 24, one.ebx >> 16 & 0xff), (index as u32, 3));
        assert_ne!(one.edx & 1 << 28, 0, "HTT");
        let (smt, core, end) =
            (leaf(0xb, 0).unwrap(), leaf(0xb, 1).unwrap(), leaf(0xb, 2).unwrap());
        assert_eq!((smt.eax, smt.ebx, smt.ecx, smt.edx), (0, 1, 0x100, index as u32));
        assert_eq!((core.eax, core.ebx, core.ecx, core.edx), (2, 3, 0x201, index as u32));
        assert_eq!((end.eax, end.ebx, end.ecx), (0, 0, 2));
        assert_eq!(leaf(0x8000_0008, 0).unwrap().ecx, 2 << 12 | 2);
        assert!(leaf(0x1f, 0).is_none());
    }
    assert!(matches!(vm.profile.for_vcpu(0, 0), Err(CpuidError::Vcpus(0))));
    assert!(matches!(vm.profile.for_vcpu(3, 3), Err(CpuidError::Vcpus(3))));
}

#[test]
fn a_profile_survives_its_text_and_is_compared() {
    let kvm = Kvm::new().unwrap();
    let all = CpuProfile::host(&kvm).unwrap();
    let text = serde_json::to_string(&all).unwrap();
    assert_eq!(serde_json::from_str::<CpuProfile>(&text).unwrap(), all);

    let mut json: serde_json::Value = serde_json::from_str(&text).unwrap();
    for leaf in json["leaves"].as_array_mut().unwrap() {
        if leaf["function"] == 7 && leaf["index"] == 0 {
            leaf["ebx"] = (leaf["ebx"].as_u64().unwrap() | 1 << 14).into(); // mpx
        }
        if leaf["function"] == 0x8000_0008u32 {
            leaf["eax"] = (leaf["eax"].as_u64().unwrap() + 1).into();
        }
    }
    let guest: CpuProfile = serde_json::from_value(json).unwrap();
    let lacks = all.lacks(&guest);
    assert_eq!(lacks.len(), 2, "{lacks:?}");
    assert!(matches!(lacks[0], Lack::Value { .. }));
    assert_eq!(lacks[1].to_string(), "CPU feature mpx");
    assert!(guest.lacks(&all).is_empty());
}
