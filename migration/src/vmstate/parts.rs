//! Reading: the parts of a group, one after the other.
//!
//! One way through arrays, and one through structs and sets of subsections: with two of them, all that is
//! generated for a declaration would be there twice.

use serde::de::value::UsizeDeserializer;
use serde::de::{DeserializeSeed, IntoDeserializer, MapAccess, SeqAccess};

use super::de::{Choice, Found, Names, Set, Walker};
use super::walk::{Fault, Group, Step, split_version};

/// With fewer elements to come, whether they are all the same is not looked at.
const WORTH_LOOKING: usize = 8;

/// The elements of a tuple or array.
pub(super) struct Elements<'w, 'a> {
    walker: &'w mut Walker<'a>,
    group: Group,
    index: usize,
    len: usize,
    /// Long stretches of some arrays are often all the same: virtio's sections have an element for each of a
    /// thousand queues that nobody has. Each element of such an array is an `Option` to who reads it.
    alike: Option<Alike>,
    /// Where the element that is being read begins.
    start: u64,
}

#[derive(Debug, Default)]
struct Alike {
    /// How many of the next elements are known to be the same as the one before.
    same: usize,
    /// The walker's count when the element that is being read began.
    sizes_vary: u64,
}

impl<'w, 'a> Elements<'w, 'a> {
    pub(super) fn new(walker: &'w mut Walker<'a>, group: Group, len: usize, alike: bool) -> Self {
        let alike = alike.then(Alike::default);
        Self { walker, group, index: 0, len, alike, start: 0 }
    }

    /// Whether there is another element, which begins then.
    fn enter(&mut self) -> bool {
        if self.index >= self.len {
            return false;
        }
        let step = self.group.step(self.index);
        let mut taken = 1;
        if let Some(alike) = &mut self.alike {
            alike.sizes_vary = self.walker.sizes_vary;
            self.walker.choice = match std::mem::take(&mut alike.same) {
                0 => Choice::Present,
                same => {
                    taken = same;
                    Choice::Same(same)
                }
            };
        }
        self.index = self.index.saturating_add(taken);
        self.start = self.walker.enter(step);
        true
    }

    /// The element has been read.
    fn leave(&mut self) -> Result<(), Fault> {
        let Some(alike) = &mut self.alike else {
            self.walker.leave();
            return Ok(());
        };
        self.walker.chosen().map_err(|fault| self.walker.placed(fault, self.start))?;
        self.walker.leave();
        // Nothing is taken while elements are told to be the same, and nothing is found to repeat then.
        let left = self.len.saturating_sub(self.index);
        if left >= WORTH_LOOKING && self.walker.sizes_vary == alike.sizes_vary {
            alike.same = self.walker.repeats(self.start, left)?;
        }
        Ok(())
    }
}

impl<'de> SeqAccess<'de> for Elements<'_, '_> {
    type Error = Fault;

    fn next_element_seed<T: DeserializeSeed<'de>>(
        &mut self,
        seed: T,
    ) -> Result<Option<T::Value>, Fault> {
        if !self.enter() {
            return Ok(None);
        }
        let element = seed.deserialize(&mut *self.walker);
        let element = element.map_err(|fault| self.walker.placed(fault, self.start))?;
        self.leave()?;
        Ok(Some(element))
    }
}

/// The fields of a struct, as far as the version has them, or the subsections that follow, in the order in
/// which they come.
pub(super) struct Members<'w, 'a> {
    walker: &'w mut Walker<'a>,
    names: Names,
    /// The next field's place among the names.
    index: usize,
    /// The field that is being read.
    name: &'static str,
    /// Where what is being read begins.
    start: u64,
    subsections: Option<Subsections>,
}

struct Subsections {
    set: Set,
    /// The one that is being read.
    found: Option<Found>,
    /// The version of what the set belongs to.
    outer: u32,
}

impl<'w, 'a> Members<'w, 'a> {
    pub(super) fn new(walker: &'w mut Walker<'a>, group: Group, names: Names) -> Self {
        let subsections = (group == Group::Subsections).then(|| {
            let set = Set { names, taken: Vec::new() };
            Subsections { set, found: None, outer: walker.version }
        });
        Self { walker, names, index: 0, name: "", start: 0, subsections }
    }

    /// The place among the names of what comes next.
    fn next(&mut self) -> Result<Option<usize>, Fault> {
        let Some(Subsections { set, found, .. }) = &mut self.subsections else {
            let version = self.walker.version;
            let rest = self.names.get(self.index..).unwrap_or_default();
            let present = |name: &&str| split_version(name).1.is_none_or(|since| since <= version);
            let Some(passed) = rest.iter().position(present) else { return Ok(None) };
            let index = self.index.saturating_add(passed);
            self.name = self.names.get(index).copied().unwrap_or_default();
            self.index = index.saturating_add(1);
            return Ok(Some(index));
        };
        *found = self.walker.subsection(set)?;
        Ok(found.as_ref().map(|found| found.index))
    }

    /// What comes next begins.
    fn enter(&mut self) -> Result<(), Fault> {
        let Some(Subsections { set, found, outer }) = &mut self.subsections else {
            self.walker.feed.name(self.name);
            self.start = self.walker.enter(Step::Field(self.name));
            return Ok(());
        };
        let Some(Found { name, version, .. }) = *found else {
            return Err(Fault::plain("a subsection was asked for twice".to_owned()));
        };
        let (bare, newest) = split_version(name);
        let newest = newest.unwrap_or(1);
        if version > newest {
            return Err(Fault::version(bare, version, newest));
        }
        self.start = self.walker.enter(Step::Field(name));
        let begun = self.walker.begin(Some(Group::Subsection(bare, newest)));
        begun.map_err(|fault| self.walker.placed(fault, self.start))?;
        *outer = std::mem::replace(&mut self.walker.version, version);
        self.walker.sets.push(set.names);
        self.walker.choice = Choice::Present;
        Ok(())
    }

    /// What was next has been read.
    fn leave(&mut self) -> Result<(), Fault> {
        if let Some(Subsections { set, found, outer }) = &mut self.subsections {
            self.walker.chosen().map_err(|fault| self.walker.placed(fault, self.start))?;
            self.walker.sets.pop();
            self.walker.version = *outer;
            if let Some(found) = found.take() {
                let (bare, newest) = split_version(found.name);
                self.walker.end(Some(Group::Subsection(bare, newest.unwrap_or(1))));
                set.taken.push((found.name, found.start, self.walker.offset()));
            }
        }
        self.walker.leave();
        Ok(())
    }
}

impl<'de> MapAccess<'de> for Members<'_, '_> {
    type Error = Fault;

    fn next_key_seed<K: DeserializeSeed<'de>>(
        &mut self,
        seed: K,
    ) -> Result<Option<K::Value>, Fault> {
        let Some(index) = self.next()? else { return Ok(None) };
        // A derived struct knows its fields by their places too, which are compared faster than names.
        let key: UsizeDeserializer<Fault> = index.into_deserializer();
        seed.deserialize(key).map(Some)
    }

    fn next_value_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<T::Value, Fault> {
        self.enter()?;
        let value = seed.deserialize(&mut *self.walker);
        let value = value.map_err(|fault| self.walker.placed(fault, self.start))?;
        self.leave()?;
        Ok(value)
    }
}
