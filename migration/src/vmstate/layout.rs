//! What a declaration looks like on the wire, found without a value and without bytes.
//!
//! Two hosts compare the digests of their sections' layouts before any page moves.

use serde::de::DeserializeOwned;

use super::VmState;
use super::de::{Feed, Found, Names, Set, walk};
use super::shape::{Builder, Part};
use super::walk::{Fault, Group, Leaf, split_version};

/// The digest of the layout of `T`: its versions, and the names, types, numbers and versions of
/// its fields and of all subsections that it can have. It is the same on every machine and in
/// every build; names of Rust types do not matter to it.
pub fn layout_digest<T: VmState>() -> u64 {
    LayoutDigest::new(T::VERSION, T::MIN_VERSION).part::<T>("").finish()
}

/// The digest of a layout that depends on more than a type: what an
/// [`Encoder`](super::Encoder) is given, in the same order.
#[derive(Debug, Clone)]
pub struct LayoutDigest(u64);

impl LayoutDigest {
    /// Begins with the section's versions.
    pub fn new(version: u32, min_version: u32) -> Self {
        // The offset basis of 64-bit FNV-1a (RFC 9923).
        Self(0xcbf2_9ce4_8422_2325).text(&format!("version {version}, min {min_version}"))
    }

    /// A value of type `T`.
    #[must_use]
    pub fn part<T: DeserializeOwned>(self, name: &str) -> Self {
        self.text(&format!("{name}: {}", layout::<T>()))
    }

    /// A number that decides the layout, for example how many queues there are.
    #[must_use]
    pub fn number(self, name: &str, value: u64) -> Self {
        self.text(&format!("{name} = {value}"))
    }

    /// The digest.
    pub fn finish(self) -> u64 {
        self.0
    }

    fn text(self, text: &str) -> Self {
        // The prime of 64-bit FNV-1a. The zero byte keeps neighbours apart.
        let step =
            |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
        Self(text.bytes().chain([0]).fold(self.0, step))
    }
}

/// The layout of `T` as text, for people and for the digest.
///
/// Values are all zero, and lists have one element, while the type is being looked at; for a type
/// that takes no zero, the text ends with its objection, at the field that made it.
pub fn layout<T: DeserializeOwned>() -> String {
    let mut trace = Trace(Builder::new());
    let end = match walk::<T>(&mut trace, u32::MAX, String::new()) {
        Ok(_) => String::new(),
        Err(fault) => format!(" but {fault}"),
    };
    let shapes: Vec<String> =
        trace.0.into_parts().iter().map(|Part { shape, .. }| shape.to_string()).collect();
    shapes.join(", ") + &end
}

/// Feeds zeros, and every subsection that there can be.
struct Trace(Builder);

impl Feed for Trace {
    fn leaf(&mut self, leaf: Leaf, bytes: &mut [u8]) -> Result<(), Fault> {
        if self.0.at_count()
            && let Some(lowest) = bytes.last_mut()
        {
            *lowest = 1;
        }
        self.0.leaf(leaf);
        Ok(())
    }
    fn open(&mut self, group: Group) {
        self.0.open(group);
    }
    fn name(&mut self, name: &'static str) {
        self.0.call(name);
    }
    fn close(&mut self) {
        self.0.close();
    }
    fn offset(&self) -> u64 {
        0
    }
    /// All is zero, so that all elements of an array look alike.
    fn repeats(&mut self, _: u64, times: usize) -> Result<usize, Fault> {
        self.0.again(times);
        Ok(times)
    }
    fn subsection(&mut self, set: &mut Set, outer: &[Names]) -> Result<Option<Found>, Fault> {
        // A set inside itself has been seen.
        if outer.contains(&set.names) {
            return Ok(None);
        }
        let index = set.taken.len();
        Ok(set.names.get(index).map(|name| {
            let version = split_version(name).1.unwrap_or(1);
            Found { name, index, version, start: 0 }
        }))
    }
}
