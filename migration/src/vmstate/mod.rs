//! How a device's state is written down.
//!
//! State is declared once, as a plain struct that derives `Serialize` and `Deserialize`. QEMU's
//! encoding is a serde data format over these declarations:
//!
//! - integers are big-endian, `bool` is one byte, structs and tuples are their parts one after
//!   the other; nothing carries a length of its own;
//! - an array longer than serde's 32 elements is a [`FixedVec`], or a [`Tailed`] if most of it is the
//!   same; bytes that mean nothing are a [`Pad`]; a deadline is a [`Timer`]; a count followed by that many
//!   elements is a [`Counted`]; many bytes are [`Bytes`], or a [`Blob`] behind their count;
//! - a field that exists only from section version `N` on is named `name@N`
//!   (`#[serde(rename = "xcr0@12", default)]`). A struct inside a section goes by the version of
//!   the section or subsection that it is in;
//! - text behind a length byte is a [`Str8`]; `Option`, `Vec`, maps, enums, floats and
//!   `#[serde(alias)]` have no place in the format;
//! - subsections are one field whose type is a struct renamed to [`SUBSECTIONS`], each of its
//!   fields an `Option` named as the subsection is on the wire. `None` is not sent. A subsection
//!   has version 1 unless its name ends in `@N`:
//!
//! ```
//! # use serde::{Serialize, Deserialize};
//! # #[derive(Default, Serialize, Deserialize)] struct Tsr { retry: u32, thr: u8, tsr: u8 }
//! #[derive(Default, Serialize, Deserialize)]
//! #[serde(rename = "@subsections")]
//! struct SerialSubs {
//!     #[serde(rename = "serial/tsr")]
//!     tsr: Option<Tsr>,
//! }
//! ```
//!
//! From the same declaration come the bytes ([`to_bytes`], [`from_source`]), QEMU's description of
//! them ([`describe()`]), the digest that two hosts compare ([`layout_digest`]) and, with
//! `serde_json`, what people are shown. Where QEMU's description has other words, they stand beside the
//! version ([`VmState::WORDS`]), for the digest knows the declaration's. [`SectionOf`] makes a [`Section`] of any [`Migratable`] device. Where a
//! layout depends on more than a type (a device's queues, say), the device implements [`Section`]
//! itself with an [`Encoder`], a [`Decoder`], a [`Describer`] and a [`LayoutDigest`].
#![deny(
    clippy::indexing_slicing,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::arithmetic_side_effects,
    clippy::panic
)]

mod adapter;
mod bytes;
mod de;
mod describe;
mod error;
mod layout;
mod parts;
mod read;
mod section;
mod ser;
mod shape;
mod tailed;
mod types;
mod walk;
mod words;

pub use adapter::SectionOf;
pub use bytes::{Blob, Bytes};
pub use describe::{Describer, describe};
pub use error::{FieldError, StateError};
pub use layout::{LayoutDigest, layout, layout_digest};
pub use read::{Decoder, SliceSource, check_version, from_source};
pub use section::{Audience, ByteSource, Description, Migratable, Section, SectionId, VmState};
pub use ser::{Encoder, to_bytes};
pub use tailed::Tailed;
pub use types::{Counted, FixedVec, Pad, Str8, Timer};
pub use walk::SUBSECTION;
pub use words::{Form, Word, Words};

/// The serde name that marks a struct as a set of subsections.
pub const SUBSECTIONS: &str = "@subsections";

#[cfg(test)]
#[allow(
    clippy::indexing_slicing,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::arithmetic_side_effects,
    clippy::panic
)]
mod tests;
