//! Arrays whose elements are alike are read in strides; nobody can tell.

use proptest::prelude::*;
use serde::{Deserialize, Serialize};

use super::features::Patient;
use super::*;

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Queue {
    num: u16,
    pad: Pad<1>,
    enabled: bool,
    address: [u32; 2],
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Queues {
    queues: FixedVec<Queue, 1024>,
    bytes: FixedVec<u8, 700>,
    after: u32,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Lists {
    lists: FixedVec<Counted<u8, u16, 9>, 40>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Tail {
    queues: Tailed<Queue, 1024>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Long {
    queues: FixedVec<Queue, 1024>,
}

impl VmState for Tail {
    const VERSION: u32 = 1;
}

impl VmState for Long {
    const VERSION: u32 = 1;
}

impl VmState for Queues {
    const VERSION: u32 = 1;
}

impl VmState for Lists {
    const VERSION: u32 = 1;
}

fn queue(n: u16) -> Queue {
    Queue { num: n, enabled: n % 2 == 1, address: [n.into(), 7], ..Queue::default() }
}

/// Stretches of equal values: each a value and how often it comes.
fn stretches(count: usize) -> impl Strategy<Value = Vec<u16>> {
    prop::collection::vec((0..4_u16, 1..200_usize), 1..30).prop_map(move |stretches| {
        let all = stretches.into_iter().flat_map(|(value, n)| std::iter::repeat_n(value, n));
        all.chain(std::iter::repeat(0)).take(count).collect()
    })
}

/// Reads what comes from a source that must not be asked for more than will come: the section and its
/// footer.
fn patient<T: VmState>(bytes: &[u8]) -> Result<T, StateError> {
    let with_footer = [bytes, &[0x7e]].concat();
    let mut source = Patient(SliceSource::new(&with_footer));
    let state = from_source(&SectionId::new("alike", 0), 1, &mut source);
    assert_eq!(source.0.rest(), [0x7e]);
    state
}

proptest! {
    #[test]
    fn stretches_come_back(numbers in stretches(1024), bytes in stretches(700)) {
        let state = Queues {
            queues: FixedVec::from_fn(|i| queue(numbers[i])),
            bytes: FixedVec::from_fn(|i| bytes[i] as u8),
            after: 0xdead_beef,
        };
        let written = write("alike", &state);
        prop_assert_eq!(written.len(), 1024 * 12 + 700 + 4);
        prop_assert_eq!(&patient::<Queues>(&written).unwrap(), &state);
    }

    #[test]
    fn what_holds_its_tail_once_is_the_same_on_the_wire(numbers in stretches(1024), keep in 0..1024_usize) {
        let numbers: Vec<u16> = numbers.into_iter().take(keep).collect();
        let short = Tail { queues: Tailed::new(numbers.iter().map(|n| queue(*n)), queue(1)) };
        let long = |i: usize| queue(numbers.get(i).copied().unwrap_or(1));
        let long = Long { queues: FixedVec::from_fn(long) };
        let written = write("alike", &short);
        prop_assert_eq!(&written, &write("alike", &long));
        prop_assert_eq!(&patient::<Tail>(&written).unwrap(), &short);
        prop_assert!(short.queues.iter().eq(long.queues.iter()));
        let shape = |digest: LayoutDigest| digest.finish();
        prop_assert_eq!(
            shape(LayoutDigest::new(1, 1).part::<Tail>("queues")),
            shape(LayoutDigest::new(1, 1).part::<Long>("queues"))
        );
        // Where all elements are told one by one, it is held as shortly.
        let json = serde_json::to_value(&short).unwrap();
        prop_assert_eq!(&json, &serde_json::to_value(&long).unwrap());
        prop_assert_eq!(serde_json::from_value::<Tail>(json).unwrap(), short);
    }

    #[test]
    fn lists_of_any_length_come_back(lengths in prop::collection::vec(0..9_usize, 40)) {
        // An empty list is a zero, and what follows one looks like another.
        let state = Lists { lists: FixedVec::from_fn(|i| vec![0; lengths[i]].into()) };
        let written = write("alike", &state);
        prop_assert_eq!(&patient::<Lists>(&written).unwrap(), &state);
    }
}

#[test]
fn what_is_wrong_in_the_middle_is_named_by_its_place() {
    let mut bytes = write("alike", &Queues::default());
    // The bool of queue 700, behind number and padding.
    bytes[700 * 12 + 3] = 2;
    let error = read::<Queues>("alike", 1, &bytes).unwrap_err().to_string();
    assert!(error.contains("queues[700].enabled"), "{error}");
    let cut = &bytes[..500 * 12 + 1];
    let error = read::<Queues>("alike", 1, cut).unwrap_err().to_string();
    assert!(error.contains("broke off at offset 0x1770"), "{error}");
}

#[test]
fn padding_that_differs_makes_no_difference() {
    let mut bytes = write("alike", &Queues::default());
    for at in (0..1024).step_by(3) {
        bytes[at * 12 + 2] = at as u8;
    }
    assert_eq!(read::<Queues>("alike", 1, &bytes).unwrap(), Queues::default());
}

#[test]
fn a_tail_that_is_cut_or_too_long_is_refused() {
    let state = Tail { queues: Tailed::new([queue(3)], queue(0)) };
    let bytes = write("alike", &state);
    assert!(read::<Tail>("alike", 1, &bytes[..1000 * 12]).is_err());
    assert_eq!((state.queues.get(0), state.queues.get(1)), (Some(&queue(3)), Some(&queue(0))));
    assert_eq!((state.queues.get(1023), state.queues.get(1024)), (Some(&queue(0)), None));
    let list = |n: usize| serde_json::json!({ "queues": vec![queue(0); n] });
    for n in [0, 1023, 1025] {
        assert!(serde_json::from_value::<Tail>(list(n)).is_err(), "{n} elements");
    }
}
