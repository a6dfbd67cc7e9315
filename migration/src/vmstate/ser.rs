//! Writing: the walk over a value that is `Serialize`, and the bytes it makes.

use serde::Serialize;
use serde::ser::{Impossible, SerializeStruct, SerializeTuple, SerializeTupleStruct};

use super::shape::Builder;
use super::types::AGAIN;
use super::walk::{Fault, Group, Leaf, MAX_DEPTH, Path, SUBSECTION, Step, split_version};
use super::{SectionId, StateError, VmState};

/// The body of a section whose state is `state`, in the newest version, as QEMU writes it.
///
/// Fails when the type is not one that the format has (a float, a map, an `Option` that is not a
/// subsection, …) or a [`Counted`](super::Counted) is longer than it may be.
pub fn to_bytes<T: VmState>(section: &SectionId, state: &T) -> Result<Vec<u8>, StateError> {
    let mut encoder = Encoder::new(section);
    encoder.put(state)?;
    Ok(encoder.into_bytes())
}

/// Writes a section value by value, for layouts that depend on more than the type.
#[derive(Debug)]
pub struct Encoder {
    section: String,
    out: Vec<u8>,
}

impl Encoder {
    /// An empty body of `section`, which only errors will name.
    pub fn new(section: &SectionId) -> Self {
        Self { section: section.to_string(), out: Vec::new() }
    }

    /// Appends `value`. A struct of subsections may stand by itself.
    pub fn put<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), StateError> {
        walk(value, Out { bytes: &mut self.out, shapes: None })
            .map_err(|fault| fault.writing(&self.section))
    }

    /// Appends bytes as they are.
    pub fn put_bytes(&mut self, bytes: &[u8]) {
        self.out.extend_from_slice(bytes);
    }

    /// The body so far.
    pub fn into_bytes(self) -> Vec<u8> {
        self.out
    }
}

/// What a walk over a value gives its parts to: the bytes, and who looks at their shape, if somebody does. The
/// bytes are written even if nobody wants but the shape, so that there is one walk over each declaration's values.
struct Out<'a> {
    bytes: &'a mut Vec<u8>,
    shapes: Option<&'a mut Builder>,
}

impl Out<'_> {
    /// A leaf, with its big-endian bytes.
    fn leaf<const N: usize>(&mut self, leaf: Leaf, bytes: [u8; N]) {
        self.bytes.extend_from_slice(&bytes);
        if let Some(shapes) = &mut self.shapes {
            shapes.leaf(leaf);
        }
    }
    /// An array of bytes.
    fn all(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
        if let Some(shapes) = &mut self.shapes {
            shapes.open(Group::Tuple);
            if let Some(more) = bytes.len().checked_sub(1) {
                shapes.leaf(Leaf::U8);
                shapes.again(more);
            }
            shapes.close();
        }
    }
    /// What follows until [`close`](Self::close) belongs to `group`.
    fn open(&mut self, group: Group) {
        if let Group::Subsection(name, version) = group {
            // The walk has seen to it that the length fits.
            let length = u8::try_from(name.len()).unwrap_or(u8::MAX);
            self.bytes.extend_from_slice(&[SUBSECTION, length]);
            self.bytes.extend_from_slice(name.as_bytes());
            self.bytes.extend_from_slice(&version.to_be_bytes());
        }
        if let Some(shapes) = &mut self.shapes {
            shapes.open(group);
        }
    }
    /// The next part of a struct has this name, `@N` included.
    fn name(&mut self, name: &'static str) {
        if let Some(shapes) = &mut self.shapes {
            shapes.call(name);
        }
    }
    /// The innermost open group is complete.
    fn close(&mut self) {
        if let Some(shapes) = &mut self.shapes {
            shapes.close();
        }
    }
    /// The last part of the innermost open group, which began at `start`, comes `times` times more.
    fn again(&mut self, start: usize, times: usize) {
        if let Some(shapes) = &mut self.shapes {
            shapes.again(times);
        }
        let Some(len) = self.bytes.len().checked_sub(start) else { return };
        let mut left = len.saturating_mul(times);
        self.bytes.reserve(left);
        // What is there already is copied, so that it doubles each time.
        while left > 0 {
            let have = self.bytes.len().saturating_sub(start).min(left);
            self.bytes.extend_from_within(start..start.saturating_add(have));
            left = left.saturating_sub(have);
        }
    }
}

/// The shape of `value`, added to `shapes`.
pub(super) fn look<T: Serialize + ?Sized>(value: &T, shapes: &mut Builder) -> Result<(), Fault> {
    walk(value, Out { bytes: &mut Vec::new(), shapes: Some(shapes) })
}

/// Walks over `value`.
fn walk<T: Serialize + ?Sized>(value: &T, sink: Out<'_>) -> Result<(), Fault> {
    let mut walker = Walker { sink, path: Path::default(), depth: 0, last: 0 };
    value.serialize(&mut walker).map_err(|fault| fault.at(&walker.path, 0))
}

/// This code is made anew for each declaration.
struct Walker<'a> {
    sink: Out<'a>,
    path: Path,
    depth: usize,
    /// Where the last element of an array began.
    last: usize,
}

impl<'a> Walker<'a> {
    fn open(&mut self, group: Group) -> Result<Parts<'_, 'a>, Fault> {
        self.deeper()?;
        self.sink.open(group);
        Ok(Parts { walker: self, group, index: 0 })
    }

    fn deeper(&mut self) -> Result<(), Fault> {
        self.depth = self.depth.saturating_add(1);
        if self.depth > MAX_DEPTH {
            return Err(Fault::plain(format!("nested deeper than {MAX_DEPTH} levels")));
        }
        Ok(())
    }

    fn shallower(&mut self) {
        self.depth = self.depth.saturating_sub(1);
    }

    /// One part of the group that is open.
    fn part<T: Serialize + ?Sized>(&mut self, step: Step, value: &T) -> Result<(), Fault> {
        self.path.push(step);
        value.serialize(&mut *self).map_err(|fault| self.placed(fault))?;
        self.path.pop();
        Ok(())
    }

    /// `fault` with its place.
    #[cold]
    fn placed(&self, fault: Fault) -> Fault {
        fault.at(&self.path, 0)
    }
}

#[cold]
fn refused(what: &str) -> Fault {
    Fault::plain(format!("QEMU's format has no {what}"))
}

/// The given methods of a `Serializer`, refusing what they are given.
macro_rules! refuse {
    ($what:literal: $($method:ident($($type:ty),*) -> $ok:ty),* $(,)?) => {
        $(refuse!(@one $what, $method, $ok, $($type),*);)*
    };
    (@one $what:literal, $method:ident, $ok:ty, ) => {
        fn $method(self) -> Result<$ok, Fault> {
            Err(refused($what))
        }
    };
    (@one $what:literal, $method:ident, $ok:ty, $a:ty) => {
        fn $method(self, _: $a) -> Result<$ok, Fault> {
            Err(refused($what))
        }
    };
    (@one $what:literal, $method:ident, $ok:ty, $a:ty, $b:ty) => {
        fn $method(self, _: $a, _: $b) -> Result<$ok, Fault> {
            Err(refused($what))
        }
    };
    (@one $what:literal, $method:ident, $ok:ty, $a:ty, $b:ty, $c:ty) => {
        fn $method(self, _: $a, _: $b, _: $c) -> Result<$ok, Fault> {
            Err(refused($what))
        }
    };
    (@one $what:literal, $method:ident, $ok:ty, $a:ty, $b:ty, $c:ty, $d:ty) => {
        fn $method(self, _: $a, _: $b, _: $c, _: $d) -> Result<$ok, Fault> {
            Err(refused($what))
        }
    };
}

/// What neither an ordinary field nor a subsection may be.
macro_rules! refuse_always {
    () => {
        refuse!("floats": serialize_f32(f32) -> (), serialize_f64(f64) -> ());
        refuse!("chars": serialize_char(char) -> ());
        refuse!("text without a length byte (use Str8)": serialize_str(&str) -> ());
        refuse!("sequences of unknown length (use FixedVec or Counted)":
            serialize_seq(Option<usize>) -> Self::SerializeSeq);
        refuse!("maps": serialize_map(Option<usize>) -> Self::SerializeMap);
        refuse!("enums":
            serialize_tuple_variant(&'static str, u32, &'static str, usize)
                -> Self::SerializeTupleVariant,
            serialize_struct_variant(&'static str, u32, &'static str, usize)
                -> Self::SerializeStructVariant);
        fn serialize_newtype_variant<T: Serialize + ?Sized>(
            self,
            _: &'static str,
            _: u32,
            _: &'static str,
            _: &T,
        ) -> Result<(), Fault> {
            Err(refused("enums"))
        }
    };
}

macro_rules! leaves {
    ($($method:ident($type:ty) => $leaf:ident;)*) => {
        $(fn $method(self, v: $type) -> Result<(), Fault> {
            self.sink.leaf(Leaf::$leaf, v.to_be_bytes());
            Ok(())
        })*
    };
}

impl<'w, 'a> serde::Serializer for &'w mut Walker<'a> {
    type Ok = ();
    type Error = Fault;
    type SerializeSeq = Impossible<(), Fault>;
    type SerializeTuple = Parts<'w, 'a>;
    type SerializeTupleStruct = Parts<'w, 'a>;
    type SerializeTupleVariant = Impossible<(), Fault>;
    type SerializeMap = Impossible<(), Fault>;
    type SerializeStruct = Parts<'w, 'a>;
    type SerializeStructVariant = Impossible<(), Fault>;

    fn is_human_readable(&self) -> bool {
        false
    }

    leaves! {
        serialize_u8(u8) => U8;
        serialize_u16(u16) => U16;
        serialize_u32(u32) => U32;
        serialize_u64(u64) => U64;
        serialize_i8(i8) => I8;
        serialize_i16(i16) => I16;
        serialize_i32(i32) => I32;
        serialize_i64(i64) => I64;
    }

    fn serialize_bool(self, v: bool) -> Result<(), Fault> {
        self.sink.leaf(Leaf::Bool, [u8::from(v)]);
        Ok(())
    }
    fn serialize_unit(self) -> Result<(), Fault> {
        Ok(())
    }
    fn serialize_unit_struct(self, _: &'static str) -> Result<(), Fault> {
        Ok(())
    }
    fn serialize_newtype_struct<T: Serialize + ?Sized>(
        self,
        name: &'static str,
        value: &T,
    ) -> Result<(), Fault> {
        self.deeper()?;
        if let Some(group) = Group::of_newtype(name) {
            self.sink.open(group);
            value.serialize(&mut *self)?;
            self.sink.close();
        } else {
            value.serialize(&mut *self)?;
        }
        self.shallower();
        Ok(())
    }
    fn serialize_tuple(self, _: usize) -> Result<Self::SerializeTuple, Fault> {
        self.open(Group::Tuple)
    }
    fn serialize_tuple_struct(
        self,
        name: &'static str,
        _: usize,
    ) -> Result<Self::SerializeTupleStruct, Fault> {
        self.open(Group::of_tuple_struct(name))
    }
    fn serialize_struct(
        self,
        name: &'static str,
        _: usize,
    ) -> Result<Self::SerializeStruct, Fault> {
        self.open(Group::of_struct(name))
    }
    fn serialize_some<T: Serialize + ?Sized>(self, _: &T) -> Result<(), Fault> {
        Err(refused("optional values, except subsections"))
    }

    fn serialize_unit_variant(
        self,
        name: &'static str,
        times: u32,
        _: &'static str,
    ) -> Result<(), Fault> {
        if name != AGAIN {
            return Err(refused("enums"));
        }
        self.sink.again(self.last, usize::try_from(times).unwrap_or(0));
        Ok(())
    }

    /// An array of them.
    fn serialize_bytes(self, bytes: &[u8]) -> Result<(), Fault> {
        self.deeper()?;
        self.sink.all(bytes);
        self.shallower();
        Ok(())
    }

    refuse!("optional values, except subsections": serialize_none() -> ());
    refuse_always!();
}

/// The parts of a group, one after the other.
struct Parts<'w, 'a> {
    walker: &'w mut Walker<'a>,
    group: Group,
    index: usize,
}

impl Parts<'_, '_> {
    fn element<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), Fault> {
        let step = self.group.step(self.index);
        self.index = self.index.saturating_add(1);
        let start = self.walker.sink.bytes.len();
        self.walker.part(step, value)?;
        self.walker.last = start;
        Ok(())
    }

    fn close(self) -> Result<(), Fault> {
        self.walker.sink.close();
        self.walker.shallower();
        Ok(())
    }
}

impl SerializeTuple for Parts<'_, '_> {
    type Ok = ();
    type Error = Fault;
    fn serialize_element<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), Fault> {
        self.element(value)
    }
    fn end(self) -> Result<(), Fault> {
        self.close()
    }
}

impl SerializeTupleStruct for Parts<'_, '_> {
    type Ok = ();
    type Error = Fault;
    fn serialize_field<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), Fault> {
        self.element(value)
    }
    fn end(self) -> Result<(), Fault> {
        self.close()
    }
}

impl SerializeStruct for Parts<'_, '_> {
    type Ok = ();
    type Error = Fault;
    fn serialize_field<T: Serialize + ?Sized>(
        &mut self,
        name: &'static str,
        value: &T,
    ) -> Result<(), Fault> {
        if self.group == Group::Subsections {
            self.walker.path.push(Step::Field(name));
            value
                .serialize(Subsection { walker: self.walker, name })
                .map_err(|fault| self.walker.placed(fault))?;
            self.walker.path.pop();
            Ok(())
        } else {
            self.walker.sink.name(name);
            self.walker.part(Step::Field(name), value)
        }
    }
    fn skip_field(&mut self, name: &'static str) -> Result<(), Fault> {
        if self.group == Group::Subsections {
            return Ok(());
        }
        self.walker.path.push(Step::Field(name));
        Err(refused("fields that are left out").at(&self.walker.path, 0))
    }
    fn end(self) -> Result<(), Fault> {
        self.close()
    }
}

/// The field of a struct of subsections: an `Option`, and nothing when it is `None`.
struct Subsection<'w, 'a> {
    walker: &'w mut Walker<'a>,
    name: &'static str,
}

impl serde::Serializer for Subsection<'_, '_> {
    type Ok = ();
    type Error = Fault;
    type SerializeSeq = Impossible<(), Fault>;
    type SerializeTuple = Impossible<(), Fault>;
    type SerializeTupleStruct = Impossible<(), Fault>;
    type SerializeTupleVariant = Impossible<(), Fault>;
    type SerializeMap = Impossible<(), Fault>;
    type SerializeStruct = Impossible<(), Fault>;
    type SerializeStructVariant = Impossible<(), Fault>;

    fn is_human_readable(&self) -> bool {
        false
    }
    fn serialize_none(self) -> Result<(), Fault> {
        Ok(())
    }
    fn serialize_some<T: Serialize + ?Sized>(self, value: &T) -> Result<(), Fault> {
        let (name, version) = split_version(self.name);
        if name.len() > usize::from(u8::MAX) {
            return Err(Fault::plain("a subsection's name has at most 255 bytes".to_owned()));
        }
        self.walker.deeper()?;
        self.walker.sink.open(Group::Subsection(name, version.unwrap_or(1)));
        value.serialize(&mut *self.walker)?;
        self.walker.sink.close();
        self.walker.shallower();
        Ok(())
    }
    fn serialize_newtype_struct<T: Serialize + ?Sized>(
        self,
        _: &'static str,
        _: &T,
    ) -> Result<(), Fault> {
        Err(refused("subsections that are not optional"))
    }

    refuse!("enums": serialize_unit_variant(&'static str, u32, &'static str) -> ());
    refuse!("subsections that are not optional":
        serialize_bool(bool) -> (),
        serialize_u8(u8) -> (),
        serialize_u16(u16) -> (),
        serialize_u32(u32) -> (),
        serialize_u64(u64) -> (),
        serialize_i8(i8) -> (),
        serialize_i16(i16) -> (),
        serialize_i32(i32) -> (),
        serialize_i64(i64) -> (),
        serialize_unit() -> (),
        serialize_unit_struct(&'static str) -> (),
        serialize_bytes(&[u8]) -> (),
        serialize_tuple(usize) -> Self::SerializeTuple,
        serialize_tuple_struct(&'static str, usize) -> Self::SerializeTupleStruct,
        serialize_struct(&'static str, usize) -> Self::SerializeStruct);
    refuse_always!();
}
