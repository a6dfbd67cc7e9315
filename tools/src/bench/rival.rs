//! Who is compared, and how each is started: a mini-vmm, or a QEMU.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use super::scenario::Scenario;
use crate::error::{Error, Result};
use crate::process;

/// The command line that a rival understands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// `mini-vmm run …`
    MiniVmm,
    /// `qemu-system-x86_64 …`, or whatever takes its options.
    Qemu,
}

/// What a program's name ends with where both sides compare.
pub const VERIFIED: &str = " --verify";

/// ... and where the memory goes to another process of the host without being copied.
pub const LOCAL: &str = " --local";

/// A program that is measured.
#[derive(Debug, Clone)]
pub struct Rival {
    /// Its name in the table.
    pub name: String,
    /// The program.
    pub program: PathBuf,
    /// How it is started.
    pub kind: Kind,
    /// What it says to `--version`, first line.
    pub version: String,
    /// How its VMs are moved.
    pub way: Way,
}

/// How a VM is moved.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Way {
    /// Connections for pages, if they have their own.
    pub channels: Option<u8>,
    /// The destination has allocated the guest's memory when it begins.
    pub prealloc: bool,
    /// Both sides compare all memory and state at the switchover; only a mini-vmm can.
    pub verify: bool,
    /// The source notes what its guest writes in rings of so many entries, not in a log.
    pub dirty_ring: Option<u32>,
    /// The memory itself changes hands, over a Unix socket; only a mini-vmm can.
    pub local: bool,
}

/// How large a VM is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    /// Memory in MiB.
    pub memory_mib: u64,
    /// vCPUs.
    pub vcpus: u64,
}

/// What a VM is to do.
pub enum Role<'a> {
    /// Boot the guest.
    Source(&'a Scenario),
    /// Wait for it at this port of loopback.
    Destination(u16),
}

impl Rival {
    /// Looks at a program and finds out from its version what it is.
    ///
    /// # Errors
    /// If it can't be run, or is neither a mini-vmm nor a QEMU.
    pub fn new(name: &str, program: &Path, way: Way) -> Result<Rival> {
        let said = process::output(Command::new(program).arg("--version"))?;
        let version = said.lines().next().unwrap_or_default().to_owned();
        let kind = kind_of(&version).ok_or_else(|| Error::Bench {
            what: format!("{} is neither a mini-vmm nor a QEMU", program.display()),
            found: format!("to --version it says: {version}"),
        })?;
        let name = match way.channels {
            Some(channels) => format!("{name}×{channels}"),
            None => name.to_owned(),
        };
        let name = if way.verify { format!("{name}{VERIFIED}") } else { name };
        let name = match way.dirty_ring {
            Some(entries) => format!("{name} --dirty-ring {entries}"),
            None => name,
        };
        let name = if way.local { format!("{name}{LOCAL}") } else { name };
        Ok(Rival { name, program: program.to_owned(), kind, version, way })
    }

    /// What the control socket of a destination is told before it listens, where its command line can't
    /// say it.
    pub fn listen(&self, port: u16) -> Vec<(&'static str, Value)> {
        let mut orders = self.several();
        if self.waits() {
            orders.push(("migrate-incoming", json!({ "uri": self.uri(&port.to_string()) })));
        }
        orders
    }

    /// What the source is told beside the orders that are the same for all.
    pub fn own_parameters(&self) -> Option<(&'static str, Value)> {
        let Way { verify, local, .. } = self.way;
        let parameters = json!({ "x-verify": verify, "x-local": local });
        (verify || local).then_some(("migrate-set-parameters", parameters))
    }

    /// Where a destination waits; the port is free, and so is a socket's name with it.
    pub fn uri(&self, port: &str) -> String {
        if !self.way.local {
            return format!("tcp:127.0.0.1:{port}");
        }
        let socket = std::env::temp_dir().join(format!("mini-vmm-bench-{port}.sock"));
        format!("unix:{}", socket.display())
    }

    /// What both control sockets are told of connections.
    pub fn several(&self) -> Vec<(&'static str, Value)> {
        let Some(channels) = self.way.channels else { return Vec::new() };
        let multifd = json!([{ "capability": "multifd", "state": true }]);
        vec![
            ("migrate-set-capabilities", json!({ "capabilities": multifd })),
            ("migrate-set-parameters", json!({ "multifd-channels": channels })),
        ]
    }

    /// Whether a destination must be told more before it listens: a QEMU, how many will connect.
    fn waits(&self) -> bool {
        self.kind == Kind::Qemu && self.way.channels.is_some()
    }

    /// The command that starts a VM with its serial port at standard input and output and its
    /// control socket at `qmp`. `image` is the guest's ELF file.
    pub fn command(&self, size: Size, role: &Role<'_>, image: &Path, qmp: &Path) -> Command {
        let mut command = Command::new(&self.program);
        let (memory, vcpus) = (format!("{}M", size.memory_mib), size.vcpus.to_string());
        let (qmp, image) = (qmp.display(), image.display().to_string());
        match self.kind {
            Kind::MiniVmm => {
                let name = match role {
                    Role::Source(_) => "bench-source",
                    Role::Destination(_) => "bench-destination",
                };
                command.args(["run", "--name", name, "--machine", "pc-i440fx-7.2"]);
                command.args(["--cpu", "host", "--memory", &memory, "--smp", &vcpus]);
                command.args(["--serial", "stdio", "--qmp", &format!("unix:{qmp}")]);
                match role {
                    Role::Source(scenario) => {
                        if let Some(entries) = self.way.dirty_ring {
                            command.args(["--dirty-ring", &entries.to_string()]);
                        }
                        command.args(self.way.local.then_some("--shared-memory"));
                        command.args(["--kernel", &image, "--append", &scenario.guest])
                    }
                    Role::Destination(port) => {
                        command.args(self.way.prealloc.then_some("--prealloc"));
                        command.args(["--migrate-listen", &self.uri(&port.to_string())])
                    }
                };
            }
            Kind::Qemu => {
                command.args(["-machine", QEMU_MACHINE, "-accel", "kvm", "-cpu", QEMU_CPU]);
                command.args(["-nodefaults", "-no-user-config", "-display", "none"]);
                command.args(["-m", &memory, "-smp", &vcpus, "-serial", "stdio"]);
                command.args(["-qmp", &format!("unix:{qmp},server=on,wait=off")]);
                // The same on both sides, as a QEMU wants it.
                command.args(["-kernel", &image]);
                match role {
                    Role::Source(scenario) => command.args(["-append", &scenario.guest]),
                    Role::Destination(port) => {
                        command.args(self.way.prealloc.then_some("-mem-prealloc"));
                        let from = if self.waits() {
                            "defer".to_owned()
                        } else {
                            format!("tcp:127.0.0.1:{port}")
                        };
                        command.args(["-incoming", &from])
                    }
                };
            }
        }
        command
    }
}

/// The board that mini-vmm has too.
const QEMU_MACHINE: &str = "pc-i440fx-7.2,usb=off,vmport=off,hpet=off,graphics=off";
/// Without the last word QEMU ends at once on hosts whose KVM lacks `IA32_ARCH_CAPABILITIES`.
const QEMU_CPU: &str = "host,-arch-capabilities";

pub(super) fn kind_of(version: &str) -> Option<Kind> {
    if version.starts_with("mini-vmm ") {
        Some(Kind::MiniVmm)
    } else if version.contains("QEMU") {
        Some(Kind::Qemu)
    } else {
        None
    }
}

/// Takes `NAME=PATH` apart.
///
/// # Errors
/// A sentence, if it is not of that form.
pub fn parse(text: &str) -> std::result::Result<(String, PathBuf), String> {
    match text.split_once('=') {
        Some((name, path)) if !name.is_empty() && !path.is_empty() => {
            Ok((name.to_owned(), path.into()))
        }
        _ => Err("expected NAME=PATH".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_is_known_by_its_version() {
        assert_eq!(kind_of("mini-vmm 0.1.0"), Some(Kind::MiniVmm));
        assert_eq!(kind_of("QEMU emulator version 7.2.22 (Debian)"), Some(Kind::Qemu));
        assert_eq!(kind_of("busybox"), None);
    }

    #[test]
    fn both_sides_of_every_rival_are_of_the_size_that_is_wanted() {
        let size = Size { memory_mib: 512, vcpus: 4 };
        let scenario = Scenario::named("idle", size).unwrap();
        for (kind, smp) in [(Kind::MiniVmm, "--smp 4"), (Kind::Qemu, "-smp 4")] {
            let rival = Rival {
                name: "x".into(),
                program: "x".into(),
                kind,
                version: String::new(),
                way: Way::default(),
            };
            for role in [Role::Source(&scenario), Role::Destination(1)] {
                let command = rival.command(size, &role, Path::new("image"), Path::new("qmp"));
                let line = process::line(&command);
                assert!(line.contains(smp) && line.contains(" 512M"), "{line}");
            }
        }
    }

    #[test]
    fn a_rival_is_a_name_and_a_path() {
        assert_eq!(parse("new=/x/y=z"), Ok(("new".into(), "/x/y=z".into())));
        for text in ["", "x", "=x", "x="] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
