//! Capabilities and parameters of a migration: their names in QMP, ranges and defaults.
//!
//! A client of QEMU's finds every name that QEMU 7.2 has. What has no effect here is kept and
//! shown as it was set; what would have an effect that does not exist here is refused.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::throttle::Limits;
use crate::wire::multifd::MAX_CHANNELS;
use crate::wire::zstd::MAX_LEVEL;

/// What happens when a migration's time is over and it has not converged.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnTimeout {
    /// The migration is given up; the guest stays.
    #[default]
    Cancel,
    /// The guest is stopped and moved, however long that takes.
    Force,
}

/// How pages are compressed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Compression {
    /// Not at all.
    #[default]
    None,
    /// By zstd.
    Zstd,
}

/// The parameters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parameters {
    /// `max-bandwidth`: bytes per second while the guest runs; 0 is no limit, which is the default
    /// (QEMU's is 128 MiB/s). The last pages, with the guest stopped, are never slowed.
    pub max_bandwidth: u64,
    /// `downtime-limit`: how long the guest may stand still for the last pages. 300 ms.
    pub downtime_limit: Duration,
    /// `multifd` (a capability): pages on connections of their own.
    pub multifd: bool,
    /// `multifd-channels`: how many, from 1 to [`MAX_CHANNELS`]. 2.
    pub multifd_channels: u8,
    /// `multifd-compression` and `multifd-zstd-level` (up to [`MAX_LEVEL`], 1): how pages on those
    /// connections are compressed. What comes is taken however it is.
    pub compression: Compression,
    /// The level for when it is zstd.
    pub zstd_level: u8,
    /// `x-timeout`, in ms: how long the guest may be migrated before `x-on-timeout` happens; 0, the
    /// default, is for ever.
    pub timeout: Option<Duration>,
    /// `x-on-timeout`: `cancel` (default) or `force`.
    pub on_timeout: OnTimeout,
    /// `x-verify`: compare RAM and device state of the two sides before the guest runs. Off: it
    /// makes the downtime longer.
    pub verify: bool,
    /// `x-local`: give a destination on this host the memory itself, over a Unix socket, and copy none of it.
    /// Off.
    pub local: bool,
    /// `x-stall-timeout`, in ms: how long the other side may be silent when it owes an answer, or
    /// take no bytes. 30 s.
    pub stall_timeout: Duration,
    /// `x-settle`: a source in doubt asks the destination and looks at the disks by itself. On; off
    /// leaves all to the operator.
    pub settle: bool,
    /// `pause-before-switchover` (a capability): stop in `pre-switchover` until the user goes on.
    pub pause_before_switchover: bool,
    /// `events` (a capability): send MIGRATION and MIGRATION_PASS events.
    pub events: bool,
    /// `auto-converge` (a capability): make the vCPUs rest when the guest writes faster than can be
    /// sent.
    pub auto_converge: bool,
    /// How much: `cpu-throttle-initial`, `cpu-throttle-increment`, `max-cpu-throttle`,
    /// `cpu-throttle-tailslow`, `throttle-trigger-threshold`.
    pub throttle: Limits,
    /// Parameters of QEMU's that the engine has no use for, kept as they were set.
    carried: BTreeMap<&'static str, u64>,
}

impl Default for Parameters {
    fn default() -> Self {
        Self {
            max_bandwidth: 0,
            downtime_limit: Duration::from_millis(300),
            multifd: false,
            multifd_channels: 2,
            compression: Compression::None,
            zstd_level: 1,
            timeout: None,
            on_timeout: OnTimeout::Cancel,
            verify: false,
            local: false,
            settle: true,
            stall_timeout: Duration::from_secs(30),
            pause_before_switchover: false,
            events: false,
            auto_converge: false,
            throttle: Limits::default(),
            carried: INTEGERS.iter().filter(|p| p.carried).map(|p| (p.name, p.default)).collect(),
        }
    }
}

/// An integer parameter, with QEMU's range and default.
struct Integer {
    name: &'static str,
    default: u64,
    min: u64,
    max: u64,
    /// Kept and shown, without effect in this crate.
    carried: bool,
}

const fn integer(name: &'static str, default: u64, min: u64, max: u64, carried: bool) -> Integer {
    Integer { name, default, min, max, carried }
}

/// A day, in ms: longer waits are mistakes.
const DAY_MS: u64 = 24 * 3600 * 1000;

const INTEGERS: &[Integer] = &[
    integer("max-bandwidth", 0, 0, i64::MAX as u64, false),
    // QEMU takes up to 2000 s.
    integer("downtime-limit", 300, 0, 2_000_000, false),
    integer("multifd-channels", 2, 1, MAX_CHANNELS as u64, false),
    integer("multifd-zstd-level", 1, 0, MAX_LEVEL as u64, false),
    integer("multifd-zlib-level", 1, 0, 9, true),
    integer("x-timeout", 0, 0, 30 * DAY_MS, false),
    integer("x-stall-timeout", 30_000, 100, DAY_MS, false),
    integer("announce-initial", 50, 0, 100_000, true),
    integer("announce-max", 550, 0, 100_000, true),
    integer("announce-rounds", 5, 0, 1000, true),
    integer("announce-step", 100, 1, 10_000, true),
    integer("cpu-throttle-increment", 10, 1, 99, false),
    integer("cpu-throttle-initial", 20, 1, 99, false),
    integer("max-cpu-throttle", 99, 1, 99, false),
    integer("max-postcopy-bandwidth", 0, 0, i64::MAX as u64, true),
    integer("throttle-trigger-threshold", 50, 1, 100, false),
    integer("xbzrle-cache-size", 64 << 20, 4096, i64::MAX as u64, true),
];

/// Why a parameter or capability was not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParameterError {
    /// There is none of that name.
    #[error("there is no migration parameter '{name}'")]
    UnknownParameter {
        /// The name.
        name: String,
    },
    /// There is no capability of that name.
    #[error("there is no migration capability '{name}'")]
    UnknownCapability {
        /// The name.
        name: String,
    },
    /// The value is not one that it takes.
    #[error("parameter '{name}' expects {expected}, found {found}")]
    Value {
        /// The name.
        name: String,
        /// Type and range.
        expected: String,
        /// What was given.
        found: String,
    },
    /// A capability that can only be in one state here.
    #[error("capability '{name}' is always {}: {why}", if *state { "on" } else { "off" })]
    Fixed {
        /// The name.
        name: &'static str,
        /// The state that it has.
        state: bool,
        /// Why.
        why: &'static str,
    },
}

impl Parameters {
    /// Sets a parameter by its name in QMP.
    pub fn set(&mut self, name: &str, value: &Value) -> Result<(), ParameterError> {
        let bad = |expected: String| ParameterError::Value {
            name: name.to_owned(),
            expected,
            found: value.to_string(),
        };
        match name {
            "x-on-timeout" => {
                self.on_timeout = serde_json::from_value(value.clone())
                    .map_err(|_| bad("\"cancel\" or \"force\"".into()))?;
                return Ok(());
            }
            "x-verify" => {
                self.verify = value.as_bool().ok_or_else(|| bad("true or false".into()))?;
                return Ok(());
            }
            "x-local" => {
                self.local = value.as_bool().ok_or_else(|| bad("true or false".into()))?;
                return Ok(());
            }
            "x-settle" => {
                self.settle = value.as_bool().ok_or_else(|| bad("true or false".into()))?;
                return Ok(());
            }
            "cpu-throttle-tailslow" => {
                self.throttle.tailslow =
                    value.as_bool().ok_or_else(|| bad("true or false".into()))?;
                return Ok(());
            }
            // What libvirt and others set to its neutral value as a matter of course.
            "tls-creds" | "tls-hostname" | "tls-authz" => {
                return if value.as_str() == Some("") {
                    Ok(())
                } else {
                    Err(bad("\"\": there is no TLS yet".into()))
                };
            }
            "multifd-compression" => {
                self.compression = serde_json::from_value(value.clone())
                    .map_err(|_| bad("\"none\" or \"zstd\"".into()))?;
                return Ok(());
            }
            _ => {}
        }
        let known = INTEGERS.iter().find(|p| p.name == name);
        let Some(p) = known else {
            return Err(ParameterError::UnknownParameter { name: name.to_owned() });
        };
        let number = value
            .as_u64()
            .filter(|n| (p.min..=p.max).contains(n))
            .ok_or_else(|| bad(format!("an integer from {} to {}", p.min, p.max)))?;
        match name {
            "max-bandwidth" => self.max_bandwidth = number,
            "downtime-limit" => self.downtime_limit = Duration::from_millis(number),
            "multifd-channels" => self.multifd_channels = number as u8,
            "multifd-zstd-level" => self.zstd_level = number as u8,
            "x-timeout" => {
                self.timeout = (number != 0).then(|| Duration::from_millis(number));
            }
            "cpu-throttle-initial" => self.throttle.initial = number as u8,
            "cpu-throttle-increment" => self.throttle.increment = number as u8,
            "max-cpu-throttle" => self.throttle.max = number as u8,
            "throttle-trigger-threshold" => self.throttle.trigger = number as u8,
            "x-stall-timeout" => self.stall_timeout = Duration::from_millis(number),
            _ => {
                self.carried.insert(p.name, number);
            }
        }
        Ok(())
    }

    /// All parameters, as `query-migrate-parameters` shows them.
    pub fn to_json(&self) -> Value {
        let ms = |d: Duration| d.as_millis() as u64;
        let mut all: Map<String, Value> =
            self.carried.iter().map(|(name, n)| ((*name).to_owned(), json!(n))).collect();
        all.extend([
            ("max-bandwidth".to_owned(), json!(self.max_bandwidth)),
            ("downtime-limit".to_owned(), json!(ms(self.downtime_limit))),
            ("multifd-channels".to_owned(), json!(self.multifd_channels)),
            ("multifd-compression".to_owned(), json!(self.compression)),
            ("multifd-zstd-level".to_owned(), json!(self.zstd_level)),
            ("cpu-throttle-initial".to_owned(), json!(self.throttle.initial)),
            ("cpu-throttle-increment".to_owned(), json!(self.throttle.increment)),
            ("max-cpu-throttle".to_owned(), json!(self.throttle.max)),
            ("cpu-throttle-tailslow".to_owned(), json!(self.throttle.tailslow)),
            ("throttle-trigger-threshold".to_owned(), json!(self.throttle.trigger)),
            ("tls-creds".to_owned(), json!("")),
            ("tls-hostname".to_owned(), json!("")),
            ("tls-authz".to_owned(), json!("")),
            ("x-timeout".to_owned(), json!(self.timeout.map_or(0, ms))),
            ("x-on-timeout".to_owned(), json!(self.on_timeout)),
            ("x-verify".to_owned(), json!(self.verify)),
            ("x-local".to_owned(), json!(self.local)),
            ("x-settle".to_owned(), json!(self.settle)),
            ("x-stall-timeout".to_owned(), json!(ms(self.stall_timeout))),
        ]);
        Value::Object(all)
    }

    /// Switches a capability by its name in QMP.
    pub fn set_capability(&mut self, name: &str, state: bool) -> Result<(), ParameterError> {
        match name {
            "events" => self.events = state,
            "pause-before-switchover" => self.pause_before_switchover = state,
            "multifd" => self.multifd = state,
            "auto-converge" => self.auto_converge = state,
            _ => {
                let fixed = FIXED.iter().find(|c| c.name == name);
                let Some(c) = fixed else {
                    return Err(ParameterError::UnknownCapability { name: name.to_owned() });
                };
                if c.state != state {
                    return Err(ParameterError::Fixed { name: c.name, state: c.state, why: c.why });
                }
            }
        }
        Ok(())
    }

    /// All capabilities and their states, as `query-migrate-capabilities` lists them.
    pub fn capabilities(&self) -> Vec<(&'static str, bool)> {
        let mut all: Vec<_> = FIXED.iter().map(|c| (c.name, c.state)).collect();
        all.push(("auto-converge", self.auto_converge));
        all.push(("events", self.events));
        all.push(("multifd", self.multifd));
        all.push(("pause-before-switchover", self.pause_before_switchover));
        all.sort_unstable();
        all
    }

    /// The level at which pages are to be compressed by zstd, if they are.
    pub(crate) fn zstd(&self) -> Option<u8> {
        (self.compression == Compression::Zstd).then_some(self.zstd_level)
    }

    /// A carried parameter of QEMU's, for example `announce-rounds`.
    pub fn carried(&self, name: &str) -> Option<u64> {
        self.carried.get(name).copied()
    }
}

/// A capability of QEMU 7.2's that has one state here.
struct Fixed {
    name: &'static str,
    state: bool,
    why: &'static str,
}

const fn off(name: &'static str) -> Fixed {
    Fixed { name, state: false, why: "mini-vmm does not have it" }
}

const FIXED: &[Fixed] = &[
    Fixed {
        name: "return-path",
        state: true,
        why: "a source must learn whether its guest arrived",
    },
    off("background-snapshot"),
    off("block"),
    off("compress"),
    off("dirty-bitmaps"),
    off("late-block-activate"),
    off("postcopy-blocktime"),
    off("postcopy-preempt"),
    off("postcopy-ram"),
    off("rdma-pin-all"),
    off("release-ram"),
    off("validate-uuid"),
    off("x-colo"),
    off("x-ignore-shared"),
    off("xbzrle"),
    off("zero-blocks"),
    off("zero-copy-send"),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_parameter_that_is_shown_can_be_set_to_what_is_shown() {
        let mut parameters = Parameters::default();
        let shown = parameters.to_json();
        for (name, value) in shown.as_object().unwrap() {
            parameters.set(name, value).unwrap_or_else(|e| panic!("{name}: {e}"));
        }
        assert_eq!(parameters, Parameters::default());
    }

    #[test]
    fn ranges_are_kept() {
        let mut p = Parameters::default();
        for (name, value) in [
            ("downtime-limit", json!(2_000_001)),
            ("downtime-limit", json!(-1)),
            ("downtime-limit", json!("300")),
            ("multifd-channels", json!(0)),
            ("multifd-channels", json!(17)),
            ("max-bandwidth", json!(1.5)),
            ("x-on-timeout", json!("explode")),
            ("x-verify", json!(1)),
            ("x-local", json!("on")),
            ("cpu-throttle-initial", json!(0)),
            ("cpu-throttle-increment", json!(0)),
            ("max-cpu-throttle", json!(100)),
            ("throttle-trigger-threshold", json!(101)),
            ("cpu-throttle-tailslow", json!("on")),
            ("tls-creds", json!("tls0")),
            ("multifd-compression", json!("zlib")),
            ("multifd-zstd-level", json!(21)),
        ] {
            assert!(matches!(p.set(name, &value), Err(ParameterError::Value { .. })), "{name}");
        }
        assert!(matches!(
            p.set("bandwidth", &json!(1)),
            Err(ParameterError::UnknownParameter { .. })
        ));
        assert_eq!(p, Parameters::default());
        p.set("downtime-limit", &json!(50)).unwrap();
        p.set("x-timeout", &json!(1000)).unwrap();
        p.set("cpu-throttle-initial", &json!(40)).unwrap();
        p.set("cpu-throttle-increment", &json!(5)).unwrap();
        p.set("max-cpu-throttle", &json!(80)).unwrap();
        p.set("cpu-throttle-tailslow", &json!(true)).unwrap();
        p.set("throttle-trigger-threshold", &json!(70)).unwrap();
        let limits = Limits { initial: 40, increment: 5, max: 80, tailslow: true, trigger: 70 };
        assert_eq!(p.throttle, limits);
        assert_eq!(p.to_json()["cpu-throttle-initial"], 40);
        p.set("announce-rounds", &json!(7)).unwrap();
        assert_eq!(p.zstd(), None);
        p.set("multifd-compression", &json!("zstd")).unwrap();
        p.set("multifd-zstd-level", &json!(7)).unwrap();
        assert_eq!((p.zstd(), &p.to_json()["multifd-compression"]), (Some(7), &json!("zstd")));
        assert_eq!(p.downtime_limit, Duration::from_millis(50));
        assert_eq!(p.timeout, Some(Duration::from_secs(1)));
        assert_eq!(p.carried("announce-rounds"), Some(7));
        assert_eq!(p.to_json()["x-timeout"], 1000);
    }

    #[test]
    fn capabilities_that_are_not_there_cannot_be_switched_on() {
        let mut p = Parameters::default();
        for (name, state) in p.capabilities() {
            p.set_capability(name, state).unwrap();
        }
        p.set_capability("events", true).unwrap();
        p.set_capability("pause-before-switchover", true).unwrap();
        assert!(p.capabilities().contains(&("events", true)));
        let error = p.set_capability("return-path", false).unwrap_err();
        assert!(error.to_string().contains("always on"));
        assert!(p.set_capability("postcopy-ram", true).is_err());
        assert!(matches!(
            p.set_capability("teleport", true),
            Err(ParameterError::UnknownCapability { .. })
        ));
    }
}
