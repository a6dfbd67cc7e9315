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
        (Value::Int { .. }, Value::Int { .. }) => note(path.to_owned(), a.to_text(), b.to_text()),
        // Two programs may describe the same bytes differently.
        (a, b) if a.size() == b.size() => {
            let mut bytes = Vec::new();
            b.write(&mut bytes);
            by_place(path, a, &mut bytes.as_slice(), note);
        }
        (a, b) => note(path.to_owned(), a.to_text(), b.to_text()),
    }
}

fn members(path: &str, a: &[Member], b: &[Member], note: Note<'_>) {
    let fields = |members: &[Member]| -> Vec<Member> {
        members.iter().filter(|m| m.subsection.is_none()).cloned().collect()
    };
    let same_names = |a: &[Member], b: &[Member]| {
        a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.name == b.name)
    };
    let (first, second) = (fields(a), fields(b));
    if !same_names(&first, &second) {
        // Two programs may call the fields of one layout differently.
        let (first, second) = (Value::Struct(first), Value::Struct(second));
        let mut bytes = Vec::new();
        second.write(&mut bytes);
        if first.size() == bytes.len() {
            by_place(path, &first, &mut bytes.as_slice(), note);
            let rest = |members: &[Member]| -> Vec<Member> {
                members.iter().filter(|m| m.subsection.is_some()).cloned().collect()
            };
            return by_name(path, &rest(a), &rest(b), note);
        }
    }
    by_name(path, a, b, note);
}

/// Compares a value with the bytes that stand in its place, under its names.
fn by_place(path: &str, value: &Value, bytes: &mut &[u8], note: Note<'_>) {
    match value {
        Value::Struct(members) => {
            for member in members {
                if member.subsection.is_some() {
                    // Type, length of the name, name, version.
                    let header = member.name.len().saturating_add(6);
                    *bytes = bytes.get(header..).unwrap_or_default();
                }
                by_place(&format!("{path}/{}", member.name), &member.value, bytes, note);
            }
        }
        Value::Array(all) => {
            for (n, value) in all.iter().enumerate() {
                by_place(&format!("{path}[{n}]"), value, bytes, note);
            }
        }
        Value::Int { size, signed, .. } => {
            let (its, rest) = bytes.split_at_checked((*size).into()).unwrap_or_default();
            *bytes = rest;
            let bits = its.iter().fold(0, |bits, byte| bits << 8 | u64::from(*byte));
            let other = Value::Int { bits, size: *size, signed: *signed };
            note(path.to_owned(), value.to_text(), other.to_text());
        }
        Value::Bytes(first) => {
            let (its, rest) = bytes.split_at_checked(first.len()).unwrap_or_default();
            *bytes = rest;
            self::bytes(path, first, its, note);
        }
    }
}

fn by_name(path: &str, a: &[Member], b: &[Member], note: Note<'_>) {
    // The order of subsections is free.
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
