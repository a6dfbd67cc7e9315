//! What the walks over a declaration share: leaves, groups, the path to the current field, and
//! what can go wrong on the way.
//!
//! Writing, describing, reading and tracing a layout are the same walk over the same declaration;
//! only what happens at each leaf differs.

use std::fmt;
use std::io;

use super::types::{COUNTED, PAD, TIMER};
use super::{SUBSECTIONS, StateError};

/// How deeply declarations may nest. QEMU's deepest section has six levels; the limit is there for
/// types that contain themselves.
pub(super) const MAX_DEPTH: usize = 32;

/// The byte in front of a subsection.
pub const SUBSECTION: u8 = 0x05;

/// A value that is not made of others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Leaf {
    Bool,
    U8,
    U16,
    U32,
    U64,
    I8,
    I16,
    I32,
    I64,
}

impl Leaf {
    /// What QEMU's description calls it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Leaf::Bool => "bool",
            Leaf::U8 => "uint8",
            Leaf::U16 => "uint16",
            Leaf::U32 => "uint32",
            Leaf::U64 => "uint64",
            Leaf::I8 => "int8",
            Leaf::I16 => "int16",
            Leaf::I32 => "int32",
            Leaf::I64 => "int64",
        }
    }

    /// Bytes on the wire.
    pub(super) fn size(self) -> u64 {
        match self {
            Leaf::Bool | Leaf::U8 | Leaf::I8 => 1,
            Leaf::U16 | Leaf::I16 => 2,
            Leaf::U32 | Leaf::I32 => 4,
            Leaf::U64 | Leaf::I64 => 8,
        }
    }
}

/// Something that is made of parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Group {
    Struct(&'static str),
    Tuple,
    Counted,
    Pad,
    Timer,
    Subsections,
    /// One subsection that is present, with its name on the wire.
    Subsection(&'static str, u32),
}

impl Group {
    /// The group behind a serde struct of this name.
    pub(super) fn of_struct(name: &'static str) -> Self {
        if name == SUBSECTIONS { Group::Subsections } else { Group::Struct(name) }
    }

    /// The group behind a serde tuple struct of this name.
    pub(super) fn of_tuple_struct(name: &'static str) -> Self {
        if name == COUNTED { Group::Counted } else { Group::Tuple }
    }

    /// The group behind a serde newtype, if it is one that means something.
    pub(super) fn of_newtype(name: &'static str) -> Option<Self> {
        match name {
            PAD => Some(Group::Pad),
            TIMER => Some(Group::Timer),
            _ => None,
        }
    }

    /// What the path shows for part `index` of this group.
    pub(super) fn step(self, index: usize) -> Step {
        match (self, index) {
            (Group::Counted, 0) => Step::Field("count"),
            (Group::Counted, _) => Step::Hidden,
            _ => Step::Index(index),
        }
    }
}

/// `name@N` as its name and `N`.
pub(super) fn split_version(name: &str) -> (&str, Option<u32>) {
    match name.rsplit_once('@') {
        Some((bare, version)) => match version.parse() {
            Ok(version) => (bare, Some(version)),
            Err(_) => (name, None),
        },
        None => (name, None),
    }
}

/// One step from a value to one of its parts.
#[derive(Debug, Clone)]
pub(super) enum Step {
    Root(String),
    Field(&'static str),
    Index(usize),
    Hidden,
}

/// Where a walk stands.
#[derive(Debug, Default)]
pub(super) struct Path(Vec<Step>);

impl Path {
    pub(super) fn rooted(root: String) -> Self {
        Self(vec![Step::Root(root)])
    }
    pub(super) fn push(&mut self, step: Step) {
        self.0.push(step);
    }
    pub(super) fn pop(&mut self) {
        self.0.pop();
    }
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut any = false;
        for step in &self.0 {
            let dot = if any { "." } else { "" };
            match step {
                Step::Root(name) if name.is_empty() => continue,
                Step::Root(name) => write!(f, "{dot}{name}")?,
                Step::Field(name) => write!(f, "{dot}{}", split_version(name).0)?,
                Step::Index(index) => write!(f, "[{index}]")?,
                Step::Hidden => continue,
            }
            any = true;
        }
        if any { Ok(()) } else { f.write_str("the section itself") }
    }
}

/// What stopped a walk.
#[derive(Debug)]
pub(super) enum Fault {
    /// A problem whose place is not known yet.
    Plain(String),
    /// A problem at a place.
    Placed { path: String, offset: u64, problem: String },
    /// The source failed.
    Io { offset: u64, source: io::Error },
    /// A subsection is newer than this side knows.
    Version { subsection: &'static str, found: u32, max: u32 },
    /// A subsection came again: the walk starts over and passes the first one by.
    Again,
}

impl Fault {
    /// The fault with its place, unless it has one already.
    pub(super) fn at(self, path: &Path, offset: u64) -> Self {
        match self {
            Fault::Plain(problem) => Fault::Placed { path: path.to_string(), offset, problem },
            placed => placed,
        }
    }

    /// The fault as a reader's error.
    pub(super) fn reading(self, section: &str) -> StateError {
        let section = section.to_owned();
        match self {
            Fault::Placed { path, offset, problem } => {
                StateError::Malformed { section, path, offset, problem }
            }
            Fault::Io { offset, source } => StateError::Io { section, offset, source },
            Fault::Version { subsection, found, max } => StateError::Version {
                section: format!("{section}, subsection {subsection}"),
                found,
                min: 0,
                max,
            },
            other @ (Fault::Plain(_) | Fault::Again) => StateError::Malformed {
                section,
                path: String::new(),
                offset: 0,
                problem: other.to_string(),
            },
        }
    }

    /// The fault as a writer's error.
    pub(super) fn writing(self, section: &str) -> StateError {
        let section = section.to_owned();
        match self {
            Fault::Placed { path, problem, .. } => {
                StateError::Unwritable { section, path, problem }
            }
            other => {
                StateError::Unwritable { section, path: String::new(), problem: other.to_string() }
            }
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fault::Plain(problem) => f.write_str(problem),
            Fault::Placed { path, problem, .. } => write!(f, "{path}: {problem}"),
            Fault::Io { source, .. } => write!(f, "{source}"),
            Fault::Version { subsection, found, max } => {
                write!(f, "{subsection}: version {found} is not supported, at most {max}")
            }
            Fault::Again => f.write_str("a subsection came twice"),
        }
    }
}

impl std::error::Error for Fault {}

impl serde::ser::Error for Fault {
    fn custom<T: fmt::Display>(msg: T) -> Self {
        Fault::Plain(msg.to_string())
    }
}

impl serde::de::Error for Fault {
    fn custom<T: fmt::Display>(msg: T) -> Self {
        Fault::Plain(msg.to_string())
    }
}
