//! The JSON at a stream's end, by which a tool can read devices that it does not know.

use serde::Deserialize;

/// The description: QEMU's `vmdesc`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
pub struct Description {
    /// The devices' sections.
    #[serde(default)]
    pub devices: Vec<Device>,
}

/// One section.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Device {
    /// Its name on the wire.
    pub name: String,
    /// Its instance.
    pub instance_id: i64,
    /// Its fields.
    #[serde(flatten)]
    pub layout: Layout,
}

/// What stands in a section, a struct or a subsection.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
pub struct Layout {
    /// Its name; that of a subsection is on the wire.
    #[serde(default)]
    pub vmsd_name: String,
    /// Its version.
    #[serde(default)]
    pub version: i64,
    /// In the order of the wire.
    #[serde(default)]
    pub fields: Vec<Field>,
    /// Those that were sent, behind the fields.
    #[serde(default)]
    pub subsections: Vec<Layout>,
}

/// One field, or several alike.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
pub struct Field {
    /// Its name.
    pub name: String,
    /// What it is: `uint32`, `buffer`, `struct`, …
    #[serde(rename = "type", default)]
    pub kind: String,
    /// Its size, in bytes; of one element, where there are several.
    #[serde(default)]
    pub size: u64,
    /// How many elements there are, all described by this.
    pub array_len: Option<u64>,
    /// The number of this element, where each is described on its own.
    pub index: Option<u64>,
    /// What a struct is made of.
    #[serde(rename = "struct")]
    pub layout: Option<Layout>,
    /// The same, for one that has no name of its own.
    pub fields: Option<Vec<Field>>,
    /// Its subsections.
    #[serde(default)]
    pub subsections: Vec<Layout>,
    /// Its name.
    #[serde(default)]
    pub vmsd_name: String,
}

impl Description {
    /// The description in the last part of a stream: `00`, `06`, a length, JSON. Something may follow it.
    pub(super) fn find(tail: &[u8]) -> Option<Self> {
        // From the end on: that is where it is, and what looks like one in a device is before.
        tail.windows(2).enumerate().rev().filter(|(_, two)| two == &[0, 6]).find_map(|(at, _)| {
            let text = tail.get(at.checked_add(2)?..)?;
            let (len, text) = text.split_first_chunk::<4>()?;
            let json = text.get(..u32::from_be_bytes(*len) as usize)?;
            if !(json.starts_with(b"{") && json.trim_ascii_end().ends_with(b"}")) {
                return None;
            }
            serde_json::from_slice(json).ok()
        })
    }

    /// The layout of a section.
    pub(super) fn section(&self, name: &str, instance: u32) -> Option<&Layout> {
        // Printed as the signed number that it is in QEMU's source.
        let same = |id: i64| id == i64::from(instance) || id == i64::from(instance as i32);
        self.devices.iter().find(|d| d.name == name && same(d.instance_id)).map(|d| &d.layout)
    }
}
