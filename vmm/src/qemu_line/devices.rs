//! `-device`: the virtio devices of a QEMU command line, and their slots.

use std::collections::BTreeMap;

use super::backends::or_null;
use super::device_rules::{BALLOON, BLOCK, NET, PORT, RNG, SERIAL, VIRTIO};
use super::drives::{Drives, ERRORS};
use super::findings::Findings;
use super::props::{Props, Rules};
use crate::config::{
    CharBackend, ConsoleSettings, ConsoleTable, DiskSettings, NetSettings, OnOff, PciSlot, Place,
    PlainSettings, Queues, Settings, VirtioVersion, VmName,
};

/// The devices of both sides, by the part of the name that says what it does.
const KINDS: [&str; 5] =
    ["virtio-blk", "virtio-net", "virtio-rng", "virtio-balloon", "virtio-serial"];

/// Backends, by the names that devices use.
#[derive(Debug, Default)]
pub(super) struct Backends {
    pub(super) drives: Drives,
    pub(super) nets: BTreeMap<String, NetSettings>,
    pub(super) chars: BTreeMap<String, Option<CharBackend>>,
}

impl Backends {
    /// Those that no device has taken.
    fn tell_unused(&self, found: &mut Findings) {
        let drives = self.drives.unused().map(|id| format!("-drive or -blockdev {id}"));
        let nets = self.nets.keys().map(|id| format!("-netdev {id}"));
        let chars = self.chars.keys().map(|id| format!("-chardev {id}"));
        for option in drives.chain(nets).chain(chars) {
            found.note(&option, "no device uses it; left out");
        }
    }
}

/// Gives out slots as QEMU does while it goes through the devices, and makes settings of them.
pub(super) struct Devices<'a> {
    backends: Backends,
    settings: &'a mut Settings,
    found: &'a mut Findings,
    taken: Vec<PciSlot>,
    /// A virtio-serial device that has no console yet: its name in errors, and its place.
    serial: Option<(String, Place)>,
}

impl<'a> Devices<'a> {
    pub(super) fn new(
        backends: Backends,
        settings: &'a mut Settings,
        found: &'a mut Findings,
    ) -> Self {
        Self { backends, settings, found, taken: Vec::new(), serial: None }
    }

    /// Goes through the devices in the order of the command line.
    pub(super) fn all(mut self, devices: &[String]) {
        for text in devices {
            match Props::parse(text, "driver") {
                Ok(props) => self.device(props),
                Err(why) => self.found.matters("-device", why),
            }
        }
        // QEMU makes these when it has seen all options.
        for drive in std::mem::take(&mut self.backends.drives.virtio) {
            let pairs = [("driver", "virtio-blk-pci".to_string()), ("drive", drive)];
            self.device(Props::of(pairs.map(|(key, value)| (key.to_string(), value)).into()));
        }
        if let Some((option, _)) = self.serial.take() {
            self.found.matters(
                option,
                "mini-vmm has this device as a console only; start the guest in QEMU with one \
                 -device virtconsole,chardev=… behind it",
            );
        }
        self.name_the_nameless();
        self.backends.tell_unused(self.found);
    }

    /// A device without an id is named by its kind and place; not as one that has been given that
    /// name in QEMU.
    fn name_the_nameless(&mut self) {
        let Settings { disk, net, rng, console, balloon, .. } = &mut *self.settings;
        let mut ids: Vec<(&str, usize, &mut Option<VmName>)> = Vec::new();
        ids.extend(disk.iter_mut().enumerate().map(|(n, disk)| ("disk", n, &mut disk.id)));
        ids.extend(net.iter_mut().enumerate().map(|(n, net)| ("net", n, &mut net.id)));
        ids.extend(rng.iter_mut().map(|rng| ("rng", 0, &mut rng.place.id)));
        ids.extend(console.iter_mut().map(|console| ("console", 0, &mut console.0.id)));
        ids.extend(balloon.iter_mut().map(|balloon| ("balloon", 0, &mut balloon.place.id)));
        let mut taken: Vec<_> = ids.iter().filter_map(|(.., id)| (**id).clone()).collect();
        for (kind, n, id) in ids {
            if id.is_none() {
                let names = (n..).filter_map(|n| format!("{kind}{n}").parse().ok());
                *id = names.take(taken.len() + 1).find(|name| !taken.contains(name));
                taken.extend(id.clone());
            }
        }
    }

    fn device(&mut self, mut props: Props) {
        let driver = props.take("driver").unwrap_or_default();
        let id = props.take("id");
        let option = match &id {
            Some(id) => format!("-device {driver},id={id}"),
            None => format!("-device {driver}"),
        };
        if driver == "virtconsole" {
            return self.console(props, &option);
        }
        let Some((kind, named)) = virtio(&driver) else {
            return self.found.matters(option, advice(&driver));
        };
        let place = Place {
            id: id.and_then(|id| self.id(&id, &option)),
            addr: self.slot(&mut props, &option),
            virtio: self.version(named, &mut props, &option),
        };
        let rules: Rules = match kind {
            "virtio-blk" => return self.disk(place, props, &option),
            "virtio-net" => return self.net(place, props, &option),
            "virtio-rng" => RNG,
            "virtio-balloon" => BALLOON,
            _ => SERIAL,
        };
        props.settle(&option, &[VIRTIO, rules], self.found);
        let plain = Some(PlainSettings { on: true, place });
        let before = match (kind, plain) {
            ("virtio-rng", plain) => std::mem::replace(&mut self.settings.rng, plain).is_some(),
            ("virtio-balloon", plain) => {
                std::mem::replace(&mut self.settings.balloon, plain).is_some()
            }
            (_, Some(PlainSettings { place, .. })) => {
                let has_console = self.settings.console.is_some();
                self.serial.replace((option.clone(), place)).is_some() || has_console
            }
            (_, None) => false,
        };
        if before {
            self.found.matters(option, format!("mini-vmm has one {kind} device at most"));
        }
    }

    fn disk(&mut self, place: Place, mut props: Props, option: &str) {
        let queues = props.take("num-queues").and_then(|text| match text.parse() {
            Ok(queues @ 1..=255) => Some(Queues(queues)),
            _ => {
                self.found.matters(option, "num-queues must be a number from 1 to 255");
                None
            }
        });
        let drive = props.take("drive");
        props.settle(option, &[VIRTIO, BLOCK, ERRORS], self.found);
        let Some(drive) = drive else {
            return self.found.matters(option, "it has no drive=");
        };
        let Some(image) = self.backends.drives.image(&drive, option, self.found) else { return };
        self.settings.disk.push(DiskSettings {
            path: image.path,
            id: place.id,
            addr: place.addr,
            virtio: place.virtio,
            readonly: Some(OnOff(image.readonly)),
            cache: Some(image.cache),
            queues,
        });
    }

    fn net(&mut self, place: Place, mut props: Props, option: &str) {
        let mac = props.take("mac").and_then(|text| match text.parse() {
            Ok(mac) => Some(mac),
            Err(e) => {
                self.found.matters(option, format!("{e}"));
                None
            }
        });
        let netdev = props.take("netdev");
        props.settle(option, &[VIRTIO, NET], self.found);
        let Some(netdev) = netdev else {
            return self.found.matters(option, "it has no netdev=");
        };
        let Some(backend) = self.backends.nets.remove(&netdev) else {
            return self.found.matters(
                option,
                format!("there is no -netdev with id={netdev} that mini-vmm could use for it"),
            );
        };
        self.settings.net.push(NetSettings {
            mac,
            id: place.id,
            addr: place.addr,
            virtio: place.virtio,
            ..backend
        });
    }

    fn console(&mut self, mut props: Props, option: &str) {
        let Some((serial, place)) = self.serial.take() else {
            return self.found.matters(
                option,
                "there is no virtio-serial-pci before it that has no console yet; mini-vmm has one \
                 device with one console",
            );
        };
        // The only bus that there can be has the name of its device, if it has one.
        if let Some(bus) = props.take("bus") {
            let named = place.id.as_ref().is_some_and(|id| bus == format!("{id}.0"));
            if !named && bus != "virtio-serial-bus.0" {
                self.found.matters(option, format!("there is no bus {bus} of {serial}"));
            }
        }
        let chardev = props.take("chardev").unwrap_or_default();
        props.settle(option, &[PORT], self.found);
        let Some(backend) = self.backends.chars.remove(&chardev) else {
            return self.found.matters(
                option,
                format!("there is no -chardev with id={chardev} that is not in use"),
            );
        };
        self.settings.console = Some(ConsoleSettings(ConsoleTable {
            backend: or_null(backend, option, "--console", self.found),
            id: place.id,
            addr: place.addr,
            virtio: place.virtio,
        }));
    }

    fn id(&mut self, id: &str, option: &str) -> Option<VmName> {
        let id = id.parse().ok();
        if id.is_none() {
            self.found.note(option, "its id is none for mini-vmm, which gives it another");
        }
        id
    }

    fn slot(&mut self, props: &mut Props, option: &str) -> Option<PciSlot> {
        let slot = match props.take("addr") {
            Some(text) => match text.parse::<PciSlot>() {
                Ok(slot) => Some(slot),
                Err(e) => {
                    self.found.matters(option, format!("{e}"));
                    return None;
                }
            },
            None => (PciSlot::FIRST..=PciSlot::LAST)
                .filter_map(PciSlot::new)
                .find(|slot| !self.taken.contains(slot)),
        };
        match slot {
            None => self.found.matters(option, "no PCI slot is left for it"),
            Some(slot) if self.taken.contains(&slot) => self.found.matters(
                option,
                format!("PCI slot {slot} is taken by a device before it, so QEMU refuses it"),
            ),
            Some(slot) => self.taken.push(slot),
        }
        slot
    }

    fn version(
        &mut self,
        named: Option<VirtioVersion>,
        props: &mut Props,
        option: &str,
    ) -> Option<VirtioVersion> {
        let no_legacy = match props.take("disable-legacy").as_deref() {
            None | Some("off" | "auto" | "no" | "false" | "n") => false,
            Some("on" | "yes" | "true" | "y") => true,
            Some(other) => {
                self.found.matters(option, format!("disable-legacy={other} is no switch"));
                false
            }
        };
        let no_modern = props.take_switch("disable-modern").unwrap_or(false);
        match (no_legacy, no_modern, named) {
            (false, false, None) => None,
            (false, false, named) => named,
            (true, false, None | Some(VirtioVersion::Modern)) => Some(VirtioVersion::Modern),
            (false, true, None) => Some(VirtioVersion::Legacy),
            _ => {
                self.found.matters(option, "it is for no driver at all, so QEMU refuses it");
                None
            }
        }
    }
}

/// What a driver's name stands for, and the version of virtio that it fixes.
fn virtio(driver: &str) -> Option<(&'static str, Option<VirtioVersion>)> {
    KINDS.into_iter().find_map(|kind| match driver.strip_prefix(kind)? {
        "" | "-pci" => Some((kind, None)),
        "-pci-transitional" => Some((kind, Some(VirtioVersion::Transitional))),
        "-pci-non-transitional" => Some((kind, Some(VirtioVersion::Modern))),
        _ => None,
    })
}

/// What to do about a device that mini-vmm has not.
fn advice(driver: &str) -> String {
    const NETWORK: [&str; 8] =
        ["e1000", "rtl8139", "ne2k", "pcnet", "i825", "vmxnet", "tulip", "usb-net"];
    const DISKS: [&str; 6] = ["ide-", "scsi-", "nvme", "virtio-scsi", "usb-storage", "floppy"];
    let is = |known: &[&str]| known.iter().any(|name| driver.starts_with(name));
    let instead = if is(&NETWORK) {
        "start the guest in QEMU with virtio-net-pci instead"
    } else if is(&DISKS) {
        "start the guest in QEMU with virtio-blk-pci instead"
    } else if is(&["vhost-", "vfio-"]) {
        "what it does is outside the VM and can't be moved; start the guest in QEMU without it"
    } else {
        "start the guest in QEMU without it (mini-vmm has virtio-blk-pci, virtio-net-pci, \
         virtio-rng-pci, virtio-balloon-pci, and virtio-serial-pci with one virtconsole)"
    };
    format!("mini-vmm has no such device; {instead}")
}
