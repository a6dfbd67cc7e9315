//! Descriptions as a QEMU writes them, and layouts.

use proptest::prelude::*;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::features::{Endless, Everything, everything};
use super::golden::{IoApicState, SerialState, serial_state};
use super::*;

fn leaf(name: &str, type_name: &str, size: u64) -> Value {
    json!({ "name": name, "type": type_name, "size": size })
}

#[test]
fn ioapic() {
    let description =
        crate::vmstate::describe(&SectionId::new("ioapic", 0), &IoApicState::default());
    let expected = json!({
        "name": "ioapic", "instance_id": 0, "vmsd_name": "ioapic", "version": 3, "fields": [
            leaf("id", "uint8", 1),
            leaf("ioregsel", "uint8", 1),
            leaf("unused", "unused_buffer", 8),
            leaf("irr", "uint32", 4),
            { "name": "ioredtbl", "array_len": 24, "type": "uint64", "size": 8 },
        ]
    });
    assert_eq!(description.unwrap(), expected);
}

#[test]
fn serial() {
    let description = crate::vmstate::describe(&SectionId::new("serial", 0), &serial_state());
    let subsection =
        |name, fields: Value| json!({ "vmsd_name": name, "version": 1, "fields": fields });
    let expected = json!({
        "name": "serial", "instance_id": 0, "vmsd_name": "serial", "version": 3, "fields": [
            {
                "name": "state", "type": "struct", "size": 11 + 29 + 46 + 39,
                "struct": {
                    "vmsd_name": "serial", "version": 1,
                    "fields": [
                        leaf("divider", "uint16", 2),
                        leaf("rbr", "uint8", 1),
                        leaf("ier", "uint8", 1),
                        leaf("iir", "uint8", 1),
                        leaf("lcr", "uint8", 1),
                        leaf("mcr", "uint8", 1),
                        leaf("lsr", "uint8", 1),
                        leaf("msr", "uint8", 1),
                        leaf("scr", "uint8", 1),
                        leaf("fcr_vmstate", "uint8", 1),
                    ],
                    "subsections": [
                        subsection(
                            "serial/thr_ipending",
                            json!([leaf("thr_ipending", "int32", 4)])
                        ),
                        subsection(
                            "serial/recv_fifo",
                            json!([
                                leaf("data", "buffer", 16),
                                leaf("head", "uint32", 4),
                                leaf("num", "uint32", 4),
                            ])
                        ),
                        subsection(
                            "serial/fifo_timeout_timer",
                            json!([leaf("fifo_timeout_timer", "timer", 8)])
                        ),
                    ],
                },
            },
        ]
    });
    assert_eq!(description.unwrap(), expected);
}

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(rename = "odd")]
struct Odd {
    unused1: Pad<28>,
    drives: [Drive; 2],
    unused2: Pad<24>,
    grid: [[u16; 4]; 3],
    queue: Counted<u32, u64, 4>,
    text: Counted<u8, u8, 255>,
    pair: (u8, i32),
}
impl VmState for Odd {
    const VERSION: u32 = 1;
}

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(rename = "fdrive")]
struct Drive {
    head: u8,
    subsections: DriveSubs,
}

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(rename = "@subsections")]
struct DriveSubs {
    #[serde(rename = "fdrive/media_rate@0")]
    media_rate: Option<u8>,
}

#[test]
fn what_is_seldom() {
    let mut odd = Odd { queue: vec![1, 2].into(), ..Default::default() };
    odd.drives[1].subsections.media_rate = Some(3);
    let id = SectionId::new("0000:00:01.3/odd", 2);
    let drive = |index: u64, size: u64| {
        let mut drive = json!({
            "name": "drives", "index": index, "type": "struct", "size": size,
            "struct": { "vmsd_name": "fdrive", "version": 1, "fields": [leaf("head", "uint8", 1)] },
        });
        if size > 1 {
            drive["struct"]["subsections"] = json!([{
                "vmsd_name": "fdrive/media_rate", "version": 0,
                "fields": [leaf("media_rate", "uint8", 1)],
            }]);
        }
        drive
    };
    let expected = json!({
        "name": "0000:00:01.3/odd", "instance_id": 2, "vmsd_name": "odd", "version": 1,
        "fields": [
            leaf("unused[0]", "unused_buffer", 28),
            drive(0, 1),
            drive(1, 25),
            leaf("unused[1]", "unused_buffer", 24),
            { "name": "grid", "array_len": 12, "type": "uint16", "size": 2 },
            leaf("queue.count", "uint32", 4),
            { "name": "queue", "array_len": 2, "type": "uint64", "size": 8 },
            leaf("text.count", "uint8", 1),
            { "name": "pair", "index": 0, "type": "uint8", "size": 1 },
            { "name": "pair", "index": 1, "type": "int32", "size": 4 },
        ]
    });
    assert_eq!(crate::vmstate::describe(&id, &odd).unwrap(), expected);
}

#[test]
fn described_by_hand() {
    let mut describer = Describer::new(&SectionId::new("0000:00:02.0/virtio-net", 0), 11);
    describer.opaque("virtio", "virtio", 500);
    describer.put("vector", &7u16).unwrap();
    let expected = json!({
        "name": "0000:00:02.0/virtio-net", "instance_id": 0, "vmsd_name": "virtio-net",
        "version": 11, "fields": [leaf("virtio", "virtio", 500), leaf("vector", "uint16", 2)],
    });
    assert_eq!(describer.finish(), expected);
}

/// How many bytes a reader of descriptions takes for `structure`, which it checks on the way.
fn described_size(structure: &Value) -> u64 {
    let list = |name: &str| structure[name].as_array().into_iter().flatten();
    let fields = list("fields").map(|field| {
        let size = field["size"].as_u64().unwrap();
        if field["type"] == "struct" {
            assert_eq!(described_size(&field["struct"]), size, "{field}");
        }
        size * field["array_len"].as_u64().unwrap_or(1)
    });
    let subsections = list("subsections")
        .map(|sub| sub["vmsd_name"].as_str().unwrap().len() as u64 + 6 + described_size(sub));
    fields.sum::<u64>() + subsections.sum::<u64>()
}

proptest! {
    #[test]
    fn a_description_covers_every_byte(state in everything()) {
        let id = SectionId::new("all", 0);
        let description = crate::vmstate::describe(&id, &state).unwrap();
        let bytes = to_bytes(&id, &state).unwrap();
        prop_assert_eq!(described_size(&description), bytes.len() as u64);
    }
}

#[test]
fn a_layout_shows_what_is_not_there() {
    assert_eq!(
        layout::<SerialState>(),
        "{state: {divider: uint16, rbr: uint8, ier: uint8, iir: uint8, lcr: uint8, mcr: uint8, \
         lsr: uint8, msr: uint8, scr: uint8, fcr_vmstate: uint8, \
         subsections: subsections{serial/thr_ipending version 1{int32}, \
         serial/tsr version 1{{retry: uint32, thr: uint8, tsr: uint8}}, \
         serial/recv_fifo version 1{{data: array{16 × uint8}, head: uint32, num: uint32}}, \
         serial/fifo_timeout_timer version 1{timer}}}}"
    );
    let everything = layout::<Everything>();
    for part in [
        "queue: counted{uint32, array{{desc: uint64, last_avail_idx: uint16, active: bool}}}",
        "long: array{40 × uint8}",
        "pad: pad 3",
        "xcr0@4: uint64",
        "inner/rate version 0{uint8}",
        "all/nested version 2{{format: uint16, size@2: uint32, ",
    ] {
        assert!(everything.contains(part), "{part} in {everything}");
    }
    // A type that contains itself is looked at once.
    assert_eq!(
        layout::<Endless>(),
        "{subsections: subsections{e version 1{{subsections: subsections{}}}}}"
    );
}

#[test]
fn a_type_without_a_zero_says_so() {
    #[derive(Debug, Serialize, Deserialize)]
    struct NonZero {
        before: u16,
        value: std::num::NonZeroU8,
    }
    let layout = layout::<NonZero>();
    assert!(layout.starts_with("{before: uint16, value: uint8} but value: "), "{layout}");
}

#[test]
fn digests_tell_layouts_apart() {
    #[derive(Debug, Serialize, Deserialize)]
    struct A {
        x: u8,
        y: [u16; 2],
    }
    #[derive(Debug, Serialize, Deserialize)]
    struct SameAsA {
        x: u8,
        y: (u16, u16),
    }
    #[derive(Debug, Serialize, Deserialize)]
    struct OtherName {
        x: u8,
        z: [u16; 2],
    }
    #[derive(Debug, Serialize, Deserialize)]
    struct OtherType {
        x: u8,
        y: [i16; 2],
    }
    #[derive(Debug, Serialize, Deserialize)]
    struct OtherNumber {
        x: u8,
        y: [u16; 3],
    }
    #[derive(Debug, Serialize, Deserialize)]
    struct OtherVersion {
        x: u8,
        #[serde(rename = "y@2", default)]
        y: [u16; 2],
    }
    fn digest<T: DeserializeOwned>() -> u64 {
        LayoutDigest::new(2, 1).part::<T>("").finish()
    }
    let a = digest::<A>();
    assert_eq!(a, digest::<SameAsA>());
    assert_eq!(a, LayoutDigest::new(2, 1).part::<A>("").finish());
    let others = [
        digest::<OtherName>(),
        digest::<OtherType>(),
        digest::<OtherNumber>(),
        digest::<OtherVersion>(),
        LayoutDigest::new(3, 1).part::<A>("").finish(),
        LayoutDigest::new(2, 2).part::<A>("").finish(),
        LayoutDigest::new(2, 1).part::<A>("").number("queues", 1).finish(),
    ];
    for other in others {
        assert_ne!(a, other);
    }
    // The digest is compared between builds: it may not change by accident.
    assert_eq!(layout_digest::<SerialState>(), 2_573_527_824_646_636_868);
}
