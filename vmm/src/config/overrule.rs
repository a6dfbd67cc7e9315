//! Flags over a file, or over a QEMU command line.

use super::{DiskSettings, NetSettings, Settings, VmName};

impl Settings {
    /// `self` with everything that `flags` says instead, or in addition.
    #[must_use]
    pub fn overruled_by(mut self, flags: Self) -> Self {
        if flags.kernel.is_some() {
            self.selfcheck = None;
        }
        if flags.selfcheck.is_some() {
            (self.kernel, self.initrd, self.append) = (None, None, None);
        }
        // Two flags with one id are a slip, and no change of each other.
        let (disks, nets) = (self.disk.len(), self.net.len());
        for disk in flags.disk {
            let known = self.disk.iter().take(disks).map(|d| &d.id);
            let same = named(known, "disk", disk.id.as_ref());
            match same.and_then(|n| self.disk.get_mut(n)) {
                Some(known) => known.overrule(disk),
                None => self.disk.push(disk),
            }
        }
        for net in flags.net {
            let known = self.net.iter().take(nets).map(|n| &n.id);
            let same = named(known, "net", net.id.as_ref());
            match same.and_then(|n| self.net.get_mut(n)) {
                Some(known) => known.overrule(net),
                None => self.net.push(net),
            }
        }
        Self {
            name: flags.name.or(self.name),
            uuid: flags.uuid.or(self.uuid),
            machine: flags.machine.or(self.machine),
            cpu: flags.cpu.or(self.cpu),
            smp: flags.smp.or(self.smp),
            memory: flags.memory.or(self.memory),
            kernel: flags.kernel.or(self.kernel),
            initrd: flags.initrd.or(self.initrd),
            append: flags.append.or(self.append),
            firmware: flags.firmware.or(self.firmware),
            selfcheck: flags.selfcheck.or(self.selfcheck),
            disk: self.disk,
            net: self.net,
            rng: flags.rng.or(self.rng),
            balloon: flags.balloon.or(self.balloon),
            console: flags.console.or(self.console),
            serial: flags.serial.or(self.serial),
            qmp: flags.qmp.or(self.qmp),
            prealloc: flags.prealloc.or(self.prealloc),
            dirty_ring: flags.dirty_ring.or(self.dirty_ring),
            shared_memory: flags.shared_memory.or(self.shared_memory),
            paused: flags.paused.or(self.paused),
            migrate_listen: flags.migrate_listen.or(self.migrate_listen),
        }
    }
}

/// Which of these devices has that id, said or by default.
fn named<'a>(
    mut ids: impl Iterator<Item = &'a Option<VmName>>,
    kind: &str,
    wanted: Option<&VmName>,
) -> Option<usize> {
    let wanted = wanted?;
    let mut n = 0..;
    ids.position(|id| {
        let n = n.next().unwrap_or(usize::MAX);
        id.as_ref().map_or_else(|| wanted.as_str() == format!("{kind}{n}"), |id| id == wanted)
    })
}

impl DiskSettings {
    /// Takes from `flags` what is said there.
    fn overrule(&mut self, flags: Self) {
        *self = Self {
            path: flags.path,
            id: flags.id,
            addr: flags.addr.or(self.addr),
            virtio: flags.virtio.or(self.virtio),
            readonly: flags.readonly.or(self.readonly),
            cache: flags.cache.or(self.cache),
            queues: flags.queues.or(self.queues),
        };
    }
}

impl NetSettings {
    /// Takes from `flags` what is said there; a tap replaces a stream, and the other way round.
    fn overrule(&mut self, flags: Self) {
        let (tap, stream) = match (flags.tap, flags.stream) {
            (None, None) => (self.tap.take(), self.stream.take()),
            said => said,
        };
        *self = Self {
            tap,
            stream,
            mac: flags.mac.or(self.mac),
            id: flags.id,
            addr: flags.addr.or(self.addr),
            virtio: flags.virtio.or(self.virtio),
        };
    }
}
