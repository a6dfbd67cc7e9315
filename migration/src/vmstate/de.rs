//! Reading: the walk over a type that is `Deserialize`, whatever feeds it.

use serde::de::{DeserializeOwned, Deserializer, Visitor};
use serde::forward_to_deserialize_any;

use super::bytes::BYTES;
use super::parts::{Elements, Members};
use super::types::FIXED;
use super::walk::{Fault, Group, Leaf, MAX_DEPTH, Path, Step};

/// What a walk over a type takes its parts from.
pub(super) trait Feed {
    /// The big-endian bytes of a leaf.
    fn leaf(&mut self, leaf: Leaf, bytes: &mut [u8]) -> Result<(), Fault>;
    /// So many leaves of a byte each.
    fn bytes(&mut self, bytes: &mut [u8]) -> Result<(), Fault> {
        bytes.chunks_mut(1).try_for_each(|byte| self.leaf(Leaf::U8, byte))
    }
    /// What follows until [`close`](Self::close) belongs to `group`.
    fn open(&mut self, group: Group);
    /// The next part of a struct has this name, `@N` included.
    fn name(&mut self, name: &'static str);
    /// The innermost open group is complete.
    fn close(&mut self);
    /// How many bytes have been taken.
    fn offset(&self) -> u64;
    /// Passes by what repeats the last `len` bytes that were taken, and gives how often it did: at most
    /// `times`. So many times `len` bytes do follow.
    fn repeats(&mut self, len: u64, times: usize) -> Result<usize, Fault> {
        let _ = (len, times);
        Ok(0)
    }
    /// The next subsection, if one follows that belongs to the set.
    fn subsection(&mut self, set: &mut Set, outer: &[Names]) -> Result<Option<Found>, Fault>;
}

/// The names that a set of subsections knows, `@N` included.
pub(super) type Names = &'static [&'static str];

/// A set of subsections that is being read.
#[derive(Debug)]
pub(super) struct Set {
    pub(super) names: Names,
    /// Those that have come: name, and the offsets where they begin and end.
    pub(super) taken: Vec<(&'static str, u64, u64)>,
}

/// A subsection that follows.
#[derive(Debug)]
pub(super) struct Found {
    /// Its name as declared, `@N` included.
    pub(super) name: &'static str,
    /// Where the set's names have it.
    pub(super) index: usize,
    /// Its version on the wire.
    pub(super) version: u32,
    /// Where it begins.
    pub(super) start: u64,
}

/// Walks over `T`, in the given version; errors name `root`.
pub(super) fn walk<T: DeserializeOwned>(
    feed: &mut dyn Feed,
    version: u32,
    root: String,
) -> Result<T, Fault> {
    let start = feed.offset();
    let mut walker = Walker {
        feed,
        offset: start,
        path: Path::rooted(root),
        depth: 0,
        version,
        sets: Vec::new(),
        sizes_vary: 0,
        choice: Choice::None,
    };
    T::deserialize(&mut walker).map_err(|fault| walker.placed(fault, start))
}

/// What the next `Option` is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Choice {
    /// Nothing that may be read.
    None,
    /// A subsection that is there, or an element that is not said to be the same.
    Present,
    /// So many elements that are the same as the one before.
    Same(usize),
}

/// One for all kinds of feed, and nothing in it depends on the type that is walked over but what cannot do
/// without: this code is made anew for each declaration, and all of it comes into memory when a guest arrives.
pub(super) struct Walker<'a> {
    pub(super) feed: &'a mut dyn Feed,
    /// The feed's, which is not asked for it at each part.
    offset: u64,
    path: Path,
    depth: usize,
    /// The version of the section or subsection that is being read.
    pub(super) version: u32,
    /// The sets of subsections that are being read, innermost last.
    pub(super) sets: Vec<Names>,
    /// How often something was read whose size is not the declaration's.
    pub(super) sizes_vary: u64,
    pub(super) choice: Choice,
}

impl Walker<'_> {
    fn bytes<const N: usize>(&mut self, leaf: Leaf) -> Result<[u8; N], Fault> {
        let mut bytes = [0; N];
        self.feed.leaf(leaf, &mut bytes)?;
        self.offset = self.offset.saturating_add(leaf.size());
        Ok(bytes)
    }

    /// An array of `len` bytes, of which the caller has seen to it that they are not too many.
    fn all(&mut self, len: usize) -> Result<Vec<u8>, Fault> {
        self.begin(Some(Group::Tuple))?;
        let mut bytes = vec![0; len];
        self.feed.bytes(&mut bytes)?;
        self.offset = self.offset.saturating_add(u64::try_from(len).unwrap_or(u64::MAX));
        self.end(Some(Group::Tuple));
        Ok(bytes)
    }

    /// How many bytes have been taken.
    pub(super) fn offset(&self) -> u64 {
        self.offset
    }

    /// Passes by what repeats the bytes since `start`, at most `times`; gives how often it did.
    pub(super) fn repeats(&mut self, start: u64, times: usize) -> Result<usize, Fault> {
        let same = self.feed.repeats(self.offset.saturating_sub(start), times);
        self.offset = self.feed.offset();
        same
    }

    /// The next subsection of `set`, if one follows.
    pub(super) fn subsection(&mut self, set: &mut Set) -> Result<Option<Found>, Fault> {
        let start = self.offset;
        let found = self.feed.subsection(set, &self.sets);
        self.offset = self.feed.offset();
        found.map_err(|fault| self.placed(fault, start))
    }

    /// A group begins.
    pub(super) fn begin(&mut self, group: Option<Group>) -> Result<(), Fault> {
        if self.choice != Choice::None {
            return Err(not_optional());
        }
        self.depth = self.depth.saturating_add(1);
        if self.depth > MAX_DEPTH {
            return Err(Fault::plain(format!("nested deeper than {MAX_DEPTH} levels")));
        }
        if let Some(group) = group {
            self.feed.open(group);
            if matches!(group, Group::Counted | Group::Subsections) {
                self.sizes_vary = self.sizes_vary.saturating_add(1);
            }
        }
        Ok(())
    }

    /// The group that began last is complete.
    pub(super) fn end(&mut self, group: Option<Group>) {
        if group.is_some() {
            self.feed.close();
        }
        self.depth = self.depth.saturating_sub(1);
    }

    /// One part of a group begins; gives where.
    pub(super) fn enter(&mut self, step: Step) -> u64 {
        self.path.push(step);
        self.offset
    }

    /// The part that began last has been read.
    pub(super) fn leave(&mut self) {
        self.path.pop();
    }

    /// Fails when what could only be an `Option` has been read as something else.
    pub(super) fn chosen(&self) -> Result<(), Fault> {
        if self.choice == Choice::None { Ok(()) } else { Err(not_optional()) }
    }

    /// `fault` with its place, in the part that began at `start`.
    #[cold]
    pub(super) fn placed(&self, fault: Fault, start: u64) -> Fault {
        fault.at(&self.path, start)
    }

    fn elements<'de, V: Visitor<'de>>(
        &mut self,
        group: Group,
        len: usize,
        alike: bool,
        visitor: V,
    ) -> Result<V::Value, Fault> {
        self.begin(Some(group))?;
        let value = visitor.visit_seq(Elements::new(self, group, len, alike))?;
        self.end(Some(group));
        Ok(value)
    }
}

macro_rules! leaves {
    ($($method:ident => $visit:ident($type:ty), $leaf:ident;)*) => {
        $(fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
            visitor.$visit(<$type>::from_be_bytes(self.bytes(Leaf::$leaf)?))
        })*
    };
}

impl<'de> Deserializer<'de> for &mut Walker<'_> {
    type Error = Fault;

    fn is_human_readable(&self) -> bool {
        false
    }

    leaves! {
        deserialize_u8 => visit_u8(u8), U8;
        deserialize_u16 => visit_u16(u16), U16;
        deserialize_u32 => visit_u32(u32), U32;
        deserialize_u64 => visit_u64(u64), U64;
        deserialize_i8 => visit_i8(i8), I8;
        deserialize_i16 => visit_i16(i16), I16;
        deserialize_i32 => visit_i32(i32), I32;
        deserialize_i64 => visit_i64(i64), I64;
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        match self.bytes(Leaf::Bool)? {
            [0] => visitor.visit_bool(false),
            [1] => visitor.visit_bool(true),
            [other] => Err(Fault::plain(format!("expected a bool (0 or 1), found {other:#x}"))),
        }
    }
    fn deserialize_unit<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        visitor.visit_unit()
    }
    fn deserialize_unit_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        visitor: V,
    ) -> Result<V::Value, Fault> {
        visitor.visit_unit()
    }
    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        name: &'static str,
        visitor: V,
    ) -> Result<V::Value, Fault> {
        let group = Group::of_newtype(name);
        self.begin(group)?;
        let value = visitor.visit_newtype_struct(&mut *self)?;
        self.end(group);
        Ok(value)
    }
    fn deserialize_tuple<V: Visitor<'de>>(self, len: usize, visitor: V) -> Result<V::Value, Fault> {
        self.elements(Group::Tuple, len, false, visitor)
    }
    fn deserialize_tuple_struct<V: Visitor<'de>>(
        self,
        name: &'static str,
        len: usize,
        visitor: V,
    ) -> Result<V::Value, Fault> {
        if name == BYTES {
            return visitor.visit_byte_buf(self.all(len)?);
        }
        self.elements(Group::of_tuple_struct(name), len, name == FIXED, visitor)
    }
    fn deserialize_struct<V: Visitor<'de>>(
        self,
        name: &'static str,
        names: Names,
        visitor: V,
    ) -> Result<V::Value, Fault> {
        let group = Group::of_struct(name);
        self.begin(Some(group))?;
        let value = visitor.visit_map(Members::new(self, group, names))?;
        self.end(Some(group));
        Ok(value)
    }
    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        match std::mem::replace(&mut self.choice, Choice::None) {
            Choice::None => Err(refused("optional values, except subsections")),
            Choice::Present => visitor.visit_some(self),
            Choice::Same(times) => visitor.visit_u64(u64::try_from(times).unwrap_or(u64::MAX)),
        }
    }
    fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Fault> {
        Err(refused("values of this type: it has integers, bools, fixed arrays and structs"))
    }
    forward_to_deserialize_any! {
        i128 u128 f32 f64 char str string bytes byte_buf seq map enum identifier ignored_any
    }
}

#[cold]
fn refused(what: &str) -> Fault {
    Fault::plain(format!("QEMU's format has no {what}"))
}

#[cold]
fn not_optional() -> Fault {
    refused("subsections that are not optional")
}
