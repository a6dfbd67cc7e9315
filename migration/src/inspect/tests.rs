use std::io;

use super::*;
use crate::guest::RamBlock;
use crate::vmstate::SectionId;
use crate::wire::command::Command;
use crate::wire::header::{self, Configuration};
use crate::wire::section::{
    PartType, SectionHeader, write_end, write_footer, write_header, write_part_header,
};
use crate::wire::{ram, write_str8};

/// A device that no program has: every kind of field that a description knows.
const DESCRIPTION: &str = r#"{ "page_size": 4096, "devices": [ {
    "name": "thing", "instance_id": 2, "vmsd_name": "thing", "version": 3,
    "fields": [
        { "name": "small", "type": "uint8", "size": 1 },
        { "name": "below", "type": "int32 le", "size": 4 },
        { "name": "list", "type": "uint16", "size": 2, "array_len": 3 },
        { "name": "each", "index": 0, "type": "uint8", "size": 1 },
        { "name": "each", "index": 1, "type": "uint8", "size": 1 },
        { "name": "blob", "type": "buffer", "size": 3 },
        { "name": "inner", "type": "struct", "size": 9, "struct": {
            "vmsd_name": "inner", "version": 1,
            "fields": [ { "name": "at", "type": "timer", "size": 8 } ],
            "subsections": [ { "vmsd_name": "inner/more", "version": 1,
                "fields": [ { "name": "on", "type": "bool", "size": 1 } ] } ] } }
    ],
    "subsections": [
        { "vmsd_name": "thing/b", "version": 2, "fields": [] },
        { "vmsd_name": "thing/a", "version": 1, "fields": [ { "name": "x", "type": "uint64", "size": 8 } ] }
    ] } ] }"#;

fn subsection(out: &mut Vec<u8>, name: &str, version: u32, body: &[u8]) {
    out.push(5);
    write_str8(out, name);
    out.extend_from_slice(&version.to_be_bytes());
    out.extend_from_slice(body);
}

/// The body of the device.
fn body() -> Vec<u8> {
    let mut out = vec![7];
    out.extend_from_slice(&(-2_i32).to_be_bytes());
    out.extend_from_slice(&[0, 1, 0, 2, 0, 3, 8, 9, 0xaa, 0xbb, 0xcc]);
    out.extend_from_slice(&5_u64.to_be_bytes());
    subsection(&mut out, "inner/more", 1, &[1]);
    // In another order than described.
    subsection(&mut out, "thing/a", 1, &0x1234_u64.to_be_bytes());
    subsection(&mut out, "thing/b", 2, &[]);
    out
}

/// A whole stream: three pages of RAM, a command, the device.
fn stream(description: &str) -> Vec<u8> {
    let mut out = Vec::new();
    let configuration = Configuration { machine: "toy-1.0".into(), ..Configuration::default() };
    header::write(&mut out, &configuration);
    Command::Ping(1).write(&mut out);
    let key = SectionId::new("ram", 0);
    write_header(&mut out, PartType::Start, &SectionHeader { id: 2, key, version: 4 });
    let block = |name: &str, len| RamBlock { name: name.into(), len };
    ram::write_blocks(&mut out, &[block("toy.ram", 0x4000), block("toy.rom", 0x1000)]);
    ram::write_eos(&mut out);
    write_footer(&mut out, 2);
    for _ in 0..2 {
        write_part_header(&mut out, PartType::Part, 2);
        ram::write_record(&mut out, Some("toy.ram"), 0x1000, ram::PAGE);
        out.extend_from_slice(&[0x11; 4096]);
        ram::write_record(&mut out, None, 0x2000, ram::ZERO);
        out.push(0);
        ram::write_eos(&mut out);
        write_footer(&mut out, 2);
    }
    write_part_header(&mut out, PartType::End, 2);
    ram::write_record(&mut out, Some("toy.rom"), 0, ram::ZERO);
    out.push(0xff);
    ram::write_eos(&mut out);
    write_footer(&mut out, 2);
    let key = SectionId::new("thing", 2);
    write_header(&mut out, PartType::Full, &SectionHeader { id: 9, key, version: 3 });
    out.extend_from_slice(&body());
    write_footer(&mut out, 9);
    write_end(&mut out, description);
    out
}

fn report(bytes: &[u8]) -> Report {
    read(bytes, &mut (), &mut |_| {}).unwrap()
}

fn broken(bytes: &[u8]) -> Broken {
    report(bytes).broken.expect("it is broken")
}

#[test]
fn everything_is_found_and_every_field_has_its_value() {
    let report = report(&stream(DESCRIPTION));
    assert!(report.broken.is_none(), "{:?}", report.broken);
    assert_eq!(report.configuration.machine, "toy-1.0");
    assert_eq!(report.bytes, stream(DESCRIPTION).len() as u64);
    let pages = |n: usize| report.blocks[n].pages;
    assert_eq!(pages(0), Pages { normal: 2, zero: 2, ..Pages::default() });
    assert_eq!(pages(1), Pages { filled: 1, ..Pages::default() });
    let kinds: Vec<_> = report
        .parts
        .iter()
        .map(|part| match part {
            Part::Ram(ram) => format!("{} {}", ram.kind, ram.sections),
            Part::Device(section) => section.key.to_string(),
            Part::Command(command) => command.command.name().to_string(),
            Part::End(_) => "end".to_string(),
            Part::Description(_) => "description".to_string(),
        })
        .collect();
    let expected =
        ["ping", "START 1", "PART 2", "END 1", "thing (instance 2)", "end", "description"];
    assert_eq!(kinds, expected);
    let thing = report.devices().next().unwrap();
    assert_eq!(thing.body, body());
    let values = thing.value.as_ref().unwrap();
    assert_eq!(
        values.to_json(),
        serde_json::json!({
            "small": 7, "below": -2, "list": [1, 2, 3], "each[0]": 8, "each[1]": 9,
            "blob": "aabbcc", "inner": { "at": 5, "inner/more": { "on": 1 } },
            "thing/a": { "x": 0x1234 }, "thing/b": {},
        })
    );
    let Value::Struct(members) = values else { panic!("a struct") };
    assert_eq!(
        members.iter().map(|m| m.offset).collect::<Vec<_>>(),
        [0, 1, 5, 11, 12, 13, 16, 41, 62]
    );
}

#[test]
fn runs_of_pages_are_as_many_pages_and_are_written_as_they_were() {
    let mut bytes = stream(DESCRIPTION);
    // In front of the last record of pages.
    let mut end = Vec::new();
    write_part_header(&mut end, PartType::End, 2);
    let at = end.len() + bytes.windows(end.len()).position(|w| w == end).unwrap();
    let mut runs = Vec::new();
    ram::write_record(&mut runs, Some("toy.ram"), 0x1000, ram::PAGE | ram::RUN);
    ram::write_run(&mut runs, 3);
    runs.extend_from_slice(&[5; 3 * 4096]);
    ram::write_record(&mut runs, None, 0, ram::ZERO | ram::RUN);
    ram::write_run(&mut runs, 4);
    runs.push(0);
    bytes.splice(at..at, runs);
    let report = report(&bytes);
    assert!(report.broken.is_none(), "{:?}", report.broken);
    assert_eq!(report.blocks[0].pages, Pages { normal: 5, zero: 6, ..Pages::default() });
    let mut rewriter = Rewriter::new(Vec::new());
    read(&*bytes, &mut rewriter, &mut |_| {}).unwrap();
    assert_eq!(rewriter.into_inner(), bytes);
    // One page more than the block has.
    let count = at + 8 + 1 + 7;
    assert_eq!(bytes[count..count + 4], [0, 0, 0, 3]);
    bytes[count + 3] = 4;
    let words = broken(&bytes).what;
    assert!(words.contains("pages in a run"), "{words}");
}

#[test]
fn what_was_understood_is_written_as_it_was() {
    let stream = stream(DESCRIPTION);
    let mut rewriter = Rewriter::new(Vec::new());
    read(&*stream, &mut rewriter, &mut |_| {}).unwrap();
    assert!(rewriter.into_inner() == stream);
}

#[test]
fn a_stream_that_ends_anywhere_is_reported_up_to_there() {
    let stream = stream(DESCRIPTION);
    let end = stream.len() - DESCRIPTION.len() - 5;
    for len in 0..stream.len() {
        let report = report(&stream[..len]);
        let devices = report.devices().count();
        // Without a description, which is optional, it is whole.
        assert_eq!(report.broken.is_none(), len == end, "cut at {len}");
        if let Some(broken) = report.broken {
            assert!(broken.offset <= len as u64, "{len}: {broken:?}");
            assert!(!broken.likely.is_empty());
        }
        assert!(devices <= 1);
        assert!(report.bytes <= len as u64);
    }
}

#[test]
fn no_change_of_a_byte_does_harm() {
    let stream = stream(DESCRIPTION);
    for at in 0..stream.len() {
        for change in [1, 0x80, 0xff] {
            let mut changed = stream.clone();
            changed[at] ^= change;
            let mut rewriter = Rewriter::new(Vec::new());
            let report = read(&*changed, &mut rewriter, &mut |_| {}).unwrap();
            let _ = report.to_json();
            if report.broken.is_none() && report.trailing == 0 {
                assert!(rewriter.into_inner() == changed, "byte {at} of another value was lost");
            }
        }
    }
}

#[test]
fn without_a_description_a_section_ends_at_its_footer() {
    let report = report(&stream("{}"));
    assert!(report.broken.is_none(), "{:?}", report.broken);
    let thing = report.devices().next().unwrap();
    assert_eq!((&thing.value, &thing.body), (&None, &body()));
}

#[test]
fn what_is_wrong_is_named_with_its_place() {
    let good = stream(DESCRIPTION);
    let not = broken(b"GET / HTTP/1.1\r\n");
    assert!(not.what.contains("not a migration stream") && not.offset == 0, "{not:?}");

    // One field more than the device has: its footer is not where it should be.
    let more = DESCRIPTION.replace(
        r#""name": "blob", "type": "buffer", "size": 3"#,
        r#""name": "blob", "type": "buffer", "size": 4"#,
    );
    let off = broken(&stream(&more));
    assert!(off.what.contains("thing (instance 2)"), "{off:?}");
    assert!(off.what.contains("inner/more"), "{off:?}");

    let other = DESCRIPTION.replace("inner/more", "other/more");
    assert!(broken(&stream(&other)).what.contains("expected subsection other/more"));
    let none = DESCRIPTION.replace(r#""subsections": ["#, r#""unknown": ["#);
    let off = broken(&stream(&none));
    assert!(off.likely.contains("Missing section footer"), "{off:?}");

    let absurd = DESCRIPTION.replace(r#""array_len": 3"#, r#""array_len": 99999999999"#);
    assert!(broken(&stream(&absurd)).what.contains("thing/list"));
    let endless =
        absurd.replace(r#""type": "uint16", "size": 2"#, r#""type": "uint16", "size": 0"#);
    assert!(broken(&stream(&endless)).what.contains("too many values"));

    let at = good.windows(7).rposition(|w| w == b"toy.rom").unwrap();
    let mut unknown = good.clone();
    unknown[at] = b'x';
    assert!(broken(&unknown).likely.contains("Unknown ramblock"));
}

#[test]
fn differences_are_named_by_section_and_field() {
    let a = report(&stream(DESCRIPTION));
    assert_eq!(diff(&a, &report(&stream(DESCRIPTION))), []);
    let mut other = stream(DESCRIPTION);
    let at = other.windows(3).position(|w| w == [0xaa, 0xbb, 0xcc]).unwrap();
    other[at + 1] = 0;
    other[at + 10] = 6;
    let found = diff(&a, &report(&other));
    let place =
        |n: usize| (found[n].place.as_str(), found[n].first.as_str(), found[n].second.as_str());
    assert_eq!(found.len(), 2);
    assert_eq!(place(0), ("thing (instance 2)/blob", "aabbcc", "aa00cc"));
    assert_eq!(place(1), ("thing (instance 2)/inner/at", "5", "6"));

    // Another program's names for the same fields.
    let named = DESCRIPTION.replace("\"blob\"", "\"lump\"").replace("\"at\"", "\"when\"");
    let mut other = stream(&named);
    assert_eq!(diff(&a, &report(&other)), []);
    let at = other.windows(3).position(|w| w == [0xaa, 0xbb, 0xcc]).unwrap();
    other[at] = 1;
    let found = diff(&a, &report(&other));
    assert_eq!((found.len(), found[0].place.as_str()), (1, "thing (instance 2)/blob"));

    // A device or a subsection that only one has.
    let mut short = a;
    short.parts.retain(|part| !matches!(part, Part::Device(_)));
    let found = diff(&short, &report(&stream(DESCRIPTION)));
    assert_eq!((found[0].first.as_str(), found[0].second.as_str()), ("(missing)", "(there)"));
}

#[test]
fn a_visitor_that_has_had_enough_ends_the_reading() {
    struct Full;
    impl Visitor for Full {
        fn page(&mut self, _: PageRecord<'_>, _: PageContent<'_>) -> io::Result<()> {
            Err(io::ErrorKind::StorageFull.into())
        }
    }
    let error = read(&*stream(DESCRIPTION), &mut Full, &mut |_| {}).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::StorageFull);
}

#[test]
fn a_stream_much_longer_than_memory_shall_hold_is_read_in_pieces() {
    // One byte at a time is the worst that a pipe can do.
    struct Slow<'a>(&'a [u8]);
    impl io::Read for Slow<'_> {
        fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
            let n = usize::from(!to.is_empty());
            io::Read::read(&mut self.0, &mut to[..n])
        }
    }
    let stream = stream(DESCRIPTION);
    let report = read(Slow(&stream), &mut (), &mut |_| {}).unwrap();
    assert!(report.broken.is_none());
}
