//! Reading: the walk over a type that is `Deserialize`, whatever feeds it.

use serde::de::value::{StrDeserializer, UsizeDeserializer};
use serde::de::{
    DeserializeOwned, DeserializeSeed, Deserializer, IntoDeserializer, MapAccess, SeqAccess,
    Visitor,
};
use serde::forward_to_deserialize_any;

use super::types::FIXED;
use super::walk::{Fault, Group, Leaf, MAX_DEPTH, Path, Step, split_version};

/// With fewer elements to come, whether they are all the same is not looked at.
const WORTH_LOOKING: usize = 8;

/// What a walk over a type takes its parts from.
pub(super) trait Feed {
    /// The big-endian bytes of a leaf.
    fn leaf(&mut self, leaf: Leaf, bytes: &mut [u8]) -> Result<(), Fault>;
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
    /// Its version on the wire.
    pub(super) version: u32,
    /// Where it begins.
    pub(super) start: u64,
}

/// Walks over `T`, in the given version; errors name `root`.
pub(super) fn walk<T: DeserializeOwned>(
    feed: &mut impl Feed,
    version: u32,
    root: String,
) -> Result<T, Fault> {
    let start = feed.offset();
    let path = Path::rooted(root);
    let mut walker = Walker { feed, path, depth: 0, version, sets: Vec::new(), sizes_vary: 0 };
    T::deserialize(&mut walker).map_err(|fault| fault.at(&walker.path, start))
}

/// One for each kind of feed: the guest stands still while tens of thousands of values are read.
struct Walker<'a, F> {
    feed: &'a mut F,
    path: Path,
    depth: usize,
    /// The version of the section or subsection that is being read.
    version: u32,
    /// The sets of subsections that are being read, innermost last.
    sets: Vec<Names>,
    /// How often something was read whose size is not the declaration's.
    sizes_vary: u64,
}

impl<F: Feed> Walker<'_, F> {
    fn bytes<const N: usize>(&mut self, leaf: Leaf) -> Result<[u8; N], Fault> {
        let mut bytes = [0; N];
        self.feed.leaf(leaf, &mut bytes)?;
        Ok(bytes)
    }

    /// Reads what is inside a group.
    fn group<T>(
        &mut self,
        group: Option<Group>,
        inside: impl FnOnce(&mut Self) -> Result<T, Fault>,
    ) -> Result<T, Fault> {
        self.depth = self.depth.saturating_add(1);
        if self.depth > MAX_DEPTH {
            return Err(Fault::Plain(format!("nested deeper than {MAX_DEPTH} levels")));
        }
        if let Some(group) = group {
            self.feed.open(group);
            if matches!(group, Group::Counted | Group::Subsections) {
                self.sizes_vary = self.sizes_vary.saturating_add(1);
            }
        }
        let value = inside(self)?;
        if group.is_some() {
            self.feed.close();
        }
        self.depth = self.depth.saturating_sub(1);
        Ok(value)
    }

    /// Reads one part of a group.
    fn part<T>(
        &mut self,
        step: Step,
        inside: impl FnOnce(&mut Self) -> Result<T, Fault>,
    ) -> Result<T, Fault> {
        self.path.push(step);
        let start = self.feed.offset();
        let value = inside(self).map_err(|fault| fault.at(&self.path, start))?;
        self.path.pop();
        Ok(value)
    }

    fn elements<'de, V: Visitor<'de>>(
        &mut self,
        group: Group,
        len: usize,
        visitor: V,
    ) -> Result<V::Value, Fault> {
        self.group(Some(group), |walker| {
            visitor.visit_seq(Elements { walker, group, index: 0, len })
        })
    }
}

macro_rules! leaves {
    ($($method:ident => $visit:ident($type:ty), $leaf:ident;)*) => {
        $(fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
            visitor.$visit(<$type>::from_be_bytes(self.bytes(Leaf::$leaf)?))
        })*
    };
}

impl<'de, F: Feed> Deserializer<'de> for &mut Walker<'_, F> {
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
            [other] => Err(Fault::Plain(format!("expected a bool (0 or 1), found {other:#x}"))),
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
        self.group(Group::of_newtype(name), |walker| visitor.visit_newtype_struct(walker))
    }
    fn deserialize_tuple<V: Visitor<'de>>(self, len: usize, visitor: V) -> Result<V::Value, Fault> {
        self.elements(Group::Tuple, len, visitor)
    }
    fn deserialize_tuple_struct<V: Visitor<'de>>(
        self,
        name: &'static str,
        len: usize,
        visitor: V,
    ) -> Result<V::Value, Fault> {
        if name != FIXED {
            return self.elements(Group::of_tuple_struct(name), len, visitor);
        }
        self.group(Some(Group::Tuple), |walker| {
            visitor.visit_seq(Alike { walker, index: 0, len, same: 0 })
        })
    }
    fn deserialize_struct<V: Visitor<'de>>(
        self,
        name: &'static str,
        names: Names,
        visitor: V,
    ) -> Result<V::Value, Fault> {
        let group = Group::of_struct(name);
        self.group(Some(group), |walker| match group {
            Group::Subsections => {
                walker.sets.push(names);
                let set = Set { names, taken: Vec::new() };
                let value = visitor.visit_map(Subsections { walker, set, next: None })?;
                walker.sets.pop();
                Ok(value)
            }
            _ => visitor.visit_map(Fields { walker, names: names.iter().enumerate(), next: "" }),
        })
    }
    fn deserialize_option<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Fault> {
        Err(refused("optional values, except subsections"))
    }
    fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Fault> {
        Err(refused("values of this type: it has integers, bools, fixed arrays and structs"))
    }
    forward_to_deserialize_any! {
        i128 u128 f32 f64 char str string bytes byte_buf seq map enum identifier ignored_any
    }
}

fn refused(what: &str) -> Fault {
    Fault::Plain(format!("QEMU's format has no {what}"))
}

/// The elements of a tuple or array.
struct Elements<'w, 'a, F> {
    walker: &'w mut Walker<'a, F>,
    group: Group,
    index: usize,
    len: usize,
}

impl<'de, F: Feed> SeqAccess<'de> for Elements<'_, '_, F> {
    type Error = Fault;

    fn next_element_seed<T: DeserializeSeed<'de>>(
        &mut self,
        seed: T,
    ) -> Result<Option<T::Value>, Fault> {
        if self.index >= self.len {
            return Ok(None);
        }
        let step = self.group.step(self.index);
        self.index = self.index.saturating_add(1);
        self.walker.part(step, |walker| seed.deserialize(walker)).map(Some)
    }
}

/// The elements of an array, long stretches of which are often all the same: virtio's sections have one
/// for each of a thousand queues that nobody has.
struct Alike<'w, 'a, F> {
    walker: &'w mut Walker<'a, F>,
    index: usize,
    len: usize,
    /// How many of the next ones are known to be the same as the one before.
    same: usize,
}

impl<'de, F: Feed> SeqAccess<'de> for Alike<'_, '_, F> {
    type Error = Fault;

    fn next_element_seed<T: DeserializeSeed<'de>>(
        &mut self,
        seed: T,
    ) -> Result<Option<T::Value>, Fault> {
        if self.index >= self.len {
            return Ok(None);
        }
        let same = std::mem::take(&mut self.same);
        if same > 0 {
            self.index = self.index.saturating_add(same);
            return seed.deserialize(Same(same)).map(Some);
        }
        let step = Step::Index(self.index);
        self.index = self.index.saturating_add(1);
        let (start, sizes_vary) = (self.walker.feed.offset(), self.walker.sizes_vary);
        let element = self.walker.part(step, |walker| seed.deserialize(Present(walker)))?;
        let left = self.len.saturating_sub(self.index);
        if left >= WORTH_LOOKING && self.walker.sizes_vary == sizes_vary {
            let size = self.walker.feed.offset().saturating_sub(start);
            self.same = self.walker.feed.repeats(size, left)?;
        }
        Ok(Some(element))
    }
}

/// The fields of a struct, as far as the version has them.
struct Fields<'w, 'a, F> {
    walker: &'w mut Walker<'a, F>,
    names: std::iter::Enumerate<std::slice::Iter<'static, &'static str>>,
    next: &'static str,
}

impl<'de, F: Feed> MapAccess<'de> for Fields<'_, '_, F> {
    type Error = Fault;

    fn next_key_seed<K: DeserializeSeed<'de>>(
        &mut self,
        seed: K,
    ) -> Result<Option<K::Value>, Fault> {
        let version = self.walker.version;
        let present =
            |(_, name): &(usize, &&str)| split_version(name).1.is_none_or(|since| since <= version);
        let Some((index, name)) = self.names.find(present) else {
            return Ok(None);
        };
        self.next = name;
        // A derived struct knows its fields by their places too, which are compared faster than names.
        let key: UsizeDeserializer<Fault> = index.into_deserializer();
        seed.deserialize(key).map(Some)
    }

    fn next_value_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<T::Value, Fault> {
        self.walker.feed.name(self.next);
        self.walker.part(Step::Field(self.next), |walker| seed.deserialize(walker))
    }
}

/// The subsections that follow, in the order in which they come.
struct Subsections<'w, 'a, F> {
    walker: &'w mut Walker<'a, F>,
    set: Set,
    next: Option<Found>,
}

impl<'de, F: Feed> MapAccess<'de> for Subsections<'_, '_, F> {
    type Error = Fault;

    fn next_key_seed<K: DeserializeSeed<'de>>(
        &mut self,
        seed: K,
    ) -> Result<Option<K::Value>, Fault> {
        let outer = self.walker.sets.split_last().map_or(&[][..], |(_, outer)| outer);
        let start = self.walker.feed.offset();
        let found = self.walker.feed.subsection(&mut self.set, outer);
        self.next = found.map_err(|fault| fault.at(&self.walker.path, start))?;
        let Some(found) = &self.next else {
            return Ok(None);
        };
        let key: StrDeserializer<'_, Fault> = found.name.into_deserializer();
        seed.deserialize(key).map(Some)
    }

    fn next_value_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<T::Value, Fault> {
        let Some(found) = self.next.take() else {
            return Err(Fault::Plain("a subsection was asked for twice".to_owned()));
        };
        let (bare, newest) = split_version(found.name);
        let newest = newest.unwrap_or(1);
        if found.version > newest {
            let (found, max) = (found.version, newest);
            return Err(Fault::Version { subsection: bare, found, max });
        }
        let outer_version = std::mem::replace(&mut self.walker.version, found.version);
        let value = self.walker.part(Step::Field(found.name), |walker| {
            walker.group(Some(Group::Subsection(bare, newest)), |walker| {
                seed.deserialize(Present(walker))
            })
        })?;
        self.walker.version = outer_version;
        self.set.taken.push((found.name, found.start, self.walker.feed.offset()));
        Ok(value)
    }
}

/// So many elements that are the same as the one before.
struct Same(usize);

impl<'de> Deserializer<'de> for Same {
    type Error = Fault;

    fn is_human_readable(&self) -> bool {
        false
    }
    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        visitor.visit_u64(u64::try_from(self.0).unwrap_or(u64::MAX))
    }
    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option
        unit unit_struct newtype_struct seq tuple tuple_struct map struct enum identifier ignored_any
    }
}

/// A subsection that is there, or an element that is not said to be the same: the `Some` of an `Option`.
struct Present<'w, 'a, F>(&'w mut Walker<'a, F>);

impl<'de, F: Feed> Deserializer<'de> for Present<'_, '_, F> {
    type Error = Fault;

    fn is_human_readable(&self) -> bool {
        false
    }
    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        visitor.visit_some(self.0)
    }
    fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Fault> {
        Err(refused("subsections that are not optional"))
    }
    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf unit
        unit_struct newtype_struct seq tuple tuple_struct map struct enum identifier ignored_any
    }
}
