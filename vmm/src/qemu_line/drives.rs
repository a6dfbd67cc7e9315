//! Disk images in a QEMU command line: `-drive`, and the nodes of `-blockdev`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use super::findings::Findings;
use super::props::{Props, Rule, Rules};
use crate::config::DiskCache;

/// How far a node may be from its file: raw upon file is one step.
const MAX_DEPTH: usize = 4;

/// What happens to a request that the host can't fulfil: mini-vmm tells the guest.
pub(super) const ERRORS: Rules = &[
    ("werror", Rule::Only(&["report", "auto", "enospc"])),
    ("rerror", Rule::Only(&["report", "auto"])),
];
const DRIVE: Rules = &[
    ("media", Rule::Only(&["disk"])),
    ("snapshot", Rule::Only(&["off"])),
    ("index", Rule::Host),
    ("bus", Rule::Host),
    ("unit", Rule::Host),
    ("copy-on-read", Rule::Only(&["off"])),
];
const HOST: Rules = &[
    ("aio", Rule::Host),
    ("discard", Rule::Host),
    ("detect-zeroes", Rule::Host),
    ("locking", Rule::Host),
    ("auto-read-only", Rule::Host),
    ("force-share", Rule::Host),
    ("cache.no-flush", Rule::Host),
    ("cache.writeback", Rule::Only(&["on"])),
];

/// What a disk is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Image {
    pub(super) path: PathBuf,
    pub(super) readonly: bool,
    pub(super) cache: DiskCache,
}

/// All images, by the name that `-device …,drive=` says.
#[derive(Debug, Default)]
pub(super) struct Drives {
    images: BTreeMap<String, Option<Image>>,
    nodes: BTreeMap<String, Node>,
    /// What devices have taken, and the nodes below it.
    used: BTreeSet<String>,
    /// Those of `if=virtio`, which are disks without a `-device`.
    pub(super) virtio: Vec<String>,
}

#[derive(Debug)]
struct Node {
    driver: String,
    filename: Option<String>,
    below: Option<Below>,
    readonly: bool,
    direct: Option<bool>,
}

#[derive(Debug)]
enum Below {
    Named(String),
    Inline(Box<Node>),
}

impl Drives {
    /// Takes a `-drive`.
    pub(super) fn drive(&mut self, text: &str, found: &mut Findings) {
        let mut props = match Props::parse(text, "file") {
            Ok(props) => props,
            Err(why) => return found.matters("-drive", why),
        };
        let id = props.take("id");
        let interface = props.take("if").unwrap_or_else(|| "ide".into());
        let shown = id.clone().unwrap_or_else(|| format!("if={interface}"));
        let option = format!("-drive {shown}");
        let id = match (id, interface.as_str()) {
            (Some(id), _) => id,
            (None, "virtio") => format!("virtio{}", self.virtio.len()),
            (None, _) => String::new(),
        };
        match interface.as_str() {
            "none" => {}
            "virtio" => self.virtio.push(id.clone()),
            _ => found.matters(
                &option,
                format!(
                    "mini-vmm has no {interface} disks; write if=none and \
                     -device virtio-blk-pci,drive=…"
                ),
            ),
        }
        let image = self.image_of_drive(&mut props, &option, found);
        props.settle(&option, &[DRIVE, HOST, ERRORS], found);
        if self.images.insert(id, image).is_some() {
            found.matters(option, "there is another one of that name, so QEMU refuses it");
        }
    }

    fn image_of_drive(
        &mut self,
        props: &mut Props,
        option: &str,
        found: &mut Findings,
    ) -> Option<Image> {
        let format = props.take("format").or_else(|| props.take("driver"));
        match format.as_deref() {
            Some("raw") => {}
            Some(other) => found.matters(option, not_raw(other)),
            None => found.matters(
                option,
                "QEMU would guess the image's format and mini-vmm has raw ones only; write \
                 format=raw if it is one",
            ),
        }
        let readonly = props.take_switch("readonly").or_else(|| props.take_switch("read-only"));
        let cache = match props.take("cache").as_deref() {
            None | Some("writeback") => DiskCache::Writeback,
            Some("none") => DiskCache::None,
            Some("unsafe") => {
                found.note(option, "cache=unsafe: the guest's flushes are carried out here");
                DiskCache::Writeback
            }
            Some(other) => {
                found.matters(
                    option,
                    format!(
                        "with cache={other} the guest sees a disk without a write cache, which \
                         mini-vmm has not; start it in QEMU with cache=writeback or cache=none"
                    ),
                );
                DiskCache::Writeback
            }
        };
        let cache = match props.take_switch("cache.direct") {
            Some(true) => DiskCache::None,
            Some(false) => DiskCache::Writeback,
            None => cache,
        };
        let Some(file) = props.take("file").or_else(|| props.take("file.filename")) else {
            found.matters(option, "it has no file");
            return None;
        };
        let path = local_path(&file, option, found)?;
        Some(Image { path, readonly: readonly.unwrap_or(false), cache })
    }

    /// Those that no device has asked for.
    pub(super) fn unused(&self) -> impl Iterator<Item = &str> {
        let names = self.images.keys().chain(self.nodes.keys());
        names.filter(|name| !self.used.contains(*name)).map(String::as_str)
    }

    /// Takes a `-blockdev`.
    pub(super) fn blockdev(&mut self, text: &str, found: &mut Findings) {
        let mut props = match Props::parse(text, "driver") {
            Ok(props) => props,
            Err(why) => return found.matters("-blockdev", why),
        };
        let Some(name) = props.take("node-name") else {
            return found.matters("-blockdev", "it has no node-name, so nothing can use it");
        };
        let option = format!("-blockdev {name}");
        let node = node(props, &option, MAX_DEPTH, found);
        if self.nodes.insert(name, node).is_some() {
            found.matters(option, "there is another one of that name, so QEMU refuses it");
        }
    }

    /// The image that a device names. What is wrong with it goes to `found`, and has been told
    /// already where nothing comes back without a word.
    pub(super) fn image(
        &mut self,
        name: &str,
        option: &str,
        found: &mut Findings,
    ) -> Option<Image> {
        self.used.insert(name.to_string());
        if let Some(image) = self.images.get(name) {
            return image.clone();
        }
        let Some(top) = self.nodes.get(name) else {
            found.matters(
                option,
                format!(
                    "there is no -drive with id={name}, and no -blockdev with node-name={name}"
                ),
            );
            return None;
        };
        let (mut node, mut direct) = (top, top.direct);
        for _ in 0..MAX_DEPTH {
            match (node.driver.as_str(), &node.below) {
                ("file" | "host_device", _) => {
                    let Some(file) = &node.filename else {
                        found.matters(option, format!("the node {name} names no filename"));
                        return None;
                    };
                    let cache = match node.direct.or(direct) {
                        Some(true) => DiskCache::None,
                        _ => DiskCache::Writeback,
                    };
                    return Some(Image { path: file.into(), readonly: top.readonly, cache });
                }
                ("raw", Some(Below::Inline(below))) => {
                    (node, direct) = (below, below.direct.or(direct));
                }
                ("raw", Some(Below::Named(below))) => {
                    self.used.insert(below.clone());
                    let Some(below) = self.nodes.get(below) else {
                        found.matters(option, format!("there is no -blockdev {below}"));
                        return None;
                    };
                    (node, direct) = (below, below.direct);
                }
                ("raw", None) => {
                    found.matters(option, format!("the node {name} has no file"));
                    return None;
                }
                (other, _) => {
                    found.matters(option, not_raw(other));
                    return None;
                }
            }
        }
        found.matters(option, format!("the node {name} is too far from its file"));
        None
    }
}

fn node(mut props: Props, option: &str, depth: usize, found: &mut Findings) -> Node {
    let driver = props.take("driver").unwrap_or_default();
    let named = props.take("file").map(Below::Named);
    let inline = props.take_below("file.");
    let below = if inline.is_empty() || depth == 0 {
        named
    } else {
        Some(Below::Inline(Box::new(node(inline, option, depth - 1, found))))
    };
    let node = Node {
        filename: props.take("filename"),
        below,
        readonly: props.take_switch("read-only").unwrap_or(false),
        direct: props.take_switch("cache.direct"),
        driver,
    };
    // The name of an inner node is for QEMU's own commands.
    props.take("node-name");
    // Another kind of image has properties of its own; whoever uses it says that it is none of ours.
    if matches!(node.driver.as_str(), "raw" | "file" | "host_device") {
        props.settle(option, &[HOST], found);
    }
    node
}

fn not_raw(driver: &str) -> String {
    format!(
        "mini-vmm has raw images and block devices only, not '{driver}'; convert it with qemu-img \
         convert -O raw, and start the guest in QEMU with that"
    )
}

/// The path in a `-drive`'s file, where a word and a colon at the beginning is a protocol.
fn local_path(file: &str, option: &str, found: &mut Findings) -> Option<PathBuf> {
    if let Some(path) = file.strip_prefix("file:") {
        return Some(path.into());
    }
    let protocol = file.split('/').next().and_then(|first| first.split_once(':'));
    if let Some((protocol, _)) = protocol {
        found.matters(
            option,
            format!(
                "'{protocol}:' is no file on this host; mini-vmm has local files and block devices \
                 (write file:PATH if the name has a colon in it)"
            ),
        );
        return None;
    }
    Some(file.into())
}
