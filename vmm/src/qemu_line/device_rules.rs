//! What becomes of the properties of QEMU's devices that no setting is made of.

use super::props::{Rule, Rules};

const ON: Rule = Rule::Only(&["on"]);
const OFF: Rule = Rule::Only(&["off"]);

/// What all virtio devices have.
pub(super) const VIRTIO: Rules = &[
    ("bus", Rule::Only(&["pci.0"])),
    ("multifunction", OFF),
    ("ioeventfd", Rule::Host),
    ("any_layout", ON),
    ("event_idx", ON),
    ("indirect_desc", ON),
    ("notify_on_empty", ON),
    ("queue_reset", ON),
    ("ats", OFF),
    ("iommu_platform", OFF),
    ("packed", OFF),
    ("page-per-vq", OFF),
    ("modern-pio-notify", OFF),
    // Option ROMs come along with the guest, and go back with it.
    ("romfile", Rule::Host),
    ("rombar", Rule::Host),
    ("bootindex", Rule::Host),
];
/// virtio-blk, beside those.
pub(super) const BLOCK: Rules = &[
    ("write-cache", Rule::Only(&["on", "auto"])),
    ("config-wce", ON),
    ("queue-size", Rule::Only(&["256"])),
    ("seg-max-adjust", ON),
    ("discard", ON),
    ("write-zeroes", ON),
    ("scsi", OFF),
    ("logical_block_size", Rule::Only(&["512"])),
    ("physical_block_size", Rule::Only(&["512"])),
    ("iothread", Rule::Host),
    ("request-merging", Rule::Host),
    ("share-rw", Rule::Host),
    ("account-failed", Rule::Host),
    ("account-invalid", Rule::Host),
];
/// virtio-net, beside those.
pub(super) const NET: Rules = &[
    ("mq", OFF),
    ("rss", OFF),
    ("hash", OFF),
    ("failover", OFF),
    ("vectors", Rule::Only(&["4"])),
    ("rx_queue_size", Rule::Only(&["256"])),
    ("tx_queue_size", Rule::Only(&["256"])),
    ("host_mtu", Rule::Only(&["0"])),
    ("speed", Rule::Only(&["-1"])),
    ("csum", ON),
    ("gso", ON),
    ("guest_csum", ON),
    ("guest_tso4", ON),
    ("guest_tso6", ON),
    ("guest_ecn", ON),
    ("guest_ufo", ON),
    ("guest_announce", ON),
    ("host_tso4", ON),
    ("host_tso6", ON),
    ("host_ecn", ON),
    ("host_ufo", ON),
    ("mrg_rxbuf", ON),
    ("status", ON),
    ("ctrl_vq", ON),
    ("ctrl_rx", ON),
    ("ctrl_vlan", ON),
    ("ctrl_rx_extra", ON),
    ("ctrl_mac_addr", ON),
    ("ctrl_guest_offloads", ON),
    ("tx", Rule::Host),
];
/// virtio-rng, beside those.
pub(super) const RNG: Rules =
    &[("rng", Rule::Host), ("max-bytes", Rule::Host), ("period", Rule::Host)];
/// virtio-balloon, beside those.
pub(super) const BALLOON: Rules = &[
    ("deflate-on-oom", OFF),
    ("free-page-hint", OFF),
    ("free-page-reporting", OFF),
    ("page-poison", ON),
];
/// virtio-serial, beside those.
pub(super) const SERIAL: Rules =
    &[("max_ports", Rule::Only(&["31"])), ("vectors", Rule::Only(&["2"])), ("emergency-write", ON)];
/// virtconsole.
pub(super) const PORT: Rules = &[("nr", Rule::Only(&["0"]))];
