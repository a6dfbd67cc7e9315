//! What `inspect` prints for people.

use std::io::Write;

use indicatif::HumanBytes;
use migration::inspect::{
    Broken, CommandPart, DeviceSection, Difference, Pages, Part, Report, Value,
};
use serde_json::Value as Json;

use super::image::PageDifference;

/// Bytes of a field that are shown on one line, in hexadecimal digits.
const SHOWN: usize = 96;

/// Prints a line. A reader that has seen enough (`| head`) ends the program quietly.
fn line(text: &str) {
    if writeln!(std::io::stdout().lock(), "{text}").is_err() {
        std::process::exit(0);
    }
}

/// Prints JSON.
pub(super) fn print(json: &Json) {
    line(&format!("{json:#}"));
}

/// Prints an overview.
pub(super) fn report(report: &Report) {
    let configuration = &report.configuration;
    if configuration.machine.is_empty() && report.parts.is_empty() {
        // Not even the first bytes were right.
        return;
    }
    line(&format!("machine   {}", configuration.machine));
    if !configuration.capabilities.is_empty() {
        line(&format!("needs     {}", configuration.capabilities.join(", ")));
    }
    let devices = report.devices().count();
    let state = if report.broken.is_some() { "broken off" } else { "complete" };
    line(&format!("stream    {} bytes, {devices} devices, {state}", report.bytes));
    line("\nRAM");
    for block in &report.blocks {
        let (name, size) = (&block.block.name, HumanBytes(block.block.len).to_string());
        line(&format!("  {name:32} {size:>12}   {}", pages(&block.pages)));
    }
    line("\noffset       part");
    for part in &report.parts {
        line(&one(part));
    }
    if report.trailing > 0 {
        line(&format!("             {} bytes follow the end", report.trailing));
    }
}

fn pages(pages: &Pages) -> String {
    let kinds = [
        (pages.normal, "whole"),
        (pages.zero, "zero"),
        (pages.filled, "of one byte"),
        (pages.encoded, "compressed"),
    ];
    let some = kinds.iter().filter(|(count, _)| *count > 0);
    let words: Vec<_> = some.map(|(count, kind)| format!("{count} {kind}")).collect();
    if words.is_empty() { "no pages".into() } else { format!("pages: {}", words.join(", ")) }
}

fn one(part: &Part) -> String {
    match part {
        Part::Ram(ram) => {
            let sections =
                if ram.sections == 1 { String::new() } else { format!(" x {}", ram.sections) };
            let name = format!("ram {}{sections}", ram.kind);
            format!("{:#012x} {name:44} {:>10} bytes, {}", ram.offset, ram.size, pages(&ram.pages))
        }
        Part::Device(section) => {
            let name = section.key.to_string();
            let (offset, version, size) = (section.offset, section.version, section.body.len());
            let mut text = format!("{offset:#012x} {name:44} {size:>10} bytes, version {version}");
            if let Some(Value::Struct(members)) = &section.value {
                for member in members.iter().filter(|member| member.subsection.is_some()) {
                    text += &format!("\n               + {}", member.name);
                }
            }
            text
        }
        Part::Command(CommandPart { offset, command }) => {
            let name = format!("command {}", command.name());
            format!("{offset:#012x} {name:44} {:>10} bytes", command.payload.len())
        }
        Part::End(offset) => format!("{offset:#012x} end"),
        Part::Description(part) => {
            format!("{:#012x} {:44} {:>10} bytes", part.offset, "description", part.size)
        }
    }
}

/// Prints a section's fields.
pub(super) fn section(section: &DeviceSection) {
    let DeviceSection { key, version, body_offset, body, .. } = section;
    line(&format!("{key}, version {version}: {} bytes at {body_offset:#x}", body.len()));
    match &section.value {
        Some(value) => tree("", *body_offset, value),
        None => line("  (the stream has no description of it)"),
    }
}

fn tree(path: &str, base: u64, value: &Value) {
    let Value::Struct(members) = value else { return };
    for member in members {
        let offset = base + member.offset;
        let place = match member.subsection {
            Some(version) => {
                line(&format!("  {offset:#010x} {path}+ {} (version {version})", member.name));
                format!("{path}  ")
            }
            None => format!("{path}{}", member.name),
        };
        match &member.value {
            Value::Struct(_) if member.subsection.is_some() => tree(&place, base, &member.value),
            Value::Struct(_) => tree(&format!("{place}/"), base, &member.value),
            Value::Array(values) if values.iter().any(|v| matches!(v, Value::Struct(_))) => {
                array(&place, base, values);
            }
            other => leaf(offset, &place, other),
        }
    }
}

/// An array of structs; elements that follow an equal one are only counted.
fn array(place: &str, base: u64, values: &[Value]) {
    let mut at = 0;
    // By their bytes: a value knows its offset, in which they differ.
    let bytes = |value: &Value| {
        let mut bytes = Vec::new();
        value.write(&mut bytes);
        bytes
    };
    for same in values.chunk_by(|a, b| bytes(a) == bytes(b)) {
        let Some(first) = same.first() else { continue };
        let range = match same.len() {
            1 => format!("{place}[{at}]/"),
            n => format!("{place}[{at}..{}]/", at + n),
        };
        tree(&range, base, first);
        at += same.len();
    }
}

fn leaf(offset: u64, place: &str, value: &Value) {
    let text = value.to_text();
    let shown = match text.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}… ({} characters)", &text[..end], text.len()),
        None => text,
    };
    line(&format!("  {offset:#010x} {place} = {shown}"));
}

/// Where and why a stream breaks.
pub(super) fn broken(broken: &Broken) -> String {
    let Broken { offset, what, likely } = broken;
    format!("the stream breaks at offset {offset:#x}: {what}\n  likely: {likely}")
}

/// Prints differences.
pub(super) fn differences(fields: &[Difference], pages: &[PageDifference]) {
    for Difference { place, first, second } in fields {
        line(&format!("{place}\n  - {first}\n  + {second}"));
    }
    for block in pages {
        let first: Vec<_> = block.first.iter().map(|offset| format!("{offset:#x}")).collect();
        let more = if block.pages > first.len() as u64 { ", …" } else { "" };
        line(&format!(
            "ram/{}: {} pages differ, at {}{more}",
            block.name,
            block.pages,
            first.join(", ")
        ));
    }
    if fields.is_empty() && pages.is_empty() {
        line("no difference");
    }
}
