//! What stands in a section: a tree of named values that remembers how it was written.

use serde_json::{Map, Value as Json, json};

use crate::wire::write_str8;

/// A value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Value {
    /// A whole number of 1, 2, 4 or 8 bytes, big-endian on the wire.
    Int {
        /// Its bits.
        bits: u64,
        /// Its size, in bytes.
        size: u8,
        /// Whether the highest bit is a sign.
        signed: bool,
    },
    /// Bytes that are not taken apart.
    Bytes(Vec<u8>),
    /// Several alike.
    Array(Vec<Value>),
    /// Named parts, and subsections behind them.
    Struct(Vec<Member>),
}

/// A named part of a struct.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// Its name; of a subsection as on the wire, else with `[N]` for one of several.
    pub name: String,
    /// Its offset in the section's body, in bytes.
    pub offset: u64,
    /// The version of a subsection; nothing for a field.
    pub subsection: Option<u32>,
    /// What stands there.
    pub value: Value,
}

impl Value {
    /// Writes it as it was read.
    pub fn write(&self, out: &mut Vec<u8>) {
        match self {
            Self::Int { bits, size, .. } => {
                let bytes = bits.to_be_bytes();
                let from = bytes.len().saturating_sub((*size).into());
                out.extend_from_slice(bytes.get(from..).unwrap_or_default());
            }
            Self::Bytes(bytes) => out.extend_from_slice(bytes),
            Self::Array(values) => values.iter().for_each(|value| value.write(out)),
            Self::Struct(members) => {
                for member in members {
                    if let Some(version) = member.subsection {
                        out.push(crate::vmstate::SUBSECTION);
                        write_str8(out, &member.name);
                        out.extend_from_slice(&version.to_be_bytes());
                    }
                    member.value.write(out);
                }
            }
        }
    }

    /// How many bytes it has on the wire.
    pub fn size(&self) -> usize {
        let mut bytes = Vec::new();
        self.write(&mut bytes);
        bytes.len()
    }

    /// The signed number of an [`Int`](Self::Int) that is one.
    fn signed(bits: u64, size: u8) -> i64 {
        let unused = 64_u32.saturating_sub(u32::from(size).saturating_mul(8));
        let shifted = bits.checked_shl(unused).unwrap_or(bits) as i64;
        shifted.checked_shr(unused).unwrap_or(shifted)
    }

    /// In JSON: numbers as such, bytes as a text of hexadecimal digits.
    pub fn to_json(&self) -> Json {
        match self {
            Self::Int { bits, size, signed: true } => json!(Self::signed(*bits, *size)),
            Self::Int { bits, .. } => json!(bits),
            Self::Bytes(bytes) => Json::String(hex(bytes)),
            Self::Array(values) => values.iter().map(Self::to_json).collect(),
            Self::Struct(members) => {
                let pairs = members.iter().map(|m| (m.name.clone(), m.value.to_json()));
                Json::Object(pairs.collect::<Map<_, _>>())
            }
        }
    }

    /// In words, for one line.
    pub fn to_text(&self) -> String {
        match self {
            Self::Int { bits, size, signed: true } => Self::signed(*bits, *size).to_string(),
            Self::Int { bits, .. } if *bits < 10 => bits.to_string(),
            Self::Int { bits, .. } => format!("{bits:#x}"),
            Self::Bytes(bytes) => hex(bytes),
            Self::Array(values) => {
                let all: Vec<String> = values.iter().map(Self::to_text).collect();
                format!("[{}]", all.join(" "))
            }
            Self::Struct(_) => self.to_json().to_string(),
        }
    }
}

/// Hexadecimal digits.
pub(super) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    let mut text = String::with_capacity(bytes.len().saturating_mul(2));
    for byte in bytes {
        // A String takes everything.
        let _ = write!(text, "{byte:02x}");
    }
    text
}
