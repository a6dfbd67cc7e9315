//! Takes a section's body apart, by its description.

use super::description::{Field, Layout};
use super::value::{Member, Value};
use crate::vmstate::SUBSECTION;

/// Deepest nesting of structs; QEMU's own is below 10.
const MAX_DEPTH: usize = 32;
/// Most values in one section, so that a description of empty fields cannot take all memory. A virtio
/// device with a full list of unfinished requests has some 10,000.
const MAX_VALUES: u64 = 4 << 20;

/// A body that is not as its description says.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// It ends too early.
    #[error(
        "field {path} needs {need} bytes at offset {offset:#x} of the section, {have} are left"
    )]
    Short {
        /// The field.
        path: String,
        /// Its offset in the body.
        offset: u64,
        /// Its size, in bytes.
        need: u64,
        /// What is left.
        have: u64,
    },
    /// A subsection is not there.
    #[error("expected subsection {name} at offset {offset:#x} of the section, found {found}")]
    Subsection {
        /// The one that the description has.
        name: String,
        /// Offset in the body.
        offset: u64,
        /// What stands there.
        found: String,
    },
    /// The description itself is not one that a VM has.
    #[error("the description of {path} is absurd: {why}")]
    Absurd {
        /// Where.
        path: String,
        /// Why.
        why: &'static str,
    },
}

/// Takes a body apart; gives the value and how long the body is.
pub(super) fn decode(layout: &Layout, bytes: &[u8]) -> Result<(Value, usize), DecodeError> {
    let mut decoder = Decoder { bytes, at: 0, values: 0 };
    let value = decoder.layout(layout, &layout.vmsd_name, 0)?;
    Ok((value, decoder.at))
}

struct Decoder<'a> {
    bytes: &'a [u8],
    at: usize,
    values: u64,
}

impl<'a> Decoder<'a> {
    fn take(&mut self, size: u64, path: &str) -> Result<&'a [u8], DecodeError> {
        let rest = self.bytes.get(self.at..).unwrap_or_default();
        let taken = usize::try_from(size).ok().and_then(|size| rest.get(..size));
        let taken = taken.ok_or_else(|| DecodeError::Short {
            path: path.to_owned(),
            offset: self.at as u64,
            need: size,
            have: rest.len() as u64,
        })?;
        self.at = self.at.saturating_add(taken.len());
        Ok(taken)
    }

    fn layout(&mut self, layout: &Layout, path: &str, depth: usize) -> Result<Value, DecodeError> {
        self.body(&layout.fields, &layout.subsections, path, depth)
    }

    fn body(
        &mut self,
        fields: &[Field],
        subsections: &[Layout],
        path: &str,
        depth: usize,
    ) -> Result<Value, DecodeError> {
        let absurd = |why| DecodeError::Absurd { path: path.to_owned(), why };
        if depth > MAX_DEPTH {
            return Err(absurd("structs within structs without end"));
        }
        let depth = depth.saturating_add(1);
        let mut members = Vec::new();
        for field in fields {
            let name = match field.index {
                Some(index) => format!("{}[{index}]", field.name),
                None => field.name.clone(),
            };
            let path = format!("{path}/{name}");
            let offset = self.at as u64;
            let value = match field.array_len {
                None => self.field(field, &path, depth)?,
                Some(len) => {
                    let mut values = Vec::new();
                    for _ in 0..len {
                        values.push(self.field(field, &path, depth)?);
                    }
                    Value::Array(values)
                }
            };
            members.push(Member { name, offset, subsection: None, value });
        }
        for _ in subsections {
            let offset = self.at as u64;
            // By name: the order on the wire is what counts.
            let Some(found) = subsections.iter().find(|s| self.is_next(s)) else { break };
            let path = format!("{path}/{}", found.vmsd_name);
            self.take(2_u64.saturating_add(found.vmsd_name.len() as u64), &path)?;
            let version = self.take(4, &path)?.first_chunk().map_or(0, |v| u32::from_be_bytes(*v));
            let value = self.layout(found, &path, depth)?;
            let name = found.vmsd_name.clone();
            members.push(Member { name, offset, subsection: Some(version), value });
        }
        let has =
            |s: &&Layout| members.iter().any(|m| m.subsection.is_some() && m.name == s.vmsd_name);
        if let Some(missing) = subsections.iter().find(|s| !has(s)) {
            let next = self.bytes.get(self.at..).unwrap_or_default();
            return Err(DecodeError::Subsection {
                name: missing.vmsd_name.clone(),
                offset: self.at as u64,
                found: super::value::hex(next.get(..16).unwrap_or(next)),
            });
        }
        Ok(Value::Struct(members))
    }

    fn is_next(&self, subsection: &Layout) -> bool {
        let name = subsection.vmsd_name.as_bytes();
        let next = self.bytes.get(self.at..).unwrap_or_default();
        next.split_first_chunk::<2>().is_some_and(|([kind, len], rest)| {
            *kind == SUBSECTION && usize::from(*len) == name.len() && rest.starts_with(name)
        })
    }

    fn field(&mut self, field: &Field, path: &str, depth: usize) -> Result<Value, DecodeError> {
        self.values = self.values.saturating_add(1);
        if self.values > MAX_VALUES {
            return Err(DecodeError::Absurd { path: path.to_owned(), why: "too many values" });
        }
        if let Some(layout) = &field.layout {
            return self.layout(layout, path, depth);
        }
        if let Some(fields) = &field.fields {
            return self.body(fields, &field.subsections, path, depth);
        }
        let bytes = self.take(field.size, path)?;
        let kind = field.kind.as_str();
        let number = ["uint", "int", "bool", "timer"].iter().any(|k| kind.starts_with(k));
        if number && let 1 | 2 | 4 | 8 = bytes.len() {
            let bits = bytes.iter().fold(0, |bits, byte| bits << 8 | u64::from(*byte));
            let signed = kind.starts_with("int") || kind.starts_with("timer");
            return Ok(Value::Int { bits, size: bytes.len() as u8, signed });
        }
        Ok(Value::Bytes(bytes.to_vec()))
    }
}
