//! What became of a migration: the name that both sides know it by, the question that a source in doubt
//! asks over a connection of its own, and the answers.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// A [`Hello::abilities`](crate::manifest::Hello::abilities): the destination can be asked what became of
/// a migration that it was given a name for, and runs the guest only over disks that are as COMMIT says.
pub const FATE: &str = "fate";

/// Names one attempt to migrate, among all that there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct MigrationId(Uuid);

impl MigrationId {
    /// A new one: 122 random bits.
    pub fn random() -> Self {
        Self(Uuid::new_v4())
    }

    /// Its bytes, for where there is no JSON.
    pub fn to_bytes(self) -> [u8; 16] {
        self.0.into_bytes()
    }
}

impl std::fmt::Display for MigrationId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// What a destination knows of a migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fate {
    /// Its guest has started there.
    Runs,
    /// It has not, and never will: what would let it is undone.
    NeverHere,
    /// Whoever answers has never heard of it: a destination that was started since, or another one.
    Unknown,
}

/// What became of this migration?
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Question {
    /// Its name.
    pub id: MigrationId,
}

/// The answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// The name that was asked for.
    pub id: MigrationId,
    /// What became of it.
    pub fate: Fate,
}
