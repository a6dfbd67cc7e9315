//! What the guest's `CPUID` instruction answers.
//!
//! A [`CpuProfile`] is everything but the vCPU's own number: it is made once from the host and the
//! model, compared between two hosts ([`CpuProfile::lacks`]), and written out for each vCPU
//! ([`CpuProfile::for_vcpu`]). A destination gives its vCPUs the source's profile, not its own, so
//! that the guest sees the same processor after the move.
//!
//! Leaf numbers: Intel SDM volume 2 "CPUID", AMD APM volume 3 appendix E, and Linux'
//! `Documentation/virt/kvm/x86/cpuid.rst` for 0x4000_0000.

use kvm_bindings::{
    CpuId, KVM_CAP_TSC_DEADLINE_TIMER, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES,
    kvm_cpuid_entry2,
};
use kvm_ioctls::{Cap, Kvm};
use serde::{Deserialize, Serialize};

pub use crate::cpuid_compare::Lack;

use crate::cpu_model::{CpuModel, CpuModelName};
use crate::cpuid_names;
use crate::cpuid_topology;
use crate::error::{KvmError, vm_error};

/// Most vCPUs of a machine whose guests may not know x2APIC: APIC ids are 8 bits wide, and 255 is
/// all of them.
pub const MAX_VCPUS: u32 = 254;

/// One of the four registers that a leaf fills.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[allow(missing_docs)]
pub enum Reg {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// One feature bit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Feature {
    /// The leaf.
    pub function: u32,
    /// The sub-leaf, 0 where the leaf has none.
    pub index: u32,
    /// The register.
    pub reg: Reg,
    /// The bit's number.
    pub bit: u8,
}

impl std::fmt::Display for Feature {
    /// The feature's name, or where it stands.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match cpuid_names::name(*self) {
            Some(name) => f.write_str(name),
            None => write!(
                f,
                "CPUID {:#x}.{} {:?} bit {}",
                self.function, self.index, self.reg, self.bit
            ),
        }
    }
}

/// What one leaf (and sub-leaf) answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Leaf {
    pub function: u32,
    /// The sub-leaf; `None` where ECX does not matter.
    pub index: Option<u32>,
    pub eax: u32,
    pub ebx: u32,
    pub ecx: u32,
    pub edx: u32,
}

impl Leaf {
    /// The register's value.
    pub fn reg(&self, reg: Reg) -> u32 {
        match reg {
            Reg::Eax => self.eax,
            Reg::Ebx => self.ebx,
            Reg::Ecx => self.ecx,
            Reg::Edx => self.edx,
        }
    }

    fn reg_mut(&mut self, reg: Reg) -> &mut u32 {
        match reg {
            Reg::Eax => &mut self.eax,
            Reg::Ebx => &mut self.ebx,
            Reg::Ecx => &mut self.ecx,
            Reg::Edx => &mut self.edx,
        }
    }

    fn is_zero(&self) -> bool {
        self.eax | self.ebx | self.ecx | self.edx == 0
    }
}

/// Why no profile can be made.
#[derive(Debug, thiserror::Error)]
pub enum CpuidError {
    /// KVM does not answer.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The host's processor, or its KVM, does not have what the model promises.
    #[error("this host cannot run --cpu {model}: it lacks {}", .missing.join(", "))]
    Missing {
        /// The model.
        model: CpuModelName,
        /// The features' names.
        missing: Vec<String>,
    },
    /// A profile (from another host) with more leaves than KVM takes.
    #[error("a CPU profile of {0} leaves; KVM takes at most {KVM_MAX_CPUID_ENTRIES}")]
    TooLong(usize),
    /// More vCPUs than APIC ids.
    #[error("{0} vCPUs; this machine has 1 to {MAX_VCPUS}")]
    Vcpus(u32),
}

/// Everything that `CPUID` tells a guest, except which vCPU it is on and how many there are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuProfile {
    leaves: Vec<Leaf>,
}

impl CpuProfile {
    /// Everything that this host's KVM can give a guest: what another host's profile is compared
    /// with.
    pub fn host(kvm: &Kvm) -> Result<Self, CpuidError> {
        let supported = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(vm_error("KVM_GET_SUPPORTED_CPUID"))?;
        let leaves = supported
            .as_slice()
            .iter()
            .map(|e| Leaf {
                function: e.function,
                index: (e.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0).then_some(e.index),
                eax: e.eax,
                ebx: e.ebx,
                ecx: e.ecx,
                edx: e.edx,
            })
            .collect();
        let mut profile = Self { leaves };
        // KVM gives these without (on older kernels) listing them.
        if kvm.check_extension_raw(KVM_CAP_TSC_DEADLINE_TIMER.into()) > 0 {
            profile.change(1, 0, |leaf| leaf.ecx |= 1 << 24);
        }
        profile.change(1, 0, |leaf| leaf.ecx |= 1 << 31);
        profile.change(6, 0, |leaf| leaf.eax |= 1 << 2);
        profile.keep_what_vcpus_can_move(kvm.check_extension(Cap::NestedState));
        Ok(profile)
    }

    /// The profile that `model` gives a guest of the host whose [whole profile](Self::host) this is.
    pub fn for_model(&self, model: CpuModel) -> Result<Self, CpuidError> {
        let mut profile = self.clone();
        if let Some(features) = model.name.features() {
            let missing: Vec<String> = features
                .iter()
                .filter(|feature| !profile.has(**feature))
                .map(ToString::to_string)
                .collect();
            if !missing.is_empty() {
                return Err(CpuidError::Missing { model: model.name, missing });
            }
            profile.reduce_to(model.name, &features, model.migratable);
        }
        if model.migratable {
            profile.change(0x8000_0007, 0, |leaf| leaf.edx &= !INVTSC);
        }
        Ok(profile)
    }

    /// The leaves, for showing them.
    pub fn leaves(&self) -> &[Leaf] {
        &self.leaves
    }

    /// The leaf's answer; all zero where there is none.
    pub fn leaf(&self, function: u32, index: u32) -> Leaf {
        let found = self
            .leaves
            .iter()
            .find(|l| l.function == function && l.index.is_none_or(|i| i == index));
        found.copied().unwrap_or(Leaf {
            function,
            index: Some(index),
            eax: 0,
            ebx: 0,
            ecx: 0,
            edx: 0,
        })
    }

    /// Whether the feature is there.
    pub fn has(&self, feature: Feature) -> bool {
        let leaf = self.leaf(feature.function, feature.index);
        leaf.reg(feature.reg).checked_shr(feature.bit.into()).unwrap_or(0) & 1 != 0
    }

    /// Physical address width in bits; 36 where the processor does not say.
    pub fn phys_bits(&self) -> u8 {
        match self.leaf(0x8000_0008, 0).eax as u8 {
            0 => 36,
            bits => bits,
        }
    }

    /// The vendor's name, for example `GenuineIntel`.
    pub fn vendor(&self) -> String {
        let leaf = self.leaf(0, 0);
        let bytes: Vec<u8> =
            [leaf.ebx, leaf.edx, leaf.ecx].iter().flat_map(|r| r.to_le_bytes()).collect();
        String::from_utf8_lossy(&bytes).trim_end_matches('\0').to_string()
    }

    /// What vCPU `index` of `count` answers: one socket of `count` cores with one thread each, APIC
    /// ids equal to the index.
    pub fn for_vcpu(&self, index: u32, count: u32) -> Result<CpuId, CpuidError> {
        if count == 0 || count > MAX_VCPUS || index >= count {
            return Err(CpuidError::Vcpus(count));
        }
        let mut profile = self.clone();
        cpuid_topology::describe(&mut profile, index, count);
        let entries: Vec<_> = profile.leaves.iter().map(entry).collect();
        CpuId::from_entries(&entries).map_err(|_| CpuidError::TooLong(entries.len()))
    }

    /// Changes a leaf if it is there.
    pub(crate) fn change(&mut self, function: u32, index: u32, how: impl FnOnce(&mut Leaf)) {
        let leaf = self
            .leaves
            .iter_mut()
            .find(|l| l.function == function && l.index.is_none_or(|i| i == index));
        if let Some(leaf) = leaf {
            how(leaf);
        }
    }

    /// Replaces all sub-leaves of `function`.
    pub(crate) fn replace(&mut self, function: u32, leaves: impl IntoIterator<Item = Leaf>) {
        self.remove(|l| l.function == function);
        self.leaves.extend(leaves);
        self.leaves.sort_by_key(|l| (l.function, l.index));
    }

    fn remove(&mut self, which: impl Fn(&Leaf) -> bool) {
        self.leaves.retain(|leaf| !which(leaf));
    }

    /// Takes away what belongs to a physical machine, or has state that no migration carries.
    fn keep_what_vcpus_can_move(&mut self, nested: bool) {
        // OSXSAVE follows the guest's CR4, the kernel keeps it.
        self.change(1, 0, |leaf| leaf.ecx &= !(1 << 27));
        // MONITOR hints, thermal sensors, cache monitoring, SGX, processor trace, memory encryption.
        self.remove(|l| matches!(l.function, 5 | 0xf | 0x10 | 0x12 | 0x14 | 0x8000_001f));
        self.change(1, 0, |leaf| leaf.ecx &= !(1 << 3));
        self.change(6, 0, |leaf| {
            *leaf = Leaf { eax: leaf.eax & 4, ebx: 0, ecx: 0, edx: 0, ..*leaf };
        });
        const SGX: u32 = 1 << 2;
        const PROCESSOR_TRACE: u32 = 1 << 25;
        const SGX_LC: u32 = 1 << 30;
        self.change(7, 0, |leaf| {
            leaf.ebx &= !(SGX | PROCESSOR_TRACE);
            leaf.ecx &= !SGX_LC;
        });
        // Of power management only the invariant TSC means anything in a guest.
        self.change(0x8000_0007, 0, |leaf| {
            *leaf = Leaf { eax: 0, ebx: 0, ecx: 0, edx: leaf.edx & INVTSC, ..*leaf };
        });
        // Interfaces that need more of userspace than this VMM does: MSI with 15-bit destination
        // ids, and telling of encrypted pages.
        const KVM_MSI_EXT_DEST_ID: u32 = 1 << 15;
        const KVM_HC_MAP_GPA_RANGE: u32 = 1 << 16;
        const KVM_MIGRATION_CONTROL: u32 = 1 << 17;
        self.change(0x4000_0001, 0, |leaf| {
            leaf.eax &= !(KVM_MSI_EXT_DEST_ID | KVM_HC_MAP_GPA_RANGE | KVM_MIGRATION_CONTROL);
        });
        if !nested {
            self.change(1, 0, |leaf| leaf.ecx &= !VMX);
            self.change(0x8000_0001, 0, |leaf| leaf.ecx &= !SVM);
            self.remove(|l| l.function == 0x8000_000a);
        }
        // A leaf of zeros says the same as no leaf; the maxima in leaf 0 and 0x8000_0000 stay.
        self.remove(|l| l.is_zero() && l.function & 0x7fff_ffff != 0);
    }

    /// Takes away all feature bits but `features`, and every leaf that has to do with others.
    fn reduce_to(&mut self, name: CpuModelName, features: &[Feature], migratable: bool) {
        let xsave = features.contains(&XSAVE);
        self.remove(|l| {
            !matches!(
                l.function,
                0 | 1 | 4 | 6 | 7 | 0xb | 0xd | 0x4000_0000 | 0x4000_0001 | 0x8000_0000
                    ..=0x8000_0008 | 0x8000_001d | 0x8000_001e
            ) || (l.function == 7 && l.index != Some(0))
                || (l.function == 0xd && (!xsave || l.index > Some(2)))
        });
        for (function, reg) in FEATURE_WORDS {
            let keep = features
                .iter()
                .filter(|f| (f.function, f.reg) == (*function, *reg))
                .fold(0u32, |bits, f| bits | 1 << f.bit);
            self.change(*function, 0, |leaf| *leaf.reg_mut(*reg) &= keep);
        }
        // x87, SSE and AVX; no compaction, no supervisor state.
        self.change(0xd, 0, |leaf| {
            *leaf = Leaf { eax: 7, ebx: XSAVE_AVX_SIZE, ecx: XSAVE_AVX_SIZE, edx: 0, ..*leaf };
        });
        self.change(0xd, 1, |leaf| {
            *leaf = Leaf { eax: 0, ebx: 0, ecx: 0, edx: 0, ..*leaf };
        });
        // What every KVM since Linux 5.8 has: clocks, steal time, asynchronous page faults, paravirtual
        // EOI and unhalt, the stable clock source.
        const PARAVIRTUAL: u32 = 0x0100_00fb;
        self.change(0x4000_0001, 0, |leaf| {
            *leaf = Leaf { eax: leaf.eax & PARAVIRTUAL, ebx: 0, ecx: 0, edx: 0, ..*leaf };
        });
        self.change(0x8000_0008, 0, |leaf| leaf.ebx = 0);
        if migratable {
            self.change(0x8000_0007, 0, |leaf| leaf.edx = 0);
        }
        // A processor that nobody built: family 15, model 107, stepping 1 says "x86-64" and nothing
        // that would switch on a kernel's workarounds for a particular one.
        self.change(1, 0, |leaf| leaf.eax = 0x0006_0fb1);
        self.change(0, 0, |leaf| leaf.eax = leaf.eax.min(0xd));
        self.change(0x8000_0000, 0, |leaf| leaf.eax = leaf.eax.min(0x8000_001e));
        let mut brand = [0u8; 48];
        let text = format!("mini-vmm {name}");
        brand[..text.len()].copy_from_slice(text.as_bytes());
        for (leaf, bytes) in (0x8000_0002..=0x8000_0004).zip(brand.chunks_exact(16)) {
            let word = |n: usize| {
                bytes[4 * n..].first_chunk().map_or(0, |b: &[u8; 4]| u32::from_le_bytes(*b))
            };
            let leaf = Leaf {
                function: leaf,
                index: None,
                eax: word(0),
                ebx: word(1),
                ecx: word(2),
                edx: word(3),
            };
            self.replace(leaf.function, [leaf]);
        }
    }
}

const INVTSC: u32 = 1 << 8;
const VMX: u32 = 1 << 5;
const SVM: u32 = 1 << 2;
const XSAVE: Feature = Feature { function: 1, index: 0, reg: Reg::Ecx, bit: 26 };
/// Legacy area, header, and AVX' 256 bytes behind them.
const XSAVE_AVX_SIZE: u32 = 512 + 64 + 256;
/// The registers that consist of feature bits which a model rules.
const FEATURE_WORDS: &[(u32, Reg)] = &[
    (1, Reg::Ecx),
    (1, Reg::Edx),
    (6, Reg::Eax),
    (7, Reg::Ebx),
    (7, Reg::Ecx),
    (7, Reg::Edx),
    (0x8000_0001, Reg::Ecx),
    (0x8000_0001, Reg::Edx),
];

fn entry(leaf: &Leaf) -> kvm_cpuid_entry2 {
    kvm_cpuid_entry2 {
        function: leaf.function,
        index: leaf.index.unwrap_or(0),
        flags: if leaf.index.is_some() { KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 },
        eax: leaf.eax,
        ebx: leaf.ebx,
        ecx: leaf.ecx,
        edx: leaf.edx,
        ..Default::default()
    }
}
