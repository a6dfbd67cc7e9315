//! A struct with everything the format has, and what hostile bytes do to it.

use proptest::prelude::*;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::*;

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Everything {
    on: bool,
    small: (i8, u16),
    wide: i64,
    pad: Pad<3>,
    timer: Timer,
    words: [u16; 3],
    long: FixedVec<u8, 40>,
    queue: Counted<u32, Queue, 5>,
    signed: Counted<i32, u8, 4>,
    name: Str8,
    reg: Reg,
    inner: Inner,
    /// A byte that may look like a subsection's beginning.
    after: [u8; 2],
    #[serde(rename = "xcr0@4", default)]
    xcr0: u64,
    pub(super) subsections: Subs,
}
impl VmState for Everything {
    const VERSION: u32 = 5;
    const MIN_VERSION: u32 = 3;
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
struct Queue {
    desc: u64,
    last_avail_idx: u16,
    active: bool,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
struct Reg(u32);

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
struct Inner {
    value: i32,
    subsections: InnerSubs,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename = "@subsections")]
struct InnerSubs {
    #[serde(rename = "inner/rate@0")]
    rate: Option<u8>,
    #[serde(rename = "inner_outport")]
    outport: Option<u8>,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename = "@subsections")]
pub(super) struct Subs {
    #[serde(rename = "all/nested@2")]
    nested: Option<Nested>,
    #[serde(rename = "all/flag")]
    flag: Option<bool>,
    #[serde(rename = "mini-vmm/extra")]
    extra: Option<Counted<u16, u64, 3>>,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
struct Nested {
    format: u16,
    #[serde(rename = "size@2", default)]
    size: u32,
    subsections: NestedSubs,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename = "@subsections")]
struct NestedSubs {
    #[serde(rename = "all/nested/vmx")]
    vmx: Option<u64>,
}

fn queue() -> impl Strategy<Value = Queue> {
    (any::<u64>(), any::<u16>(), any::<bool>()).prop_map(|(desc, last_avail_idx, active)| Queue {
        desc,
        last_avail_idx,
        active,
    })
}

fn subs() -> impl Strategy<Value = Subs> {
    let nested = (any::<u16>(), any::<u32>(), any::<Option<u64>>())
        .prop_map(|(format, size, vmx)| Nested { format, size, subsections: NestedSubs { vmx } });
    let extra = prop::collection::vec(any::<u64>(), 0..=3).prop_map(Counted::from);
    (prop::option::of(nested), any::<Option<bool>>(), prop::option::of(extra))
        .prop_map(|(nested, flag, extra)| Subs { nested, flag, extra })
}

prop_compose! {
    pub(super) fn everything()(
        on: bool,
        small: (i8, u16),
        wide: i64,
        timer in prop::option::of(0..i64::MAX),
        words: [u16; 3],
        long in prop::collection::vec(any::<u8>(), 40),
        queue in prop::collection::vec(queue(), 0..=5),
        signed in prop::collection::vec(any::<u8>(), 0..=4),
        name in "[a-zé]{0,20}",
        reg: u32,
        inner in (any::<i32>(), any::<Option<u8>>(), any::<Option<u8>>()),
        after in prop::sample::select(vec![[5u8, 0], [5, 5], [5, 10], [5, 255], [0, 5]]),
        rest in (any::<u64>(), subs()),
    ) -> Everything {
        Everything {
            on,
            small,
            wide,
            pad: Pad,
            timer: Timer(timer),
            words,
            long: long.try_into().unwrap(),
            queue: queue.into(),
            signed: signed.into(),
            name: Str8(name),
            reg: Reg(reg),
            inner: Inner {
                value: inner.0,
                subsections: InnerSubs { rate: inner.1, outport: inner.2 },
            },
            after,
            xcr0: rest.0,
            subsections: rest.1,
        }
    }
}

proptest! {
    #[test]
    fn round_trip(state in everything()) {
        let bytes = write("all", &state);
        prop_assert_eq!(read::<Everything>("all", 5, &bytes).unwrap(), state);
    }

    #[test]
    fn json_round_trip(state in everything()) {
        let text = serde_json::to_string(&state).unwrap();
        prop_assert_eq!(serde_json::from_str::<Everything>(&text).unwrap(), state);
    }

    #[test]
    fn arbitrary_bytes(bytes in prop::collection::vec(any::<u8>(), 0..400), version in 3u32..=5) {
        let mut source = SliceSource::new(&bytes);
        let _ = from_source::<Everything>(&SectionId::new("all", 0), version, &mut source);
    }

    #[test]
    fn changed_bytes(
        state in everything(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
    ) {
        let mut bytes = write("all", &state);
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        let mut source = SliceSource::new(&bytes);
        let _ = from_source::<Everything>(&SectionId::new("all", 0), 5, &mut source);
    }

    #[test]
    fn nothing_is_asked_for_behind_the_footer(state in everything()) {
        let mut bytes = write("all", &state);
        bytes.extend([0x7e, 0, 0, 0, 1]);
        let mut source = Patient(SliceSource::new(&bytes));
        let read = from_source::<Everything>(&SectionId::new("all", 0), 5, &mut source);
        prop_assert_eq!(read.unwrap(), state);
        prop_assert_eq!(source.0.rest(), [0x7e, 0, 0, 0, 1]);
    }

    #[test]
    fn cut_short(mut state in everything()) {
        state.subsections.extra = Some(vec![1, 2].into());
        let bytes = write("all", &state);
        let fields = write("all", &Everything { subsections: Subs::default(), ..state });
        for n in 0..bytes.len() {
            let mut source = SliceSource::new(&bytes[..n]);
            let read = from_source::<Everything>(&SectionId::new("all", 0), 5, &mut source);
            // Cut off in front of a subsection, the rest is a whole section.
            match read {
                Err(_) => prop_assert_ne!(n, fields.len()),
                Ok(state) => prop_assert_eq!(write("all", &state), &bytes[..n]),
            }
        }
    }
}

/// A connection whose other side waits for an answer: looking behind what it has sent would never
/// end.
pub(super) struct Patient<'a>(pub(super) SliceSource<'a>);

impl ByteSource for Patient<'_> {
    fn read_exact(&mut self, buf: &mut [u8]) -> std::io::Result<()> {
        self.0.read_exact(buf)
    }
    fn peek(&mut self, n: usize) -> std::io::Result<&[u8]> {
        assert!(n <= self.0.rest().len(), "waits for ever");
        self.0.peek(n)
    }
    fn offset(&self) -> u64 {
        self.0.offset()
    }
}

#[test]
fn older_versions_have_fewer_fields() {
    let state = Everything { xcr0: 7, ..Default::default() };
    let bytes = write("all", &state);
    let old = &bytes[..bytes.len() - 8];
    assert_eq!(read::<Everything>("all", 3, old).unwrap(), Everything::default());
    assert!(matches!(read::<Everything>("all", 2, old), Err(StateError::Version { min: 3, .. })));

    // A subsection has a version of its own.
    let nested = b"\x05\x0aall/nested\0\0\0\x01\x12\x34\x05\x08all/flag\0\0\0\x01\x01";
    let state = read::<Everything>("all", 3, &[old, nested].concat()).unwrap();
    assert_eq!(state.subsections.nested.unwrap().format, 0x1234);
    assert_eq!(state.subsections.flag, Some(true));
}

#[test]
fn errors_name_the_place() {
    let state = Everything { queue: vec![Queue::default(); 2].into(), ..Default::default() };
    let mut bytes = write("all", &state);
    // The second queue's `active`: what stands before the queues, the count, two queues.
    let active = 1 + 3 + 8 + 3 + 8 + 6 + 40 + 4 + 2 * 11 - 1;
    bytes[active] = 2;
    let error = read::<Everything>("all", 5, &bytes).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!(
            "all, queue[1].active, offset {active:#x} of the stream: \
             expected a bool (0 or 1), found 0x2"
        )
    );
    let cut = read::<Everything>("all", 5, &bytes[..active - 20]).unwrap_err();
    assert!(matches!(cut, StateError::Io { .. }), "{cut}");

    let count = active - 2 * 11;
    bytes[count] = 6;
    let error = read::<Everything>("all", 5, &bytes).unwrap_err();
    assert!(error.to_string().starts_with("all, queue, offset"), "{error}");
    assert!(error.to_string().ends_with("6 elements, at most 5"), "{error}");

    let flag = b"\x05\x08all/flag\0\0\0\x01\x09";
    let error =
        read::<Everything>("all", 5, &[&write("all", &Everything::default()), &flag[..]].concat())
            .unwrap_err();
    assert!(error.to_string().contains("subsections.all/flag"), "{error}");
}

/// A type that contains itself.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Endless {
    subsections: EndlessSubs,
}
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(rename = "@subsections")]
struct EndlessSubs {
    #[serde(rename = "e")]
    more: Option<Box<Endless>>,
}
impl VmState for Endless {
    const VERSION: u32 = 1;
}

#[test]
fn nesting_is_bounded() {
    let bytes = b"\x05\x01e\0\0\0\x01".repeat(100_000);
    let error = read::<Endless>("endless", 1, &bytes).unwrap_err();
    assert!(error.to_string().contains("nested deeper"), "{error}");
    let state = (0..100).fold(Endless::default(), |inner, _| Endless {
        subsections: EndlessSubs { more: Some(Box::new(inner)) },
    });
    let error = to_bytes(&SectionId::new("endless", 0), &state).unwrap_err();
    assert!(error.to_string().contains("nested deeper"), "{error}");
}

#[test]
fn what_the_format_does_not_have() {
    fn refused<T: Serialize + DeserializeOwned>(value: T) {
        let id = SectionId::new("odd", 0);
        let written = Encoder::new(&id).put(&value);
        assert!(matches!(written, Err(StateError::Unwritable { .. })), "{written:?}");
        let mut source = SliceSource::new(&[0; 64]);
        let read = Decoder::new(&id, 1, &mut source).get::<T>("odd");
        assert!(matches!(read, Err(StateError::Malformed { .. })));
    }
    #[derive(Serialize, Deserialize)]
    #[serde(rename = "@subsections")]
    struct NotOptional {
        #[serde(rename = "odd/value")]
        value: u8,
    }
    #[derive(Serialize, Deserialize)]
    enum Choice {
        A,
        B(u8),
    }
    refused(1.5f32);
    refused(1.5f64);
    refused('x');
    refused(String::from("text"));
    refused(vec![1u8]);
    refused(Some(1u8));
    refused(std::collections::BTreeMap::from([(1u8, 2u8)]));
    refused(Choice::A);
    refused(Choice::B(1));
    refused(1u128);

    let id = SectionId::new("odd", 0);
    let error = Encoder::new(&id).put(&NotOptional { value: 1 }).unwrap_err();
    assert!(error.to_string().contains("not optional"), "{error}");
    let bytes = b"\x05\x09odd/value\0\0\0\x01\x01";
    let read = Decoder::new(&id, 1, &mut SliceSource::new(bytes)).get::<NotOptional>("");
    assert!(read.is_err());
}

#[test]
fn by_hand() {
    let id = SectionId::new("0000:00:02.0/virtio-net", 0);
    let mut encoder = Encoder::new(&id);
    encoder.put(&2u32).unwrap();
    encoder.put(&Queue { desc: 1, last_avail_idx: 2, active: true }).unwrap();
    encoder.put(&Queue { desc: 3, last_avail_idx: 4, active: false }).unwrap();
    encoder.put(&InnerSubs { rate: Some(9), outport: None }).unwrap();
    let bytes = encoder.into_bytes();

    let mut source = SliceSource::new(&bytes);
    let mut decoder = Decoder::new(&id, 1, &mut source);
    let n: u32 = decoder.get("queues").unwrap();
    let queues: Vec<Queue> = decoder.get_seq("queue", n as usize).unwrap();
    assert_eq!(queues[1].last_avail_idx, 4);
    let subs: InnerSubs = decoder.get("").unwrap();
    assert_eq!(subs.rate, Some(9));
    decoder.finish().unwrap();

    let mut broken = bytes.clone();
    broken[4 + 11 + 10] = 7;
    let mut source = SliceSource::new(&broken);
    let mut decoder = Decoder::new(&id, 1, &mut source);
    decoder.get::<u32>("queues").unwrap();
    let error = decoder.get_seq::<Queue>("queue", 2).unwrap_err();
    assert!(error.to_string().contains("queue[1].active"), "{error}");
}
