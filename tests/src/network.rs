//! Interfaces for guests' networks.

use std::process::Command;

fn ip(args: &[&str]) {
    let status = Command::new("ip").args(args).status().expect("ip is installed");
    assert!(status.success(), "ip {} works", args.join(" "));
}

/// An interface that is removed when this is dropped.
struct Link(&'static str);

impl Drop for Link {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["link", "del", self.0]).status();
    }
}

/// A tap interface that lives as long as this.
pub struct Tap(Link);

impl Tap {
    /// One with an address.
    pub fn new(name: &'static str, address: &str) -> Self {
        let tap = Self::plain(name);
        ip(&["addr", "add", address, "dev", name]);
        tap
    }

    fn plain(name: &'static str) -> Self {
        ip(&["tuntap", "add", name, "mode", "tap"]);
        let tap = Self(Link(name));
        ip(&["link", "set", name, "up"]);
        tap
    }

    /// Its name.
    pub fn name(&self) -> &'static str {
        self.0.0
    }
}

/// A bridge with taps for several VMs, as a host has it.
pub struct Bridge {
    taps: Vec<Tap>,
    _bridge: Link,
}

impl Bridge {
    /// A bridge of that name and address, and its taps.
    pub fn new(name: &'static str, address: &str, taps: &[&'static str]) -> Self {
        ip(&["link", "add", name, "type", "bridge"]);
        let bridge = Link(name);
        ip(&["addr", "add", address, "dev", name]);
        ip(&["link", "set", name, "up"]);
        let taps = taps.iter().map(|tap| {
            let tap = Tap::plain(tap);
            ip(&["link", "set", tap.name(), "master", name]);
            tap
        });
        Self { taps: taps.collect(), _bridge: bridge }
    }

    /// The names of its taps.
    pub fn taps(&self) -> impl Iterator<Item = &'static str> {
        self.taps.iter().map(Tap::name)
    }
}
