//! What one mini-vmm tells another about a VM before any page moves, and what it answers.
//!
//! The source sends a [`Manifest`]; the destination compares it with the machine that it has built
//! and answers with a [`Verdict`] that names **every** problem at once. Both travel as JSON, so
//! that a later version can add to them.

use serde::{Deserialize, Serialize};

use crate::fate::MigrationId;
use crate::guest::RamBlock;
pub use crate::problem::Problem;
use crate::wire::limits::MAX_PROBLEMS;

/// Which versions of the private messages this side speaks, newest first.
pub const PROTOCOL_VERSIONS: &[u32] = &[1];

/// The destination's first words to a source that it recognises as a mini-vmm.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// Name and version of the program.
    pub program: String,
    /// Versions of the private messages that it speaks.
    pub protocols: Vec<u32>,
    /// What else it can do, in words; a release that has never heard of them says nothing.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub abilities: Vec<String>,
}

/// A [`Hello::abilities`]: a manifest may be [only a question](Manifest::only_asking), and probes may
/// follow its verdict.
pub const PREFLIGHT: &str = "preflight";

/// A [`Hello::abilities`]: [runs of pages](crate::wire::ram::RUN) in one record.
pub const RUNS: &str = "runs";

/// A [`Hello::abilities`]: sections in the [shorter form](crate::vmstate::Audience::MiniVmm).
pub const SHORT: &str = "short-sections";

/// A [`Hello::abilities`]: pages on [further connections](crate::wire::multifd), if the manifest says so.
pub const CHANNELS: &str = "channels";

/// A [`Hello::abilities`]: pages on further connections [compressed](crate::wire::zstd).
pub const ZSTD: &str = "zstd";

/// A [`Hello::abilities`]: RAM as a descriptor, if the manifest says so.
pub const MEMORY: &str = "memory";

impl Hello {
    /// Whether the destination has said that it can do this.
    pub fn can(&self, ability: &str) -> bool {
        self.abilities.iter().any(|known| known == ability)
    }
}

/// A [`Hello::abilities`]: behind such a question the state of devices and vCPUs may follow, to be loaded
/// and thrown away.
pub const REHEARSE: &str = "rehearse";

/// A few bytes of RAM that a device's state relies on, for a rehearsal, in which no page travels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scrap {
    /// The guest's physical address.
    pub address: u64,
    /// What stands there.
    pub value: u32,
}

/// The state of devices and vCPUs follows, to be loaded and thrown away.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rehearse {
    /// What of the RAM is needed to load it.
    pub scraps: Vec<Scrap>,
}

/// What a VM is and what it needs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// The version of the private messages that the source will use.
    pub protocol: u32,
    /// Name and version of the source's program.
    pub program: String,
    /// The versioned machine type.
    pub machine: String,
    /// The number of vCPUs.
    pub vcpus: u32,
    /// The RAM blocks and their lengths.
    pub ram: Vec<RamBlock>,
    /// The device sections that will come.
    pub sections: Vec<SectionManifest>,
    /// Whether the source will send digests for comparison before the hand-over.
    #[serde(default)]
    pub verify: bool,
    /// Nothing will come: the source only wants the verdict, and to send a few bytes for a
    /// measurement. Said only to a destination that can [do that](PREFLIGHT).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub only_asking: bool,
    /// The connections that pages will come through, if it is not this one. Said only to a destination
    /// that knows [them](CHANNELS).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub channels: Option<Channels>,
    /// The first block of RAM comes as a descriptor, with a ledger, when the verdict has been given. Said only
    /// to a destination that knows [that](MEMORY).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub memory: bool,
    /// What this attempt is called if its outcome is to be asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<MigrationId>,
    /// The source listens for [`Running`]. One of an earlier release knows no such message.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub hears_running: bool,
    /// How long after PREPARED the source will say COMMIT at the latest, in ms; 0 if it does not say.
    #[serde(default)]
    pub commit_within_ms: u64,
    /// The source's wall clock when it wrote this, in ms since 1970; 0 if it does not say.
    #[serde(default)]
    pub sent_at_ms: u64,
    /// What only the machines themselves understand; see
    /// [`Machine::details`](crate::guest::Machine::details).
    #[serde(default)]
    pub details: serde_json::Value,
}

/// Further connections that will bring the pages.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Channels {
    /// How many.
    pub count: u8,
    /// What each of them begins with.
    pub token: MigrationId,
}

/// One device section that will come.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SectionManifest {
    /// Its name on the wire.
    pub id: String,
    /// Its instance.
    pub instance: u32,
    /// The version that will be written.
    pub version: u32,
    /// A digest of its layout; two sides with the same version and another digest have changed a
    /// layout without a new version. Empty when the side can't tell.
    #[serde(default)]
    pub layout: String,
}

/// The destination's answer to a manifest.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Verdict {
    /// What the VM can't move with. Empty: go on.
    pub problems: Vec<Problem>,
    /// What it can move with, but should be known.
    #[serde(default)]
    pub warnings: Vec<Problem>,
    /// How many more there are than a verdict has room for.
    #[serde(default)]
    pub left_out: u64,
    /// How long the destination waits for COMMIT after PREPARED, in ms: the shorter of what either
    /// side proposes. 0 if it does not say.
    #[serde(default)]
    pub prepared_for_ms: u64,
}

impl Verdict {
    /// The verdict that consists of these, in their order.
    pub fn new(all: Vec<Problem>) -> Self {
        let (problems, warnings) = all.into_iter().partition(|problem| problem.fatal);
        Self { problems, warnings, left_out: 0, prepared_for_ms: 0 }.bounded()
    }

    /// The same, no longer than a peer takes: of a hostile one anything may come.
    #[must_use]
    pub fn bounded(mut self) -> Self {
        for (list, fatal) in [(&mut self.problems, true), (&mut self.warnings, false)] {
            let surplus = list.len().saturating_sub(MAX_PROBLEMS);
            self.left_out = self.left_out.saturating_add(surplus as u64);
            list.truncate(MAX_PROBLEMS);
            for problem in list {
                *problem = Problem { fatal, ..problem.bounded() };
            }
        }
        self
    }
}

/// The destination holds everything and nothing runs yet.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Prepared {
    /// Bytes of RAM that were compared with the source's digests; 0 when none were asked for.
    #[serde(default)]
    pub verified_ram_bytes: u64,
    /// Sections that were saved again and compared with what had come.
    #[serde(default)]
    pub verified_sections: u64,
}

/// The guest runs on the destination, which is [`Shut`](crate::wire::return_path::Message::Shut)'s to decide; this
/// says since when. Comes right before that.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Running {
    /// How long it has been running when this was written, in µs.
    pub since_us: u64,
}

/// Digests of what the source has sent, taken while it stands still.
///
/// A name that is not known is refused: it may be one of these that has changed on its way, and what
/// it stood for would not be compared. A release that adds one says so in its hello first.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Digests {
    /// RAM: one entry for each block of the manifest.
    pub blocks: Vec<BlockDigests>,
    /// The device sections, as they were sent. Empty: the source does not say.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sections: Vec<SectionDigest>,
    /// The manifest's JSON, as it was sent, in 16 hexadecimal digits. Empty: the source does not say.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub manifest: String,
}

/// The digest of one device section.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SectionDigest {
    /// Its name on the wire.
    pub id: String,
    /// Its instance.
    pub instance: u32,
    /// Of its version and its body.
    pub digest: u64,
}

/// Digests of one RAM block.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockDigests {
    /// The block's name.
    pub name: String,
    /// How many bytes each digest covers (the last one perhaps fewer).
    pub chunk: u64,
    /// The digests, in order.
    pub digests: Vec<u64>,
}
