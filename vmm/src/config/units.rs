//! Sizes, times and rates as people write them: `2G`, `300ms`, `1.5s`, `100M`, `1Gbit`.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use super::ConfigError;

/// Bytes. Written `512M`, `2G`, `1.5GiB`, `4096B`; K, M, G, T are powers of 1024. A number without
/// a unit is refused, because half the world means bytes by it and the other half megabytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ByteSize(pub u64);

/// A time. Written `300ms`, `1.5s`, `2m`, `1h`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HumanDuration(pub Duration);

/// Bytes a second. Written like a size (`100M`, `100MiB/s`), or in decimal bits (`1Gbit`, `800Mbit/s`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Rate(pub u64);

const SIZES: [(&str, u64); 5] =
    [("T", 1 << 40), ("G", 1 << 30), ("M", 1 << 20), ("K", 1 << 10), ("B", 1)];

/// `12.5xyz` → (12.5 as numerator over a power of ten, `xyz`); exact, no floating point.
fn number(text: &str) -> Option<(u128, u128, &str)> {
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (digits, unit) = text.split_at_checked(end)?;
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
    // 20 and 9 digits keep their product inside 128 bits.
    if whole.is_empty() || whole.len() > 20 || fraction.len() > 9 || fraction.contains('.') {
        return None;
    }
    let over = 10u128.pow(u32::try_from(fraction.len()).ok()?);
    let value = whole.parse::<u128>().ok()? * over
        + if fraction.is_empty() { 0 } else { fraction.parse().ok()? };
    Some((value, over, unit.trim()))
}

fn scaled(value: u128, over: u128, factor: u128) -> Option<u64> {
    u64::try_from(value.checked_mul(factor)? / over).ok()
}

fn size_factor(unit: &str) -> Option<u64> {
    let unit = unit.to_ascii_uppercase();
    let letter = match unit.len() {
        1 => unit.as_str(),
        _ => unit.strip_suffix("IB").or_else(|| unit.strip_suffix('B'))?,
    };
    SIZES.iter().find(|(name, _)| *name == letter).map(|(_, factor)| *factor)
}

impl FromStr for ByteSize {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let parse = || {
            let (value, over, unit) = number(text.trim())?;
            scaled(value, over, size_factor(unit)?.into()).map(Self)
        };
        parse().ok_or_else(|| invalid("size", text, "a size with its unit, like 512M or 2G"))
    }
}

impl FromStr for HumanDuration {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let parse = || {
            let (value, over, unit) = number(text.trim())?;
            let nanos: u128 = match unit {
                "us" | "µs" => 1_000,
                "ms" => 1_000_000,
                "s" | "sec" => 1_000_000_000,
                "m" | "min" => 60_000_000_000,
                "h" => 3_600_000_000_000,
                _ => return None,
            };
            scaled(value, over, nanos).map(|n| Self(Duration::from_nanos(n)))
        };
        parse().ok_or_else(|| invalid("time", text, "a time with its unit, like 300ms, 1.5s or 2m"))
    }
}

impl FromStr for Rate {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let parse = || {
            let (value, over, unit) = number(text.trim())?;
            let unit = unit.strip_suffix("/s").unwrap_or(unit);
            if let Some(scale) = unit.strip_suffix("bit") {
                let factor: u128 = match scale.to_ascii_uppercase().as_str() {
                    "K" => 1_000,
                    "M" => 1_000_000,
                    "G" => 1_000_000_000,
                    _ => return None,
                };
                return scaled(value, over.checked_mul(8)?, factor).map(Self);
            }
            scaled(value, over, size_factor(unit)?.into()).map(Self)
        };
        parse().ok_or_else(|| {
            invalid("rate", text, "a rate with its unit, like 100M (bytes a second) or 1Gbit")
        })
    }
}

fn invalid(what: &'static str, found: &str, expected: &str) -> ConfigError {
    ConfigError::Invalid { what, found: found.to_string(), expected: expected.to_string() }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, factor) = SIZES
            .into_iter()
            .find(|(_, factor)| self.0 >= *factor && self.0.is_multiple_of(*factor))
            .unwrap_or(("B", 1));
        write!(f, "{}{name}", self.0 / factor)
    }
}

impl fmt::Display for HumanDuration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.0)
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/s", ByteSize(self.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (text, want) in [
            ("2G", 2 << 30),
            ("512M", 512 << 20),
            ("1.5GiB", 3 << 29),
            ("4096B", 4096),
            ("64kb", 64 << 10),
        ] {
            assert_eq!(text.parse::<ByteSize>().unwrap(), ByteSize(want), "{text}");
        }
        for text in ["", "2", "G", "-1G", "1..5G", "2X", "99999999999T", "1e3M", "2GG", "٣G", "2Gé"]
        {
            assert!(text.parse::<ByteSize>().is_err(), "{text}");
        }
        for n in [0, 1, 4096, 3 << 20, (2 << 30) + 1, u64::MAX >> 4] {
            assert_eq!(ByteSize(n).to_string().parse::<ByteSize>().unwrap(), ByteSize(n));
        }
    }

    #[test]
    fn times_and_rates() {
        assert_eq!("300ms".parse::<HumanDuration>().unwrap().0, Duration::from_millis(300));
        assert_eq!("1.5s".parse::<HumanDuration>().unwrap().0, Duration::from_millis(1500));
        assert!("300".parse::<HumanDuration>().is_err());
        assert_eq!("1Gbit".parse::<Rate>().unwrap(), Rate(125_000_000));
        assert_eq!("100MiB/s".parse::<Rate>().unwrap(), Rate(100 << 20));
        assert_eq!(Rate(100 << 20).to_string().parse::<Rate>().unwrap(), Rate(100 << 20));
    }
}
