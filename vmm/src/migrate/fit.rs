//! Would the source's VM fit this machine and this host: everything that does not, at once.
//!
//! The engine compares RAM and sections; here is what needs to know the board, the processor and the
//! host: PCI slots and what is in them, CPUID and KVM (tried out in [`trial`](super::trial)), free
//! memory, disks and taps.

use arch::cpuid::Lack;
use arch::host::KvmHost;
use arch::trial::VcpuNeeds;
use devices::virtio::Trouble;
use migration::problem::{Problem, kind};
use serde_json::Value;
use uuid::Uuid;

use super::details::{Details, Device};
use super::trial::Trial;
use crate::vm::Vm;

const SAME_DEVICES: &str = "start the destination with the same devices at the same addr=";
const SAME_CPU: &str = "start the VM with a CPU model that all hosts have (--cpu x86-64-v2 or \
                        x86-64-v3), and give the destination the same --cpu";
/// A block device's feature bit VIRTIO_BLK_F_RO (virtio 1.2, 5.2.3).
const READ_ONLY: u64 = 1 << 5;
/// What the destination needs beside the guest's RAM: its own process and KVM's page tables.
const OVERHEAD: u64 = 32 << 20;

/// Everything about `source` that does not fit this machine. When nothing does not, the guest's
/// processor is noted, to be shown again.
pub(super) fn compare(vm: &Vm, trial: &mut Trial, source: &Value) -> Vec<Problem> {
    let source = match serde_json::from_value::<Details>(source.clone()) {
        Ok(source) => source,
        Err(e) => {
            return vec![Problem::new(
                kind::DETAILS,
                "the description of the machine",
                "one that this version understands",
                e,
                "use versions of mini-vmm that belong together",
            )];
        }
    };
    let machine = &vm.machine;
    tracing::debug!("the source's VM is called '{}'", source.name);
    let mut problems = Vec::from_iter(uuid(vm.config().uuid, source.uuid));
    problems.extend(devices(&machine.board.describe_devices(), &source.devices));
    let theirs =
        KvmHost { tsc_khz: source.tsc_khz, xsave_size: source.xsave_size, ..machine.host.clone() };
    problems.extend(machine.host_cpu.lacks(&source.cpu).into_iter().map(processor));
    problems.extend(machine.host.lacks(&theirs).into_iter().map(processor));
    problems.extend(kvm(&machine.host, &source));
    problems.extend(trial.run(vm, &source));
    problems.extend(
        crate::memory::available()
            .and_then(|free| memory(free, machine.ram.size().saturating_sub(machine.ram.held()))),
    );
    problems.extend(machine.board.try_backends().into_iter().map(|(name, t)| back_end(&name, t)));
    if problems.iter().all(|problem| !problem.fatal) {
        vm.kvm_state.promise(source.cpu);
    }
    problems
}

/// Whether they are meant to be one VM. A side that has been given no UUID takes any.
fn uuid(here: Uuid, theirs: Uuid) -> Option<Problem> {
    let differ = !here.is_nil() && !theirs.is_nil() && here != theirs;
    let hint =
        "start the destination with the source's --uuid, or look whether it is the right one";
    let problem = Problem::new(kind::UUID, "the VM's UUID", here, theirs, hint).of("", "uuid");
    differ.then(|| problem.known_as(format!("UUID received is {theirs} and local is {here}")))
}

/// The first byte of a device's configuration that is not the same, as a QEMU says it.
fn configuration(name: &str, ours: &Device, theirs: &Device) -> Option<Problem> {
    // An older source does not say.
    if theirs.config.is_empty() {
        return None;
    }
    let byte = |of: &Device, at: u8| of.config.get(&at).copied().unwrap_or(0);
    let at = (0..=u8::MAX).find(|at| byte(ours, *at) != byte(theirs, *at))?;
    let (expected, found) = (byte(ours, at), byte(theirs, at));
    let hint = "use the same version of mini-vmm, and the same devices, on both sides";
    let what = format!("byte {at:#04x} of the PCI configuration of {name}");
    let (shown, read) = (format!("{expected:#04x}"), format!("{found:#04x}"));
    let known = format!(
        "get_pci_config_device: Bad config data: i={at:#x} read: {found:x} device: {expected:x}"
    );
    let problem = Problem::new(kind::PCI_CONFIG, what, shown, read, hint);
    Some(problem.of(name, format!("config[{at:#x}]")).known_as(known))
}

/// What the destination's processor or KVM lacks.
fn processor(lack: Lack) -> Problem {
    match lack {
        Lack::Feature(feature) => {
            let name = feature.to_string();
            let known = format!("host doesn't support requested feature: {name}");
            Problem::new(
                kind::CPU_FEATURE,
                format!("CPU feature {name}"),
                "a processor or a KVM without it",
                "promised it to the guest",
                SAME_CPU,
            )
            .of("", name)
            .known_as(known)
        }
        Lack::Value { what, wanted, found } => {
            let kind = match what.as_str() {
                what if what.starts_with("TSC") => kind::TSC_FREQUENCY,
                what if what.starts_with("size of the XSAVE") => kind::XSAVE_SIZE,
                _ => kind::CPU_FEATURE,
            };
            Problem::new(kind, what.clone(), found, wanted, SAME_CPU).of("", what)
        }
    }
}

/// Capabilities of KVM, fatal where the guest uses one now.
fn kvm(here: &KvmHost, source: &Details) -> Vec<Problem> {
    let mut problems = Vec::new();
    let newer = "use a kernel that is as new as the source's";
    for (name, theirs, ours) in [
        ("KVM_CAP_EXCEPTION_PAYLOAD", source.kvm.exception_payload, here.exception_payload),
        ("KVM_CAP_X86_TRIPLE_FAULT_EVENT", source.kvm.triple_fault, here.triple_fault),
    ] {
        if theirs && !ours {
            let problem = Problem::new(kind::KVM_CAPABILITY, name, "a KVM without it", "it", newer);
            problems.push(problem.of("", name).known_as(name));
        }
    }
    let hypervisors = source.vcpus.iter().filter(|vcpu| vcpu.hypervisor);
    if here.nested_state_size == 0 {
        problems.extend(hypervisors.map(|vcpu: &VcpuNeeds| {
            Problem::new(
                kind::NESTED_STATE,
                format!("vCPU {}, which runs a hypervisor", vcpu.index),
                "no KVM_CAP_NESTED_STATE",
                "it, in use",
                "use a host whose KVM has nested virtualization, or end the guest's VMs",
            )
            .of_vcpu(vcpu.index, "nested state")
        }));
    }
    problems
}

/// Whether the host has room for so much of the VM's memory as it has not given yet: with `--prealloc` that is none.
fn memory(free: u64, missing: u64) -> Option<Problem> {
    let needed = missing.saturating_add(OVERHEAD);
    let problem = Problem::new(
        kind::HOST_MEMORY,
        "free memory of the destination's host",
        format!("{free} bytes"),
        format!("need of {needed} bytes"),
        "free memory on that host, or let the process have more (its MemAvailable counts, and the \
         memory.max of its control groups), or choose another",
    );
    (free < needed).then(|| problem.of("", "MemAvailable"))
}

fn back_end(device: &str, trouble: Trouble) -> Problem {
    match trouble {
        Trouble::Missing { what, source } => {
            let (kind, hint) = if device.starts_with("virtio-blk") {
                (kind::DISK_MISSING, "let the destination's host reach the image at that path")
            } else {
                (kind::TAP_MISSING, "make the interface on the destination's host")
            };
            let known = format!("{}: {source}", kind.known_as);
            Problem::new(kind, &what, source, "it", hint).of(device, &what).known_as(known)
        }
        Trouble::NotWritable { what, source } => Problem::new(
            kind::DISK_NOT_WRITABLE,
            &what,
            format!("no permission to write to it ({source})"),
            "a guest that writes to it",
            "let the user that the destination runs as write to the image",
        )
        .of(device, what),
        Trouble::Size { what, was, is } => Problem::new(
            kind::DISK_SIZE,
            &what,
            format!("{is} sectors now"),
            format!("{was} sectors, as it had when the destination was started"),
            "start the destination anew, with the image that the source uses",
        )
        .of(device, what),
        Trouble::Unlocked { what } => Problem::new(
            kind::DISK_UNLOCKED,
            format!("the lock on {}", what.trim_start_matches("the ")),
            "one that nobody holds",
            "its own image locked",
            "make sure that both paths lead to the same image (a file system that does not share \
             locks between hosts looks the same)",
        )
        .of(device, what),
        Trouble::Offload { what, offload, source } => Problem::new(
            kind::TAP_OFFLOAD,
            format!("{offload} on {what}"),
            format!("a kernel that refuses it ({source})"),
            "it, offered to the driver",
            "use a kernel and a network driver with the same offloads on both hosts",
        )
        .of(device, offload)
        .known_as(format!("saved image requires {offload} support")),
    }
}

/// The feature that is compared by itself.
fn of_access(kind: &str) -> u64 {
    if kind == "virtio-blk" { READ_ONLY } else { 0 }
}

fn devices(here: &[Device], source: &[Device]) -> Vec<Problem> {
    let mut problems = Vec::new();
    for theirs in source {
        let Some(ours) = here.iter().find(|d| d.slot == theirs.slot) else {
            problems.push(
                Problem::new(
                    kind::PCI_SLOT,
                    format!("PCI slot {:02x}", theirs.slot),
                    "nothing",
                    &theirs.kind,
                    SAME_DEVICES,
                )
                .of(format!("PCI slot {:02x}", theirs.slot), "device"),
            );
            continue;
        };
        let name = format!("{} in PCI slot {:02x}", theirs.kind, theirs.slot);
        if ours.kind != theirs.kind {
            problems.push(
                Problem::new(
                    kind::PCI_SLOT,
                    format!("PCI slot {:02x}", theirs.slot),
                    &ours.kind,
                    &theirs.kind,
                    SAME_DEVICES,
                )
                .of(format!("PCI slot {:02x}", theirs.slot), "device"),
            );
            continue;
        }
        let before = problems.len();
        let mut differs = |kind, field: &str, what: &str, a: String, b: String, hint: &str| {
            if a != b {
                let problem = Problem::new(kind, format!("{what} of {name}"), a, b, hint);
                problems.push(problem.of(&name, field));
            }
        };
        differs(
            kind::QUEUES,
            "queues",
            "the number of queues",
            ours.queues.to_string(),
            theirs.queues.to_string(),
            "give both sides the same queues= (the default is one for each vCPU)",
        );
        differs(
            kind::PCI_CONFIG,
            "virtio",
            "the kind",
            ours.virtio.to_string(),
            theirs.virtio.to_string(),
            "give both sides the same virtio=",
        );
        differs(
            kind::PCI_CONFIG,
            "vectors",
            "the number of MSI-X vectors",
            ours.vectors.to_string(),
            theirs.vectors.to_string(),
            "",
        );
        let bars = |device: &Device| {
            let all = device.bars.iter().map(|(index, bar)| format!("BAR {index}: {bar}"));
            all.collect::<Vec<_>>().join(", ")
        };
        if !theirs.bars.is_empty() && ours.virtio == theirs.virtio && ours.vectors == theirs.vectors
        {
            differs(
                kind::PCI_CONFIG,
                "bars",
                "the BARs",
                bars(ours),
                bars(theirs),
                "use the same version of mini-vmm on both sides",
            );
        }
        let show = |sectors: Option<u64>| sectors.map_or("none".into(), |n| format!("{n} sectors"));
        differs(
            kind::DISK_SIZE,
            "sectors",
            "the capacity",
            show(ours.sectors),
            show(theirs.sectors),
            "both sides must use the same image",
        );
        if theirs.kind == "virtio-blk" {
            let access =
                |features| if features & READ_ONLY == 0 { "writable" } else { "read-only" };
            differs(
                kind::DISK_READONLY,
                "readonly",
                "the access to the image",
                access(ours.features).into(),
                access(theirs.features).into(),
                "give both sides the same readonly=",
            );
        }
        // It follows from any of the others.
        if problems.len() == before {
            problems.extend(configuration(&name, ours, theirs));
        }
        let missing = theirs.features & !ours.features & !of_access(&theirs.kind);
        if missing != 0 {
            problems.push(
                Problem::new(
                    kind::FEATURES,
                    format!("the features of {name}"),
                    format!("{:#x}", ours.features),
                    format!("{:#x}, of which {missing:#x} are not to be had here", theirs.features),
                    "use a back end with the same offloads on both sides",
                )
                .of(&name, "features")
                .known_as(format!(
                    "Features {:#x} unsupported. Allowed features: {:#x}",
                    theirs.features, ours.features
                )),
            );
        }
    }
    for ours in here.iter().filter(|d| source.iter().all(|s| s.slot != d.slot)) {
        problems.push(
            Problem::new(
                kind::PCI_SLOT,
                format!("PCI slot {:02x}", ours.slot),
                &ours.kind,
                "nothing",
                SAME_DEVICES,
            )
            .of(format!("PCI slot {:02x}", ours.slot), "device")
            .known_as(""),
        );
    }
    problems
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[test]
    fn a_host_with_too_little_memory_is_named_with_both_numbers() {
        assert_eq!(memory((1 << 30) + OVERHEAD, 1 << 30), None);
        let problem = memory(1 << 30, 1 << 30).unwrap();
        assert!(problem.fatal && problem.code == "host-memory", "{problem:?}");
        assert!(problem.to_string().contains("Cannot allocate memory"), "{problem}");
    }

    #[test]
    fn every_trouble_of_a_back_end_has_its_code() {
        let what = || "the disk image /a.img".to_string();
        let tap = || "tap tap0".to_string();
        let source = || io::Error::from(io::ErrorKind::NotFound);
        let cases = [
            (Trouble::Missing { what: what(), source: source() }, "disk-missing", "Could not open"),
            (Trouble::Missing { what: tap(), source: source() }, "tap-missing", "/dev/net/tun"),
            (Trouble::NotWritable { what: what(), source: source() }, "disk-not-writable", "write"),
            (Trouble::Size { what: what(), was: 8, is: 9 }, "disk-size", "9 sectors"),
            (Trouble::Unlocked { what: what() }, "disk-unlocked", "lock"),
            (
                Trouble::Offload { what: tap(), offload: "TUN_F_UFO", source: source() },
                "tap-offload",
                "saved image requires TUN_F_UFO support",
            ),
        ];
        for (trouble, code, words) in cases {
            let device = if code.starts_with("tap") { "virtio-net" } else { "virtio-blk" };
            let problem = back_end(&format!("{device} in PCI slot 03"), trouble);
            assert_eq!(problem.code, code);
            assert!(problem.to_string().contains(words), "{problem}");
            assert_eq!(problem.fatal, code != "disk-unlocked");
        }
    }

    fn device() -> Device {
        Device {
            kind: "virtio-net".into(),
            slot: 2,
            queues: 3,
            vectors: 4,
            features: 0xff,
            virtio: Default::default(),
            sectors: None,
            config: [(0, 0xf4), (1, 0x1a), (3, 0x10)].into(),
            bars: [(0, "io 0x20".into()), (1, "memory 0x1000".into())].into(),
        }
    }

    #[test]
    fn a_device_is_compared_in_all_that_its_configuration_says() {
        assert_eq!(devices(&[device()], &[device()]), []);
        let one = |change: fn(&mut Device)| {
            let mut theirs = device();
            change(&mut theirs);
            let problems = devices(&[device()], &[theirs]);
            assert_eq!(problems.len(), 1, "{problems:?}");
            let Problem { code, field, known_as, .. } = problems[0].clone();
            assert!(problems[0].fatal && known_as.contains("Bad config data") || code == "queues");
            (code, field, problems[0].to_string())
        };
        let (code, field, text) = one(|d| _ = d.config.insert(0x34, 0x98));
        assert_eq!((&code[..], &field[..]), ("pci-config", "config[0x34]"));
        assert!(text.contains("Bad config data: i=0x34 read: 98 device: 0"), "{text}");
        let (code, field, text) = one(|d| _ = d.bars.insert(1, "memory 0x2000".into()));
        assert_eq!((&code[..], &field[..]), ("pci-config", "bars"));
        assert!(text.contains("BAR 1: memory 0x2000"), "{text}");
        // What follows from something else is not said once more.
        let (code, field, _) = one(|d| {
            d.vectors = 5;
            d.config.insert(0x9a, 4);
            d.bars.insert(1, "memory 0x2000".into());
        });
        assert_eq!((&code[..], &field[..]), ("pci-config", "vectors"));
        assert_eq!(one(|d| d.queues = 5).0, "queues");
        // An older release says nothing of it.
        let older = Device { config: Default::default(), bars: Default::default(), ..device() };
        assert_eq!(devices(&[device()], &[older]), []);
    }

    #[test]
    fn two_uuids_are_one_too_many() {
        let (a, b) = (Uuid::from_u128(1), Uuid::from_u128(2));
        assert_eq!((uuid(a, a), uuid(a, Uuid::nil()), uuid(Uuid::nil(), a)), (None, None, None));
        let problem = uuid(a, b).expect("a problem");
        assert!(problem.fatal && problem.code == "uuid");
        assert!(problem.known_as.starts_with("UUID received is 00000000"), "{problem}");
    }

    #[test]
    fn what_a_processor_lacks_has_a_code_of_its_own() {
        let value =
            |what: &str| Lack::Value { what: what.into(), wanted: "2".into(), found: "1".into() };
        for (what, code) in [
            ("TSC frequency", "tsc-frequency"),
            ("size of the XSAVE area", "xsave-size"),
            ("physical address bits", "cpu-feature"),
        ] {
            assert_eq!(processor(value(what)).code, code);
        }
    }
}
