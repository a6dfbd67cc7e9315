//! The format against literal bytes, against itself, and against hostile bytes.

use super::*;

mod adapter;
mod alike;
mod bytes;
mod describe;
mod features;
mod golden;

/// Reads a whole body, and says whether anything was left.
fn read<T: VmState>(name: &str, version: u32, bytes: &[u8]) -> Result<T, StateError> {
    let mut source = SliceSource::new(bytes);
    let state = from_source(&SectionId::new(name, 0), version, &mut source)?;
    assert_eq!(source.rest(), b"", "everything is read");
    Ok(state)
}

fn write<T: VmState>(name: &str, state: &T) -> Vec<u8> {
    to_bytes(&SectionId::new(name, 0), state).unwrap()
}
