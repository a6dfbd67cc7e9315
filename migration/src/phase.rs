//! Where a migration stands, in QMP's words.
//!
//! ```text
//! source:       none → setup → active → [pre-switchover →] device → completed
//!                        └───────┴──────────────┴──────────────┴──→ failed
//!                        └───────┴──────────────┴──────────────┴──→ cancelling → cancelled
//! destination:  none → setup → active → completed | failed
//! ```

use std::fmt;

use serde::{Deserialize, Serialize};

/// The status of a migration. The words are the ones that a client of QEMU's knows; it treats any
/// other as an error.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize,
)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// There has been no migration.
    #[default]
    None,
    /// The two sides are getting to know each other.
    Setup,
    /// RAM travels while the guest runs.
    Active,
    /// The guest stands still, and the user's word is awaited.
    PreSwitchover,
    /// The guest stands still, and what is left travels.
    Device,
    /// The other side (on a destination: this side) runs the guest.
    Completed,
    /// The migration failed; on the source the guest goes on, or the outcome is in doubt and the
    /// error says so.
    Failed,
    /// A cancel was asked for and is under way.
    Cancelling,
    /// The migration was cancelled and the guest goes on.
    Cancelled,
}

impl Phase {
    /// Every phase.
    pub const ALL: [Self; 9] = [
        Self::None,
        Self::Setup,
        Self::Active,
        Self::PreSwitchover,
        Self::Device,
        Self::Completed,
        Self::Failed,
        Self::Cancelling,
        Self::Cancelled,
    ];

    /// QMP's word.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Setup => "setup",
            Self::Active => "active",
            Self::PreSwitchover => "pre-switchover",
            Self::Device => "device",
            Self::Completed => "completed",
            Self::Failed => "failed",
            Self::Cancelling => "cancelling",
            Self::Cancelled => "cancelled",
        }
    }

    /// Whether a migration is under way, so that a second one must wait.
    pub fn is_busy(self) -> bool {
        use Phase::*;
        matches!(self, Setup | Active | PreSwitchover | Device | Cancelling)
    }

    /// Whether a migration may go from here to `next`. A new one may start wherever none is
    /// under way.
    pub fn may_become(self, next: Self) -> bool {
        use Phase::*;
        match next {
            None => false,
            Setup => !self.is_busy(),
            Active => self == Setup,
            PreSwitchover => self == Active,
            Device => matches!(self, Active | PreSwitchover),
            // A destination knows no switch-over of its own.
            Completed => matches!(self, Active | Device),
            Failed => self.is_busy(),
            Cancelling => matches!(self, Setup | Active | PreSwitchover | Device),
            Cancelled => self == Cancelling,
        }
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::Phase::{self, *};

    #[test]
    fn every_pair_is_allowed_or_not_as_the_picture_says() {
        let allowed = [
            (None, vec![Setup]),
            (Setup, vec![Active, Failed, Cancelling]),
            (Active, vec![PreSwitchover, Device, Completed, Failed, Cancelling]),
            (PreSwitchover, vec![Device, Failed, Cancelling]),
            (Device, vec![Completed, Failed, Cancelling]),
            (Completed, vec![Setup]),
            (Failed, vec![Setup]),
            (Cancelling, vec![Failed, Cancelled]),
            (Cancelled, vec![Setup]),
        ];
        for (from, to) in allowed {
            for next in Phase::ALL {
                assert_eq!(from.may_become(next), to.contains(&next), "{from} → {next}");
            }
        }
    }

    #[test]
    fn the_words_are_those_of_the_json() {
        for phase in Phase::ALL {
            assert_eq!(serde_json::to_value(phase).unwrap(), phase.name());
        }
    }
}
