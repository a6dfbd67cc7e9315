//! Bytes that are moved as a whole against the same ones moved one by one.

use proptest::prelude::*;
use serde::{Deserialize, Serialize};

use super::*;

/// The same section in both ways.
macro_rules! section {
    ($name:ident, $fixed:ty, $counted:ty) => {
        #[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
        struct $name {
            before: u16,
            fixed: $fixed,
            counted: $counted,
            after: u8,
        }
        impl VmState for $name {
            const VERSION: u32 = 1;
            const MIN_VERSION: u32 = 1;
        }
    };
}

section!(Whole, Bytes<70>, Blob<u16, 300>);
section!(Each, FixedVec<u8, 70>, Counted<u16, u8, 300>);

fn whole(fixed: &[u8], counted: &[u8]) -> Whole {
    let fixed = Bytes::try_from(fixed.to_vec()).unwrap();
    Whole { before: 0x0102, fixed, counted: counted.to_vec().into(), after: 3 }
}

fn each(fixed: &[u8], counted: &[u8]) -> Each {
    let fixed = FixedVec::try_from(fixed.to_vec()).unwrap();
    Each { before: 0x0102, fixed, counted: counted.to_vec().into(), after: 3 }
}

proptest! {
    #[test]
    fn they_are_the_same_bytes_the_same_description_and_the_same_json(
        fixed in prop::collection::vec(any::<u8>(), 70),
        counted in prop::collection::vec(any::<u8>(), 0..=300),
        cut in any::<prop::sample::Index>(),
    ) {
        let (whole, each) = (whole(&fixed, &counted), each(&fixed, &counted));
        let bytes = write("bytes", &whole);
        prop_assert_eq!(&bytes, &write("bytes", &each));
        prop_assert_eq!(&read::<Whole>("bytes", 1, &bytes).unwrap(), &whole);
        let id = SectionId::new("bytes", 0);
        prop_assert_eq!(describe(&id, &whole).unwrap(), describe(&id, &each).unwrap());
        let json = serde_json::to_value(&whole).unwrap();
        prop_assert_eq!(&json, &serde_json::to_value(&each).unwrap());
        prop_assert_eq!(serde_json::from_value::<Whole>(json).unwrap(), whole);
        // What breaks off is an error.
        let cut = &bytes[..cut.index(bytes.len())];
        read::<Whole>("bytes", 1, cut).unwrap_err();
    }
}

#[test]
fn the_digest_does_not_tell_them_apart() {
    assert_eq!(layout::<Whole>(), layout::<Each>());
    assert_eq!(layout_digest::<Whole>(), layout_digest::<Each>());
}

#[test]
fn more_than_there_may_be_is_refused_before_it_is_asked_for() {
    let mut bytes = write("bytes", &whole(&[7; 70], &[1; 300]));
    // The count, behind `before` and `fixed`.
    assert_eq!(bytes[72..74], [1, 44]);
    bytes[73] += 1;
    let error = read::<Whole>("bytes", 1, &bytes).unwrap_err().to_string();
    assert!(error.contains("counted") && error.contains("301 bytes, at most 300"), "{error}");

    let long = whole(&[0; 70], &[0; 301]);
    let error = to_bytes(&SectionId::new("bytes", 0), &long).unwrap_err().to_string();
    assert!(error.contains("301 bytes, at most 300"), "{error}");
    assert_eq!(Bytes::<3>::try_from(vec![0; 4]), Err(4));
    serde_json::from_value::<Bytes<3>>(serde_json::json!([1, 2])).unwrap_err();
}

#[test]
fn a_place_behind_them_is_where_it_is() {
    #[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
    struct Behind {
        bytes: Blob<u8, 9>,
        on: bool,
    }
    impl VmState for Behind {
        const VERSION: u32 = 1;
        const MIN_VERSION: u32 = 1;
    }
    let error = read::<Behind>("behind", 1, &[2, 9, 9, 5]).unwrap_err();
    let StateError::Malformed { path, offset, .. } = error else { panic!("{error}") };
    assert_eq!((path.as_str(), offset), ("on", 3));
}
