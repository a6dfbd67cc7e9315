//! A device behind its section.

use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};

use super::*;

#[derive(Debug, Default)]
struct Latch {
    value: u8,
    restored: bool,
}

#[derive(Debug, Serialize, Deserialize)]
struct LatchState {
    value: u8,
    subsections: LatchSubs,
}
impl VmState for LatchState {
    const VERSION: u32 = 2;
    const MIN_VERSION: u32 = 1;
}

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(rename = "@subsections")]
struct LatchSubs {
    #[serde(rename = "mini-vmm/latch")]
    ours: Option<u8>,
}

impl Migratable for Latch {
    type State = LatchState;
    fn save(&self, audience: Audience) -> Result<LatchState, FieldError> {
        let ours = (audience == Audience::MiniVmm).then_some(9);
        Ok(LatchState { value: self.value, subsections: LatchSubs { ours } })
    }
    fn check(&self, state: &LatchState) -> Result<(), FieldError> {
        if state.value < 8 {
            return Ok(());
        }
        Err(FieldError::new("value", "less than 8", state.value))
    }
    fn restore(&mut self, state: LatchState) -> Result<(), FieldError> {
        self.value = state.value;
        self.restored = true;
        Ok(())
    }
}

fn latch(value: u8) -> (Arc<Mutex<Latch>>, Box<dyn Section>) {
    let device = Arc::new(Mutex::new(Latch { value, restored: false }));
    let section = SectionOf::new(SectionId::new("latch", 1), device.clone());
    (device, Box::new(section))
}

#[test]
fn from_one_device_to_another() {
    let (_, source) = latch(5);
    let (device, mut destination) = latch(0);
    let bytes = source.save(Audience::Qemu).unwrap();
    assert_eq!(bytes, [5]);
    let state = destination.decode(1, &mut SliceSource::new(&bytes)).unwrap();
    assert_eq!(device.lock().unwrap().value, 0, "decode touches nothing");
    destination.apply(state).unwrap();
    assert_eq!(device.lock().unwrap().value, 5);

    let bytes = source.save(Audience::MiniVmm).unwrap();
    assert_eq!(bytes, b"\x05\x05\x0emini-vmm/latch\0\0\0\x01\x09");
    let (same, described) = source.save_described(Audience::MiniVmm).unwrap();
    assert_eq!(same, bytes);
    let described = described().unwrap();
    assert_eq!(described["subsections"][0]["vmsd_name"], "mini-vmm/latch");
    assert_eq!(source.layout_digest(), layout_digest::<LatchState>());
    assert_eq!((source.version(), source.min_version()), (2, 1));
}

#[test]
fn refusals() {
    let (device, mut section) = latch(0);
    let error = section.decode(2, &mut SliceSource::new(&[8])).unwrap_err();
    assert_eq!(error.to_string(), "latch (instance 1): field value: expected less than 8, found 8");
    let error = section.decode(3, &mut SliceSource::new(&[1])).unwrap_err();
    assert!(matches!(error, StateError::Version { found: 3, min: 1, max: 2, .. }), "{error}");
    let error = section.apply(Box::new(7u32)).unwrap_err();
    assert!(error.to_string().contains("another section"), "{error}");
    assert!(!device.lock().unwrap().restored);
}
