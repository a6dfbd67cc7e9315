//! What travels: encoders and decoders of QEMU 7.2's migration stream and of our own messages in
//! it. Nothing here touches a socket, a VM or a clock.
//!
//! ```text
//! source → destination                                          destination → source
//! ┌────────────────────────────┐
//! │ file header                │ header.rs                      return_path.rs
//! │ configuration              │ header.rs                      ┌───────────────────────────────┐
//! │ OPEN_RETURN_PATH, PING     │ command.rs                     │ [HELLO] PONG                  │
//! │ [MANIFEST]                 │ command.rs                     │ [VERDICT]                     │
//! │ [PROBE …, a preflight's]   │ command.rs                     │                               │
//! │ START ram: block list, EOS │ section.rs, ram.rs             │                               │
//! │ PART  ram: records, EOS    │                                │                               │
//! │ …                          │                                │ (FAILED: at any time)         │
//! │ END   ram: records, EOS    │                                │                               │
//! │ FULL  device … footer      │ section.rs                     │                               │
//! │ [VERIFY]                   │ command.rs                     │                               │
//! │ EOF, description           │ section.rs                     │ [PREPARED]                    │
//! │ [COMMIT]                   │ command.rs                     │ SHUT 0                        │
//! └────────────────────────────┘                                └───────────────────────────────┘
//! [ ] only between two mini-vmms
//! ```
//!
//! All integers are big-endian.
#![cfg_attr(
    not(test),
    deny(
        clippy::indexing_slicing,
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::arithmetic_side_effects
    )
)]

pub mod command;
pub mod header;
pub mod limits;
pub mod multifd;
pub mod ram;
pub mod return_path;
pub mod section;
pub mod zstd;

use std::io;

use crate::vmstate::ByteSource;

/// What can be wrong with the bytes that a peer sent.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// The bytes stopped coming, or the connection failed.
    #[error("the stream broke off at offset {offset:#x}, in {what}")]
    BrokenOff {
        /// What was being read.
        what: &'static str,
        /// Offset in the stream.
        offset: u64,
        /// The operating system's reason.
        #[source]
        source: io::Error,
    },
    /// The very first bytes are not those of a migration.
    #[error("not a migration stream: it begins with {found:#010x}, expected 0x5145564d (\"QEVM\")")]
    NotAStream {
        /// The first four bytes.
        found: u32,
    },
    /// A stream version that nobody speaks any more, or not yet.
    #[error("unsupported migration stream version {found}, this side takes 3")]
    StreamVersion {
        /// The version on the wire.
        found: u32,
    },
    /// The configuration section is not where it must be.
    #[error("configuration section missing: expected type 0x07, found {found:#04x}")]
    ConfigurationMissing {
        /// The byte in its place.
        found: u8,
    },
    /// A length or a count beyond its bound.
    #[error("{what} at offset {offset:#x} is {found}, at most {max} is taken")]
    TooLarge {
        /// What was being read.
        what: &'static str,
        /// Offset in the stream.
        offset: u64,
        /// The number on the wire.
        found: u64,
        /// The bound.
        max: u64,
    },
    /// A value that the format does not have in this place.
    #[error("{what} at offset {offset:#x}: expected {expected}, found {found}")]
    Unexpected {
        /// What was being read.
        what: &'static str,
        /// Offset in the stream.
        offset: u64,
        /// What would have been right.
        expected: String,
        /// What stands there.
        found: String,
    },
    /// A section does not end where its reader stopped: the two sides disagree on its fields.
    #[error(
        "missing section footer for {section}: expected 0x7e at offset {offset:#x}, found \
         {found:#04x}; the two sides disagree on the section's fields"
    )]
    FooterMissing {
        /// The section's name and instance.
        section: String,
        /// Offset in the stream.
        offset: u64,
        /// The byte in its place.
        found: u8,
    },
    /// A footer that belongs to another section.
    #[error("mismatched section id in footer for {section}: expected {expected}, found {found}")]
    FooterId {
        /// The section's name and instance.
        section: String,
        /// Offset in the stream.
        offset: u64,
        /// The id in the section's header.
        expected: u32,
        /// The id in the footer.
        found: u32,
    },
    /// Something that QEMU can do and this side does not.
    #[error(
        "{feature} is not supported: switch the capability off on the source (offset {offset:#x})"
    )]
    Unsupported {
        /// The capability's name in QMP, or what it is.
        feature: &'static str,
        /// Offset in the stream.
        offset: u64,
    },
    /// One of our own messages whose JSON can't be read.
    #[error("the {what} message at offset {offset:#x} can't be read")]
    Json {
        /// Which message.
        what: &'static str,
        /// Offset in the stream.
        offset: u64,
        /// Where in the JSON, and why.
        #[source]
        source: serde_json::Error,
    },
}

impl WireError {
    /// Where in the stream, in bytes.
    pub fn offset(&self) -> u64 {
        match self {
            Self::BrokenOff { offset, .. }
            | Self::TooLarge { offset, .. }
            | Self::Unexpected { offset, .. }
            | Self::FooterMissing { offset, .. }
            | Self::FooterId { offset, .. }
            | Self::Unsupported { offset, .. }
            | Self::Json { offset, .. } => *offset,
            // The first four bytes, the next four, and what follows them.
            Self::NotAStream { .. } => 0,
            Self::StreamVersion { .. } => 4,
            Self::ConfigurationMissing { .. } => 8,
        }
    }

    /// The I/O error behind this, if the bytes stopped coming.
    pub fn io(&self) -> Option<&io::Error> {
        match self {
            Self::BrokenOff { source, .. } => Some(source),
            _ => None,
        }
    }
}

/// Reads exactly `N` bytes; `what` names them in an error.
pub fn read_array<const N: usize>(
    source: &mut dyn ByteSource,
    what: &'static str,
) -> Result<[u8; N], WireError> {
    let offset = source.offset();
    let mut buf = [0; N];
    source.read_exact(&mut buf).map_err(|e| WireError::BrokenOff { what, offset, source: e })?;
    Ok(buf)
}

/// Reads one byte.
pub fn read_u8(source: &mut dyn ByteSource, what: &'static str) -> Result<u8, WireError> {
    read_array(source, what).map(u8::from_be_bytes)
}

/// Reads a big-endian `u16`.
pub fn read_u16(source: &mut dyn ByteSource, what: &'static str) -> Result<u16, WireError> {
    read_array(source, what).map(u16::from_be_bytes)
}

/// Reads a big-endian `u32`.
pub fn read_u32(source: &mut dyn ByteSource, what: &'static str) -> Result<u32, WireError> {
    read_array(source, what).map(u32::from_be_bytes)
}

/// Reads a big-endian `u64`.
pub fn read_u64(source: &mut dyn ByteSource, what: &'static str) -> Result<u64, WireError> {
    read_array(source, what).map(u64::from_be_bytes)
}

/// Reads `len` bytes, which the caller has checked against a bound. The memory grows with what
/// has really come.
pub fn read_bytes(
    source: &mut dyn ByteSource,
    len: u32,
    what: &'static str,
) -> Result<Vec<u8>, WireError> {
    let mut bytes = Vec::new();
    in_pieces(source, len, what, |piece| bytes.extend_from_slice(piece))?;
    Ok(bytes)
}

/// Reads and forgets `len` bytes.
pub fn skip(source: &mut dyn ByteSource, len: u32, what: &'static str) -> Result<(), WireError> {
    in_pieces(source, len, what, |_| {})
}

/// Reads `len` bytes and gives them to `take` piece by piece: no more is held than has come.
fn in_pieces(
    source: &mut dyn ByteSource,
    len: u32,
    what: &'static str,
    mut take: impl FnMut(&[u8]),
) -> Result<(), WireError> {
    let mut left = len as usize;
    let mut piece = [0; 4096];
    while left > 0 {
        let n = left.min(piece.len());
        let Some(buf) = piece.get_mut(..n) else { break };
        let offset = source.offset();
        source.read_exact(buf).map_err(|e| WireError::BrokenOff { what, offset, source: e })?;
        take(buf);
        left = left.saturating_sub(n);
    }
    Ok(())
}

/// Reads a name: a `u8` length and that many bytes of text.
pub fn read_str8(source: &mut dyn ByteSource, what: &'static str) -> Result<String, WireError> {
    let offset = source.offset();
    let len = read_u8(source, what)?;
    let bytes = read_bytes(source, u32::from(len), what)?;
    text(bytes, what, offset)
}

fn text(bytes: Vec<u8>, what: &'static str, offset: u64) -> Result<String, WireError> {
    String::from_utf8(bytes).map_err(|e| WireError::Unexpected {
        what,
        offset,
        expected: "text".into(),
        found: String::from_utf8_lossy(e.as_bytes()).escape_debug().to_string(),
    })
}

/// Writes a name: a `u8` length and the bytes. A name that is longer than 255 bytes is cut; RAM
/// blocks and sections are named by this side, never by a peer.
pub fn write_str8(out: &mut Vec<u8>, name: &str) {
    debug_assert!(name.len() <= 255, "{name}");
    let bytes = name.as_bytes();
    let bytes = bytes.get(..255).unwrap_or(bytes);
    out.push(bytes.len() as u8);
    out.extend_from_slice(bytes);
}

/// Reads one of our own payloads: `u32` length and JSON. The `u16` that came before it says 4.
fn read_json<T: serde::de::DeserializeOwned>(
    source: &mut dyn ByteSource,
    what: &'static str,
) -> Result<T, WireError> {
    let offset = source.offset();
    let len = read_u32(source, what)?;
    if len > limits::MAX_JSON {
        return Err(WireError::TooLarge {
            what,
            offset,
            found: len.into(),
            max: limits::MAX_JSON.into(),
        });
    }
    let bytes = read_bytes(source, len, what)?;
    serde_json::from_slice(&bytes).map_err(|e| WireError::Json { what, offset, source: e })
}

/// Writes one of our own payloads, number and lengths included. What can't be written as JSON, or
/// is too long for a peer to take, does not exist in the messages' types short of a manifest with
/// absurd details, which is then sent as `null` and refused by the peer.
fn write_json(out: &mut Vec<u8>, number: u16, value: &impl serde::Serialize) {
    let json = serde_json::to_vec(value)
        .ok()
        .filter(|json| json.len() <= limits::MAX_JSON as usize)
        .unwrap_or_else(|| b"null".to_vec());
    out.extend_from_slice(&number.to_be_bytes());
    out.extend_from_slice(&4u16.to_be_bytes());
    out.extend_from_slice(&(json.len() as u32).to_be_bytes());
    out.extend_from_slice(&json);
}

/// `reason` cut to what a peer takes, at a character's border.
pub fn bounded_reason(reason: &str) -> String {
    let mut end = reason.len().min(limits::MAX_REASON);
    while !reason.is_char_boundary(end) {
        end = end.saturating_sub(1);
    }
    reason.get(..end).unwrap_or_default().to_owned()
}

/// An error and its causes as one line: "this: because of that".
pub(crate) fn error_chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        next = cause.source();
    }
    text
}
