//! What a machine says of itself beyond RAM and sections. What a destination makes of it is in
//! [`fit`](super::fit).

use std::collections::BTreeMap;

use arch::cpuid::CpuProfile;
use arch::trial::VcpuNeeds;
use devices::pci::{BarKind, PciConfig};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use uuid::Uuid;

use crate::config::VirtioVersion;
use crate::vm::Vm;

/// The details of a manifest. A later version may add to them; what is missing is not compared.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Details {
    /// The VM's name, for messages.
    #[serde(default)]
    pub(super) name: String,
    /// Its UUID; nil if it has none.
    #[serde(default)]
    pub(super) uuid: Uuid,
    /// What the guest's CPUID tells.
    pub(super) cpu: CpuProfile,
    /// The guest's TSC frequency in kHz, if the kernel tells.
    pub(super) tsc_khz: Option<u32>,
    /// Size of a vCPU's XSAVE area in bytes.
    pub(super) xsave_size: usize,
    /// The PCI functions of the configuration.
    pub(super) devices: Vec<Device>,
    /// What each vCPU needs of a host, as it is now.
    #[serde(default)]
    pub(super) vcpus: Vec<VcpuNeeds>,
    /// What the source's KVM can beyond the necessary.
    #[serde(default)]
    pub(super) kvm: KvmExtras,
}

/// Capabilities of KVM that hardly any guest needs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub(super) struct KvmExtras {
    pub(super) exception_payload: bool,
    pub(super) triple_fault: bool,
    pub(super) nested_state: bool,
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
    /// What must be the same of its configuration space, by the offset of each byte that is not 0.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub config: BTreeMap<u8, u8>,
    /// Its BARs by their number, as words: `io 0x20`, `memory 0x1000`, `memory64 0x4000`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub bars: BTreeMap<u8, String>,
}

impl Device {
    /// What of a configuration space both sides must have.
    pub(crate) fn describe_config(config: &PciConfig) -> (BTreeMap<u8, u8>, BTreeMap<u8, String>) {
        let fixed = (0..=u8::MAX).zip(config.fixed()).filter(|(_, byte)| *byte != 0);
        let bar = |(index, kind, size)| {
            let kind = match kind {
                BarKind::Io => "io",
                BarKind::Memory32 => "memory",
                BarKind::Memory64 => "memory64",
            };
            Some((u8::try_from(index).ok()?, format!("{kind} {size:#x}")))
        };
        (fixed.collect(), config.bars().filter_map(bar).collect())
    }
}

/// What `vm` is and needs. A guest that runs goes on running; each of its vCPUs is looked at in a pause of
/// some microseconds.
pub(super) fn of(vm: &Vm) -> Value {
    let machine = &vm.machine;
    let details = Details {
        name: vm.config().name.to_string(),
        uuid: vm.config().uuid,
        cpu: machine.cpu.clone(),
        tsc_khz: machine.host.tsc_khz,
        xsave_size: machine.host.xsave_size,
        devices: machine.board.describe_devices(),
        vcpus: vm.look_at_vcpus(),
        kvm: KvmExtras {
            exception_payload: machine.host.exception_payload,
            triple_fault: machine.host.triple_fault,
            nested_state: machine.host.nested_state_size > 0,
        },
    };
    // A struct of plain values always has a JSON form.
    serde_json::to_value(details).unwrap_or_default()
}
