//! Reading a section from the bytes of a stream.

use std::io;

use serde::de::DeserializeOwned;

use super::de::{Feed, Found, Names, Set, walk};
use super::walk::{Fault, Group, Leaf, SUBSECTION, split_version};
use super::{ByteSource, SectionId, StateError, VmState};

/// How often subsections may come again inside one value. QEMU never repeats one, and takes it
/// when somebody else does.
const MAX_REPEATS: usize = 16;
/// How far ahead a source can be looked into at once, in bytes ([`ByteSource::peek`]).
const MAX_PEEK: usize = 512;

/// Reads the body of a section whose state is a `T`.
///
/// The version must be one of `T::MIN_VERSION..=T::VERSION`. Fields named `name@N` are left at
/// their default below version `N`. Subsections come in any order; of a repeated one the last
/// counts; one that nobody here knows is an error that names it.
pub fn from_source<T: VmState>(
    section: &SectionId,
    version: u32,
    source: &mut dyn ByteSource,
) -> Result<T, StateError> {
    check_version(section, version, T::MIN_VERSION, T::VERSION)?;
    let mut decoder = Decoder::new(section, version, source);
    let state = decoder.get("")?;
    decoder.finish()?;
    Ok(state)
}

/// Refuses a version outside `min..=max`.
pub fn check_version(
    section: &SectionId,
    found: u32,
    min: u32,
    max: u32,
) -> Result<(), StateError> {
    if (min..=max).contains(&found) {
        return Ok(());
    }
    Err(StateError::Version { section: section.to_string(), found, min, max })
}

/// Reads a section value by value, for layouts that depend on more than the type.
pub struct Decoder<'a> {
    section: String,
    version: u32,
    source: &'a mut dyn ByteSource,
}

impl<'a> Decoder<'a> {
    /// Reads `section`, sent in this version, from the next byte of `source` on.
    pub fn new(section: &SectionId, version: u32, source: &'a mut dyn ByteSource) -> Self {
        Self { section: section.to_string(), version, source }
    }

    /// The next value; errors call it `field`. A struct of subsections may stand by itself.
    pub fn get<T: DeserializeOwned>(&mut self, field: &str) -> Result<T, StateError> {
        self.get_at(field.to_owned())
    }

    /// The next `n` values; errors call them `field[0]`, `field[1]`, …
    ///
    /// `n` is the caller's to bound.
    pub fn get_seq<T: DeserializeOwned>(
        &mut self,
        field: &str,
        n: usize,
    ) -> Result<Vec<T>, StateError> {
        (0..n).map(|index| self.get_at(format!("{field}[{index}]"))).collect()
    }

    /// The next `n` bytes.
    ///
    /// `n` is the caller's to bound.
    pub fn get_bytes(&mut self, n: usize) -> Result<Vec<u8>, StateError> {
        let offset = self.source.offset();
        let mut bytes = vec![0; n];
        let io = |source| Fault::io(offset, source).reading(&self.section);
        self.source.read_exact(&mut bytes).map_err(io)?;
        Ok(bytes)
    }

    /// An error about the value `field` that has just been read, for a count or size that decides
    /// what follows and cannot be right.
    pub fn malformed(&self, field: &str, problem: impl std::fmt::Display) -> StateError {
        StateError::Malformed {
            section: self.section.clone(),
            path: field.to_owned(),
            offset: self.source.offset(),
            problem: problem.to_string(),
        }
    }

    /// Says that the section is complete: a subsection that still follows is one that nobody
    /// knows.
    pub fn finish(self) -> Result<(), StateError> {
        let start = self.source.offset();
        let mut input = Input::new(self.source);
        let problem = match input.next_name(&[]) {
            Ok(Some(name)) => unknown(&name),
            Ok(None) => match input.peek(1) {
                Ok(next) if next == [SUBSECTION] => "a subsection's name breaks off".to_owned(),
                Ok(_) => return Ok(()),
                Err(fault) => return Err(fault.reading(&self.section)),
            },
            Err(fault) => return Err(fault.reading(&self.section)),
        };
        let path = "the section itself".to_owned();
        Err(StateError::Malformed { section: self.section, path, offset: start, problem })
    }

    fn get_at<T: DeserializeOwned>(&mut self, root: String) -> Result<T, StateError> {
        let mut input = Input::new(self.source);
        loop {
            match walk(&mut input, self.version, root.clone()) {
                Err(fault) if fault.is_again() => input.rewind(),
                Err(fault) => return Err(fault.reading(&self.section)),
                Ok(value) => return Ok(value),
            }
        }
    }
}

fn unknown(name: &[u8]) -> String {
    format!("the subsection \"{}\" is not known here", name.escape_ascii())
}

/// The bytes of one value. They are kept while it is being read, because a subsection that comes
/// again can only be honoured by reading the value anew without the first one.
struct Input<'a> {
    source: &'a mut dyn ByteSource,
    log: Vec<u8>,
    /// How much of `log` has been read since the last rewind.
    at: usize,
    /// The stream's offset where `log` begins.
    base: u64,
    /// Subsections to pass by: the offsets where they begin and end.
    passed_by: Vec<(u64, u64)>,
}

impl<'a> Input<'a> {
    fn new(source: &'a mut dyn ByteSource) -> Self {
        let base = source.offset();
        Self { source, log: Vec::new(), at: 0, base, passed_by: Vec::new() }
    }

    fn rewind(&mut self) {
        self.at = 0;
    }

    fn io(&self, source: io::Error) -> Fault {
        Fault::io(self.offset(), source)
    }

    /// The next bytes of a leaf. How many is known where this is compiled, which spares what it takes to move
    /// any number of them, in all but the first of what reads them.
    fn fill_leaf<const N: usize>(&mut self, bytes: &mut [u8; N]) -> Result<(), Fault> {
        if self.at != self.log.len() {
            return self.fill(bytes);
        }
        if let Err(e) = self.source.read_exact(bytes) {
            return Err(self.io(e));
        }
        self.log.extend_from_slice(bytes);
        self.at = self.log.len();
        Ok(())
    }

    fn fill(&mut self, bytes: &mut [u8]) -> Result<(), Fault> {
        let logged = self.log.get(self.at..).unwrap_or_default();
        let n = logged.len().min(bytes.len());
        let (old, new) = bytes.split_at_mut(n);
        old.copy_from_slice(logged.split_at(n).0);
        if !new.is_empty() {
            if let Err(e) = self.source.read_exact(new) {
                return Err(self.io(e));
            }
            self.log.extend_from_slice(new);
        }
        self.at = self.at.saturating_add(bytes.len());
        Ok(())
    }

    /// The next `n` bytes (`n` at most 257) without taking them, or what there is of them.
    fn peek(&mut self, n: usize) -> Result<Vec<u8>, Fault> {
        let mut bytes: Vec<u8> =
            self.log.get(self.at..).unwrap_or_default().iter().copied().take(n).collect();
        let missing = n.saturating_sub(bytes.len());
        if missing > 0 {
            match self.source.peek(missing) {
                Ok(next) => bytes.extend(next.iter().take(missing)),
                Err(e) => return Err(self.io(e)),
            }
        }
        Ok(bytes)
    }

    fn skip_to(&mut self, end: u64) -> Result<(), Fault> {
        while self.offset() < end {
            self.fill(&mut [0])?;
        }
        Ok(())
    }

    /// The name of the subsection that follows, if its name begins with one of `starts`, or any
    /// name if there are none.
    ///
    /// A field of an outer struct may follow instead, with any bytes; so no more is asked of the
    /// source than what the bytes before give reason to, lest it wait for bytes that never come.
    fn next_name(&mut self, starts: &[&str]) -> Result<Option<Vec<u8>>, Fault> {
        if self.peek(1)? != [SUBSECTION] {
            return Ok(None);
        }
        let shortest = starts.iter().map(|start| start.len()).min().unwrap_or(0);
        let [_, len] = self.peek(2)?[..] else { return Ok(None) };
        let len = usize::from(len);
        if len < shortest {
            return Ok(None);
        }
        let fits = |name: &[u8]| {
            starts.is_empty()
                || starts.iter().any(|start| {
                    let n = start.len().min(name.len());
                    start.as_bytes().get(..n) == name.get(..n)
                })
        };
        for n in [shortest, len] {
            let bytes = self.peek(n.saturating_add(2))?;
            let name = bytes.get(2..).unwrap_or_default();
            if !fits(name) {
                return Ok(None);
            }
            if name.len() < n {
                // The stream ends here. What is left of a name is no field either.
                let cut = !name.is_empty();
                return if cut {
                    Err(self.io(io::ErrorKind::UnexpectedEof.into()))
                } else {
                    Ok(None)
                };
            }
            if n == len {
                return Ok(Some(name.to_vec()));
            }
        }
        Ok(None)
    }
}

/// What every name of the owner's subsections begins with, slash included.
fn prefix(name: &str) -> Option<&str> {
    name.split_inclusive('/').next().filter(|first| first.ends_with('/'))
}

/// Whether `name` is one of `names`, or looks like one of its owner's.
fn claims(names: Names, name: &[u8]) -> bool {
    names.iter().any(|known| {
        split_version(known).0.as_bytes() == name
            || prefix(known).is_some_and(|prefix| name.starts_with(prefix.as_bytes()))
    })
}

impl Feed for Input<'_> {
    fn leaf(&mut self, _: Leaf, bytes: &mut [u8]) -> Result<(), Fault> {
        if let Ok(bytes) = <&mut [u8; 4]>::try_from(&mut *bytes) {
            self.fill_leaf(bytes)
        } else if let Ok(bytes) = <&mut [u8; 8]>::try_from(&mut *bytes) {
            self.fill_leaf(bytes)
        } else if let Ok(bytes) = <&mut [u8; 1]>::try_from(&mut *bytes) {
            self.fill_leaf(bytes)
        } else {
            self.fill(bytes)
        }
    }
    fn bytes(&mut self, bytes: &mut [u8]) -> Result<(), Fault> {
        self.fill(bytes)
    }
    fn open(&mut self, _: Group) {}
    fn name(&mut self, _: &'static str) {}
    fn close(&mut self) {}

    fn offset(&self) -> u64 {
        self.base.saturating_add(u64::try_from(self.at).unwrap_or(u64::MAX))
    }

    fn repeats(&mut self, len: u64, times: usize) -> Result<usize, Fault> {
        let Ok(len @ 1..=MAX_PEEK) = usize::try_from(len) else { return Ok(0) };
        let before = self.log.len().checked_sub(len).filter(|_| self.at == self.log.len());
        let Some(before) = before else { return Ok(0) };
        let mut found = 0usize;
        while found < times {
            let fit = MAX_PEEK.checked_div(len).unwrap_or(0);
            let several = fit.min(times.saturating_sub(found));
            let ahead = self.source.peek(several.saturating_mul(len));
            let offset = self.base.saturating_add(u64::try_from(self.at).unwrap_or(u64::MAX));
            let ahead = ahead.map_err(|source| Fault::io(offset, source))?;
            let last = self.log.get(before..before.saturating_add(len)).unwrap_or_default();
            let same = ahead.chunks_exact(len).take_while(|next| *next == last).count();
            if same > 0 {
                let mut passed = [0; MAX_PEEK];
                let passed = passed.get_mut(..same.saturating_mul(len)).unwrap_or_default();
                self.fill(passed)?;
                found = found.saturating_add(same);
            }
            if same < several {
                break;
            }
        }
        Ok(found)
    }

    fn subsection(&mut self, set: &mut Set, outer: &[Names]) -> Result<Option<Found>, Fault> {
        let starts: Vec<&str> =
            set.names.iter().map(|name| prefix(name).unwrap_or(split_version(name).0)).collect();
        if starts.is_empty() {
            return Ok(None);
        }
        loop {
            let start = self.offset();
            if let Some(&(_, end)) = self.passed_by.iter().find(|(from, _)| *from == start) {
                self.skip_to(end)?;
                continue;
            }
            let Some(name) = self.next_name(&starts)? else { return Ok(None) };
            let mut names = set.names.iter().enumerate();
            let known = names.find(|(_, known)| split_version(known).0.as_bytes() == name);
            let Some((index, known)) = known else {
                let foreign = !claims(set.names, &name);
                if foreign || outer.iter().any(|names| claims(names, &name)) {
                    return Ok(None);
                }
                return Err(Fault::plain(unknown(&name)));
            };
            if let Some(&(_, from, to)) = set.taken.iter().find(|(taken, ..)| taken == known) {
                if self.passed_by.len() >= MAX_REPEATS {
                    return Err(Fault::plain(format!("more than {MAX_REPEATS} repetitions")));
                }
                self.passed_by.push((from, to));
                return Err(Fault::again());
            }
            // Type byte, length byte, name, version.
            self.skip_to(
                start.saturating_add(2).saturating_add(u64::try_from(name.len()).unwrap_or(0)),
            )?;
            let mut version = [0; 4];
            self.fill(&mut version)?;
            let version = u32::from_be_bytes(version);
            return Ok(Some(Found { name: known, index, version, start }));
        }
    }
}

/// A byte source over bytes that are in memory already.
#[derive(Debug, Clone)]
pub struct SliceSource<'a> {
    rest: &'a [u8],
    offset: u64,
}

impl<'a> SliceSource<'a> {
    /// Reads `bytes`, which stand at offset 0.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self::at(bytes, 0)
    }

    /// Reads `bytes`, which stand at `offset` of their stream.
    pub fn at(bytes: &'a [u8], offset: u64) -> Self {
        Self { rest: bytes, offset }
    }

    /// What has not been read.
    pub fn rest(&self) -> &'a [u8] {
        self.rest
    }
}

impl ByteSource for SliceSource<'_> {
    fn read_exact(&mut self, buf: &mut [u8]) -> io::Result<()> {
        let Some((taken, rest)) = self.rest.split_at_checked(buf.len()) else {
            return Err(io::ErrorKind::UnexpectedEof.into());
        };
        buf.copy_from_slice(taken);
        self.rest = rest;
        self.offset = self.offset.saturating_add(u64::try_from(buf.len()).unwrap_or(u64::MAX));
        Ok(())
    }
    fn peek(&mut self, n: usize) -> io::Result<&[u8]> {
        Ok(self.rest.get(..n).unwrap_or(self.rest))
    }
    fn offset(&self) -> u64 {
        self.offset
    }
}
