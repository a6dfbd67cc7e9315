//! Both directions, one against the other, and against lines that people write.

mod classes;
mod devices;
mod round_trip;

use super::*;
use crate::config::{Config, Settings};

/// A board that is in order, with nothing on it.
const BOARD: &str = "qemu-system-x86_64 -machine pc-i440fx-7.2,usb=off,vmport=off,hpet=off -accel kvm \
                     -cpu host -nodefaults -serial null";

fn from_toml(toml: &str) -> Config {
    Config::resolve(Settings::from_toml(toml, "x").expect(toml)).expect(toml)
}

/// What the board with these options is, and what is said beside it.
fn like(options: &str) -> Like {
    Like::from_line(&format!("{BOARD} {options}")).unwrap_or_else(|e| panic!("{options}: {e}"))
}

/// The same, resolved as a VM that waits for a migration.
fn config(options: &str) -> Config {
    let mut settings = like(options).settings;
    settings.migrate_listen.get_or_insert(crate::config::MigrateListen::Defer);
    Config::resolve(settings).expect(options)
}

/// What keeps this line from being ours.
fn refusal(line: &str) -> String {
    match Like::from_line(line) {
        Ok(like) => panic!("{line} was taken: {like:?}"),
        Err(e) => e.to_string(),
    }
}
