//! Section `piix4_pm` v3.

use std::cell::Cell;
use std::fmt;

use migration::vmstate::{
    Audience, FieldError, FixedVec, Form, Migratable, Timer, VmState, Word, Words,
};
use serde::de::{SeqAccess, Visitor};
use serde::ser::SerializeTuple;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::Piix4Pm;
use super::acpi::AcpiRegisters;
use super::hotplug::{BUSES, Cpu, PciHotplug};
use super::smbus::{BLOCK, SmBus};
use crate::pci::{PCI_DEVICE_WORDS, PciDeviceState};

/// Section `0000:00:01.3/piix4_pm` v3. Its length depends on how many vCPUs there are: it is read
/// through [`PmSection`](super::PmSection).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PmState {
    pub(super) parent_obj: PciDeviceState,
    #[serde(rename = "ar.pm1.evt.sts")]
    pub(super) pm1_sts: u16,
    #[serde(rename = "ar.pm1.evt.en")]
    pub(super) pm1_en: u16,
    #[serde(rename = "ar.pm1.cnt.cnt")]
    pub(super) pm1_cnt: u16,
    pub(super) apm: Apm,
    pub(super) smb: SmBus,
    /// When the timer interrupts, in nanoseconds of the machine's clock.
    #[serde(rename = "ar.tmr.timer")]
    pub(super) timer: Timer,
    /// In ticks of the timer.
    #[serde(rename = "ar.tmr.overflow_time")]
    pub(super) overflow_time: i64,
    #[serde(rename = "ar.gpe")]
    pub(super) gpe: Gpe,
    #[serde(rename = "acpi_pci_hotplug.hotplug_select")]
    pub(super) hotplug_select: u32,
    #[serde(rename = "acpi_pci_hotplug.acpi_pcihp_pci_status")]
    pub(super) pci_slots: FixedVec<PciSlots, BUSES>,
    #[serde(rename = "acpi_pci_hotplug.acpi_index")]
    pub(super) acpi_index: u32,
    pub(super) subsections: Subsections,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename = "APM State")]
pub(super) struct Apm {
    pub(super) apmc: u8,
    pub(super) apms: u8,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename = "gpe")]
pub(super) struct Gpe {
    pub(super) sts: u16,
    pub(super) en: u16,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename = "acpi_pcihp_pci_status")]
pub(super) struct PciSlots {
    pub(super) up: u32,
    pub(super) down: u32,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename = "@subsections")]
pub(super) struct Subsections {
    #[serde(rename = "piix4_pm/memhp")]
    pub(super) memhp: Option<MemoryHotplug>,
    /// Only once the guest has switched to the modern interface.
    #[serde(rename = "piix4_pm/cpuhp")]
    pub(super) cpuhp: Option<CpuHotplug>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct MemoryHotplug {
    pub(super) acpi_memory_hotplug: MemorySelector,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename = "memory hotplug state")]
pub(super) struct MemorySelector {
    pub(super) selector: u32,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct CpuHotplug {
    pub(super) cpuhp_state: CpuHotplugState,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename = "CPU hotplug state")]
pub(super) struct CpuHotplugState {
    pub(super) selector: u32,
    pub(super) command: u8,
    pub(super) devs: PerCpu,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename = "CPU hotplug device state")]
pub(super) struct CpuState {
    pub(super) is_inserting: bool,
    pub(super) is_removing: bool,
    pub(super) ost_event: u32,
    pub(super) ost_status: u32,
}

/// One element per vCPU, and no count on the wire: a reader knows how many there are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct PerCpu(pub(super) Vec<CpuState>);

thread_local! {
    /// How many elements a [`PerCpu`] has that is read now.
    static CPUS: Cell<usize> = const { Cell::new(1) };
}

/// Reads with `f` on a machine of `cpus` vCPUs.
pub(super) fn with_cpus<T>(cpus: usize, f: impl FnOnce() -> T) -> T {
    struct Restore(usize);
    impl Drop for Restore {
        fn drop(&mut self) {
            CPUS.set(self.0);
        }
    }
    let _restore = Restore(CPUS.replace(cpus));
    f()
}

impl Serialize for PerCpu {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        let mut tuple = s.serialize_tuple(self.0.len())?;
        for cpu in &self.0 {
            tuple.serialize_element(cpu)?;
        }
        tuple.end()
    }
}

impl<'de> Deserialize<'de> for PerCpu {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct V;
        impl<'de> Visitor<'de> for V {
            type Value = PerCpu;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("one element per vCPU")
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<PerCpu, A::Error> {
                let mut cpus = Vec::new();
                while let Some(cpu) = seq.next_element()? {
                    cpus.push(cpu);
                }
                Ok(PerCpu(cpus))
            }
        }
        d.deserialize_tuple(CPUS.get(), V)
    }
}

/// QEMU's words: of the slots' registers it decides one by one whether they are sent.
const FIELDS: &[Word] = &[
    Word::shown("piix4_pm", "acpi_pci_hotplug.acpi_pcihp_pci_status", Form::Each),
    Word::shown("pmsmb", "smb_data", Form::Bytes),
];

impl VmState for PmState {
    const VERSION: u32 = 3;
    const WORDS: Words = Words { prefix: "", fields: &[PCI_DEVICE_WORDS, FIELDS] };
}

impl Migratable for Piix4Pm {
    type State = PmState;

    fn save(&self, _: Audience) -> Result<PmState, FieldError> {
        let slots = &self.pci_hotplug.slots;
        let devs = self.cpu_hotplug.cpus.iter().map(|cpu| CpuState {
            is_inserting: cpu.inserting,
            is_removing: cpu.removing,
            ost_event: cpu.ost_event,
            ost_status: cpu.ost_status,
        });
        let cpuhp = self.cpu_hotplug.modern.then(|| CpuHotplug {
            cpuhp_state: CpuHotplugState {
                selector: self.cpu_hotplug.selector,
                command: self.cpu_hotplug.command,
                devs: PerCpu(devs.collect()),
            },
        });
        Ok(PmState {
            parent_obj: self.config.save(false),
            pm1_sts: self.acpi.status,
            pm1_en: self.acpi.enable,
            pm1_cnt: self.acpi.control,
            apm: Apm { apmc: self.apm_control, apms: self.apm_status },
            smb: self.smbus.clone(),
            timer: Timer(self.acpi.saved_deadline_ns()),
            overflow_time: self.acpi.overflow_at,
            gpe: Gpe { sts: self.acpi.gpe_status, en: self.acpi.gpe_enable },
            hotplug_select: self.pci_hotplug.select,
            pci_slots: FixedVec::from_fn(|bus| {
                slots
                    .get(bus)
                    .map(|(up, down)| PciSlots { up: *up, down: *down })
                    .unwrap_or_default()
            }),
            acpi_index: self.pci_hotplug.acpi_index,
            subsections: Subsections {
                memhp: Some(MemoryHotplug {
                    acpi_memory_hotplug: MemorySelector { selector: self.memory_selector },
                }),
                cpuhp,
            },
        })
    }

    fn check(&self, state: &PmState) -> Result<(), FieldError> {
        self.config.check(&state.parent_obj)?;
        if state.smb.index as usize >= BLOCK {
            let found = state.smb.index;
            return Err(FieldError::new("smb.smb_index", "0 to 31", found));
        }
        if state.overflow_time < 0 {
            return Err(FieldError::new("ar.tmr.overflow_time", "0 or more", state.overflow_time));
        }
        if let Some(cpuhp) = &state.subsections.cpuhp {
            let (expected, found) = (self.cpu_hotplug.cpus.len(), cpuhp.cpuhp_state.devs.0.len());
            if expected != found {
                return Err(FieldError::new("cpuhp_state.devs", expected, found));
            }
        }
        Ok(())
    }

    fn restore(&mut self, state: PmState) -> Result<(), FieldError> {
        self.config.restore(&state.parent_obj);
        self.acpi = AcpiRegisters {
            status: state.pm1_sts,
            enable: state.pm1_en,
            control: state.pm1_cnt,
            overflow_at: state.overflow_time,
            gpe_status: state.gpe.sts,
            gpe_enable: state.gpe.en,
        };
        self.apm_control = state.apm.apmc;
        self.apm_status = state.apm.apms;
        self.smbus = state.smb;
        self.pci_hotplug = PciHotplug {
            select: state.hotplug_select,
            slots: state.pci_slots.iter().map(|slots| (slots.up, slots.down)).collect(),
            acpi_index: state.acpi_index,
        };
        self.memory_selector =
            state.subsections.memhp.map_or(0, |memhp| memhp.acpi_memory_hotplug.selector);
        self.cpu_hotplug.reset();
        if let Some(CpuHotplug { cpuhp_state }) = state.subsections.cpuhp {
            self.cpu_hotplug.modern = true;
            self.cpu_hotplug.selector = cpuhp_state.selector;
            self.cpu_hotplug.command = cpuhp_state.command;
            self.cpu_hotplug.cpus = cpuhp_state
                .devs
                .0
                .into_iter()
                .map(|cpu| Cpu {
                    inserting: cpu.is_inserting,
                    removing: cpu.is_removing,
                    ost_event: cpu.ost_event,
                    ost_status: cpu.ost_status,
                })
                .collect();
        }
        self.remap();
        self.update();
        Ok(())
    }
}
