//! Devices of the effective configuration: nothing optional is left in them.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::Serialize;

use super::types::unknown_word;
use super::{ConfigError, MacAddr, PciSlot, SocketUri, VmName};

/// Where a serial port or console leads to.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum CharBackend {
    /// The terminal that runs the VM.
    Stdio,
    /// Output is written to a file, which is emptied first; there is no input.
    File(PathBuf),
    /// A listening socket; one client at a time.
    Unix(PathBuf),
    /// A new pseudo-terminal; `mini-vmm status` shows which.
    Pty,
    /// Output is dropped; there is no input.
    Null,
}

impl FromStr for CharBackend {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        match text.split_once(':') {
            Some(("file", path)) if !path.is_empty() => Ok(Self::File(path.into())),
            Some(("unix", path)) if !path.is_empty() => match text.parse::<SocketUri>()? {
                SocketUri::Unix(path) => Ok(Self::Unix(path)),
                SocketUri::Tcp { .. } => unreachable_backend(text),
            },
            None if text == "stdio" => Ok(Self::Stdio),
            None if text == "pty" => Ok(Self::Pty),
            None if text == "null" => Ok(Self::Null),
            _ => unreachable_backend(text),
        }
    }
}

fn unreachable_backend<T>(text: &str) -> Result<T, ConfigError> {
    let word = text.split(':').next().unwrap_or(text);
    let forms = "one of stdio, file:PATH, unix:PATH, pty, null";
    Err(unknown_word(
        "serial or console",
        if word.is_empty() { text } else { word },
        forms,
        &["stdio", "file", "unix", "pty", "null"],
    ))
}

impl fmt::Display for CharBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stdio => f.write_str("stdio"),
            Self::File(path) => write!(f, "file:{}", path.display()),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Pty => f.write_str("pty"),
            Self::Null => f.write_str("null"),
        }
    }
}

/// How a disk image is opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum DiskCache {
    /// Through the host's page cache; a guest's flush reaches the disk.
    #[default]
    Writeback,
    /// Around the host's page cache (`O_DIRECT`); a guest's flush reaches the disk.
    None,
}

impl FromStr for DiskCache {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        match text {
            "writeback" => Ok(Self::Writeback),
            "none" => Ok(Self::None),
            _ => Err(unknown_word("cache", text, "a cache mode", &["writeback", "none"])),
        }
    }
}

impl fmt::Display for DiskCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Writeback => "writeback",
            Self::None => "none",
        })
    }
}

/// Which drivers a virtio device is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum VirtioVersion {
    /// Old ones and new ones.
    #[default]
    Transitional,
    /// Those of virtio 1.0 and later (QEMU's `disable-legacy=on`).
    Modern,
    /// Those of before (QEMU's `disable-modern=on`).
    Legacy,
}

impl FromStr for VirtioVersion {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        match text {
            "transitional" => Ok(Self::Transitional),
            "modern" => Ok(Self::Modern),
            "legacy" => Ok(Self::Legacy),
            _ => Err(unknown_word(
                "virtio",
                text,
                "a kind of virtio device",
                &["transitional", "modern", "legacy"],
            )),
        }
    }
}

impl fmt::Display for VirtioVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Transitional => "transitional",
            Self::Modern => "modern",
            Self::Legacy => "legacy",
        })
    }
}

/// A virtio-blk device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct DiskConfig {
    /// A raw image, of any size, or a block device.
    pub path: PathBuf,
    /// Its id.
    pub id: VmName,
    /// Its slot.
    pub addr: PciSlot,
    /// Which drivers it is for.
    pub virtio: VirtioVersion,
    /// Whether the guest may only read it.
    pub readonly: bool,
    /// How it is opened.
    pub cache: DiskCache,
    /// Number of request queues, 1 to 255; QEMU's default is one for each vCPU. MSI-X vectors are
    /// one more than that.
    pub queues: u16,
}

/// Where a network device's frames go.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum NetBackend {
    /// An existing tap interface of that name.
    Tap(String),
    /// A stream socket to connect to, each frame behind its length (32 bits, big-endian), as
    /// QEMU's `-netdev stream` does.
    Stream(SocketUri),
}

/// A virtio-net device with one pair of queues.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct NetConfig {
    /// Where its frames go.
    #[serde(flatten)]
    pub backend: NetBackend,
    /// Its Ethernet address.
    pub mac: MacAddr,
    /// Its id.
    pub id: VmName,
    /// Its slot.
    pub addr: PciSlot,
    /// Which drivers it is for.
    pub virtio: VirtioVersion,
}

/// A virtio-rng or virtio-balloon device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct PlainConfig {
    /// Its id.
    pub id: VmName,
    /// Its slot.
    pub addr: PciSlot,
    /// Which drivers it is for.
    pub virtio: VirtioVersion,
}

/// A virtio-console device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct ConsoleConfig {
    /// Where it leads to.
    pub backend: CharBackend,
    /// Its id.
    pub id: VmName,
    /// Its slot.
    pub addr: PciSlot,
    /// Which drivers it is for.
    pub virtio: VirtioVersion,
}
