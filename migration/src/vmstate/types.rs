//! Field types that QEMU's layouts have and plain Rust does not.

use std::fmt;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};

use serde::de::{Error as _, IgnoredAny, SeqAccess, Visitor};
use serde::ser::{Error as _, SerializeTuple};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::tailed::shortened;

/// `N` bytes that mean nothing: written as zero, ignored when read.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Pad<const N: usize>;

/// The serde name by which the format recognises a [`Pad`].
pub(crate) const PAD: &str = "@pad";
/// The serde name by which the format recognises a [`Timer`].
pub(crate) const TIMER: &str = "@timer";
/// The serde name by which the format recognises a [`Counted`].
pub(crate) const COUNTED: &str = "@counted";
/// The serde name by which the format recognises a [`FixedVec`] that is read, element by element or so many at
/// once as have the same bytes.
pub(crate) const FIXED: &str = "@fixed";
/// The serde name by which the format recognises that the elements of a [`FixedVec`] go on as the one before,
/// so many times as the variant's number.
pub(crate) const AGAIN: &str = "@again";

impl<const N: usize> Serialize for Pad<N> {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        if s.is_human_readable() {
            return s.serialize_unit();
        }
        s.serialize_newtype_struct(PAD, &FixedVec::<u8, N>::default())
    }
}

impl<'de, const N: usize> Deserialize<'de> for Pad<N> {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct V(usize);
        impl<'de> Visitor<'de> for V {
            type Value = ();
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{} unused bytes", self.0)
            }
            fn visit_newtype_struct<D: Deserializer<'de>>(self, d: D) -> Result<(), D::Error> {
                shortened::<u8, D>(self.0, d).map(drop)
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
                while seq.next_element::<u8>()?.is_some() {}
                Ok(())
            }
        }
        if d.is_human_readable() {
            return d.deserialize_ignored_any(IgnoredAny).map(|_| Pad);
        }
        d.deserialize_newtype_struct(PAD, V(N)).map(|()| Pad)
    }
}

/// A deadline in nanoseconds of the clock that the device uses; `None` is a timer that is not
/// armed. Eight bytes, all ones when not armed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Timer(pub Option<i64>);

impl Serialize for Timer {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        if s.is_human_readable() {
            return self.0.serialize(s);
        }
        s.serialize_newtype_struct(TIMER, &self.0.unwrap_or(-1))
    }
}

impl<'de> Deserialize<'de> for Timer {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(rename = "@timer")]
        struct Raw(i64);
        if d.is_human_readable() {
            return Option::deserialize(d).map(Timer);
        }
        let Raw(ns) = Raw::deserialize(d)?;
        Ok(Timer((ns != -1).then_some(ns)))
    }
}

/// Exactly `N` elements, on the heap. On the wire: the elements, no length.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FixedVec<T, const N: usize>(Vec<T>);

impl<T: Default + Clone, const N: usize> Default for FixedVec<T, N> {
    fn default() -> Self {
        Self(vec![T::default(); N])
    }
}

impl<T, const N: usize> FixedVec<T, N> {
    /// The elements `f(0)` to `f(N - 1)`.
    pub fn from_fn(f: impl FnMut(usize) -> T) -> Self {
        Self((0..N).map(f).collect())
    }
}

impl<T, const N: usize> TryFrom<Vec<T>> for FixedVec<T, N> {
    type Error = usize;
    /// Fails with the length that was given when it is not `N`.
    fn try_from(v: Vec<T>) -> Result<Self, usize> {
        if v.len() == N { Ok(Self(v)) } else { Err(v.len()) }
    }
}

impl<T, const N: usize> Deref for FixedVec<T, N> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        &self.0
    }
}

impl<T, const N: usize> DerefMut for FixedVec<T, N> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.0
    }
}

impl<T: Serialize + PartialEq, const N: usize> Serialize for FixedVec<T, N> {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        let strides = !s.is_human_readable();
        let mut tuple = s.serialize_tuple(N)?;
        let mut rest = self.0.as_slice();
        while let Some((first, others)) = rest.split_first() {
            tuple.serialize_element(first)?;
            let same = |others: &[T]| others.iter().take_while(|other| *other == first).count();
            let same = if strides { same(others) } else { 0 };
            if same > 0 {
                tuple.serialize_element(&Again(u32::try_from(same).map_err(S::Error::custom)?))?;
            }
            rest = others.get(same..).unwrap_or_default();
        }
        tuple.end()
    }
}

/// The element before so many times more.
pub(super) struct Again(pub(super) u32);

impl Serialize for Again {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_unit_variant(AGAIN, self.0, "")
    }
}

/// What a [`FixedVec`] is read as.
pub(super) enum Told<T> {
    /// An element.
    One(T),
    /// So many of the next elements are the same as the one before.
    Same(usize),
}

impl<T> From<T> for Told<T> {
    fn from(element: T) -> Self {
        Self::One(element)
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Told<T> {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct V<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for V<T> {
            type Value = Told<T>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an element, or how many are the same as the one before")
            }
            fn visit_some<D: Deserializer<'de>>(self, d: D) -> Result<Told<T>, D::Error> {
                T::deserialize(d).map(Told::One)
            }
            fn visit_u64<E: serde::de::Error>(self, times: u64) -> Result<Told<T>, E> {
                usize::try_from(times).map(Told::Same).map_err(E::custom)
            }
        }
        d.deserialize_option(V(PhantomData))
    }
}

impl<'de, T: Deserialize<'de> + Clone, const N: usize> Deserialize<'de> for FixedVec<T, N> {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let mut elements = shortened::<T, D>(N, d)?;
        if let Some(last) = elements.last().cloned() {
            elements.resize(N, last);
        }
        Ok(Self(elements))
    }
}

/// A count of type `C` (`u8`, `u16`, `u32` or `i32`) followed by that many elements, at most
/// `MAX`; a larger count is refused before anything is allocated.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Counted<C, T, const MAX: usize>(pub Vec<T>, PhantomData<C>);

impl<C, T, const MAX: usize> Default for Counted<C, T, MAX> {
    fn default() -> Self {
        Self(Vec::new(), PhantomData)
    }
}

impl<C, T, const MAX: usize> From<Vec<T>> for Counted<C, T, MAX> {
    fn from(v: Vec<T>) -> Self {
        Self(v, PhantomData)
    }
}

impl<C, T, const MAX: usize> Serialize for Counted<C, T, MAX>
where
    C: Serialize + TryFrom<usize>,
    T: Serialize,
{
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        if s.is_human_readable() && self.0.len() <= MAX {
            return s.collect_seq(&self.0);
        }
        write_counted::<C, ElementsSeed<T>, S>(self.0.len(), MAX, &Elements(&self.0), s)
    }
}

/// Writes a count of type `C`, and what it counts.
pub(super) fn write_counted<C, L, S>(
    len: usize,
    max: usize,
    list: &impl Serialize,
    s: S,
) -> Result<S::Ok, S::Error>
where
    C: Serialize + TryFrom<usize>,
    L: List,
    S: Serializer,
{
    use serde::ser::SerializeTupleStruct;
    if len > max {
        return Err(S::Error::custom(too_many::<L>(len, max)));
    }
    let count =
        C::try_from(len).map_err(|_| S::Error::custom("the count does not fit its type"))?;
    let mut tuple = s.serialize_tuple_struct(COUNTED, 2)?;
    tuple.serialize_field(&count)?;
    tuple.serialize_field(list)?;
    tuple.end()
}

/// What reads so many of something.
pub(super) trait List: From<usize> {
    /// What they are called.
    const NAME: &'static str;
}

fn too_many<L: List>(count: usize, max: usize) -> String {
    format!("{count} {}, at most {max}", L::NAME)
}

/// Reads a count of type `C`, at most `MAX`, and then what an `L` made of it reads.
pub(super) struct CountThen<C, L, const MAX: usize>(PhantomData<(C, L)>);

impl<C, L, const MAX: usize> CountThen<C, L, MAX> {
    pub(super) fn new() -> Self {
        Self(PhantomData)
    }
}

impl<'de, C, L, const MAX: usize> Visitor<'de> for CountThen<C, L, MAX>
where
    C: Deserialize<'de> + TryInto<usize>,
    L: List + serde::de::DeserializeSeed<'de>,
{
    type Value = L::Value;
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a count of at most {MAX} and that many {}", L::NAME)
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<L::Value, A::Error> {
        let count = seq
            .next_element::<C>()?
            .ok_or_else(|| A::Error::invalid_length(0, &self))?
            .try_into()
            .map_err(|_| A::Error::custom("a negative or oversized count"))?;
        if count > MAX {
            return Err(A::Error::custom(too_many::<L>(count, MAX)));
        }
        let list = seq.next_element_seed(L::from(count))?;
        list.ok_or_else(|| A::Error::invalid_length(1, &self))
    }
}

struct Elements<'a, T>(&'a [T]);

impl<T: Serialize> Serialize for Elements<'_, T> {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        let mut tuple = s.serialize_tuple(self.0.len())?;
        for element in self.0 {
            tuple.serialize_element(element)?;
        }
        tuple.end()
    }
}

struct ElementsSeed<T>(usize, PhantomData<T>);

impl<T> From<usize> for ElementsSeed<T> {
    fn from(count: usize) -> Self {
        Self(count, PhantomData)
    }
}

impl<T> List for ElementsSeed<T> {
    const NAME: &'static str = "elements";
}

impl<'de, T: Deserialize<'de>> serde::de::DeserializeSeed<'de> for ElementsSeed<T> {
    type Value = Vec<T>;
    fn deserialize<D: Deserializer<'de>>(self, d: D) -> Result<Vec<T>, D::Error> {
        d.deserialize_tuple(self.0, self)
    }
}

impl<'de, T: Deserialize<'de>> Visitor<'de> for ElementsSeed<T> {
    type Value = Vec<T>;
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} elements", self.0)
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Vec<T>, A::Error> {
        let mut v = Vec::new();
        while let Some(element) = seq.next_element()? {
            v.push(element);
        }
        if v.len() == self.0 { Ok(v) } else { Err(A::Error::invalid_length(v.len(), &self)) }
    }
}

/// A [`Counted`] where the format knows the length of a list, as JSON does.
struct Listed<C, T, const MAX: usize>(PhantomData<(C, T)>);

impl<'de, C, T: Deserialize<'de>, const MAX: usize> Visitor<'de> for Listed<C, T, MAX> {
    type Value = Counted<C, T, MAX>;
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "at most {MAX} elements")
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
        let mut v = Vec::new();
        while let Some(element) = seq.next_element()? {
            if v.len() == MAX {
                return Err(A::Error::custom(format!("more than {MAX} elements")));
            }
            v.push(element);
        }
        Ok(Counted::from(v))
    }
}

impl<'de, C, T, const MAX: usize> Deserialize<'de> for Counted<C, T, MAX>
where
    C: Deserialize<'de> + TryInto<usize>,
    T: Deserialize<'de>,
{
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        if d.is_human_readable() {
            return d.deserialize_seq(Listed(PhantomData));
        }
        let visitor = CountThen::<C, ElementsSeed<T>, MAX>::new();
        d.deserialize_tuple_struct(COUNTED, 2, visitor).map(Self::from)
    }
}

/// Text of at most 255 bytes behind a length byte.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Str8(pub String);

impl Serialize for Str8 {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        if s.is_human_readable() {
            return s.serialize_str(&self.0);
        }
        Counted::<u8, u8, 255>::from(self.0.as_bytes().to_vec()).serialize(s)
    }
}

impl<'de> Deserialize<'de> for Str8 {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        if d.is_human_readable() {
            return String::deserialize(d).map(Str8);
        }
        let bytes = Counted::<u8, u8, 255>::deserialize(d)?.0;
        String::from_utf8(bytes).map(Str8).map_err(|_| D::Error::custom("text that is not UTF-8"))
    }
}
