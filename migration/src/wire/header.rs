//! The first bytes of a stream: the file header and the configuration section.
//!
//! ```text
//! "QEVM"  u32 3
//! 0x07    u32 length, machine type         [0x05 str8 name, u32 version, fields]…
//! ```

use super::limits::{MAX_CAPABILITIES, MAX_MACHINE_NAME};
use super::{WireError, read_array, read_bytes, read_str8, read_u8, read_u32, text, write_str8};
use crate::vmstate::{ByteSource, SUBSECTION};

/// "QEVM", the first four bytes of a migration stream.
pub const MAGIC: u32 = 0x5145_564d;
/// The only stream version in use.
pub const VERSION: u32 = 3;

const CONFIGURATION: u8 = 0x07;

/// The configuration section.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Configuration {
    /// The source's machine type.
    pub machine: String,
    /// The source's page size as a power of two, when it says so.
    pub page_bits: Option<u32>,
    /// Capabilities of the source that the destination must have too.
    pub capabilities: Vec<String>,
    /// The VM's UUID, when the source wants it compared.
    pub uuid: Option<[u8; 16]>,
}

/// Writes header and configuration.
pub fn write(out: &mut Vec<u8>, configuration: &Configuration) {
    out.extend_from_slice(&MAGIC.to_be_bytes());
    out.extend_from_slice(&VERSION.to_be_bytes());
    out.push(CONFIGURATION);
    out.extend_from_slice(&(configuration.machine.len() as u32).to_be_bytes());
    out.extend_from_slice(configuration.machine.as_bytes());
    let subsection = |out: &mut Vec<u8>, name| {
        out.push(SUBSECTION);
        write_str8(out, name);
        out.extend_from_slice(&1u32.to_be_bytes());
    };
    if let Some(bits) = configuration.page_bits {
        subsection(out, "configuration/target-page-bits");
        out.extend_from_slice(&bits.to_be_bytes());
    }
    if !configuration.capabilities.is_empty() {
        subsection(out, "configuration/capabilities");
        out.extend_from_slice(&(configuration.capabilities.len() as u32).to_be_bytes());
        configuration.capabilities.iter().for_each(|name| write_str8(out, name));
    }
    if let Some(uuid) = &configuration.uuid {
        subsection(out, "configuration/uuid");
        out.extend_from_slice(uuid);
    }
}

/// Reads the file header: the eight bytes that say whether this is a migration at all.
pub fn read_magic(source: &mut dyn ByteSource) -> Result<(), WireError> {
    let found = read_u32(source, "the file header")?;
    if found != MAGIC {
        return Err(WireError::NotAStream { found });
    }
    match read_u32(source, "the stream version")? {
        VERSION => Ok(()),
        found => Err(WireError::StreamVersion { found }),
    }
}

/// Reads the configuration section with its subsections.
pub fn read_configuration(source: &mut dyn ByteSource) -> Result<Configuration, WireError> {
    let found = read_u8(source, "the configuration section")?;
    if found != CONFIGURATION {
        return Err(WireError::ConfigurationMissing { found });
    }
    let offset = source.offset();
    let what = "the length of the machine type";
    let len = read_u32(source, what)?;
    if len > MAX_MACHINE_NAME {
        return Err(WireError::TooLarge {
            what,
            offset,
            found: len.into(),
            max: MAX_MACHINE_NAME.into(),
        });
    }
    let offset = source.offset();
    let name = read_bytes(source, len, "the machine type")?;
    let mut configuration = Configuration {
        machine: text(name, "the machine type", offset)?,
        ..Configuration::default()
    };
    while next_is_subsection(source)? {
        read_subsection(source, &mut configuration)?;
    }
    Ok(configuration)
}

fn next_is_subsection(source: &mut dyn ByteSource) -> Result<bool, WireError> {
    let offset = source.offset();
    let what = "the byte after the configuration section";
    let next = source.peek(1).map_err(|e| WireError::BrokenOff { what, offset, source: e })?;
    Ok(next.first() == Some(&SUBSECTION))
}

fn read_subsection(
    source: &mut dyn ByteSource,
    configuration: &mut Configuration,
) -> Result<(), WireError> {
    let what = "a subsection of the configuration";
    read_u8(source, what)?;
    let offset = source.offset();
    let name = read_str8(source, what)?;
    let version = read_u32(source, what)?;
    if version != 1 {
        return Err(WireError::Unexpected {
            what,
            offset,
            expected: format!("{name} version 1"),
            found: version.to_string(),
        });
    }
    match name.as_str() {
        "configuration/target-page-bits" => {
            configuration.page_bits = Some(read_u32(source, what)?);
        }
        "configuration/capabilities" => {
            let offset = source.offset();
            let count = read_u32(source, what)?;
            if count > MAX_CAPABILITIES {
                return Err(WireError::TooLarge {
                    what: "the number of capabilities",
                    offset,
                    found: count.into(),
                    max: MAX_CAPABILITIES.into(),
                });
            }
            configuration.capabilities.clear();
            for _ in 0..count {
                configuration.capabilities.push(read_str8(source, "a capability")?);
            }
        }
        "configuration/uuid" => configuration.uuid = Some(read_array(source, what)?),
        _ => {
            return Err(WireError::Unexpected {
                what,
                offset,
                expected: "one that QEMU 7.2 has".into(),
                found: name,
            });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmstate::SliceSource;

    #[test]
    fn header_and_configuration_are_qemus_bytes() {
        let mut out = Vec::new();
        let configuration =
            Configuration { machine: "pc-i440fx-7.2".into(), ..Configuration::default() };
        write(&mut out, &configuration);
        assert_eq!(out, b"QEVM\0\0\0\x03\x07\0\0\0\x0dpc-i440fx-7.2");
        out.push(8);
        let mut source = SliceSource::new(&out);
        read_magic(&mut source).unwrap();
        assert_eq!(read_configuration(&mut source).unwrap(), configuration);
        assert_eq!(source.rest(), [8]);
    }

    #[test]
    fn subsections_are_read() {
        let mut out = Vec::new();
        let configuration = Configuration {
            machine: "pc-i440fx-7.2".into(),
            uuid: Some(*b"0123456789abcdef"),
            ..Configuration::default()
        };
        write(&mut out, &configuration);
        out.extend_from_slice(b"\x05\x1aconfiguration/capabilities\0\0\0\x01\0\0\0\x01");
        out.extend_from_slice(b"\x0fx-ignore-shared\x08");
        let mut source = SliceSource::new(&out);
        read_magic(&mut source).unwrap();
        let read = read_configuration(&mut source).unwrap();
        assert_eq!(read.uuid, configuration.uuid);
        assert_eq!(read.capabilities, ["x-ignore-shared"]);
    }

    #[test]
    fn other_bytes_are_refused_by_name() {
        let magic = |bytes: &[u8]| read_magic(&mut SliceSource::new(bytes)).unwrap_err();
        assert!(matches!(magic(b"GET / HTTP/1.1"), WireError::NotAStream { found: 0x4745_5420 }));
        assert!(matches!(magic(b"QEVM\0\0\0\x04"), WireError::StreamVersion { found: 4 }));
        assert!(matches!(magic(b"QEV"), WireError::BrokenOff { .. }));
        let conf = |bytes: &[u8]| read_configuration(&mut SliceSource::new(bytes)).unwrap_err();
        assert!(matches!(conf(b"\x01"), WireError::ConfigurationMissing { found: 1 }));
        assert!(matches!(conf(b"\x07\xff\xff\xff\xff"), WireError::TooLarge { .. }));
        assert!(matches!(conf(b"\x07\0\0\0\x01\xff\x08"), WireError::Unexpected { .. }));
    }
}
