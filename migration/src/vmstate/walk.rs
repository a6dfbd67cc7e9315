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
    // Most names have none, and each name in the way of a value is asked.
    if !name.as_bytes().last().is_some_and(u8::is_ascii_digit) {
        return (name, None);
    }
    match name.rsplit_once('@') {
        Some((bare, version)) => match version.parse() {
            Ok(version) => (bare, Some(version)),
            Err(_) => (name, None),
        },
        None => (name, None),
    }
}

/// One step from a value to one of its parts.
#[derive(Debug, Clone, Copy)]
pub(super) enum Step {
    Field(&'static str),
    Index(usize),
    Hidden,
}

/// Where a walk stands.
#[derive(Debug, Default)]
pub(super) struct Path {
    root: String,
    steps: Vec<Step>,
}

impl Path {
    pub(super) fn rooted(root: String) -> Self {
        Self { root, steps: Vec::new() }
    }
    pub(super) fn push(&mut self, step: Step) {
        self.steps.push(step);
    }
    pub(super) fn pop(&mut self) {
        self.steps.pop();
    }
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.root)?;
        let mut any = !self.root.is_empty();
        for step in &self.steps {
            let dot = if any { "." } else { "" };
            match step {
                Step::Field(name) => write!(f, "{dot}{}", split_version(name).0)?,
                Step::Index(index) => write!(f, "[{index}]")?,
                Step::Hidden => continue,
            }
            any = true;
        }
        if any { Ok(()) } else { f.write_str("the section itself") }
    }
}

/// What stopped a walk. Boxed, since every value on the way is passed along beside the room for one.
#[derive(Debug)]
pub(super) struct Fault(Box<Problem>);

#[derive(Debug)]
enum Problem {
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
    /// A problem whose place is not known yet.
    #[cold]
    pub(super) fn plain(problem: String) -> Self {
        Self(Box::new(Problem::Plain(problem)))
    }

    /// The source failed.
    #[cold]
    pub(super) fn io(offset: u64, source: io::Error) -> Self {
        Self(Box::new(Problem::Io { offset, source }))
    }

    /// A subsection is newer than this side knows.
    #[cold]
    pub(super) fn version(subsection: &'static str, found: u32, max: u32) -> Self {
        Self(Box::new(Problem::Version { subsection, found, max }))
    }

    /// A subsection came again.
    #[cold]
    pub(super) fn again() -> Self {
        Self(Box::new(Problem::Again))
    }

    /// Whether the walk starts over because a subsection came again.
    pub(super) fn is_again(&self) -> bool {
        matches!(*self.0, Problem::Again)
    }

    /// The fault with its place, unless it has one already.
    pub(super) fn at(self, path: &Path, offset: u64) -> Self {
        match *self.0 {
            Problem::Plain(problem) => {
                Self(Box::new(Problem::Placed { path: path.to_string(), offset, problem }))
            }
            placed => Self(Box::new(placed)),
        }
    }

    /// The fault as a reader's error.
    pub(super) fn reading(self, section: &str) -> StateError {
        let section = section.to_owned();
        match *self.0 {
            Problem::Placed { path, offset, problem } => {
                StateError::Malformed { section, path, offset, problem }
            }
            Problem::Io { offset, source } => StateError::Io { section, offset, source },
            Problem::Version { subsection, found, max } => StateError::Version {
                section: format!("{section}, subsection {subsection}"),
                found,
                min: 0,
                max,
            },
            other @ (Problem::Plain(_) | Problem::Again) => StateError::Malformed {
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
        match *self.0 {
            Problem::Placed { path, problem, .. } => {
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
        self.0.fmt(f)
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Problem::Plain(problem) => f.write_str(problem),
            Problem::Placed { path, problem, .. } => write!(f, "{path}: {problem}"),
            Problem::Io { source, .. } => write!(f, "{source}"),
            Problem::Version { subsection, found, max } => {
                write!(f, "{subsection}: version {found} is not supported, at most {max}")
            }
            Problem::Again => f.write_str("a subsection came twice"),
        }
    }
}

impl std::error::Error for Fault {}

impl serde::ser::Error for Fault {
    #[cold]
    fn custom<T: fmt::Display>(msg: T) -> Self {
        Fault::plain(msg.to_string())
    }
}

/// Beside `custom`, what derived code calls for each field, lest the making of a message stands in each place.
impl serde::de::Error for Fault {
    #[cold]
    fn custom<T: fmt::Display>(msg: T) -> Self {
        Fault::plain(msg.to_string())
    }
    #[cold]
    fn invalid_length(len: usize, expected: &dyn serde::de::Expected) -> Self {
        Fault::plain(format!("invalid length {len}, expected {expected}"))
    }
    #[cold]
    fn missing_field(field: &'static str) -> Self {
        Fault::plain(format!("missing field `{field}`"))
    }
    #[cold]
    fn duplicate_field(field: &'static str) -> Self {
        Fault::plain(format!("duplicate field `{field}`"))
    }
}
