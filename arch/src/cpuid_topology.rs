//! Which vCPU am I, and who are the others: the leaves that tell the machine's shape.
//!
//! As the machine type presents `-smp N`: one socket of N cores with one thread each, APIC id =
//! core number. All leaves must agree, or a guest's kernel finds fault with the firmware.

use crate::cpuid::{CpuProfile, Leaf};

/// Level types of leaf 0xb (Intel SDM volume 2): hyper-thread and core.
const LEVEL_SMT: u32 = 1;
const LEVEL_CORE: u32 = 2;

/// Writes vCPU `index` of `count` into all leaves of `profile` that tell of it. `count` is 1 to 254.
pub(crate) fn describe(profile: &mut CpuProfile, index: u32, count: u32) {
    // How many bits of the APIC id number the cores.
    let core_bits = count.next_power_of_two().trailing_zeros();
    let intel = profile.vendor() == "GenuineIntel";
    profile.change(1, 0, |leaf| {
        const HTT: u32 = 1 << 28;
        leaf.ebx = (leaf.ebx & 0xff00) | (index << 24) | (count << 16);
        leaf.edx = if count > 1 { leaf.edx | HTT } else { leaf.edx & !HTT };
    });
    // Intel's caches: the last level is shared by all, the others by nobody. Bits 31:26 cores in
    // the package less one, 25:14 ids sharing this cache less one.
    for n in 0..8 {
        profile
            .change(4, n, |leaf| leaf.eax = shared(leaf.eax, count) | cores_field(leaf.eax, count));
    }
    // AMD's the same, without the number of cores.
    for n in 0..8 {
        profile.change(0x8000_001d, n, |leaf| leaf.eax = shared(leaf.eax, count));
    }
    if profile.leaf(0, 0).eax >= 0xb {
        let level = |n: u32, shift, threads, kind: u32| Leaf {
            function: 0xb,
            index: Some(n),
            eax: shift,
            ebx: threads,
            ecx: (kind << 8) | n,
            edx: index,
        };
        profile.replace(
            0xb,
            [level(0, 0, 1, LEVEL_SMT), level(1, core_bits, count, LEVEL_CORE), level(2, 0, 0, 0)],
        );
    }
    // Dies and tiles are more levels than this machine has.
    profile.replace(0x1f, []);
    profile.change(0x8000_0001, 0, |leaf| {
        const CMP_LEGACY: u32 = 1 << 1;
        leaf.ecx = if count > 1 && !intel { leaf.ecx | CMP_LEGACY } else { leaf.ecx & !CMP_LEGACY };
    });
    profile.change(0x8000_0008, 0, |leaf| {
        leaf.ecx = if count > 1 { (core_bits << 12) | (count - 1) } else { 0 };
    });
    // AMD's extended APIC id, core id with one thread per core, and the only node.
    profile.change(0x8000_001e, 0, |leaf| {
        *leaf = Leaf { eax: index, ebx: index & 0xff, ecx: 0, edx: 0, ..*leaf };
    });
}

/// EAX of a cache leaf: bits 7:5 level, 4:0 type (0 none).
fn shared(eax: u32, count: u32) -> u32 {
    const SHARING: u32 = 0xfff << 14;
    let level = (eax >> 5) & 7;
    let others = if level >= 3 { count - 1 } else { 0 };
    if eax & 0x1f == 0 { eax } else { (eax & !(SHARING | 0x3f << 26)) | (others << 14) }
}

fn cores_field(eax: u32, count: u32) -> u32 {
    let cores = (count.next_power_of_two() - 1).min(0x3f);
    if eax & 0x1f == 0 { 0 } else { cores << 26 }
}
