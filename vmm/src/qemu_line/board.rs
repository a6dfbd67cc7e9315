//! Machine, accelerator, processor, memory and kernel of a QEMU command line.

use std::path::PathBuf;

use super::findings::Findings;
use super::options::{NO_SUCH_NET, Opt};
use super::props::{Props, Rule, Rules};
use crate::config::{
    ByteSize, CpuConfig, CpuModel, MAX_DIRTY_RING, MIN_DIRTY_RING, MachineType, Settings,
    is_dirty_ring,
};

/// What QEMU 7.2 gives a guest where nothing is said.
const DEFAULT_MEMORY: ByteSize = ByteSize(128 << 20);
/// The unit of `-m` without one.
const MIB: u64 = 1 << 20;

const ON: Rule = Rule::Only(&["on"]);
const ON_AUTO: Rule = Rule::Only(&["on", "auto"]);
const OFF: Rule = Rule::Only(&["off"]);
const ONE: Rule = Rule::Only(&["1"]);
const NONE: Rule = Rule::Only(&["0"]);

const MACHINE: Rules = &[
    ("usb", OFF),
    ("vmport", OFF),
    ("hpet", OFF),
    ("graphics", Rule::Host),
    ("kernel-irqchip", ON),
    ("kernel_irqchip", ON),
    ("acpi", ON_AUTO),
    ("smm", ON_AUTO),
    ("pit", ON_AUTO),
    ("pic", ON_AUTO),
    ("i8042", ON),
    ("smbus", ON),
    ("sata", ON),
    ("nvdimm", OFF),
    ("suppress-vmdesc", OFF),
    ("bus-lock-ratelimit", NONE),
    ("default-bus-bypass-iommu", OFF),
    ("dump-guest-core", Rule::Host),
    ("mem-merge", Rule::Host),
];
const ACCEL: Rules = &[("kernel-irqchip", ON), ("notify-vmexit", Rule::Host)];
const SMP: Rules = &[("sockets", ONE), ("dies", ONE), ("clusters", ONE), ("threads", ONE)];
const MEMORY: Rules = &[("slots", NONE)];
const RTC: Rules = &[
    ("base", Rule::Only(&["utc"])),
    ("clock", Rule::Only(&["host"])),
    ("driftfix", Rule::Only(&["none"])),
];

/// What was said about the board, until all options have been seen.
#[derive(Debug, Default)]
pub(super) struct Board {
    machine: Props,
    accels: Vec<String>,
    cpu: Option<String>,
    memory: Props,
    smp: Props,
    rtc: Props,
    nodefaults: bool,
    append: Option<String>,
}

impl Board {
    /// Takes an option, or gives it back if it is about something else.
    pub(super) fn take(
        &mut self,
        option: Opt,
        settings: &mut Settings,
        found: &mut Findings,
    ) -> Option<Opt> {
        let mut merge = |into: &mut Props, implied| match Props::parse(&option.value, implied) {
            Ok(props) => into.merge(props),
            Err(why) => found.matters(format!("-{}", option.name), why),
        };
        match option.name {
            "machine" | "M" => merge(&mut self.machine, "type"),
            "m" => merge(&mut self.memory, "size"),
            "smp" => merge(&mut self.smp, "cpus"),
            "rtc" => merge(&mut self.rtc, "base"),
            "accel" => self.accels.push(option.value),
            "enable-kvm" => self.accels.push("kvm".into()),
            "no-hpet" => merge_word(&mut self.machine, "hpet=off"),
            "cpu" => self.cpu = Some(option.value),
            "nodefaults" => self.nodefaults = true,
            "no-user-config" => {}
            "kernel" => settings.kernel = Some(PathBuf::from(option.value)),
            "initrd" => settings.initrd = Some(PathBuf::from(option.value)),
            "append" => self.append = Some(option.value),
            // The name without a directory is QEMU's own SeaBIOS, which mini-vmm finds as well.
            "bios" if option.value == "bios-256k.bin" => {}
            "bios" => settings.firmware = Some(PathBuf::from(option.value)),
            "vga" if option.value != "none" => {
                found.matters(
                    format!("-vga {}", option.value),
                    "mini-vmm has no display; start the guest in QEMU with -vga none",
                );
            }
            "parallel" | "net" | "nic" if option.value != "none" => {
                let what = match option.name {
                    "parallel" => "mini-vmm has no parallel port; start the guest in QEMU without",
                    _ => NO_SUCH_NET,
                };
                found.matters(format!("-{} {}", option.name, option.value), what);
            }
            "vga" | "parallel" | "net" | "nic" => {}
            _ => return Some(option),
        }
        None
    }

    /// Makes settings of all that was said.
    pub(super) fn finish(mut self, settings: &mut Settings, found: &mut Findings) {
        if !self.nodefaults {
            found.matters(
                "-nodefaults is missing",
                "without it QEMU adds a display, a network card and drives that mini-vmm has not; \
                 start the guest in QEMU with it",
            );
        }
        let accel = self.machine.take("accel").map(|all| all.replace(':', "\0"));
        let accels = accel.iter().flat_map(|all| all.split('\0')).map(str::to_string);
        let accels: Vec<_> = accels.chain(std::mem::take(&mut self.accels)).collect();
        settings.dirty_ring = accelerator(&accels, found);
        self.finish_machine(settings, found);
        settings.cpu = processor(self.cpu.as_deref(), found);
        settings.smp = self.finish_smp(found);
        settings.memory = self.finish_memory(found);
        self.rtc.settle("-rtc", &[RTC], found);
        match (&settings.kernel, self.append) {
            // Where nothing is said, QEMU's guests get an empty line, and ours a console.
            (Some(_), append) => settings.append = Some(append.unwrap_or_default()),
            (None, append) => settings.append = append,
        }
    }

    fn finish_machine(&mut self, settings: &mut Settings, found: &mut Findings) {
        let name = MachineType::default();
        match self.machine.take("type") {
            Some(said) => match said.parse() {
                Ok(machine) => settings.machine = Some(machine),
                Err(_) if said == "pc" => found.matters(
                    "-machine pc",
                    format!("what 'pc' is changes with each QEMU; name it: {name} in QEMU 7.2"),
                ),
                Err(_) => found.matters(
                    format!("-machine {said}"),
                    format!("mini-vmm has no such board, only {name}; a guest can't change boards"),
                ),
            },
            None => found.matters(
                "-machine is missing",
                format!("QEMU's default changes with each release; name the board: {name}"),
            ),
        }
        for (key, what) in [("hpet", "an HPET"), ("vmport", "VMware's port")] {
            let off = self.machine.take_switch(key) == Some(false);
            self.machine.take(key);
            if !off {
                found.matters(
                    "-machine",
                    format!(
                        "QEMU's board has {what} and mini-vmm's has not; start the guest in QEMU \
                         with {key}=off"
                    ),
                );
            }
        }
        // Only QEMU's firmware is told.
        self.machine.take("graphics");
        std::mem::take(&mut self.machine).settle("-machine", &[MACHINE], found);
    }

    fn finish_smp(&mut self, found: &mut Findings) -> Option<u32> {
        let mut props = std::mem::take(&mut self.smp);
        let mut number = |props: &mut Props, key: &str| {
            let text = props.take(key)?;
            let number = text.parse::<u32>().ok().filter(|n| *n > 0);
            if number.is_none() {
                found.matters("-smp", format!("{key}={text} is no number of vCPUs"));
            }
            number
        };
        let cpus = number(&mut props, "cpus");
        let cores = number(&mut props, "cores");
        let maxcpus = number(&mut props, "maxcpus");
        // QEMU counts what is left out from what is said.
        let cpus = cpus.or(cores).or(maxcpus).unwrap_or(1);
        if cores.is_some_and(|cores| cores != cpus) {
            found.matters(
                "-smp",
                "mini-vmm's vCPUs are cores of one socket; start the guest in QEMU with cores= the \
                 number of vCPUs, or with the number alone",
            );
        }
        if maxcpus.is_some_and(|max| max != cpus) {
            found.matters(
                "-smp",
                "mini-vmm adds no vCPUs while the guest runs; start it in QEMU without maxcpus",
            );
        }
        props.settle("-smp", &[SMP], found);
        Some(cpus)
    }

    fn finish_memory(&mut self, found: &mut Findings) -> Option<ByteSize> {
        let mut props = std::mem::take(&mut self.memory);
        let size = match props.take("size") {
            None => DEFAULT_MEMORY,
            Some(text) => memory_size(&text).unwrap_or_else(|| {
                found.matters(
                    format!("-m {text}"),
                    "this is no size; write a number of MiB, or one with K, M, G or T",
                );
                DEFAULT_MEMORY
            }),
        };
        if props.take("maxmem").is_some_and(|max| memory_size(&max) != Some(size)) {
            found.matters(
                "-m",
                "mini-vmm adds no memory while the guest runs; start it in QEMU without maxmem",
            );
        }
        props.settle("-m", &[MEMORY], found);
        Some(size)
    }
}

fn merge_word(into: &mut Props, word: &str) {
    if let Ok(props) = Props::parse(word, "") {
        into.merge(props);
    }
}

/// The entries of a dirty ring, if one is asked for.
fn accelerator(accels: &[String], found: &mut Findings) -> Option<u32> {
    let Some(first) = accels.first() else {
        found.matters(
            "-accel is missing",
            "QEMU emulates the processor where nothing is said; start the guest with -accel kvm",
        );
        return None;
    };
    let mut ring = None;
    match Props::parse(first, "accel") {
        Ok(mut props) => match props.take("accel").as_deref() {
            Some("kvm") => {
                ring = dirty_ring(&mut props, found);
                props.settle("-accel", &[ACCEL], found);
            }
            said => found.matters(
                format!("-accel {}", said.unwrap_or_default()),
                "mini-vmm runs guests under KVM only, and an emulated processor is another one; \
                 start the guest with -accel kvm",
            ),
        },
        Err(why) => found.matters("-accel", why),
    }
    for other in accels.get(1..).unwrap_or_default() {
        if other != "kvm" {
            found.note(&format!("-accel {other}"), "not tried: mini-vmm has KVM only");
        }
    }
    ring
}

/// The guest does not see it, so one that can't be had is left out.
fn dirty_ring(props: &mut Props, found: &mut Findings) -> Option<u32> {
    let said = props.take("dirty-ring-size")?;
    match said.parse() {
        Ok(0) => None,
        Ok(entries) if is_dirty_ring(entries) => Some(entries),
        _ => {
            found.note(
                &format!("-accel kvm,dirty-ring-size={said}"),
                &format!(
                    "a dirty ring has {MIN_DIRTY_RING} to {MAX_DIRTY_RING} entries here, a power of \
                     two; left out"
                ),
            );
            None
        }
    }
}

fn processor(text: Option<&str>, found: &mut Findings) -> Option<CpuConfig> {
    let Some(text) = text else {
        found.matters(
            "-cpu is missing",
            "QEMU's default is qemu64, which mini-vmm has not; start the guest with -cpu host",
        );
        return None;
    };
    let mut props = match Props::parse(text, "model") {
        Ok(props) => props,
        Err(why) => {
            found.matters("-cpu", why);
            return None;
        }
    };
    match props.take("model").as_deref() {
        Some("host") => {}
        said => {
            found.matters(
                format!("-cpu {}", said.unwrap_or_default()),
                "mini-vmm has not this model; start the guest with -cpu host",
            );
            return None;
        }
    }
    let migratable = props.take_switch("migratable").unwrap_or(true);
    props.settle("-cpu host", &[], found);
    Some(CpuConfig { model: CpuModel::Host, migratable })
}

/// A size as `-m` has it: MiB without a unit, powers of 1024 with one, rounded down to bytes.
fn memory_size(text: &str) -> Option<ByteSize> {
    let bare = text.bytes().all(|b| b.is_ascii_digit() || b == b'.');
    let text = if bare { format!("{text}M") } else { text.to_string() };
    // QEMU's units are one letter.
    if text.bytes().filter(u8::is_ascii_alphabetic).count() != 1 {
        return None;
    }
    let size: ByteSize = text.parse().ok()?;
    (size.0 >= MIB).then_some(size)
}
