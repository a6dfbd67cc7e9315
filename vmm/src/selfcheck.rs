//! The self-checking guest: its image, and its parameters.
//!
//! What it does, what it says and what it listens to is told in `resources/selfcheck/README.md`.

use std::fmt;
use std::str::FromStr;

use crate::config::{ByteSize, nearest};

/// An ELF file with a PVH entry note, built from `resources/selfcheck`.
pub const IMAGE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/selfcheck.elf"));

/// The most vCPUs that the guest can use.
pub const MAX_VCPUS: u64 = 64;

/// What to do. Parsed from `key=value,…`; displayed as the command line that the guest reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SelfcheckParams {
    /// Bytes of RAM to fill and hold; `None`: all.
    pub fill: Option<u64>,
    /// Bytes that are rewritten, all vCPUs together.
    pub set: u64,
    /// Pages rewritten in a second, all vCPUs together; 0: as fast as possible.
    pub rate: u64,
    /// Pages of the rolling verification in a second, all vCPUs together.
    pub verify: u64,
    /// Whether the rewritten pages are spread over all memory.
    pub spread: bool,
    /// Whether all words of a page are written and verified, or four of them.
    pub full: bool,
    /// Timer interrupts in a second on each vCPU.
    pub hz: u64,
    /// vCPUs to use; `None`: those that the VM has (as the VMM fills in), or 1.
    pub vcpus: Option<u64>,
    /// Changes every value.
    pub seed: u64,
    /// Milliseconds between two status lines.
    pub every: u64,
    /// By how many µs two vCPUs' clocks may differ.
    pub skew: u64,
    /// How many vCPUs, the first ones, rewrite pages; 0: all.
    pub writers: u64,
    /// Records written to the first disk in a second; 0: none.
    pub disk: u64,
    /// Take all other disks into use as well, and ask nothing of them.
    pub drive: bool,
    /// Number of the model-specific register that the command `m` writes; 0: none.
    pub msr: u64,
    /// And its value.
    pub msr_value: u64,
}

impl Default for SelfcheckParams {
    fn default() -> Self {
        Self {
            fill: None,
            set: 16 << 20,
            rate: 2000,
            verify: 4000,
            spread: false,
            full: false,
            hz: 100,
            vcpus: None,
            seed: 1,
            every: 1000,
            skew: 1000,
            writers: 0,
            disk: 0,
            drive: false,
            msr: 0,
            msr_value: 0,
        }
    }
}

/// A parameter that the guest does not have, or a value that it cannot take.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SelfcheckError {
    /// No such key.
    #[error("the self-checking guest has no parameter '{key}'; {}", known(key))]
    UnknownKey {
        /// What was said.
        key: String,
    },
    /// Not a number, or out of range.
    #[error("the self-checking guest's parameter '{key}' is '{value}'; expected {expected}")]
    BadValue {
        /// The key.
        key: &'static str,
        /// What was said.
        value: String,
        /// What would have been right.
        expected: String,
    },
}

const KEYS: [&str; 16] = [
    "fill",
    "set",
    "rate",
    "verify",
    "spread",
    "full",
    "hz",
    "vcpus",
    "seed",
    "every",
    "skew",
    "writers",
    "disk",
    "drive",
    "msr",
    "msr_value",
];

/// The parameter that was probably meant, else all of them.
fn known(key: &str) -> String {
    match nearest(key, KEYS) {
        Some(word) => format!("did you mean '{word}'?"),
        None => format!("it has {}", KEYS.join(", ")),
    }
}

/// A bound that keeps the guest's arithmetic from overflowing, and that nobody meets.
const MANY: u64 = 1 << 40;
/// The most records in a second.
const MOST_RECORDS: u64 = 1 << 20;

fn size(key: &'static str, text: &str) -> Result<u64, SelfcheckError> {
    let plain = || text.parse().ok();
    let bytes = text.parse().map(|ByteSize(bytes)| bytes).ok().or_else(plain);
    bytes.filter(|bytes| *bytes <= MANY << 10).ok_or_else(|| SelfcheckError::BadValue {
        key,
        value: text.into(),
        expected: "a size with its unit, like 16M".into(),
    })
}

fn number(key: &'static str, text: &str, min: u64, max: u64) -> Result<u64, SelfcheckError> {
    let value = text.parse().ok().filter(|value| (min..=max).contains(value));
    value.ok_or_else(|| SelfcheckError::BadValue {
        key,
        value: text.into(),
        expected: format!("a number from {min} to {max}"),
    })
}

impl FromStr for SelfcheckParams {
    type Err = SelfcheckError;

    fn from_str(text: &str) -> Result<Self, SelfcheckError> {
        let mut params = Self::default();
        for word in text.split([',', ' ']).filter(|word| !word.is_empty()) {
            let (key, value) = word.split_once('=').unwrap_or((word, ""));
            match key {
                "fill" if value == "all" => params.fill = None,
                "fill" => {
                    let bytes = size("fill", value)?;
                    if bytes < 4096 {
                        let expected = "'all', or a size of one page (4K) or more".into();
                        return Err(SelfcheckError::BadValue {
                            key: "fill",
                            value: value.into(),
                            expected,
                        });
                    }
                    params.fill = Some(bytes);
                }
                "set" => params.set = size("set", value)?,
                "rate" => params.rate = number("rate", value, 0, MANY)?,
                "verify" => params.verify = number("verify", value, 0, MANY)?,
                "spread" => params.spread = number("spread", value, 0, 1)? == 1,
                "full" => params.full = number("full", value, 0, 1)? == 1,
                "hz" => params.hz = number("hz", value, 10, 1000)?,
                "vcpus" => params.vcpus = Some(number("vcpus", value, 1, MAX_VCPUS)?),
                "seed" => params.seed = number("seed", value, 0, u64::MAX)?,
                "every" => params.every = number("every", value, 10, MANY)?,
                "skew" => params.skew = number("skew", value, 0, MANY)?,
                "writers" => params.writers = number("writers", value, 0, MAX_VCPUS)?,
                "disk" => params.disk = number("disk", value, 0, MOST_RECORDS)?,
                "drive" => params.drive = number("drive", value, 0, 1)? == 1,
                "msr" => params.msr = number("msr", value, 0, u32::MAX.into())?,
                "msr_value" => params.msr_value = number("msr_value", value, 0, u64::MAX)?,
                _ => return Err(SelfcheckError::UnknownKey { key: key.into() }),
            }
        }
        Ok(params)
    }
}

impl fmt::Display for SelfcheckParams {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.fill {
            None => write!(f, "fill=all")?,
            Some(bytes) => write!(f, "fill={bytes}")?,
        }
        write!(
            f,
            ",set={},rate={},verify={},spread={},full={},hz={},vcpus={},seed={},every={},skew={},writers={},disk={}",
            self.set,
            self.rate,
            self.verify,
            u8::from(self.spread),
            u8::from(self.full),
            self.hz,
            self.vcpus.unwrap_or(1),
            self.seed,
            self.every,
            self.skew,
            self.writers,
            self.disk,
        )?;
        if self.drive {
            f.write_str(",drive=1")?;
        }
        match self.msr {
            0 => Ok(()),
            msr => write!(f, ",msr={msr},msr_value={}", self.msr_value),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_displayed_is_parsed_back() {
        let text = "fill=64M,set=1M,rate=0,verify=7,spread=1,full=1,hz=250,vcpus=2,seed=9,every=20,skew=5,writers=1,disk=9,drive=1,msr=320,msr_value=1";
        let params: SelfcheckParams = text.parse().unwrap();
        assert_eq!(params.fill, Some(64 << 20));
        assert_eq!(params.set, 1 << 20);
        assert!(params.spread && params.full);
        assert_eq!(params.to_string().parse(), Ok(params));

        let default = SelfcheckParams { vcpus: Some(1), ..Default::default() };
        assert_eq!("fill=all vcpus=1".parse(), Ok(default));
        assert_eq!(default.to_string().parse(), Ok(default));
    }

    #[test]
    fn what_the_guest_cannot_take_is_refused() {
        for text in ["rat=1", "rate", "rate=x", "hz=9", "hz=1001", "vcpus=0", "vcpus=65", "fill=1"]
        {
            let error = text.parse::<SelfcheckParams>().unwrap_err();
            let key = text.split('=').next().unwrap();
            assert!(error.to_string().contains(&format!("'{key}'")), "{error}");
        }
    }

    #[test]
    fn the_image_is_a_pvh_kernel() {
        assert!(IMAGE.starts_with(b"\x7fELF\x02\x01"));
        let note = b"\x04\0\0\0\x08\0\0\0\x12\0\0\0Xen\0";
        assert!(IMAGE.windows(note.len()).any(|window| window == note));
    }
}
