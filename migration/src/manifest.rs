//! What one mini-vmm tells another about a VM before any page moves, and what it answers.
//!
//! The source sends a [`Manifest`]; the destination compares it with the machine that it has built
//! and answers with a [`Verdict`] that names **every** problem at once. Both travel as JSON, so
//! that a later version can add to them.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::guest::RamBlock;

/// Which versions of the private messages this side speaks, newest first.
pub const PROTOCOL_VERSIONS: &[u32] = &[1];

/// The destination's first words to a source that it recognises as a mini-vmm.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// Name and version of the program.
    pub program: String,
    /// Versions of the private messages that it speaks.
    pub protocols: Vec<u32>,
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
    /// What only the machines themselves understand; see
    /// [`Machine::details`](crate::guest::Machine::details).
    #[serde(default)]
    pub details: serde_json::Value,
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

/// One reason why a migration can't succeed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// A stable word for programs, for example `ram-size`.
    pub code: String,
    /// What is wrong, for example `RAM block pc.ram`.
    pub what: String,
    /// What the destination has.
    pub expected: String,
    /// What the source has.
    pub found: String,
    /// What can be done about it.
    #[serde(default)]
    pub hint: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}: the destination has {}, the source has {}",
            self.what, self.expected, self.found
        )?;
        if !self.hint.is_empty() {
            write!(f, " ({})", self.hint)?;
        }
        Ok(())
    }
}

/// The destination's answer to a manifest.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// Empty: go on.
    pub problems: Vec<Problem>,
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

/// Digests of the source's RAM, taken while it stands still.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RamDigests {
    /// One entry for each block of the manifest.
    pub blocks: Vec<BlockDigests>,
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
