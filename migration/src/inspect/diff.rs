//! In which sections and fields two streams differ.

use std::collections::BTreeSet;

use super::report::{DeviceSection, Report};
use super::value::{Member, Value, hex};

/// One difference.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// Section and field, `ram` and block, or `configuration`.
    pub place: String,
    /// What the first stream has.
    pub first: String,
    /// What the second stream has.
    pub second: String,
}

/// What stands for something that a stream doesn't have.
const MISSING: &str = "(missing)";
/// More bytes than this are shown only where they differ.
const LONG: usize = 32;

/// Compares everything but the pages' contents and how often each was sent.
pub fn diff(first: &Report, second: &Report) -> Vec<Difference> {
    let mut found = Vec::new();
    let mut note = |place: String, first: String, second: String| {
        if first != second {
            found.push(Difference { place, first, second });
        }
    };
    let (a, b) = (&first.configuration, &second.configuration);
    note("configuration/machine".into(), a.machine.clone(), b.machine.clone());
    note("configuration/capabilities".into(), a.capabilities.join(","), b.capabilities.join(","));
    let uuid = |uuid: &Option<[u8; 16]>| uuid.map_or_else(|| MISSING.into(), |bytes| hex(&bytes));
    note("configuration/uuid".into(), uuid(&a.uuid), uuid(&b.uuid));

    let names = |report: &Report| -> BTreeSet<String> {
        report.blocks.iter().map(|b| b.block.name.clone()).collect()
    };
    let size = |report: &Report, name: &str| {
        let block = report.blocks.iter().find(|b| b.block.name == name);
        block.map_or_else(|| MISSING.into(), |b| format!("{:#x} bytes", b.block.len))
    };
    for name in names(first).union(&names(second)) {
        note(format!("ram/{name}"), size(first, name), size(second, name));
    }

    let keys: BTreeSet<_> = first.devices().chain(second.devices()).map(|s| &s.key).collect();
    for key in keys {
        let of = |report: &'_ Report| -> Option<usize> {
            report.devices().position(|section| &section.key == key)
        };
        let (a, b) = (of(first), of(second));
        let (a, b) =
            (a.and_then(|n| first.devices().nth(n)), b.and_then(|n| second.devices().nth(n)));
        match (a, b) {
            (Some(a), Some(b)) => sections(a, b, &mut note),
            (a, _) => {
                let there = |here: bool| if here { "(there)" } else { MISSING }.to_owned();
                note(key.to_string(), there(a.is_some()), there(a.is_none()));
            }
        }
    }
    found
}

type Note<'a> = &'a mut dyn FnMut(String, String, String);

fn sections(a: &DeviceSection, b: &DeviceSection, note: Note<'_>) {
    let name = a.key.to_string();
    note(format!("{name}: version"), a.version.to_string(), b.version.to_string());
    match (&a.value, &b.value) {
        (Some(first), Some(second)) => values(&name, first, second, note),
        _ => bytes(&name, &a.body, &b.body, note),
    }
}

fn values(path: &str, a: &Value, b: &Value, note: Note<'_>) {
    match (a, b) {
        (Value::Struct(a), Value::Struct(b)) => members(path, a, b, note),
        (Value::Array(a), Value::Array(b)) if a.len() == b.len() => {
            for (n, (a, b)) in a.iter().zip(b).enumerate() {
                values(&format!("{path}[{n}]"), a, b, note);
            }
        }
        (Value::Bytes(a), Value::Bytes(b)) => bytes(path, a, b, note),
        (a, b) => note(path.to_owned(), a.to_text(), b.to_text()),
    }
}

fn members(path: &str, a: &[Member], b: &[Member], note: Note<'_>) {
    // By name: the order of subsections is free, and fields of two programs may have different ones.
    for member in a {
        let place = format!("{path}/{}", member.name);
        match b.iter().find(|other| other.name == member.name) {
            Some(other) => values(&place, &member.value, &other.value, note),
            None => note(place, member.value.to_text(), MISSING.into()),
        }
    }
    for member in b.iter().filter(|m| a.iter().all(|other| other.name != m.name)) {
        note(format!("{path}/{}", member.name), MISSING.into(), member.value.to_text());
    }
}

fn bytes(path: &str, a: &[u8], b: &[u8], note: Note<'_>) {
    if a.len() != b.len() || a.len() <= LONG {
        return note(path.to_owned(), hex(a), hex(b));
    }
    let mut at = 0;
    while let Some(start) = a.iter().zip(b).skip(at).position(|(a, b)| a != b) {
        let start = at.saturating_add(start);
        let same = a.iter().zip(b).skip(start).position(|(a, b)| a == b);
        let end = same.map_or(a.len(), |len| start.saturating_add(len));
        let part = |bytes: &[u8]| hex(bytes.get(start..end).unwrap_or_default());
        note(format!("{path}[{start:#x}..{end:#x}]"), part(a), part(b));
        at = end;
    }
}
