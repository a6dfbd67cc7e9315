//! Interfaces for guests' networks.

use std::io::Read;
use std::process::Command;
use std::time::{Duration, Instant};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use socket2::{Domain, Protocol, Socket, Type};

use crate::wait;

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
        let tap = Self::up(name);
        ip(&["addr", "add", address, "dev", name]);
        tap
    }

    /// One without.
    pub fn up(name: &'static str) -> Self {
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
            let tap = Tap::up(tap);
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

/// The EtherType of ARP.
pub const ARP: u16 = 0x0806;
/// The EtherType of RARP (RFC 903).
pub const RARP: u16 = 0x8035;

/// Hears the frames of one EtherType that come in at any interface of this thread's network.
pub struct Sniffer(Socket);

impl Sniffer {
    /// One that hears from now on.
    pub fn new(ethertype: u16) -> Self {
        // The kernel wants the protocol of a packet socket as it is on the wire (packet(7)).
        let protocol = Protocol::from(i32::from(ethertype.to_be()));
        let socket = Socket::new(Domain::PACKET, Type::RAW, Some(protocol));
        let socket = socket.expect("a packet socket, which root may have");
        // So that the deadline is looked at.
        let patience = Some(Duration::from_millis(50));
        socket.set_read_timeout(patience).expect("a time limit");
        Self(socket)
    }

    /// Waits for `count` frames that `wanted` likes, and says when they came.
    pub fn hear(&self, count: usize, seconds: u32, wanted: impl Fn(&[u8]) -> bool) -> Vec<Instant> {
        let (mut frame, mut heard) = ([0; 2048], Vec::new());
        let deadline = Instant::now() + Duration::from_secs((seconds * wait::slowness()).into());
        while heard.len() < count {
            assert!(Instant::now() < deadline, "{} of {count} frames came in time", heard.len());
            let Ok(len) = (&self.0).read(&mut frame) else { continue };
            if wanted(&frame[..len]) {
                heard.push(Instant::now());
            }
        }
        heard
    }
}

/// Whether this is the RARP frame by which a host says for a guest where that is now (RFC 903; opcode
/// 3, a request for one's own address).
pub fn is_rarp(frame: &[u8], mac: [u8; 6]) -> bool {
    frame.starts_with(&[0xff; 6])
        && frame.get(6..14) == Some(&[&mac[..], &[0x80, 0x35]].concat())
        && frame.get(20..28) == Some(&[&[0, 3], &mac[..]].concat())
}

/// Whether this is a guest's own announcement: an ARP request for the address that it comes from
/// (RFC 5227).
pub fn is_gratuitous_arp(frame: &[u8], ip: [u8; 4]) -> bool {
    frame.get(12..14) == Some(&[8, 6])
        && frame.get(28..32) == Some(&ip)
        && frame.get(38..42) == Some(&ip)
}

/// Gives this thread, and what it starts, a network of its own with nothing but loopback.
pub fn isolate() {
    let both = CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS;
    unshare(both).expect("namespaces, which root may have");
    // sysfs shows the network of whoever mounts it.
    let mount = |source: &str, at: &str, kind: Option<&str>, flags| {
        mount(Some(source), at, kind, flags, None::<&str>).expect("a mount of our own");
    };
    mount("none", "/", None, MsFlags::MS_REC | MsFlags::MS_PRIVATE);
    mount("sysfs", "/sys", Some("sysfs"), MsFlags::empty());
    ip(&["link", "set", "lo", "up"]);
}

/// Makes this network's loopback carry so much and no more, in the words of `tc`: `100mbit`.
pub fn shape(rate: &str) {
    let tbf = ["qdisc", "replace", "dev", "lo", "root", "tbf", "rate", rate];
    let rest = ["burst", "512k", "latency", "100ms"];
    let status = Command::new("tc").args(tbf).args(rest).status().expect("tc is installed");
    assert!(status.success(), "the kernel has a token bucket (CONFIG_NET_SCH_TBF)");
}
