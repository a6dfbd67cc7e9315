//! Small values of a configuration, each parsed once and valid ever after.

use std::fmt;
use std::str::FromStr;

use super::{ConfigError, OnOff, nearest};

/// A machine type: everything that a migration depends on hangs off it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum MachineType {
    /// QEMU's board of that name.
    #[default]
    PcI440fx7_2,
}

impl MachineType {
    /// All of them.
    pub const ALL: [Self; 1] = [Self::PcI440fx7_2];

    /// The name, as in the stream's configuration section.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::PcI440fx7_2 => "pc-i440fx-7.2",
        }
    }
}

impl FromStr for MachineType {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        Self::ALL.into_iter().find(|m| m.as_str() == text).ok_or_else(|| {
            unknown_word("machine", text, "a machine type", &Self::ALL.map(Self::as_str))
        })
    }
}

impl fmt::Display for MachineType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

pub(super) fn unknown_word(
    what: &'static str,
    found: &str,
    kind: &str,
    known: &[&str],
) -> ConfigError {
    let expected = match nearest(found, known.iter().copied()) {
        Some(word) => format!("{kind}; did you mean '{word}'?"),
        None => format!("{kind}; there are {}", known.join(", ")),
    };
    ConfigError::Invalid { what, found: found.to_string(), expected }
}

/// Which CPU the guest sees.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum CpuModel {
    /// All that this host's KVM offers.
    #[default]
    Host,
    /// The x86-64-v2 level: SSE4.2, POPCNT, CMPXCHG16B.
    X86_64V2,
    /// The x86-64-v3 level: AVX2, BMI, FMA, MOVBE.
    X86_64V3,
}

impl CpuModel {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Host, Self::X86_64V2, Self::X86_64V3];

    /// The word on the command line.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::X86_64V2 => "x86-64-v2",
            Self::X86_64V3 => "x86-64-v3",
        }
    }
}

/// `MODEL[,migratable=on|off]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CpuConfig {
    /// The model.
    pub model: CpuModel,
    /// Whether features that can't be migrated (`invtsc`) are kept from the guest.
    pub migratable: bool,
}

impl Default for CpuConfig {
    fn default() -> Self {
        Self { model: CpuModel::Host, migratable: true }
    }
}

impl FromStr for CpuConfig {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let mut cpu = Self::default();
        for (n, (key, value)) in super::keys::split(text, Some("model")).into_iter().enumerate() {
            match key.as_str() {
                "model" if n == 0 => {
                    cpu.model = CpuModel::ALL
                        .into_iter()
                        .find(|m| m.as_str() == value)
                        .ok_or_else(|| {
                            unknown_word(
                                "cpu",
                                &value,
                                "a CPU model",
                                &CpuModel::ALL.map(CpuModel::as_str),
                            )
                        })?;
                }
                "migratable" => cpu.migratable = value.parse::<OnOff>()?.0,
                other => {
                    return Err(unknown_word("cpu", other, "an option of --cpu", &["migratable"]));
                }
            }
        }
        Ok(cpu)
    }
}

impl fmt::Display for CpuConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{},migratable={}", self.model.as_str(), OnOff(self.migratable))
    }
}

/// A slot of PCI bus 0 for a device, 2 to 31 (0 is the host bridge, 1 the PIIX3). Written in
/// hexadecimal as `lspci` shows it: `5`, `05.0`, `1f`, `00:05.0`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PciSlot(u8);

impl PciSlot {
    /// The first slot for devices.
    pub const FIRST: u8 = 2;
    /// The last slot of a PCI bus.
    pub const LAST: u8 = 31;

    /// The slot of that number, if a device may be there.
    #[must_use]
    pub fn new(number: u8) -> Option<Self> {
        (Self::FIRST..=Self::LAST).contains(&number).then_some(Self(number))
    }

    /// 2 to 31.
    #[must_use]
    pub fn number(self) -> u8 {
        self.0
    }
}

impl FromStr for PciSlot {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let parse = || {
            let rest = text.strip_prefix("0000:").unwrap_or(text);
            let rest = rest.strip_prefix("00:").unwrap_or(rest);
            let (slot, function) = rest.split_once('.').unwrap_or((rest, "0"));
            let slot = slot.strip_prefix("0x").unwrap_or(slot);
            if function != "0" || slot.is_empty() || !slot.bytes().all(|b| b.is_ascii_hexdigit()) {
                return None;
            }
            Self::new(u8::from_str_radix(slot, 16).ok()?)
        };
        parse().ok_or_else(|| ConfigError::Invalid {
            what: "addr",
            found: text.to_string(),
            expected: "a PCI slot from 02.0 to 1f.0, in hexadecimal as lspci shows it".to_string(),
        })
    }
}

impl fmt::Display for PciSlot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:02x}.0", self.0)
    }
}

/// An Ethernet address of one station.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MacAddr(pub [u8; 6]);

impl MacAddr {
    /// The `n`-th default, counted up from QEMU's 52:54:00:12:34:56.
    #[must_use]
    pub fn nth_default(n: u8) -> Self {
        let low = 0x12_3456 + u32::from(n);
        let [_, a, b, c] = low.to_be_bytes();
        Self([0x52, 0x54, 0x00, a, b, c])
    }
}

impl FromStr for MacAddr {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let parse = || {
            let mut bytes = [0u8; 6];
            let mut parts = text.split(':');
            for byte in &mut bytes {
                let part = parts.next()?;
                if part.len() != 2 || !part.bytes().all(|b| b.is_ascii_hexdigit()) {
                    return None;
                }
                *byte = u8::from_str_radix(part, 16).ok()?;
            }
            // The lowest bit of the first byte marks a group; a station may not have such an address.
            (parts.next().is_none() && bytes[0] & 1 == 0 && bytes != [0; 6]).then_some(Self(bytes))
        };
        parse().ok_or_else(|| ConfigError::Invalid {
            what: "mac",
            found: text.to_string(),
            expected: "a unicast MAC address like 52:54:00:12:34:56".to_string(),
        })
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// The name of a VM, or of a device: 1 to 48 of letters, digits, `-`, `_` and `.`, beginning with a
/// letter or digit. It names a directory, and fits into a socket's path.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VmName(String);

impl VmName {
    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for VmName {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let good = text.len() <= 48
            && text.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric())
            && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
        if good {
            return Ok(Self(text.to_string()));
        }
        Err(ConfigError::Invalid {
            what: "name",
            found: text.to_string(),
            expected: "a name of 1 to 48 letters, digits, '-', '_' and '.', beginning with a letter or digit".to_string(),
        })
    }
}

impl fmt::Display for VmName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
