//! Arrays of bytes that are moved as a whole: a processor's extended state has thousands of them, and the guest waits.
//!
//! On the wire, and in descriptions and digests, they are what a [`FixedVec`](super::FixedVec) and a [`Counted`] of
//! `u8` are.

use std::fmt;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};

use serde::de::{DeserializeSeed, Error as _, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::types::{COUNTED, CountThen, Counted, List, write_counted};

/// The serde name by which the format recognises bytes that are read as a whole.
pub(super) const BYTES: &str = "@bytes";

/// A count of type `C` followed by that many bytes, at most `MAX`; a larger count is refused before anything is
/// allocated.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Blob<C, const MAX: usize>(pub Vec<u8>, PhantomData<C>);

impl<C, const MAX: usize> Default for Blob<C, MAX> {
    fn default() -> Self {
        Self(Vec::new(), PhantomData)
    }
}

impl<C, const MAX: usize> From<Vec<u8>> for Blob<C, MAX> {
    fn from(v: Vec<u8>) -> Self {
        Self(v, PhantomData)
    }
}

impl<C: Serialize + TryFrom<usize>, const MAX: usize> Serialize for Blob<C, MAX> {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        if s.is_human_readable() && self.0.len() <= MAX {
            return s.collect_seq(&self.0);
        }
        write_counted::<C, Length, S>(self.0.len(), MAX, &Whole(&self.0), s)
    }
}

impl<'de, C, const MAX: usize> Deserialize<'de> for Blob<C, MAX>
where
    C: Deserialize<'de> + TryInto<usize>,
{
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        if d.is_human_readable() {
            return Counted::<C, u8, MAX>::deserialize(d).map(|list| list.0.into());
        }
        d.deserialize_tuple_struct(COUNTED, 2, CountThen::<C, Length, MAX>::new()).map(Self::from)
    }
}

/// Exactly `N` bytes, on the heap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bytes<const N: usize>(Vec<u8>);

impl<const N: usize> Default for Bytes<N> {
    fn default() -> Self {
        Self(vec![0; N])
    }
}

impl<const N: usize> Bytes<N> {
    /// The bytes `f(0)` to `f(N - 1)`.
    pub fn from_fn(f: impl FnMut(usize) -> u8) -> Self {
        Self((0..N).map(f).collect())
    }
}

impl<const N: usize> TryFrom<Vec<u8>> for Bytes<N> {
    type Error = usize;
    /// Fails with the length that was given when it is not `N`.
    fn try_from(v: Vec<u8>) -> Result<Self, usize> {
        if v.len() == N { Ok(Self(v)) } else { Err(v.len()) }
    }
}

impl<const N: usize> Deref for Bytes<N> {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl<const N: usize> DerefMut for Bytes<N> {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
}

impl<const N: usize> Serialize for Bytes<N> {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        if s.is_human_readable() { s.collect_seq(&self.0) } else { Whole(&self.0).serialize(s) }
    }
}

impl<'de, const N: usize> Deserialize<'de> for Bytes<N> {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let bytes = match d.is_human_readable() {
            true => Vec::deserialize(d)?,
            false => Length(N).deserialize(d)?,
        };
        let len = bytes.len();
        Self::try_from(bytes).map_err(|_| D::Error::invalid_length(len, &Length(N)))
    }
}

/// Bytes for the format's writer.
struct Whole<'a>(&'a [u8]);

impl Serialize for Whole<'_> {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_bytes(self.0)
    }
}

/// So many bytes from the format's reader.
struct Length(usize);

impl From<usize> for Length {
    fn from(count: usize) -> Self {
        Self(count)
    }
}

impl List for Length {
    const NAME: &'static str = "bytes";
}

impl<'de> DeserializeSeed<'de> for Length {
    type Value = Vec<u8>;
    fn deserialize<D: Deserializer<'de>>(self, d: D) -> Result<Vec<u8>, D::Error> {
        d.deserialize_tuple_struct(BYTES, self.0, self)
    }
}

impl<'de> Visitor<'de> for Length {
    type Value = Vec<u8>;
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.0)
    }
    fn visit_byte_buf<E: serde::de::Error>(self, bytes: Vec<u8>) -> Result<Vec<u8>, E> {
        Ok(bytes)
    }
}
