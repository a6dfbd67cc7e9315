//! What was found in a stream.

use serde_json::{Value as Json, json};

use super::ram::{BlockReport, Pages};
use super::value::{Value, hex};
use crate::vmstate::SectionId;
use crate::wire::command::RawCommand;
use crate::wire::header::Configuration;

/// A stream, as far as it could be read.
#[derive(Debug, Default)]
pub struct Report {
    /// How many bytes were read.
    pub bytes: u64,
    /// The configuration section.
    pub configuration: Configuration,
    /// The RAM blocks.
    pub blocks: Vec<BlockReport>,
    /// Everything behind the configuration, in order; neighbouring RAM sections as one.
    pub parts: Vec<Part>,
    /// Bytes behind the end.
    pub trailing: u64,
    /// Where it can't be read on.
    pub broken: Option<Broken>,
}

/// A part of a stream.
#[derive(Debug)]
pub enum Part {
    /// RAM.
    Ram(RamPart),
    /// A device.
    Device(DeviceSection),
    /// A command.
    Command(CommandPart),
    /// The end of the sections, at this offset.
    End(u64),
    /// The devices' description.
    Description(DescriptionPart),
}

/// RAM sections of one kind, one behind the other.
#[derive(Debug)]
pub struct RamPart {
    /// `START`, `PART` or `END`.
    pub kind: &'static str,
    /// Offset in the stream.
    pub offset: u64,
    /// All headers and footers included, in bytes.
    pub size: u64,
    /// How many sections these are.
    pub sections: u64,
    /// Their records.
    pub pages: Pages,
}

/// A device's section.
#[derive(Debug)]
pub struct DeviceSection {
    /// The number that ties it to its footer.
    pub id: u32,
    /// Name and instance.
    pub key: SectionId,
    /// Version of its layout.
    pub version: u32,
    /// Offset in the stream.
    pub offset: u64,
    /// Offset of its body.
    pub body_offset: u64,
    /// Its body.
    pub body: Vec<u8>,
    /// The body taken apart; nothing without a description, or one that it doesn't fit.
    pub value: Option<Value>,
}

/// A command.
#[derive(Debug)]
pub struct CommandPart {
    /// Offset in the stream.
    pub offset: u64,
    /// The command.
    pub command: RawCommand,
}

/// The JSON at the end.
#[derive(Debug)]
pub struct DescriptionPart {
    /// Offset in the stream.
    pub offset: u64,
    /// Length of the text, in bytes.
    pub size: u64,
}

/// Where a stream can't be read on.
#[derive(Debug)]
pub struct Broken {
    /// Offset in the stream.
    pub offset: u64,
    /// What was expected, and what stands there.
    pub what: String,
    /// What such a thing comes from, mostly.
    pub likely: &'static str,
}

impl Report {
    /// The device sections.
    pub fn devices(&self) -> impl Iterator<Item = &DeviceSection> {
        self.parts.iter().filter_map(|part| match part {
            Part::Device(section) => Some(section),
            _ => None,
        })
    }

    /// All of it, for programs.
    pub fn to_json(&self) -> Json {
        let configuration = &self.configuration;
        let uuid = configuration.uuid.map(|bytes| hex(&bytes));
        json!({
            "bytes": self.bytes,
            "machine": configuration.machine,
            "capabilities": configuration.capabilities,
            "uuid": uuid,
            "blocks": self.blocks.iter().map(|b| json!({
                "name": b.block.name, "size": b.block.len, "pages": pages(&b.pages),
            })).collect::<Vec<_>>(),
            "parts": self.parts.iter().map(Part::to_json).collect::<Vec<_>>(),
            "trailing": self.trailing,
            "broken": self.broken.as_ref().map(|b| json!({
                "offset": b.offset, "what": b.what, "likely": b.likely,
            })),
        })
    }
}

fn pages(pages: &Pages) -> Json {
    json!({
        "normal": pages.normal, "zero": pages.zero, "filled": pages.filled, "encoded": pages.encoded,
    })
}

impl Part {
    fn to_json(&self) -> Json {
        match self {
            Self::Ram(ram) => json!({
                "type": "ram", "kind": ram.kind, "offset": ram.offset, "size": ram.size,
                "sections": ram.sections, "pages": pages(&ram.pages),
            }),
            Self::Device(section) => section.to_json(),
            Self::Command(CommandPart { offset, command }) => json!({
                "type": "command", "offset": offset, "number": command.number,
                "name": command.name(), "payload": hex(&command.payload),
            }),
            Self::End(offset) => json!({ "type": "end", "offset": offset }),
            Self::Description(part) => {
                json!({ "type": "description", "offset": part.offset, "size": part.size })
            }
        }
    }
}

impl DeviceSection {
    /// The section, with its values.
    pub fn to_json(&self) -> Json {
        json!({
            "type": "device", "id": self.id, "name": self.key.idstr, "instance": self.key.instance,
            "version": self.version, "offset": self.offset, "size": self.body.len(),
            "values": self.value.as_ref().map_or_else(|| json!(hex(&self.body)), Value::to_json),
        })
    }
}
