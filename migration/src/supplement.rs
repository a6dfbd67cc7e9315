//! What a stream that nobody answers carries beside QEMU's.
//!
//! Whoever saves a VM cannot ask who will read it. So the stream is exactly QEMU's, and what QEMU's
//! layouts have no place for stands where a QEMU does not look: in the description at the stream's
//! end, JSON that a QEMU skips, under the key `mini-vmm`.
//!
//! ```text
//! {"devices": […], "page_size": 4096, "mini-vmm": {"manifest": {…}, "sections": [{…, "body": HEX}]}}
//! ```
//!
//! A mini-vmm that restores compares the manifest with itself, and takes these bodies instead of
//! the ones that came before.

use serde::{Deserialize, Serialize};

use crate::manifest::{Digests, Manifest};
use crate::vmstate::{ByteSource, SectionId};
use crate::wire::limits::MAX_SAVED_DESCRIPTION;
use crate::wire::{WireError, read_bytes, read_u32};

const WHAT: &str = "the description of the devices";

/// The key's value.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Supplement {
    /// What the VM is and needs.
    pub(crate) manifest: Manifest,
    /// The sections that are fuller than the ones in the stream.
    pub(crate) sections: Vec<FullerSection>,
    /// Digests of RAM, if they were asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) digests: Option<Digests>,
}

/// One section as another mini-vmm gets it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct FullerSection {
    id: String,
    instance: u32,
    pub(crate) version: u32,
    #[serde(with = "hex")]
    pub(crate) body: Vec<u8>,
}

impl FullerSection {
    pub(crate) fn new(key: &SectionId, version: u32, body: Vec<u8>) -> Self {
        Self { id: key.idstr.clone(), instance: key.instance, version, body }
    }

    pub(crate) fn key(&self) -> SectionId {
        SectionId::new(self.id.clone(), self.instance)
    }
}

/// The description, as far as it is for us; QEMU's part is skipped.
#[derive(Deserialize)]
struct Description {
    #[serde(rename = "mini-vmm")]
    ours: Option<Supplement>,
}

/// Reads the description's length and text, after its type. A QEMU's has nothing for us.
pub(crate) fn read(source: &mut dyn ByteSource) -> Result<Option<Supplement>, WireError> {
    let offset = source.offset();
    let len = read_u32(source, WHAT)?;
    if len > MAX_SAVED_DESCRIPTION {
        let (found, max) = (len.into(), MAX_SAVED_DESCRIPTION.into());
        return Err(WireError::TooLarge { what: WHAT, offset, found, max });
    }
    let text = read_bytes(source, len, WHAT)?;
    serde_json::from_slice::<Description>(&text)
        .map(|description| description.ours)
        .map_err(|source| WireError::Json { what: WHAT, offset, source })
}

/// Bytes as text, two characters each.
mod hex {
    use serde::de::{Deserializer, Error, Visitor};
    use serde::ser::Serializer;

    pub(super) fn serialize<S: Serializer>(bytes: &[u8], to: S) -> Result<S::Ok, S::Error> {
        use std::fmt::Write;
        let mut text = String::with_capacity(bytes.len().saturating_mul(2));
        for byte in bytes {
            // Writing to a string does not fail.
            let _ = write!(text, "{byte:02x}");
        }
        to.serialize_str(&text)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<u8>, D::Error> {
        struct Hex;
        impl Visitor<'_> for Hex {
            type Value = Vec<u8>;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("bytes in hexadecimal, two characters each")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Vec<u8>, E> {
                let digit = |c: u8| char::from(c).to_digit(16).and_then(|d| u8::try_from(d).ok());
                let byte = |pair: &[u8]| match pair {
                    [high, low] => Some((digit(*high)? << 4) | digit(*low)?),
                    _ => None,
                };
                let bytes = text.as_bytes().chunks(2).map(byte).collect::<Option<Vec<u8>>>();
                bytes.ok_or_else(|| E::custom("not bytes in hexadecimal"))
            }
        }
        from.deserialize_str(Hex)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmstate::SliceSource;

    fn framed(text: &str) -> Vec<u8> {
        let mut bytes = (text.len() as u32).to_be_bytes().to_vec();
        bytes.extend_from_slice(text.as_bytes());
        bytes
    }

    #[test]
    fn sections_come_back_and_a_qemus_description_has_none() {
        let section = FullerSection::new(&SectionId::new("cpu", 1), 12, vec![0, 0xff, 0x3a]);
        let text = serde_json::to_string(&section).expect("JSON");
        assert!(text.contains("\"00ff3a\""), "{text}");
        assert_eq!(serde_json::from_str::<FullerSection>(&text).expect("JSON"), section);
        let qemu = framed(r#"{"page_size": 4096, "devices": [{"name": "cpu"}]}"#);
        assert!(read(&mut SliceSource::new(&qemu)).expect("JSON").is_none());
    }

    #[test]
    fn damage_is_told_with_its_place() {
        let bad = framed(r#"{"mini-vmm": {"sections": [{"body": "0g"}]}}"#);
        assert!(matches!(read(&mut SliceSource::new(&bad)), Err(WireError::Json { .. })));
        for odd in ["0", "zz", "é"] {
            let text = format!(r#"{{"id": "a", "instance": 0, "version": 1, "body": "{odd}"}}"#);
            assert!(serde_json::from_str::<FullerSection>(&text).is_err(), "{odd}");
        }
        let short = &framed("{}")[..5];
        assert!(matches!(read(&mut SliceSource::new(short)), Err(WireError::BrokenOff { .. })));
        let long = read(&mut SliceSource::new(&[0xff; 8])).unwrap_err();
        assert!(matches!(long, WireError::TooLarge { .. }));
    }
}
