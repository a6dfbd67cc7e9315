//! A configuration as a QEMU command line.

use std::borrow::Cow;
use std::path::Path;

use thiserror::Error;

use crate::config::{
    Boot, CharBackend, Config, CpuModel, DiskConfig, MigrateListen, MigrationUri, NetBackend,
    NetConfig, PciSlot, SocketUri, VirtioVersion, VmName,
};

/// Why a configuration is no QEMU command line.
#[derive(Debug, Error)]
pub enum WriteError {
    /// QEMU has no such processor.
    #[error(
        "no QEMU shows a guest the processor of --cpu {0}: only a VM that runs with --cpu host can \
         go on in a QEMU"
    )]
    Cpu(&'static str),
    /// Bytes that don't fit.
    #[error("'{0}' can't stand in a command line: it is not UTF-8, or has a zero byte in it")]
    Text(String),
}

/// The command line of the QEMU that equals a VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QemuLine {
    /// Each option with its value; the first is the program.
    options: Vec<Vec<String>>,
    notes: Vec<String>,
}

impl QemuLine {
    /// For this configuration; with `incoming` it waits there, and else where the configuration says.
    ///
    /// # Errors
    /// If QEMU has not its like.
    pub fn of(config: &Config, incoming: Option<&MigrateListen>) -> Result<Self, WriteError> {
        let mut line = Self { options: Vec::new(), notes: Vec::new() };
        line.options.push(vec!["qemu-system-x86_64".to_string()]);
        line.board(config)?;
        line.boot(config)?;
        for disk in &config.disk {
            line.disk(disk)?;
        }
        for net in &config.net {
            line.net(net)?;
        }
        if let Some(rng) = &config.rng {
            line.device("virtio-rng-pci", &rng.id, rng.addr, rng.virtio, "");
        }
        if let Some(console) = &config.console {
            let (id, name) = (format!("char-{}", console.id), &console.id);
            line.chardev(&id, &console.backend)?;
            let named = line.device("virtio-serial-pci", name, console.addr, console.virtio, "");
            let bus = if named { format!("bus={name}.0,") } else { String::new() };
            line.option("-device", format!("virtconsole,{bus}chardev={id},nr=0"));
        }
        if let Some(balloon) = &config.balloon {
            line.device("virtio-balloon-pci", &balloon.id, balloon.addr, balloon.virtio, "");
        }
        // No device can have these names, since theirs are one word behind "char-".
        line.chardev("serial0", &config.serial)?;
        line.option("-serial", "chardev:serial0");
        if let Some(qmp) = &config.qmp {
            // The short form takes a path with an equals sign for something else.
            line.chardev("qmp0", &CharBackend::Unix(qmp.0.clone()))?;
            line.option("-qmp", "chardev:qmp0");
        }
        if config.prealloc {
            line.options.push(vec!["-mem-prealloc".to_string()]);
        }
        if config.paused {
            line.options.push(vec!["-S".to_string()]);
        }
        if let Some(listen) = incoming.or(config.migrate_listen.as_ref()) {
            line.option("-incoming", incoming_address(listen)?);
        }
        if let Some(arg) = line.args().find(|arg| arg.contains('\0')) {
            return Err(WriteError::Text(arg.escape_default().to_string()));
        }
        Ok(line)
    }

    /// What an operator should know beside it.
    #[must_use]
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// The program and its arguments.
    pub fn args(&self) -> impl Iterator<Item = &str> {
        self.options.iter().flatten().map(String::as_str)
    }

    /// As a shell reads it: quoted where it must be, with one option on each line.
    #[must_use]
    pub fn to_shell(&self) -> String {
        let join =
            |words: &Vec<String>| words.iter().map(|w| quoted(w)).collect::<Vec<_>>().join(" ");
        self.options.iter().map(join).collect::<Vec<_>>().join(" \\\n    ")
    }

    fn option(&mut self, name: &str, value: impl Into<String>) {
        self.options.push(vec![name.to_string(), value.into()]);
    }

    fn board(&mut self, config: &Config) -> Result<(), WriteError> {
        self.option("-name", config.name.as_str());
        if !config.uuid.is_nil() {
            self.option("-uuid", config.uuid.to_string());
        }
        self.option(
            "-machine",
            format!("{},usb=off,vmport=off,hpet=off,graphics=off", config.machine),
        );
        let ring = config.dirty_ring.map(|entries| format!(",dirty-ring-size={entries}"));
        self.option("-accel", format!("kvm{}", ring.unwrap_or_default()));
        if config.cpu.model != CpuModel::Host {
            return Err(WriteError::Cpu(config.cpu.model.as_str()));
        }
        self.option("-cpu", if config.cpu.migratable { "host" } else { "host,migratable=off" });
        for option in ["-nodefaults", "-no-user-config"] {
            self.options.push(vec![option.to_string()]);
        }
        self.option("-display", "none");
        self.option("-m", config.memory.to_string());
        self.option("-smp", config.smp.to_string());
        Ok(())
    }

    fn boot(&mut self, config: &Config) -> Result<(), WriteError> {
        if let Some(firmware) = &config.firmware {
            self.option("-bios", plain(firmware)?);
        }
        match &config.boot {
            Boot::Kernel { kernel, initrd, append } => {
                self.option("-kernel", plain(kernel)?);
                if let Some(initrd) = initrd {
                    self.option("-initrd", plain(initrd)?);
                }
                self.option("-append", append.as_str());
            }
            Boot::SelfCheck { .. } => self.notes.push(
                "the guest is the one that is built into mini-vmm: QEMU can take it while it runs, \
                 but not boot it again"
                    .to_string(),
            ),
            Boot::Firmware {} | Boot::Incoming {} => {}
        }
        Ok(())
    }

    fn disk(&mut self, disk: &DiskConfig) -> Result<(), WriteError> {
        let on = if disk.readonly { ",readonly=on" } else { "" };
        self.option(
            "-drive",
            format!(
                "if=none,id=drive-{},file={},format=raw,cache={}{on}",
                disk.id,
                drive_file(&disk.path)?,
                disk.cache
            ),
        );
        let own = format!(",drive=drive-{},num-queues={}", disk.id, disk.queues);
        self.device("virtio-blk-pci", &disk.id, disk.addr, disk.virtio, &own);
        Ok(())
    }

    fn net(&mut self, net: &NetConfig) -> Result<(), WriteError> {
        let backend = match &net.backend {
            NetBackend::Tap(name) => {
                let name = name.replace(',', ",,");
                format!("tap,id=netdev-{},ifname={name},script=no,downscript=no", net.id)
            }
            NetBackend::Stream(SocketUri::Unix(path)) => format!(
                "stream,id=netdev-{},server=off,addr.type=unix,addr.path={}",
                net.id,
                escaped(path)?
            ),
            NetBackend::Stream(SocketUri::Tcp { host, port }) => format!(
                "stream,id=netdev-{},server=off,addr.type=inet,addr.host={},addr.port={port}",
                net.id,
                host.replace(',', ",,")
            ),
        };
        self.option("-netdev", backend);
        let own = format!(",netdev=netdev-{},mac={}", net.id, net.mac);
        self.device("virtio-net-pci", &net.id, net.addr, net.virtio, &own);
        Ok(())
    }

    /// A device; says whether it has its id, for QEMU's begin with a letter.
    fn device(
        &mut self,
        driver: &str,
        id: &VmName,
        addr: PciSlot,
        version: VirtioVersion,
        own: &str,
    ) -> bool {
        let named = id.as_str().starts_with(|c: char| c.is_ascii_alphabetic());
        let id = if named { format!(",id={id}") } else { String::new() };
        let version = match version {
            VirtioVersion::Transitional => "",
            VirtioVersion::Modern => ",disable-legacy=on",
            VirtioVersion::Legacy => ",disable-modern=on",
        };
        self.option("-device", format!("{driver}{id},addr={addr}{version}{own}"));
        named
    }

    fn chardev(&mut self, id: &str, backend: &CharBackend) -> Result<(), WriteError> {
        let backend = match backend {
            CharBackend::Stdio => format!("stdio,id={id}"),
            CharBackend::Pty => format!("pty,id={id}"),
            CharBackend::Null => format!("null,id={id}"),
            CharBackend::File(path) => format!("file,id={id},path={}", escaped(path)?),
            CharBackend::Unix(path) => {
                format!("socket,id={id},path={},server=on,wait=off", escaped(path)?)
            }
        };
        self.option("-chardev", backend);
        Ok(())
    }
}

/// Where QEMU 7.2 waits: it has no `file:`, but a command can read one.
fn incoming_address(listen: &MigrateListen) -> Result<String, WriteError> {
    let MigrateListen::At(MigrationUri::File { path, offset }) = listen else {
        return Ok(listen.to_string());
    };
    let path = shell_words::quote(plain(path)?);
    Ok(match offset {
        0 => format!("exec:cat {path}"),
        // `tail` counts from 1.
        offset => format!("exec:tail -c +{} {path}", offset.saturating_add(1)),
    })
}

/// A word for a shell, without quotes where no shell needs them: commas are everywhere here.
fn quoted(word: &str) -> Cow<'_, str> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-_.,:=/+@%".contains(&b);
    if !word.is_empty() && word.bytes().all(plain) {
        return Cow::Borrowed(word);
    }
    shell_words::quote(word)
}

/// A path that stands alone.
fn plain(path: &Path) -> Result<&str, WriteError> {
    path.to_str().ok_or_else(|| WriteError::Text(path.display().to_string()))
}

/// A path among properties: a comma is written twice.
fn escaped(path: &Path) -> Result<String, WriteError> {
    Ok(plain(path)?.replace(',', ",,"))
}

/// A path where QEMU takes a first word with a colon for a protocol.
fn drive_file(path: &Path) -> Result<String, WriteError> {
    let text = escaped(path)?;
    let protocol = text.split('/').next().is_some_and(|first| first.contains(':'));
    Ok(if protocol { format!("file:{text}") } else { text })
}
