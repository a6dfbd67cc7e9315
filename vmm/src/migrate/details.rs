//! What a machine says of itself beyond RAM and sections, and what a destination makes of it.

use arch::cpuid::CpuProfile;
use arch::host::KvmHost;
use migration::manifest::Problem;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::config::VirtioVersion;
use crate::vm::Vm;

/// The details of a manifest. A later version may add to them; what is missing is not compared.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Details {
    /// What the guest's CPUID tells.
    cpu: CpuProfile,
    /// The guest's TSC frequency in kHz, if the kernel tells.
    tsc_khz: Option<u32>,
    /// Size of a vCPU's XSAVE area in bytes.
    xsave_size: usize,
    /// The PCI functions of the configuration.
    devices: Vec<Device>,
}

/// One device on PCI bus 0.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Device {
    /// For example `virtio-blk`.
    pub kind: String,
    /// PCI slot.
    pub slot: u8,
    /// Number of virtqueues.
    pub queues: u32,
    /// MSI-X vectors; 0 without MSI-X.
    pub vectors: u32,
    /// Features offered to the driver.
    pub features: u64,
    /// Which drivers it is for.
    #[serde(default)]
    pub virtio: VirtioVersion,
    /// Capacity in 512-byte sectors, of a disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sectors: Option<u64>,
}

pub(super) fn of(vm: &Vm) -> Value {
    let machine = &vm.machine;
    let details = Details {
        cpu: machine.cpu.clone(),
        tsc_khz: machine.host.tsc_khz,
        xsave_size: machine.host.xsave_size,
        devices: machine.board.describe_devices(),
    };
    // A struct of plain values always has a JSON form.
    serde_json::to_value(details).unwrap_or_default()
}

fn problem(
    code: &str,
    what: impl Into<String>,
    expected: impl ToString,
    found: impl ToString,
    hint: &str,
) -> Problem {
    Problem {
        code: code.into(),
        what: what.into(),
        expected: expected.to_string(),
        found: found.to_string(),
        hint: hint.into(),
    }
}

/// Everything about `source` that does not fit this machine. When nothing does not, the guest's
/// processor is noted, to be shown again.
pub(super) fn compare(vm: &Vm, source: &Value) -> Vec<Problem> {
    let source = match serde_json::from_value::<Details>(source.clone()) {
        Ok(source) => source,
        Err(e) => {
            return vec![problem(
                "details",
                "the description of the machine",
                "one that this version understands",
                e,
                "use versions of mini-vmm that belong together",
            )];
        }
    };
    let machine = &vm.machine;
    let mut problems = devices(&machine.board.describe_devices(), &source.devices);
    let theirs =
        KvmHost { tsc_khz: source.tsc_khz, xsave_size: source.xsave_size, ..machine.host.clone() };
    let lacks = machine.host_cpu.lacks(&source.cpu).into_iter().chain(machine.host.lacks(&theirs));
    problems.extend(lacks.map(|lack| {
        problem(
            "cpu",
            "the processor",
            "less than the guest was promised",
            lack,
            "start the VM with a CPU model that all hosts have (--cpu x86-64-v2 or x86-64-v3), \
             and give the destination the same --cpu",
        )
    }));
    if problems.is_empty() {
        vm.kvm_state.promise(source.cpu);
    }
    problems
}

fn devices(here: &[Device], source: &[Device]) -> Vec<Problem> {
    let mut problems = Vec::new();
    for theirs in source {
        let Some(ours) = here.iter().find(|d| d.slot == theirs.slot) else {
            problems.push(problem(
                "pci-slot",
                format!("PCI slot {:02x}", theirs.slot),
                "nothing",
                &theirs.kind,
                "start the destination with the same devices at the same addr=",
            ));
            continue;
        };
        let name = format!("{} in PCI slot {:02x}", theirs.kind, theirs.slot);
        if ours.kind != theirs.kind {
            problems.push(problem(
                "pci-slot",
                format!("PCI slot {:02x}", theirs.slot),
                &ours.kind,
                &theirs.kind,
                "start the destination with the same devices at the same addr=",
            ));
            continue;
        }
        let mut differs = |code: &str, what: &str, a: String, b: String, hint: &str| {
            if a != b {
                problems.push(problem(code, format!("{what} of {name}"), a, b, hint));
            }
        };
        differs(
            "queues",
            "the number of queues",
            ours.queues.to_string(),
            theirs.queues.to_string(),
            "give both sides the same queues= (the default is one for each vCPU)",
        );
        differs(
            "virtio",
            "the kind",
            ours.virtio.to_string(),
            theirs.virtio.to_string(),
            "give both sides the same virtio=",
        );
        differs(
            "msix-vectors",
            "the number of MSI-X vectors",
            ours.vectors.to_string(),
            theirs.vectors.to_string(),
            "",
        );
        let show = |sectors: Option<u64>| sectors.map_or("none".into(), |n| format!("{n} sectors"));
        differs(
            "disk-size",
            "the capacity",
            show(ours.sectors),
            show(theirs.sectors),
            "both sides must use the same image",
        );
        let missing = theirs.features & !ours.features;
        if missing != 0 {
            problems.push(problem(
                "features",
                format!("the features of {name}"),
                format!("{:#x}", ours.features),
                format!("{:#x}, of which {missing:#x} are not to be had here", theirs.features),
                "use a back end with the same offloads on both sides",
            ));
        }
    }
    for ours in here.iter().filter(|d| source.iter().all(|s| s.slot != d.slot)) {
        problems.push(problem(
            "pci-slot",
            format!("PCI slot {:02x}", ours.slot),
            &ours.kind,
            "nothing",
            "start the destination with the same devices at the same addr=",
        ));
    }
    problems
}
