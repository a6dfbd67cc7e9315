//! What the tools need of the machine, and getting it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::apt::{self, Lists};
use crate::cache;
use crate::error::{Doing, Error, Result};

/// A Debian package that is installed, and the files whose presence proves it.
struct Need {
    package: &'static str,
    files: &'static [&'static str],
}

/// To build the guests: the system's C toolchain.
const TOOLCHAIN: &[Need] = &[
    Need { package: "gcc", files: &["/usr/bin/gcc"] },
    Need { package: "binutils", files: &["/usr/bin/ld", "/usr/bin/objcopy"] },
    Need { package: "libc6-dev", files: &["/usr/lib/x86_64-linux-gnu/libc.a"] },
];

/// To unpack kernels and boot lab hosts.
const LAB: &[Need] = &[
    Need { package: "qemu-system-x86", files: &["/usr/bin/qemu-system-x86_64"] },
    Need { package: "seabios", files: &["/usr/share/seabios/bios-256k.bin"] },
    Need { package: "kmod", files: &["/sbin/depmod"] },
    Need { package: "xz-utils", files: &["/usr/bin/xz"] },
    Need { package: "zstd", files: &["/usr/bin/zstd"] },
    Need { package: "lz4", files: &["/usr/bin/lz4"] },
    Need { package: "util-linux", files: &["/usr/bin/setpriv"] },
    Need { package: "iproute2", files: &["/sbin/ip"] },
];

/// To compare with the machine's own limits.
const MEASURING: &[Need] = &[Need { package: "iperf3", files: &["/usr/bin/iperf3"] }];

/// Installs everything that any of the tools wants.
pub fn everything() -> Result<()> {
    check_system()?;
    ensure(&[TOOLCHAIN, LAB, MEASURING].concat_needs())
}

/// Installs what boots lab hosts.
pub fn lab() -> Result<()> {
    check_system()?;
    ensure(&[LAB].concat_needs())
}

/// Installs what builds guests.
pub fn toolchain() -> Result<()> {
    check_system()?;
    ensure(&[TOOLCHAIN].concat_needs())
}

/// Installs what the benchmark compares with.
pub fn measuring() -> Result<()> {
    check_system()?;
    ensure(&[LAB, MEASURING].concat_needs())
}

/// A statically linked busybox, out of its package: installing it could displace another busybox.
pub fn busybox() -> Result<PathBuf> {
    let dir = cache::entry("busybox-static", |dir| {
        apt::unpack(&Lists::Machine, "busybox-static", None, dir)
    })?;
    Ok(dir.join("bin/busybox"))
}

/// Whether a program is on the `PATH`.
pub fn has_program(name: &str) -> bool {
    Command::new(name).arg("--version").output().is_ok_and(|done| done.status.success())
}

fn ensure(needs: &[&Need]) -> Result<()> {
    let missing: Vec<&str> = needs
        .iter()
        .filter(|need| !need.files.iter().all(|file| Path::new(file).exists()))
        .map(|need| need.package)
        .collect();
    if missing.is_empty() { Ok(()) } else { apt::install(&missing) }
}

fn check_system() -> Result<()> {
    let path = "/etc/os-release";
    let text = fs::read_to_string(path).doing(|| format!("read {path}"))?;
    let value = |key: &str| {
        text.lines()
            .find_map(|line| line.strip_prefix(key)?.strip_prefix('='))
            .unwrap_or("")
            .trim_matches('"')
    };
    if cfg!(target_arch = "x86_64") && value("VERSION_CODENAME") == "bookworm" {
        return Ok(());
    }
    Err(Error::WrongSystem {
        found: format!("{} on {}", value("PRETTY_NAME"), std::env::consts::ARCH),
    })
}

trait ConcatNeeds {
    fn concat_needs(&self) -> Vec<&'static Need>;
}

impl ConcatNeeds for [&'static [Need]] {
    fn concat_needs(&self) -> Vec<&'static Need> {
        self.iter().flat_map(|group| group.iter()).collect()
    }
}
