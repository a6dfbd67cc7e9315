//! What is wrong with a configuration; every one of these is the user's to mend (exit status 2).

use thiserror::Error;

/// What is wrong with a configuration, in words for the person who wrote it.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// A parameter of the self-checking guest.
    #[error(transparent)]
    Selfcheck(#[from] crate::selfcheck::SelfcheckError),
    /// A value that can't be understood, or is out of range.
    #[error("{what}: '{found}' is not {expected}")]
    Invalid {
        /// The flag or key: "memory", "disk addr".
        what: &'static str,
        /// What was written.
        found: String,
        /// What it should be, with an example.
        expected: String,
    },
    /// A key that does not exist.
    #[error("unknown key '{found}' in {place}{}", hint(.nearest.as_deref(), .known))]
    UnknownKey {
        /// Where: "the configuration file", "--disk".
        place: String,
        /// What was written.
        found: String,
        /// The key probably meant.
        nearest: Option<String>,
        /// All keys there are.
        known: Vec<&'static str>,
    },
    /// The same id, MAC or PCI address twice.
    #[error("{kind} '{value}' is used by both {first} and {second}: give one of them another")]
    Duplicate {
        /// "id", "PCI address", "MAC address", …
        kind: &'static str,
        /// What both have.
        value: String,
        /// One of them.
        first: String,
        /// The other.
        second: String,
    },
    /// No slot left on the PCI bus.
    #[error("no PCI slot is left for {0}: the bus has the slots 2 to 31 for devices")]
    NoSlot(String),
    /// Things that can't be said together, or one that needs another.
    #[error("{0}")]
    Combination(&'static str),
    /// The configuration file can't be read.
    #[error("the configuration file '{path}' can't be read")]
    File {
        /// The file.
        path: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The configuration file is not TOML, or a value in it is wrong.
    // The reason is part of the words: the command line's parser shows no sources.
    #[error("{place}: {reason}")]
    Parse {
        /// "the configuration file 'vm.toml'", or the flag.
        place: String,
        /// Where and why.
        reason: Box<dyn std::error::Error + Send + Sync>,
    },
}

fn hint(nearest: Option<&str>, known: &[&'static str]) -> String {
    match nearest {
        Some(word) => format!(": did you mean '{word}'?"),
        None => format!(": there are {}", known.join(", ")),
    }
}
