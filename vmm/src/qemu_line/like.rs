//! From a QEMU command line to settings.

use std::collections::BTreeMap;
use std::path::Path;

use super::backends::{char_shorthand, chardev, netdev, or_null};
use super::board::Board;
use super::devices::{Backends, Devices};
use super::findings::{Findings, LikeError};
use super::options::{self, Opt};
use super::props::{Props, Rule, Rules};
use crate::config::{CharBackend, MigrateListen, OnOff, QmpSocket, Settings};

const OBJECT: Rules = &[("filename", Rule::Host), ("poll-max-ns", Rule::Host)];
const NAME: Rules = &[("debug-threads", Rule::Host), ("process", Rule::Host)];

/// What a QEMU command line says about a VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Like {
    /// All that the guest sees, and where the host's ends are.
    pub settings: Settings,
    /// What was left out since the guest does not see it, each a line for the operator.
    pub notes: Vec<String>,
}

impl Like {
    /// Reads a command line as a POSIX shell splits it; nothing is expanded.
    ///
    /// # Errors
    /// If it is none, or with all at once that keeps a VM from being like QEMU's.
    pub fn from_line(line: &str) -> Result<Self, LikeError> {
        let words = shell_words::split(line).map_err(|_| LikeError::Quote)?;
        Self::from_words(&words)
    }

    /// The same for a line that has been split already.
    ///
    /// # Errors
    /// See [`Like::from_line`].
    pub fn from_words(words: &[String]) -> Result<Self, LikeError> {
        let mut reader = Reader::default();
        let words = match words.split_first() {
            Some((program, rest)) if !program.starts_with('-') => {
                let name = Path::new(program).file_name().and_then(|name| name.to_str());
                match name {
                    Some("qemu-system-x86_64") => {}
                    // These two are wrappers of the same that need no `-accel kvm`.
                    Some("kvm" | "qemu-kvm") => {
                        reader.take(Opt { name: "accel", value: "kvm".into() })
                    }
                    _ => return Err(LikeError::Program(program.clone())),
                }
                rest
            }
            _ => words,
        };
        for option in options::sort(words, &mut reader.found) {
            reader.take(option);
        }
        reader.finish()
    }
}

/// What has been read so far. Options may come in any order, so most of it waits for the end.
#[derive(Default)]
struct Reader {
    settings: Settings,
    found: Findings,
    board: Board,
    backends: Backends,
    devices: Vec<String>,
    serials: Vec<String>,
    qmps: Vec<String>,
    monitors: Vec<String>,
}

impl Reader {
    fn take(&mut self, option: Opt) {
        let Some(option) = self.board.take(option, &mut self.settings, &mut self.found) else {
            return;
        };
        let Opt { name, value } = option;
        match name {
            "name" => self.name(&value),
            "uuid" => match value.parse() {
                Ok(uuid) => self.settings.uuid = Some(uuid),
                Err(_) => self.found.matters(format!("-uuid {value}"), "this is no UUID"),
            },
            "drive" => self.backends.drives.drive(&value, &mut self.found),
            "blockdev" => self.backends.drives.blockdev(&value, &mut self.found),
            "netdev" => {
                let netdev = netdev(&value, &mut self.found);
                add("-netdev", &mut self.backends.nets, netdev, &mut self.found);
            }
            "chardev" => {
                let chardev = chardev(&value, &mut self.found);
                add("-chardev", &mut self.backends.chars, chardev, &mut self.found);
            }
            "device" => self.devices.push(value),
            "serial" => self.serials.push(value),
            "qmp" | "qmp-pretty" => self.qmps.push(value),
            "mon" => self.monitors.push(value),
            "incoming" => self.incoming(&value),
            "mem-prealloc" => self.settings.prealloc = Some(OnOff(true)),
            "S" => self.settings.paused = Some(OnOff(true)),
            "object" => self.object(&value),
            // The table says that it is read, and nobody reads it.
            other => self.found.matters(format!("-{other}"), "mini-vmm does not know this option"),
        }
    }

    fn name(&mut self, value: &str) {
        let mut props = match Props::parse(value, "guest") {
            Ok(props) => props,
            Err(why) => return self.found.matters("-name", why),
        };
        if let Some(guest) = props.take("guest") {
            self.settings.name = guest.parse().ok();
            if self.settings.name.is_none() {
                self.found.note(
                    &format!("-name {guest}"),
                    "it is none for mini-vmm (letters, digits, '-', '_' and '.', 48 at most): say \
                     another with --name",
                );
            }
        }
        props.settle("-name", &[NAME], &mut self.found);
    }

    fn incoming(&mut self, value: &str) {
        match value.parse::<MigrateListen>() {
            Ok(listen) => self.settings.migrate_listen = Some(listen),
            Err(_) => self.found.note(
                &format!("-incoming {value}"),
                "mini-vmm does not listen there: say with --migrate-listen where it does \
                 (tcp:HOST:PORT, unix:PATH, defer)",
            ),
        }
    }

    /// The objects that only other options use.
    fn object(&mut self, value: &str) {
        let mut props = match Props::parse(value, "qom-type") {
            Ok(props) => props,
            Err(why) => return self.found.matters("-object", why),
        };
        let kind = props.take("qom-type").unwrap_or_default();
        let id = props.take("id").unwrap_or_default();
        let option = format!("-object {kind},id={id}");
        match kind.as_str() {
            "rng-random" | "rng-builtin" | "iothread" => {
                props.settle(&option, &[OBJECT], &mut self.found);
                self.found.note(&option, "the guest does not see it; left out");
            }
            kind if kind.starts_with("memory-backend") => self.found.matters(
                &option,
                "memory behind an object has another name in a migration; start the guest in QEMU \
                 with -m alone",
            ),
            _ => self.found.matters(
                &option,
                "mini-vmm has no such object; start the guest in QEMU without it",
            ),
        }
    }

    fn finish(mut self) -> Result<Like, LikeError> {
        std::mem::take(&mut self.board).finish(&mut self.settings, &mut self.found);
        self.serial();
        self.qmp();
        let devices = Devices::new(self.backends, &mut self.settings, &mut self.found);
        devices.all(&self.devices);
        if self.found.problems.is_empty() {
            Ok(Like { settings: self.settings, notes: self.found.notes })
        } else {
            Err(LikeError::Matters(self.found.problems))
        }
    }

    fn serial(&mut self) {
        let serials: Vec<_> = std::mem::take(&mut self.serials);
        let port = match serials.split_first() {
            Some((first, rest)) if first != "none" => {
                for more in rest.iter().filter(|text| *text != "none") {
                    self.found.matters(
                        format!("-serial {more}"),
                        "mini-vmm has one serial port; start the guest in QEMU with one",
                    );
                }
                first
            }
            _ => {
                return self.found.matters(
                    "-serial is missing",
                    "mini-vmm's board always has a serial port, and this QEMU's has none; start \
                     the guest in QEMU with -serial null, or with a place for its output",
                );
            }
        };
        let option = format!("-serial {port}");
        let backend = self.char_backend(port, &option);
        self.settings.serial = Some(or_null(backend, &option, "--serial", &mut self.found));
    }

    fn qmp(&mut self) {
        for text in std::mem::take(&mut self.monitors) {
            let mut props = Props::parse(&text, "chardev").unwrap_or_default();
            match (props.take("mode").as_deref(), props.take("chardev")) {
                (Some("control"), Some(id)) => self.qmps.push(format!("chardev:{id}")),
                _ => self.found.note(&format!("-mon {text}"), "QEMU's monitor is left out"),
            }
        }
        for text in std::mem::take(&mut self.qmps) {
            let option = format!("-qmp {text}");
            if text == "none" {
                continue;
            }
            match self.char_backend(&text, &option) {
                Some(CharBackend::Unix(path)) if self.settings.qmp.is_none() => {
                    self.settings.qmp = Some(QmpSocket(path));
                }
                Some(CharBackend::Unix(_)) => {
                    self.found.note(&option, "mini-vmm has one more control socket only; left out");
                }
                _ => self.found.note(
                    &option,
                    "mini-vmm's control socket is one where it listens (unix:PATH); left out",
                ),
            }
        }
    }

    /// What a serial port or monitor is to lead to; `None` if mini-vmm can't go there.
    fn char_backend(&mut self, text: &str, option: &str) -> Option<CharBackend> {
        match text.strip_prefix("chardev:") {
            None => char_shorthand(text, option, &mut self.found),
            Some(id) => match self.backends.chars.remove(id) {
                Some(backend) => backend,
                None => {
                    self.found.matters(option, format!("there is no -chardev with id={id}"));
                    None
                }
            },
        }
    }
}

/// Keeps a backend under its id.
fn add<T>(
    option: &str,
    all: &mut BTreeMap<String, T>,
    backend: Option<(String, T)>,
    found: &mut Findings,
) {
    let Some((id, backend)) = backend else { return };
    let option = format!("{option} {id}");
    if all.insert(id, backend).is_some() {
        found.matters(option, "there is another one of that id, so QEMU refuses it");
    }
}
