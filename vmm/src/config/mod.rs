//! What VM is to be run: the same words as flags, in the TOML file, and in the recorded result.
//!
//! - [`Settings`]: what was said, in a file or as flags; everything optional.
//! - [`Config`]: what it means: every default decided and written out, checked. What a migration
//!   depends on is all in here, so nothing is guessed silently; it is kept as `config.json` beside
//!   the control socket and shown by `mini-vmm status --json`.
//!
//! `Settings → Config` is [`Config::resolve`]; it looks at nothing but its argument, so the same
//! settings give the same machine on every host.

mod devices;
mod error;
mod keys;
mod migration_uri;
mod overrule;
mod resolve;
mod settings;
mod socket_uri;
mod text;
mod types;
mod units;

pub use devices::{
    CharBackend, ConsoleConfig, DiskCache, DiskConfig, NetBackend, NetConfig, PlainConfig,
    VirtioVersion,
};
pub use error::ConfigError;
pub use migration_uri::{MigrateListen, MigrationUri};
pub use resolve::{Boot, Config, MAX_CPUS, MAX_DIRTY_RING, MIN_DIRTY_RING};
pub use settings::{
    ConsoleSettings, ConsoleTable, DiskSettings, NetSettings, OnOff, Place, PlainSettings,
    QmpSocket, Queues, Settings,
};
pub use socket_uri::SocketUri;
pub use types::{CpuConfig, CpuModel, MacAddr, MachineType, PciSlot, VmName};
pub use units::{ByteSize, HumanDuration, Rate};

pub(crate) use keys::{nearest, split};
pub(crate) use resolve::is_dirty_ring;

#[cfg(test)]
mod tests;
