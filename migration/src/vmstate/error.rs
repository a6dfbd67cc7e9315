//! What can be wrong with a device's state, in words that name the place.

/// A value that a device cannot take: which field, what was expected, what was found.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("field {field}: expected {expected}, found {found}")]
pub struct FieldError {
    /// The field's path inside the section, for example `queue[0].last_avail_idx`.
    pub field: String,
    /// What would have been right.
    pub expected: String,
    /// What stands there.
    pub found: String,
}

impl FieldError {
    /// A field error from anything that can be shown.
    pub fn new(
        field: impl Into<String>,
        expected: impl std::fmt::Display,
        found: impl std::fmt::Display,
    ) -> Self {
        Self { field: field.into(), expected: expected.to_string(), found: found.to_string() }
    }
}

/// Why a section could not be saved, decoded or loaded.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// A decoded value is one that the device cannot take.
    #[error("{section}: {error}")]
    Field {
        /// The section's name and instance.
        section: String,
        /// Which field, and how.
        #[source]
        error: FieldError,
    },
    /// The bytes do not have the section's form.
    #[error("{section}, {path}, offset {offset:#x} of the stream: {problem}")]
    Malformed {
        /// The section's name and instance.
        section: String,
        /// The path of the field that was being read.
        path: String,
        /// Offset in the stream.
        offset: u64,
        /// What was expected, and what stands there.
        problem: String,
    },
    /// The state has something that the format cannot write. A mistake in the declaration.
    #[error("{section}, {path}: this cannot be written down: {problem}")]
    Unwritable {
        /// The section's name and instance.
        section: String,
        /// The path of the field that was being written.
        path: String,
        /// What is wrong with it.
        problem: String,
    },
    /// The section's version is not one that this side knows.
    #[error("{section}: version {found} is not supported, this side takes {min} to {max}")]
    Version {
        /// The section's name and instance.
        section: String,
        /// The version on the wire.
        found: u32,
        /// The oldest version that can be read.
        min: u32,
        /// The version that this side writes.
        max: u32,
    },
    /// The device can't give or take its state just now; the outside world refused.
    #[error("{section}: {what}")]
    Device {
        /// The section's name and instance.
        section: String,
        /// What failed, for example the ioctl.
        what: String,
        /// The operating system's reason.
        #[source]
        source: Option<Box<dyn std::error::Error + Send + Sync>>,
    },
    /// The stream ended or broke while a section was being read.
    #[error("{section}: the stream broke off at offset {offset:#x}")]
    Io {
        /// The section's name and instance.
        section: String,
        /// Offset in the stream.
        offset: u64,
        /// The operating system's reason.
        #[source]
        source: std::io::Error,
    },
}
