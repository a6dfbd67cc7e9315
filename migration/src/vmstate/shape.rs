//! The shape of a section: what a walk saw, without the values.

use std::borrow::Cow;
use std::fmt;

use super::walk::{Group, Leaf};

/// What something looks like on the wire.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Shape {
    Leaf(Leaf),
    Group(Group, Vec<Part>),
    /// Bytes of a type that only the description names.
    Opaque(String, u64),
}

/// A part of a group: a field with its name, or so many equal elements in a row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Part {
    /// `@N` included; empty for what has no name.
    pub(super) name: Cow<'static, str>,
    pub(super) shape: Shape,
    pub(super) times: u64,
}

impl Shape {
    /// Bytes on the wire.
    pub(super) fn size(&self) -> u64 {
        match self {
            Shape::Leaf(leaf) => leaf.size(),
            Shape::Opaque(_, size) => *size,
            Shape::Group(group, parts) => {
                let header = match group {
                    // Type byte, length byte, name, version.
                    Group::Subsection(name, _) => {
                        u64::try_from(name.len()).unwrap_or(u64::MAX).saturating_add(6)
                    }
                    _ => 0,
                };
                parts.iter().fold(header, |size, part| {
                    size.saturating_add(part.shape.size().saturating_mul(part.times))
                })
            }
        }
    }
}

/// The canonical text that a layout's digest is made of. Names of Rust types are not in it.
impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (group, parts) = match self {
            Shape::Leaf(leaf) => return f.write_str(leaf.name()),
            Shape::Opaque(name, size) => return write!(f, "{name} {size}"),
            Shape::Group(group, parts) => (group, parts),
        };
        match group {
            Group::Pad => return write!(f, "pad {}", self.size()),
            Group::Timer => return f.write_str("timer"),
            Group::Struct(_) => {}
            Group::Tuple => f.write_str("array")?,
            Group::Counted => f.write_str("counted")?,
            Group::Subsections => f.write_str("subsections")?,
            Group::Subsection(name, version) => write!(f, "{name} version {version}")?,
        }
        f.write_str("{")?;
        for (index, part) in parts.iter().enumerate() {
            let comma = if index > 0 { ", " } else { "" };
            write!(f, "{comma}{}", part.name)?;
            if !part.name.is_empty() {
                f.write_str(": ")?;
            }
            if part.times > 1 {
                write!(f, "{} × ", part.times)?;
            }
            write!(f, "{}", part.shape)?;
        }
        f.write_str("}")
    }
}

/// Collects the shape of what is walked over.
#[derive(Debug)]
pub(super) struct Builder {
    /// The groups that are open, outermost first, under one that is never closed.
    open: Vec<Frame>,
}

#[derive(Debug)]
struct Frame {
    group: Group,
    /// What the next part is called.
    next: Cow<'static, str>,
    parts: Vec<Part>,
}

impl Frame {
    fn new(group: Group) -> Self {
        Self { group, next: Cow::Borrowed(""), parts: Vec::new() }
    }
}

impl Builder {
    pub(super) fn new() -> Self {
        Self { open: vec![Frame::new(Group::Struct(""))] }
    }

    /// Names the next part.
    pub(super) fn call(&mut self, name: impl Into<Cow<'static, str>>) {
        if let Some(frame) = self.open.last_mut() {
            frame.next = name.into();
        }
    }

    /// Adds a part to the innermost open group.
    pub(super) fn add(&mut self, shape: Shape) {
        let Some(frame) = self.open.last_mut() else { return };
        let name = std::mem::take(&mut frame.next);
        match frame.parts.last_mut() {
            Some(last)
                if matches!(frame.group, Group::Tuple | Group::Pad) && last.shape == shape =>
            {
                last.times = last.times.saturating_add(1);
            }
            _ => frame.parts.push(Part { name, shape, times: 1 }),
        }
    }

    /// Whether the next leaf is the count of a [`Counted`](super::Counted).
    pub(super) fn at_count(&self) -> bool {
        self.open
            .last()
            .is_some_and(|frame| frame.group == Group::Counted && frame.parts.is_empty())
    }

    /// All parts; what a broken walk has left open is closed.
    pub(super) fn into_parts(mut self) -> Vec<Part> {
        while self.open.len() > 1 {
            self.close();
        }
        self.open.into_iter().next().map_or_else(Vec::new, |frame| frame.parts)
    }

    /// Adds a leaf.
    pub(super) fn leaf(&mut self, leaf: Leaf) {
        self.add(Shape::Leaf(leaf));
    }

    /// What follows until [`close`](Self::close) belongs to `group`.
    pub(super) fn open(&mut self, group: Group) {
        self.open.push(Frame::new(group));
    }

    /// The innermost open group is complete.
    pub(super) fn close(&mut self) {
        if let Some(frame) = self.open.pop() {
            self.add(Shape::Group(frame.group, frame.parts));
        }
    }

    /// The last part of the innermost open group comes `times` times more.
    pub(super) fn again(&mut self, times: usize) {
        let frame = self.open.last_mut();
        if let Some(last) = frame.and_then(|frame| frame.parts.last_mut()) {
            last.times = last.times.saturating_add(u64::try_from(times).unwrap_or(u64::MAX));
        }
    }
}
