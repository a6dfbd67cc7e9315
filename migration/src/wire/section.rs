//! Sections: their types, headers and footers, and the end of the stream.
//!
//! ```text
//! START, FULL   type  u32 id  str8 name  u32 instance  u32 version   body   0x7e u32 id
//! PART, END     type  u32 id                                         body   0x7e u32 id
//! EOF           0x00
//! description   0x06  u32 length  JSON
//! ```
//!
//! A body has no length: whoever reads it must know its layout, and the footer is the proof.

use super::limits::MAX_DESCRIPTION;
use super::{WireError, read_bytes, read_str8, read_u8, read_u32, skip, write_str8};
use crate::vmstate::{ByteSource, SectionId};

/// The byte in front of a part of the stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum PartType {
    /// Nothing but the description follows.
    Eof = 0,
    /// The first section of an iterable subsystem (RAM).
    Start = 1,
    /// A further one, while the source's guest runs.
    Part = 2,
    /// The last one, after it has stopped.
    End = 3,
    /// A device.
    Full = 4,
    /// The JSON description of the devices.
    Description = 6,
    /// A command.
    Command = 8,
}

/// In front of a footer.
pub const FOOTER: u8 = 0x7e;

/// Reads the byte in front of the next part of the stream.
pub fn read_part_type(source: &mut dyn ByteSource) -> Result<PartType, WireError> {
    let offset = source.offset();
    Ok(match read_u8(source, "the type of the next section")? {
        0 => PartType::Eof,
        1 => PartType::Start,
        2 => PartType::Part,
        3 => PartType::End,
        4 => PartType::Full,
        6 => PartType::Description,
        8 => PartType::Command,
        other => {
            return Err(WireError::Unexpected {
                what: "the type of the next section",
                offset,
                expected: "0, 1, 2, 3, 4, 6 or 8".into(),
                found: format!("{other:#04x}"),
            });
        }
    })
}

/// The header of a START or FULL section, after its type.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SectionHeader {
    /// Ties PART and END sections and the footer to this header.
    pub id: u32,
    /// Which section it is.
    pub key: SectionId,
    /// The version of its layout.
    pub version: u32,
}

/// Reads the header of a START or FULL section.
pub fn read_header(source: &mut dyn ByteSource) -> Result<SectionHeader, WireError> {
    let id = read_u32(source, "a section's id")?;
    let idstr = read_str8(source, "a section's name")?;
    let instance = read_u32(source, "a section's instance")?;
    let version = read_u32(source, "a section's version")?;
    Ok(SectionHeader { id, key: SectionId { idstr, instance }, version })
}

/// Writes the type and header of a START or FULL section.
pub fn write_header(out: &mut Vec<u8>, kind: PartType, header: &SectionHeader) {
    out.push(kind as u8);
    out.extend_from_slice(&header.id.to_be_bytes());
    write_str8(out, &header.key.idstr);
    out.extend_from_slice(&header.key.instance.to_be_bytes());
    out.extend_from_slice(&header.version.to_be_bytes());
}

/// Writes the type and header of a PART or END section.
pub fn write_part_header(out: &mut Vec<u8>, kind: PartType, id: u32) {
    out.push(kind as u8);
    out.extend_from_slice(&id.to_be_bytes());
}

/// Writes a footer.
pub fn write_footer(out: &mut Vec<u8>, id: u32) {
    out.push(FOOTER);
    out.extend_from_slice(&id.to_be_bytes());
}

/// Reads the footer of section `key` whose header carried `id`.
pub fn read_footer(source: &mut dyn ByteSource, key: &SectionId, id: u32) -> Result<(), WireError> {
    let offset = source.offset();
    let found = read_u8(source, "a section's footer")?;
    if found != FOOTER {
        return Err(WireError::FooterMissing { section: key.to_string(), offset, found });
    }
    let found = read_u32(source, "a section's footer")?;
    if found != id {
        return Err(WireError::FooterId { section: key.to_string(), offset, expected: id, found });
    }
    Ok(())
}

/// What stands in the description's place for another mini-vmm, which knows its sections: to describe them
/// takes longer than to write them, and the guest stands still meanwhile.
pub const NO_DESCRIPTION: &str = "{}";

/// Writes the end of the stream: EOF and the description, which a QEMU reads at least one byte of.
pub fn write_end(out: &mut Vec<u8>, description: &str) {
    out.push(PartType::Eof as u8);
    out.push(PartType::Description as u8);
    out.extend_from_slice(&(description.len() as u32).to_be_bytes());
    out.extend_from_slice(description.as_bytes());
}

/// Reads the description, after its type.
pub fn read_description(source: &mut dyn ByteSource) -> Result<Vec<u8>, WireError> {
    let what = "the description of the devices";
    let len = description_len(source)?;
    read_bytes(source, len, what)
}

/// Reads the description's length and skips its text, after its type.
pub fn skip_description(source: &mut dyn ByteSource) -> Result<(), WireError> {
    let len = description_len(source)?;
    skip(source, len, "the description of the devices")
}

fn description_len(source: &mut dyn ByteSource) -> Result<u32, WireError> {
    let offset = source.offset();
    let what = "the description of the devices";
    let len = read_u32(source, what)?;
    if len > MAX_DESCRIPTION {
        return Err(WireError::TooLarge {
            what,
            offset,
            found: len.into(),
            max: MAX_DESCRIPTION.into(),
        });
    }
    Ok(len)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmstate::SliceSource;

    #[test]
    fn a_full_section_has_header_and_footer() {
        let header = SectionHeader { id: 7, key: SectionId::new("i8259", 1), version: 1 };
        let mut out = Vec::new();
        write_header(&mut out, PartType::Full, &header);
        write_footer(&mut out, 7);
        assert_eq!(out, b"\x04\0\0\0\x07\x05i8259\0\0\0\x01\0\0\0\x01\x7e\0\0\0\x07");
        let mut source = SliceSource::new(&out);
        assert_eq!(read_part_type(&mut source).unwrap(), PartType::Full);
        assert_eq!(read_header(&mut source).unwrap(), header);
        read_footer(&mut source, &header.key, 7).unwrap();
        assert!(source.rest().is_empty());
    }

    #[test]
    fn a_wrong_footer_names_its_section() {
        let key = SectionId::new("0000:00:01.3/piix4_pm", 0);
        let read = |bytes| read_footer(&mut SliceSource::new(bytes), &key, 7).unwrap_err();
        assert!(
            read(b"\0").to_string().starts_with("missing section footer for 0000:00:01.3/piix4_pm")
        );
        assert!(read(b"\x7e\0\0\0\x08").to_string().contains("expected 7, found 8"));
    }

    #[test]
    fn the_end_is_eof_and_description() {
        let mut out = Vec::new();
        write_end(&mut out, "{}");
        assert_eq!(out, b"\0\x06\0\0\0\x02{}");
        let mut source = SliceSource::new(&out[2..]);
        skip_description(&mut source).unwrap();
        assert!(source.rest().is_empty());
        let mut source = SliceSource::new(b"\xff\xff\xff\xff");
        assert!(matches!(skip_description(&mut source), Err(WireError::TooLarge { .. })));
    }
}
