//! What was said about a VM, in a TOML file or as flags: the same words in both.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::Deserialize;
use serde::de::{
    self, DeserializeOwned, Deserializer, MapAccess, Visitor, value::MapAccessDeserializer,
};
use uuid::Uuid;

use super::keys::{check_keys, split};
use super::{
    ByteSize, CharBackend, ConfigError, CpuConfig, DiskCache, MacAddr, MachineType, MigrateListen,
    PciSlot, SocketUri, VirtioVersion, VmName,
};

/// `on` or `off` (also `true`, `false`, `yes`, `no`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OnOff(pub bool);

impl FromStr for OnOff {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        match text {
            "on" | "true" | "yes" => Ok(Self(true)),
            "off" | "false" | "no" => Ok(Self(false)),
            _ => Err(ConfigError::Invalid {
                what: "switch",
                found: text.to_string(),
                expected: "'on' or 'off'".to_string(),
            }),
        }
    }
}

impl fmt::Display for OnOff {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0 { "on" } else { "off" })
    }
}

impl<'de> Deserialize<'de> for OnOff {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Switch;
        impl Visitor<'_> for Switch {
            type Value = OnOff;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("true or false")
            }

            fn visit_bool<E: de::Error>(self, on: bool) -> Result<OnOff, E> {
                Ok(OnOff(on))
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<OnOff, E> {
                text.parse().map_err(E::custom)
            }
        }
        deserializer.deserialize_any(Switch)
    }
}

/// A number of queues, 1 to 255; in a file a number, in a flag its digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Queues(pub u16);

impl<'de> Deserialize<'de> for Queues {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Clone, Copy)]
        struct Number;
        impl Visitor<'_> for Number {
            type Value = Queues;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number of queues from 1 to 255")
            }

            fn visit_i64<E: de::Error>(self, n: i64) -> Result<Queues, E> {
                self.visit_u64(
                    u64::try_from(n)
                        .map_err(|_| E::invalid_value(de::Unexpected::Signed(n), &self))?,
                )
            }

            fn visit_u64<E: de::Error>(self, n: u64) -> Result<Queues, E> {
                match u16::try_from(n) {
                    Ok(n @ 1..=255) => Ok(Queues(n)),
                    _ => Err(E::invalid_value(de::Unexpected::Unsigned(n), &self)),
                }
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Queues, E> {
                self.visit_u64(
                    text.parse().map_err(|_| E::invalid_value(de::Unexpected::Str(text), &self))?,
                )
            }
        }
        deserializer.deserialize_any(Number)
    }
}

/// A path for the control socket, written `unix:PATH`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QmpSocket(pub PathBuf);

impl FromStr for QmpSocket {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        match text.parse() {
            Ok(SocketUri::Unix(path)) => Ok(Self(path)),
            _ => Err(ConfigError::Invalid {
                what: "qmp",
                found: text.to_string(),
                expected: "a socket, unix:PATH with a path of at most 107 bytes".to_string(),
            }),
        }
    }
}

impl fmt::Display for QmpSocket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "unix:{}", self.0.display())
    }
}

/// `path=F[,id=,addr=,readonly=,cache=,queues=,virtio=]`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct DiskSettings {
    /// A raw image, or a block device.
    pub path: PathBuf,
    /// Default `diskN`.
    pub id: Option<VmName>,
    /// Default: the next free slot.
    pub addr: Option<PciSlot>,
    /// Default `transitional`.
    pub virtio: Option<VirtioVersion>,
    /// Default off.
    pub readonly: Option<OnOff>,
    /// Default `writeback`.
    pub cache: Option<DiskCache>,
    /// Default: one for each vCPU.
    pub queues: Option<Queues>,
}

/// `tap=T|stream=ADDR[,mac=,id=,addr=,virtio=]`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct NetSettings {
    /// An existing tap interface; this or `stream`.
    pub tap: Option<String>,
    /// A socket to connect to; this or `tap`.
    pub stream: Option<SocketUri>,
    /// Default 52:54:00:12:34:56 and up.
    pub mac: Option<MacAddr>,
    /// Default `netN`.
    pub id: Option<VmName>,
    /// Default: the next free slot.
    pub addr: Option<PciSlot>,
    /// Default `transitional`.
    pub virtio: Option<VirtioVersion>,
}

/// A device that is there or not: `on`, `off`, or `addr=…,id=…`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlainSettings {
    /// Whether it is there at all.
    pub on: bool,
    /// What else was said.
    pub place: Place,
}

/// Where a device is, if that was said.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Place {
    /// Default: the device's kind and 0.
    pub id: Option<VmName>,
    /// Default: the next free slot.
    pub addr: Option<PciSlot>,
    /// Default `transitional`.
    pub virtio: Option<VirtioVersion>,
}

/// `BACKEND[,id=,addr=,virtio=]`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct ConsoleTable {
    /// Where it leads to.
    pub backend: CharBackend,
    /// Default `console0`.
    pub id: Option<VmName>,
    /// Default: the next free slot.
    pub addr: Option<PciSlot>,
    /// Default `transitional`.
    pub virtio: Option<VirtioVersion>,
}

/// A console: in a file a backend's text, or a table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConsoleSettings(pub ConsoleTable);

/// Reads `key=value,…` into a struct, by the same `Deserialize` that reads the file.
fn from_options<T: DeserializeOwned>(
    flag: &str,
    text: &str,
    first: Option<&str>,
) -> Result<T, ConfigError> {
    let pairs = split(text, first);
    check_keys::<T>(flag, pairs.iter().map(|(key, _)| key.as_str()))?;
    let mut map = serde_json::Map::new();
    for (key, value) in pairs {
        if map.insert(key.clone(), value.into()).is_some() {
            return Err(ConfigError::Invalid {
                what: "option",
                found: key,
                expected: "to be said twice".to_string(),
            });
        }
    }
    serde_json::from_value(map.into())
        .map_err(|e| ConfigError::Parse { place: flag.to_string(), reason: e.into() })
}

impl FromStr for DiskSettings {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        from_options("--disk", text, None)
    }
}

impl FromStr for NetSettings {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        from_options("--net", text, None)
    }
}

impl FromStr for PlainSettings {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        if let Ok(OnOff(on)) = text.parse() {
            return Ok(Self { on, place: Place::default() });
        }
        Ok(Self { on: true, place: from_options("--rng or --balloon", text, None)? })
    }
}

impl FromStr for ConsoleSettings {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        from_options("--console", text, Some("backend")).map(Self)
    }
}

impl<'de> Deserialize<'de> for PlainSettings {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct SwitchOrTable;
        impl<'de> Visitor<'de> for SwitchOrTable {
            type Value = PlainSettings;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("true, false, or a table with 'id' and 'addr'")
            }

            fn visit_bool<E: de::Error>(self, on: bool) -> Result<PlainSettings, E> {
                Ok(PlainSettings { on, place: Place::default() })
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<PlainSettings, A::Error> {
                let place = Place::deserialize(MapAccessDeserializer::new(map))?;
                Ok(PlainSettings { on: true, place })
            }
        }
        deserializer.deserialize_any(SwitchOrTable)
    }
}

impl<'de> Deserialize<'de> for ConsoleSettings {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct TextOrTable;
        impl<'de> Visitor<'de> for TextOrTable {
            type Value = ConsoleSettings;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a backend in quotes, like \"pty\", or a table with 'backend'")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<ConsoleSettings, E> {
                text.parse().map_err(E::custom)
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<ConsoleSettings, A::Error> {
                ConsoleTable::deserialize(MapAccessDeserializer::new(map)).map(ConsoleSettings)
            }
        }
        deserializer.deserialize_any(TextOrTable)
    }
}

/// Everything that can be said about a VM. A flag overrules the file; disks and nets add up, the
/// file's first, and one with the id of one in the file overrules that, key by key.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, clap::Args)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Settings {
    /// Name of the VM, unique on this host
    ///
    /// Its control socket and recorded configuration live under that name in $XDG_RUNTIME_DIR/mini-vmm
    /// (else /run/mini-vmm). [default: vm]
    #[arg(long, value_name = "NAME")]
    pub name: Option<VmName>,

    /// UUID of the VM [default: all zeros, as QEMU]
    #[arg(long, value_name = "UUID")]
    pub uuid: Option<Uuid>,

    /// Machine type: a migration needs the same on both sides [default: pc-i440fx-7.2]
    #[arg(long, value_name = "TYPE")]
    pub machine: Option<MachineType>,

    /// CPU the guest sees: host, x86-64-v2 or x86-64-v3 [,migratable=on|off] [default: host,migratable=on]
    ///
    /// 'host' is all this host offers, without what can't be migrated (invtsc). The levels are the
    /// same on every host that has them: choose one to migrate between different processors.
    #[arg(long, value_name = "MODEL")]
    pub cpu: Option<CpuConfig>,

    /// Number of vCPUs [default: 1]
    #[arg(long, value_name = "N")]
    pub smp: Option<u32>,

    /// Size of RAM, a multiple of 1M [default: 256M]
    #[arg(long, short = 'm', value_name = "SIZE")]
    pub memory: Option<ByteSize>,

    /// Have the host give all of RAM its memory at the start
    ///
    /// The host clears memory when it is first written to, which on a destination takes longer than the
    /// network. With this it is done while the destination waits; it then holds all of the VM's
    /// memory, also what the guest never uses.
    #[arg(long, value_name = "on|off", num_args = 0..=1, require_equals = true, default_missing_value = "on")]
    pub prealloc: Option<OnOff>,

    /// Note the pages that each vCPU writes in a ring of so many entries, not in a log [default: 0, the log]
    ///
    /// A power of two from 1024 to 65536, QEMU's '-accel kvm,dirty-ring-size=N'. With it '--auto-converge'
    /// slows the vCPUs that write most instead of all; a vCPU that fills its ring leaves the guest to
    /// have it emptied. The two sides of a migration need not have the same.
    #[arg(long, value_name = "ENTRIES")]
    pub dirty_ring: Option<u32>,

    /// Keep RAM where another process of this host can be given it, for 'migrate --local'
    ///
    /// A VM that was handed over so keeps it so, whether its new process was told or not. Such memory gets
    /// huge pages only where /sys/kernel/mm/transparent_hugepage/shmem_enabled lets it: without them it is
    /// slower to begin with.
    #[arg(long, value_name = "on|off", num_args = 0..=1, require_equals = true, default_missing_value = "on")]
    pub shared_memory: Option<OnOff>,

    /// Kernel to boot: a bzImage, or an ELF file with a PVH entry
    #[arg(long, value_name = "FILE", group = "boot")]
    pub kernel: Option<PathBuf>,

    /// Initial RAM disk for the kernel
    #[arg(long, value_name = "FILE", requires = "kernel")]
    pub initrd: Option<PathBuf>,

    /// The kernel's command line [default: console=ttyS0]
    #[arg(long, value_name = "TEXT", requires = "kernel", allow_hyphen_values = true)]
    pub append: Option<String>,

    /// BIOS: SeaBIOS' bios-256k.bin [default: where the package seabios has it]
    ///
    /// A guest without --kernel boots by it from its disks. One with --kernel gets it along when it moves
    /// to a QEMU, to reboot there.
    #[arg(long, value_name = "FILE")]
    pub firmware: Option<PathBuf>,

    /// Run the built-in guest that checks its own memory and clocks, with these parameters
    #[arg(long, value_name = "PARAMS", group = "boot", num_args = 0..=1, default_missing_value = "")]
    pub selfcheck: Option<String>,

    /// Disk: path=FILE [,id=ID] [,addr=SLOT] [,readonly=on|off] [,cache=writeback|none] [,queues=N] [,virtio=transitional|modern|legacy]
    ///
    /// A raw image of any size, or a block device. A comma in a value is written twice. 'modern' and
    /// 'legacy' are QEMU's disable-legacy=on and disable-modern=on. May be given several times; with the
    /// id of a disk of --config or --like it changes that one.
    #[arg(long, value_name = "OPTIONS")]
    pub disk: Vec<DiskSettings>,

    /// Network device: tap=NAME or stream=ADDR [,mac=MAC] [,id=ID] [,addr=SLOT] [,virtio=KIND]
    ///
    /// The tap interface must exist. ADDR is tcp:HOST:PORT or unix:PATH, spoken to as QEMU's
    /// '-netdev stream'. May be given several times; with the id of one of --config or --like it changes
    /// that one.
    #[arg(long, value_name = "OPTIONS")]
    pub net: Vec<NetSettings>,

    /// Random number device [=addr=SLOT,id=ID,virtio=KIND]
    #[arg(long, value_name = "OPTIONS", num_args = 0..=1, require_equals = true, default_missing_value = "on")]
    pub rng: Option<PlainSettings>,

    /// Balloon device [=addr=SLOT,id=ID,virtio=KIND]
    #[arg(long, value_name = "OPTIONS", num_args = 0..=1, require_equals = true, default_missing_value = "on")]
    pub balloon: Option<PlainSettings>,

    /// Virtio console (hvc0): stdio, file:PATH, unix:PATH, pty or null [,id=ID] [,addr=SLOT] [,virtio=KIND]
    #[arg(long, value_name = "BACKEND")]
    pub console: Option<ConsoleSettings>,

    /// Serial port (ttyS0): stdio, file:PATH, unix:PATH, pty or null [default: stdio]
    #[arg(long, value_name = "BACKEND")]
    pub serial: Option<CharBackend>,

    /// One more control socket, beside the one in the VM's runtime directory: unix:PATH
    #[arg(long, value_name = "SOCKET")]
    pub qmp: Option<QmpSocket>,

    /// Do not run the guest until 'mini-vmm cont'
    #[arg(long, value_name = "on|off", num_args = 0..=1, require_equals = true, default_missing_value = "on")]
    pub paused: Option<OnOff>,

    /// Wait for a VM to arrive here (tcp:HOST:PORT, unix:PATH), restore a saved one (file:PATH[,offset=N], fd:N,
    /// exec:COMMAND), or wait for 'migrate-incoming' on the control socket (defer)
    #[arg(long, value_name = "URI")]
    pub migrate_listen: Option<MigrateListen>,
}

impl Settings {
    /// Reads a TOML file.
    ///
    /// # Errors
    /// If it can't be read, isn't TOML, has an unknown key (the nearest one is named) or a bad value.
    pub fn from_file(path: &Path) -> Result<Self, ConfigError> {
        let shown = path.display().to_string();
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::File { path: shown.clone(), source })?;
        Self::from_toml(&text, &format!("the configuration file '{shown}'"))
    }

    /// Reads TOML text; `place` says in errors where it comes from.
    ///
    /// # Errors
    /// As [`Settings::from_file`].
    pub fn from_toml(text: &str, place: &str) -> Result<Self, ConfigError> {
        let parse_error = |e: toml::de::Error| ConfigError::Parse {
            place: place.to_string(),
            reason: Box::new(e),
        };
        let table: toml::Table = toml::from_str(text).map_err(parse_error)?;
        check_table(&table, place)?;
        // Once more from the text, so that a bad value is shown with its line.
        toml::from_str(text).map_err(parse_error)
    }
}

/// Unknown keys, here and in the devices' tables, with a better word than serde has for them.
fn check_table(table: &toml::Table, place: &str) -> Result<(), ConfigError> {
    check_keys::<Settings>(place, table.keys().map(String::as_str))?;
    for (key, value) in table {
        let entries: Vec<&toml::Table> = match value {
            toml::Value::Table(one) => vec![one],
            toml::Value::Array(many) => many.iter().filter_map(toml::Value::as_table).collect(),
            _ => continue,
        };
        for entry in entries {
            let keys = entry.keys().map(String::as_str);
            let place = format!("'{key}' of {place}");
            match key.as_str() {
                "disk" => check_keys::<DiskSettings>(&place, keys)?,
                "net" => check_keys::<NetSettings>(&place, keys)?,
                "rng" | "balloon" => check_keys::<Place>(&place, keys)?,
                "console" => check_keys::<ConsoleTable>(&place, keys)?,
                _ => {}
            }
        }
    }
    Ok(())
}
