//! From what was said to what it means: defaults, addresses, checks.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Serialize;
use uuid::Uuid;

use crate::selfcheck::SelfcheckParams;

use super::{
    ByteSize, CharBackend, ConfigError, ConsoleConfig, CpuConfig, DiskConfig, MacAddr, MachineType,
    MigrateListen, NetBackend, NetConfig, NetSettings, OnOff, PciSlot, PlainConfig, QmpSocket,
    Settings, VmName,
};

/// Most vCPUs a machine can have, so that a guest without x2APIC can name them all.
pub const MAX_CPUS: u32 = arch::cpuid::MAX_VCPUS;

/// The shortest dirty ring: KVM keeps 64 of its entries for itself, and 512 more on processors that log
/// pages themselves (Linux, virt/kvm/dirty_ring.c and arch/x86/kvm/vmx; Intel's PML).
pub const MIN_DIRTY_RING: u32 = 1024;

/// The longest (Linux, KVM_DIRTY_RING_MAX_ENTRIES).
pub const MAX_DIRTY_RING: u32 = 65536;

/// Granule of RAM sizes.
const MIB: u64 = 1 << 20;

/// Least RAM: the guests' images and the boot structures in the first MiB need that much.
const MIN_MEMORY: u64 = 4 * MIB;

/// Most RAM: half of the smallest physical address space (36 bits) is far less, but a host that
/// has more shall not be held back; what the host can't give is refused when the VM starts.
const MAX_MEMORY: u64 = 1 << 42;

/// Length of a network interface's name, without the end (`IFNAMSIZ` is 16).
const INTERFACE_NAME_MAX: usize = 15;

/// What the guest starts with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case", untagged)]
pub enum Boot {
    /// A kernel.
    Kernel {
        /// bzImage or ELF with a PVH entry.
        kernel: PathBuf,
        /// Initial RAM disk.
        initrd: Option<PathBuf>,
        /// Command line.
        append: String,
    },
    /// The built-in guest that checks itself.
    SelfCheck {
        /// Its parameters, empty for its own defaults.
        selfcheck: String,
    },
    /// The firmware, which looks for something to boot on the disks.
    Firmware {},
    /// Nothing: the guest arrives by migration.
    Incoming {},
}

/// A VM's effective configuration. Serialized, it is what `config.json` and `status --json` show,
/// in the words of the flags and the TOML file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Config {
    /// Unique on this host.
    pub name: VmName,
    /// All zeros if none was given.
    pub uuid: Uuid,
    /// The board.
    pub machine: MachineType,
    /// What the guest's CPUID says.
    pub cpu: CpuConfig,
    /// Number of vCPUs, 1 to [`MAX_CPUS`].
    pub smp: u32,
    /// RAM, a multiple of 1 MiB.
    pub memory: ByteSize,
    /// What the guest starts with.
    #[serde(flatten)]
    pub boot: Boot,
    /// The BIOS to boot by, or for a QEMU, if another than the default.
    pub firmware: Option<PathBuf>,
    /// Disks, in the order given.
    pub disk: Vec<DiskConfig>,
    /// Network devices, in the order given.
    pub net: Vec<NetConfig>,
    /// Random number device.
    pub rng: Option<PlainConfig>,
    /// Virtio console.
    pub console: Option<ConsoleConfig>,
    /// Balloon.
    pub balloon: Option<PlainConfig>,
    /// The 16550A.
    pub serial: CharBackend,
    /// A control socket beside the usual one.
    pub qmp: Option<QmpSocket>,
    /// Whether the host gives all of RAM its memory before anything runs.
    pub prealloc: bool,
    /// Entries of each vCPU's dirty ring, if there is one: a power of two from [`MIN_DIRTY_RING`] to
    /// [`MAX_DIRTY_RING`].
    pub dirty_ring: Option<u32>,
    /// Whether RAM can be given to another process of this host.
    pub shared_memory: bool,
    /// Whether to wait for `cont`.
    pub paused: bool,
    /// Where a migration is expected, if one is.
    pub migrate_listen: Option<MigrateListen>,
}

/// Whether a dirty ring can have so many entries.
pub(crate) fn is_dirty_ring(entries: u32) -> bool {
    entries.is_power_of_two() && (MIN_DIRTY_RING..=MAX_DIRTY_RING).contains(&entries)
}

impl Config {
    /// Decides and checks everything that was left open.
    ///
    /// # Errors
    /// The first thing that can't be: see [`ConfigError`].
    pub fn resolve(settings: Settings) -> Result<Self, ConfigError> {
        let smp = settings.smp.unwrap_or(1);
        if !(1..=MAX_CPUS).contains(&smp) {
            return Err(invalid(
                "smp",
                smp.to_string(),
                format!("a number of vCPUs from 1 to {MAX_CPUS}"),
            ));
        }
        let memory = settings.memory.unwrap_or(ByteSize(256 * MIB));
        if !memory.0.is_multiple_of(MIB) || !(MIN_MEMORY..=MAX_MEMORY).contains(&memory.0) {
            let expected = format!(
                "a RAM size that can be had: a multiple of 1M from {} to {}",
                ByteSize(MIN_MEMORY),
                ByteSize(MAX_MEMORY)
            );
            return Err(invalid("memory", memory.to_string(), expected));
        }
        let dirty_ring = settings.dirty_ring.filter(|entries| *entries != 0);
        if let Some(entries) = dirty_ring.filter(|entries| !is_dirty_ring(*entries)) {
            let expected = format!(
                "a number of entries that a dirty ring can have: a power of two from \
                 {MIN_DIRTY_RING} to {MAX_DIRTY_RING}, or 0 for none"
            );
            return Err(invalid("dirty-ring", entries.to_string(), expected));
        }
        let boot = boot(&settings)?;

        let mut slots = Slots::taken_by(&settings)?;
        let disk = settings.disk.into_iter().enumerate().map(|(n, disk)| {
            let id = id_or(disk.id, "disk", n)?;
            Ok(DiskConfig {
                addr: slots.next(disk.addr, &id)?,
                id,
                virtio: disk.virtio.unwrap_or_default(),
                path: disk.path,
                readonly: disk.readonly.is_some_and(|on| on.0),
                cache: disk.cache.unwrap_or_default(),
                queues: disk.queues.map_or_else(|| u16::try_from(smp).unwrap_or(u16::MAX), |q| q.0),
            })
        });
        let disk = disk.collect::<Result<Vec<_>, ConfigError>>()?;
        let mut macs = Macs::taken_by(&settings.net);
        let net = settings.net.into_iter().enumerate().map(|(n, net)| {
            let id = id_or(net.id.clone(), "net", n)?;
            Ok(NetConfig {
                addr: slots.next(net.addr, &id)?,
                id,
                virtio: net.virtio.unwrap_or_default(),
                mac: macs.next(net.mac)?,
                backend: backend(net)?,
            })
        });
        let net = net.collect::<Result<Vec<_>, ConfigError>>()?;
        let mut plain = |kind: &str, settings: Option<super::PlainSettings>| match settings {
            Some(device) if device.on => {
                let id = id_or(device.place.id, kind, 0)?;
                let addr = slots.next(device.place.addr, &id)?;
                let virtio = device.place.virtio.unwrap_or_default();
                Ok::<_, ConfigError>(Some(PlainConfig { addr, id, virtio }))
            }
            _ => Ok(None),
        };
        let rng = plain("rng", settings.rng)?;
        let console = match settings.console {
            None => None,
            Some(super::ConsoleSettings(table)) => {
                let place = super::PlainSettings {
                    on: true,
                    place: super::Place { id: table.id, addr: table.addr, virtio: table.virtio },
                };
                plain("console", Some(place))?.map(|plain| ConsoleConfig {
                    backend: table.backend,
                    id: plain.id,
                    addr: plain.addr,
                    virtio: plain.virtio,
                })
            }
        };
        let balloon = plain("balloon", settings.balloon)?;

        let config = Self {
            name: match settings.name {
                Some(name) => name,
                None => "vm".parse()?,
            },
            uuid: settings.uuid.unwrap_or_default(),
            machine: settings.machine.unwrap_or_default(),
            cpu: settings.cpu.unwrap_or_default(),
            smp,
            memory,
            boot,
            firmware: settings.firmware,
            disk,
            net,
            rng,
            console,
            balloon,
            serial: settings.serial.unwrap_or(CharBackend::Stdio),
            qmp: settings.qmp,
            prealloc: settings.prealloc.is_some_and(|OnOff(on)| on),
            dirty_ring,
            shared_memory: settings.shared_memory.is_some_and(|OnOff(on)| on),
            paused: settings.paused.is_some_and(|OnOff(on)| on),
            migrate_listen: settings.migrate_listen,
        };
        config.check_unique()?;
        Ok(config)
    }

    /// Slots and ids of all PCI devices in the order in which slots are given out.
    #[must_use]
    pub fn pci_devices(&self) -> Vec<(&VmName, PciSlot)> {
        let disks = self.disk.iter().map(|d| (&d.id, d.addr));
        let nets = self.net.iter().map(|n| (&n.id, n.addr));
        let rng = self.rng.iter().map(|d| (&d.id, d.addr));
        let console = self.console.iter().map(|d| (&d.id, d.addr));
        let balloon = self.balloon.iter().map(|d| (&d.id, d.addr));
        disks.chain(nets).chain(rng).chain(console).chain(balloon).collect()
    }

    fn check_unique(&self) -> Result<(), ConfigError> {
        let devices = self.pci_devices();
        unique("PCI address", devices.iter().map(|(id, addr)| (addr.to_string(), id.to_string())))?;
        unique(
            "id",
            devices
                .iter()
                .enumerate()
                .map(|(n, (id, _))| (id.to_string(), format!("device {}", n + 1))),
        )?;
        unique(
            "MAC address",
            self.net.iter().map(|net| (net.mac.to_string(), net.id.to_string())),
        )?;
        let writable = self.disk.iter().filter(|disk| !disk.readonly);
        unique(
            "disk image",
            writable.map(|disk| (disk.path.display().to_string(), disk.id.to_string())),
        )?;
        let taps = self.net.iter().filter_map(|net| match &net.backend {
            NetBackend::Tap(name) => Some((name.clone(), net.id.to_string())),
            NetBackend::Stream(_) => None,
        });
        unique("tap interface", taps)?;
        let mut backends = vec![(self.serial.to_string(), "the serial port".to_string())];
        backends.extend(
            self.console.iter().map(|c| (c.backend.to_string(), "the console".to_string())),
        );
        backends.retain(|(backend, _)| backend != "pty" && backend != "null");
        unique("backend", backends.into_iter())
    }
}

fn unique(
    kind: &'static str,
    items: impl Iterator<Item = (String, String)>,
) -> Result<(), ConfigError> {
    let mut seen = BTreeMap::new();
    for (value, owner) in items {
        if let Some(first) = seen.insert(value.clone(), owner.clone()) {
            return Err(ConfigError::Duplicate { kind, value, first, second: owner });
        }
    }
    Ok(())
}

fn boot(settings: &Settings) -> Result<Boot, ConfigError> {
    match (&settings.kernel, &settings.selfcheck) {
        (Some(_), Some(_)) => Err(ConfigError::Combination(
            "'kernel' and 'selfcheck' are two guests: say only one of them",
        )),
        (None, _) if settings.initrd.is_some() || settings.append.is_some() => {
            Err(ConfigError::Combination("'initrd' and 'append' need a 'kernel'"))
        }
        (Some(kernel), None) => Ok(Boot::Kernel {
            kernel: kernel.clone(),
            initrd: settings.initrd.clone(),
            append: settings.append.clone().unwrap_or_else(|| "console=ttyS0".to_string()),
        }),
        (None, Some(params)) => {
            // Used when the machine is built; a slip of the finger is said before.
            params.parse::<SelfcheckParams>()?;
            Ok(Boot::SelfCheck { selfcheck: params.clone() })
        }
        (None, None) if settings.migrate_listen.is_some() => Ok(Boot::Incoming {}),
        (None, None) if settings.firmware.is_some() || !settings.disk.is_empty() => {
            Ok(Boot::Firmware {})
        }
        (None, None) => Err(ConfigError::Combination(
            "there is nothing to run: say --kernel FILE, --disk to boot from, --selfcheck, or \
             --migrate-listen URI",
        )),
    }
}

fn backend(net: NetSettings) -> Result<NetBackend, ConfigError> {
    match (net.tap, net.stream) {
        (Some(tap), None) => {
            let good = (1..=INTERFACE_NAME_MAX).contains(&tap.len())
                && tap.bytes().all(|b| b.is_ascii_graphic() && b != b'/' && b != b'%')
                && tap != "."
                && tap != "..";
            if good {
                Ok(NetBackend::Tap(tap))
            } else {
                Err(invalid("tap", tap, "the name of a network interface".into()))
            }
        }
        (None, Some(address)) => Ok(NetBackend::Stream(address)),
        _ => Err(ConfigError::Combination("a network device needs either tap=NAME or stream=ADDR")),
    }
}

fn id_or(id: Option<VmName>, kind: &str, n: usize) -> Result<VmName, ConfigError> {
    match id {
        Some(id) => Ok(id),
        None => format!("{kind}{n}").parse(),
    }
}

fn invalid(what: &'static str, found: String, expected: String) -> ConfigError {
    ConfigError::Invalid { what, found, expected }
}

/// PCI slots that were asked for, so that those given out in order go around them.
struct Slots(Vec<PciSlot>);

impl Slots {
    fn taken_by(settings: &Settings) -> Result<Self, ConfigError> {
        let disks = settings.disk.iter().map(|d| d.addr);
        let nets = settings.net.iter().map(|n| n.addr);
        let rng = settings.rng.iter().filter(|d| d.on).map(|d| d.place.addr);
        let console = settings.console.iter().map(|c| c.0.addr);
        let balloon = settings.balloon.iter().filter(|d| d.on).map(|d| d.place.addr);
        Ok(Self(disks.chain(nets).chain(rng).chain(console).chain(balloon).flatten().collect()))
    }

    fn next(&mut self, asked: Option<PciSlot>, id: &VmName) -> Result<PciSlot, ConfigError> {
        if let Some(slot) = asked {
            return Ok(slot);
        }
        let free = (PciSlot::FIRST..=PciSlot::LAST)
            .filter_map(PciSlot::new)
            .find(|slot| !self.0.contains(slot));
        let slot = free.ok_or_else(|| ConfigError::NoSlot(id.to_string()))?;
        self.0.push(slot);
        Ok(slot)
    }
}

/// The same for MAC addresses.
struct Macs {
    taken: Vec<MacAddr>,
}

impl Macs {
    fn taken_by(nets: &[NetSettings]) -> Self {
        Self { taken: nets.iter().filter_map(|net| net.mac).collect() }
    }

    fn next(&mut self, asked: Option<MacAddr>) -> Result<MacAddr, ConfigError> {
        if let Some(mac) = asked {
            return Ok(mac);
        }
        let free = (0..=u8::MAX).map(MacAddr::nth_default).find(|mac| !self.taken.contains(mac));
        let mac = free.ok_or(ConfigError::Combination(
            "there are more network devices than default MAC addresses",
        ))?;
        self.taken.push(mac);
        Ok(mac)
    }
}
