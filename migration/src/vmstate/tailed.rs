//! Arrays that have room for far more than there is.

use std::fmt;
use std::iter::repeat_n;
use std::marker::PhantomData;

use serde::de::{Deserialize, Deserializer, Error as _, SeqAccess, Visitor};
use serde::ser::{Error as _, Serialize, SerializeTuple, Serializer};

use super::types::{Again, FIXED, Told};

/// Exactly `N` elements of which all behind the first few are the same, and held once: QEMU's virtio devices
/// have 1024 queues each on the wire, and every page of memory that the others would take is touched for the
/// first time while the guest stands still. On the wire: the elements, no length.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tailed<T, const N: usize>(
    /// 1 to `N` elements, the last of which is that of all that follow, and not the one before it.
    Vec<T>,
);

impl<T: Default, const N: usize> Default for Tailed<T, N> {
    fn default() -> Self {
        Self(vec![T::default()])
    }
}

impl<T: PartialEq, const N: usize> Tailed<T, N> {
    /// At most `N` elements, and what all behind them are.
    pub fn new(first: impl IntoIterator<Item = T>, rest: T) -> Self {
        let mut all: Vec<T> = first.into_iter().take(N).collect();
        if all.len() < N {
            all.push(rest);
        }
        Self::shortened(all)
    }

    fn shortened(mut all: Vec<T>) -> Self {
        while let [.., a, b] = all.as_slice()
            && a == b
        {
            all.pop();
        }
        Self(all)
    }
}

impl<T, const N: usize> Tailed<T, N> {
    /// Element `index`; `None` from `N` on.
    pub fn get(&self, index: usize) -> Option<&T> {
        let held = self.0.get(index).or(self.0.last());
        held.filter(|_| index < N)
    }

    /// All `N`.
    pub fn iter(&self) -> impl Iterator<Item = &T> {
        (0..N).filter_map(|index| self.get(index))
    }
}

impl<T: Serialize + PartialEq, const N: usize> Serialize for Tailed<T, N> {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        let all = s.is_human_readable();
        let mut tuple = s.serialize_tuple(N)?;
        if all {
            self.iter().try_for_each(|element| tuple.serialize_element(element))?;
            return tuple.end();
        }
        self.0.iter().try_for_each(|element| tuple.serialize_element(element))?;
        let again = N.saturating_sub(self.0.len());
        if again > 0 {
            tuple.serialize_element(&Again(u32::try_from(again).map_err(S::Error::custom)?))?;
        }
        tuple.end()
    }
}

/// Reads the elements, each as an `E`, of which so many come.
struct Shortening<T, E>(usize, PhantomData<(T, E)>);

impl<'de, T, E> Visitor<'de> for Shortening<T, E>
where
    T: Clone,
    E: Deserialize<'de> + Into<Told<T>>,
{
    type Value = Vec<T>;
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} elements", self.0)
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Vec<T>, A::Error> {
        let mut held: Vec<T> = Vec::new();
        // How many more that are the same as the last one.
        let mut same: usize = 0;
        while let Some(told) = seq.next_element::<E>()? {
            match told.into() {
                Told::Same(_) if held.is_empty() => {
                    return Err(A::Error::custom("nothing to be the same as"));
                }
                Told::Same(times) => same = same.saturating_add(times),
                Told::One(element) => {
                    if let Some(last) = held.last().cloned() {
                        held.extend(repeat_n(last, same));
                    }
                    same = 0;
                    held.push(element);
                }
            }
            if held.len().saturating_add(same) > self.0 {
                return Err(A::Error::custom(format!("more than {} elements", self.0)));
            }
        }
        let len = held.len().saturating_add(same);
        if len == self.0 { Ok(held) } else { Err(A::Error::invalid_length(len, &self)) }
    }
}

impl<'de, T, const N: usize> Deserialize<'de> for Tailed<T, N>
where
    T: Deserialize<'de> + Clone + PartialEq,
{
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        shortened::<T, D>(N, d).map(Self::shortened)
    }
}

/// Reads `len` elements of an array; those at its end that are said to be the same as the last are left out. How
/// many there are is not part of the type, lest there be one of these for each length.
pub(super) fn shortened<'de, T, D>(len: usize, d: D) -> Result<Vec<T>, D::Error>
where
    T: Deserialize<'de> + Clone,
    D: Deserializer<'de>,
{
    if d.is_human_readable() {
        return d.deserialize_tuple(len, Shortening::<T, T>(len, PhantomData));
    }
    d.deserialize_tuple_struct(FIXED, len, Shortening::<T, Told<T>>(len, PhantomData))
}
