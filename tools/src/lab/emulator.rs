//! The QEMU that lab hosts run on: a newer one than this release of Debian installs.
//!
//! Its emulated SVM loses fewer guests and hosts than 7.2's (docs/testing.md, "The lab"), so the one of
//! bookworm-backports is unpacked into the cache. It is not installed: the QEMU that guests move to and from
//! stays Debian 12's own.

use std::path::PathBuf;
use std::process::Command;

use crate::apt;
use crate::cache;
use crate::error::Result;
use crate::setup;

/// The program and what it loads at run time; the libraries are those that Debian 12's QEMU has
/// installed.
const PACKAGES: [&str; 4] =
    ["qemu-system-x86", "qemu-system-common", "qemu-system-data", "seabios"];

/// Where firmware is in those packages.
const FIRMWARE: [&str; 2] = ["usr/share/qemu", "usr/share/seabios"];

/// An unpacked QEMU.
#[derive(Debug, Clone)]
pub(super) struct Emulator {
    root: PathBuf,
}

impl Emulator {
    /// Fetches it where it isn't there yet.
    pub(super) fn get() -> Result<Emulator> {
        let root = cache::entry("lab-qemu", |dir| {
            setup::lab()?;
            let lists = apt::backports()?;
            PACKAGES.iter().try_for_each(|package| apt::unpack(&lists, package, None, dir))
        })?;
        Ok(Emulator { root })
    }

    /// Adds program and firmware to a command that runs what it is given, as `setpriv` does.
    pub(super) fn add_to(&self, command: &mut Command) {
        command.arg(self.root.join("usr/bin/qemu-system-x86_64"));
        for directory in FIRMWARE {
            command.arg("-L").arg(self.root.join(directory));
        }
    }
}
