//! The description of a section, as QEMU puts it at the end of the stream.
//!
//! For each section one JSON object with `name`, `instance_id`, `vmsd_name`, `version`, `fields`
//! and, when any are sent, `subsections`. A field has a `name`, a `type` and a `size`; `array_len`
//! when it is an array of equal elements (`size` is that of one element then), `index` when the
//! elements differ, and `struct` when it is a structure (whose `size` includes its subsections).
//! Facts about it were taken from the streams of a QEMU 7.2.

use std::collections::HashMap;

use serde::Serialize;
use serde_json::{Map, Value, json};

use super::ser::look;
use super::shape::{Builder, Part, Shape};
use super::walk::{Group, Leaf, split_version};
use super::{SectionId, StateError, VmState};

/// The description of the section that [`to_bytes`](super::to_bytes) makes of `state`.
pub fn describe<T: VmState>(section: &SectionId, state: &T) -> Result<Value, StateError> {
    let mut describer = Describer::new(section, T::VERSION);
    describer.put("", state)?;
    let mut description = describer.finish();
    T::WORDS.put(&mut description);
    Ok(description)
}

/// Describes a section value by value, as an [`Encoder`](super::Encoder) writes it.
#[derive(Debug)]
pub struct Describer {
    section: SectionId,
    version: u32,
    shapes: Builder,
}

impl Describer {
    /// The description of `section`, of which nothing is described yet.
    pub fn new(section: &SectionId, version: u32) -> Self {
        Self { section: section.clone(), version, shapes: Builder::new() }
    }

    /// Describes `value`. With an empty `name` the fields and subsections of a struct become
    /// those of the section.
    pub fn put<T: Serialize + ?Sized>(&mut self, name: &str, value: &T) -> Result<(), StateError> {
        self.shapes.call(name.to_owned());
        look(value, &mut self.shapes).map_err(|fault| fault.writing(&self.section.to_string()))
    }

    /// Describes `size` bytes as one field of a type that is not explained, as QEMU does with
    /// `virtio`.
    pub fn opaque(&mut self, name: &str, type_name: &str, size: u64) {
        self.shapes.call(name.to_owned());
        self.shapes.add(Shape::Opaque(type_name.to_owned(), size));
    }

    /// The description.
    pub fn finish(self) -> Value {
        let mut parts = Vec::new();
        for part in self.shapes.into_parts() {
            match part.shape {
                Shape::Group(Group::Struct(_), inner) if part.name.is_empty() => {
                    parts.extend(inner);
                }
                _ => parts.push(part),
            }
        }
        // PCI devices carry their address in front.
        let idstr = &self.section.idstr;
        let vmsd_name = idstr.rsplit_once('/').map_or(idstr.as_str(), |(_, name)| name);
        let mut description = structure(vmsd_name, self.version, &parts);
        description.insert("name".into(), json!(idstr));
        description.insert("instance_id".into(), json!(self.section.instance));
        Value::Object(description)
    }
}

fn structure(vmsd_name: &str, version: u32, parts: &[Part]) -> Map<String, Value> {
    let mut fields = Vec::new();
    let mut subsections = Vec::new();
    let mut names = Names::of(parts);
    for part in parts {
        match &part.shape {
            Shape::Group(Group::Subsections, subs) => {
                subsections.extend(subs.iter().filter_map(subsection));
            }
            shape => field(&names.of_field(part), shape, &mut fields),
        }
    }
    let mut description = Map::new();
    description.insert("vmsd_name".into(), json!(vmsd_name));
    description.insert("version".into(), json!(version));
    description.insert("fields".into(), Value::Array(fields));
    if !subsections.is_empty() {
        description.insert("subsections".into(), Value::Array(subsections));
    }
    description
}

fn subsection(part: &Part) -> Option<Value> {
    let Shape::Group(Group::Subsection(name, version), content) = &part.shape else { return None };
    let description = match content.first() {
        Some(Part { shape: Shape::Group(Group::Struct(_), parts), .. }) => {
            structure(name, *version, parts)
        }
        // A bare value is called as the subsection is.
        Some(Part { shape, times, .. }) => {
            let bare = name.rsplit_once('/').map_or(*name, |(_, bare)| bare);
            let part = Part { name: bare.into(), shape: shape.clone(), times: *times };
            structure(name, *version, &[part])
        }
        None => structure(name, *version, &[]),
    };
    Some(Value::Object(description))
}

/// The names of a structure's fields: those that occur more than once get an index.
struct Names<'a>(HashMap<&'a str, (usize, usize)>);

impl<'a> Names<'a> {
    fn of(parts: &'a [Part]) -> Self {
        let mut names = HashMap::new();
        for part in parts {
            let (_, total): &mut (usize, usize) = names.entry(Self::bare(part)).or_default();
            *total = total.saturating_add(1);
        }
        Self(names)
    }

    fn bare(part: &Part) -> &str {
        match &part.shape {
            Shape::Group(Group::Pad, _) => "unused",
            _ if part.name.is_empty() => "value",
            _ => split_version(&part.name).0,
        }
    }

    fn of_field(&mut self, part: &Part) -> String {
        let bare = Self::bare(part);
        match self.0.get_mut(bare) {
            Some((seen, total)) if *total > 1 => {
                let name = format!("{bare}[{seen}]");
                *seen = seen.saturating_add(1);
                name
            }
            _ => bare.to_owned(),
        }
    }
}

/// Adds the description of one field, which may take several entries.
fn field(name: &str, shape: &Shape, out: &mut Vec<Value>) {
    if let Shape::Group(Group::Counted, parts) = shape {
        if let [count, elements] = &parts[..] {
            field(&format!("{name}.count"), &count.shape, out);
            field(name, &elements.shape, out);
        }
        return;
    }
    let mut runs = Vec::new();
    flatten(shape, 1, &mut runs);
    if let [(shape, times)] = runs[..]
        && (times == 1 || !has_subsections(shape))
    {
        let mut entry = entry(name, shape);
        if times > 1 {
            entry.insert("array_len".into(), json!(times));
        }
        out.push(Value::Object(entry));
        return;
    }
    let each = runs.iter().flat_map(|&(shape, times)| (0..times).map(move |_| shape));
    for (index, shape) in each.enumerate() {
        let mut entry = entry(name, shape);
        entry.insert("index".into(), json!(index));
        out.push(Value::Object(entry));
    }
}

/// Arrays of arrays as runs of equal elements.
fn flatten<'a>(shape: &'a Shape, times: u64, out: &mut Vec<(&'a Shape, u64)>) {
    match shape {
        Shape::Group(Group::Tuple, parts) if !is_buffer(shape) => match &parts[..] {
            [only] => flatten(&only.shape, times.saturating_mul(only.times), out),
            parts => {
                for part in (0..times).flat_map(|_| parts) {
                    flatten(&part.shape, part.times, out);
                }
            }
        },
        Shape::Group(Group::Counted, parts) => {
            for part in (0..times).flat_map(|_| parts) {
                flatten(&part.shape, part.times, out);
            }
        }
        _ => out.push((shape, times)),
    }
}

fn is_buffer(shape: &Shape) -> bool {
    let Shape::Group(Group::Tuple, parts) = shape else { return false };
    matches!(&parts[..], [Part { shape: Shape::Leaf(Leaf::U8), .. }])
}

fn has_subsections(shape: &Shape) -> bool {
    match shape {
        Shape::Group(Group::Subsections, _) => true,
        Shape::Group(_, parts) => parts.iter().any(|part| has_subsections(&part.shape)),
        _ => false,
    }
}

fn entry(name: &str, shape: &Shape) -> Map<String, Value> {
    let mut entry = Map::new();
    let type_name = match shape {
        Shape::Leaf(leaf) => leaf.name(),
        Shape::Opaque(type_name, _) => type_name,
        Shape::Group(Group::Timer, _) => "timer",
        Shape::Group(Group::Pad, _) => "unused_buffer",
        Shape::Group(Group::Struct(struct_name), parts) => {
            // A structure inside a section goes by the section's version, and says one of its own.
            let (struct_name, version) = split_version(struct_name);
            let inner = structure(struct_name, version.unwrap_or(1), parts);
            entry.insert("struct".into(), Value::Object(inner));
            "struct"
        }
        Shape::Group(..) => "buffer",
    };
    entry.insert("name".into(), json!(name));
    entry.insert("type".into(), json!(type_name));
    entry.insert("size".into(), json!(shape.size()));
    entry
}
