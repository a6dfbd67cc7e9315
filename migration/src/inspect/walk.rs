//! From the first byte of a stream to its last, or to where it breaks.

use std::collections::HashMap;
use std::io::{self, Read};

use super::decode::{DecodeError, decode};
use super::description::Description;
use super::input::{Input, MAX_TAIL};
use super::likely::likely_cause;
use super::ram::{Pages, RamReader};
use super::report::{Broken, CommandPart, DescriptionPart, DeviceSection, Part, RamPart, Report};
use super::visit::Visitor;
use crate::vmstate::{ByteSource, SectionId};
use crate::wire::command::RawCommand;
use crate::wire::limits::MAX_SECTION_BODY;
use crate::wire::section::{
    FOOTER, PartType, SectionHeader, read_description, read_footer, read_header, read_part_type,
};
use crate::wire::{WireError, header, ram, read_bytes, read_u32};

/// Why the walk ended early.
#[derive(Debug)]
pub(super) enum Stop {
    /// The stream can't be read on.
    Broken(Broken),
    /// The visitor has had enough.
    Visitor(io::Error),
}

impl From<WireError> for Stop {
    fn from(error: WireError) -> Self {
        let likely = likely_cause(&error);
        let what = crate::wire::error_chain(&error);
        Self::Broken(Broken { offset: error.offset(), what, likely })
    }
}

impl From<io::Error> for Stop {
    fn from(error: io::Error) -> Self {
        Self::Visitor(error)
    }
}

/// Reads a stream and shows `visitor` its parts; `progress` is told now and then how many bytes have
/// been read. A stream that breaks is reported up to there.
///
/// # Errors
/// What the visitor says.
pub fn read(
    from: impl Read,
    visitor: &mut dyn Visitor,
    progress: &mut dyn FnMut(u64),
) -> io::Result<Report> {
    let mut walk = Walk {
        input: Input::new(from),
        report: Report::default(),
        ram: RamReader::default(),
        started: HashMap::new(),
        description: None,
        looked: false,
    };
    let stopped = walk.stream(visitor, progress);
    let mut report = walk.report;
    report.bytes = walk.input.offset();
    report.blocks = walk.ram.blocks;
    match stopped {
        Ok(()) => {}
        Err(Stop::Broken(broken)) => report.broken = Some(broken),
        Err(Stop::Visitor(error)) => return Err(error),
    }
    Ok(report)
}

struct Walk<R> {
    input: Input<R>,
    report: Report,
    ram: RamReader,
    /// What has begun with a START section.
    started: HashMap<u32, SectionId>,
    description: Option<Description>,
    /// The description has been looked for.
    looked: bool,
}

impl<R: Read> Walk<R> {
    fn stream(
        &mut self,
        visitor: &mut dyn Visitor,
        progress: &mut dyn FnMut(u64),
    ) -> Result<(), Stop> {
        header::read_magic(&mut self.input)?;
        self.report.configuration = header::read_configuration(&mut self.input)?;
        visitor.begin(&self.report.configuration)?;
        let shared = |name: &String| name == "x-ignore-shared";
        self.ram.addresses = self.report.configuration.capabilities.iter().any(shared);
        let mut ended = false;
        loop {
            progress(self.input.offset());
            let offset = self.input.offset();
            if ended && !matches!(self.next()?, Some(6 | 8)) {
                self.report.trailing = self.trailing()?;
                return Ok(());
            }
            match read_part_type(&mut self.input)? {
                PartType::Start => {
                    let header = read_header(&mut self.input)?;
                    self.started.insert(header.id, header.key.clone());
                    visitor.ram(PartType::Start, header.id, Some(&header))?;
                    self.ram_section("START", offset, header.id, visitor)?;
                }
                kind @ (PartType::Part | PartType::End) => {
                    let id = read_u32(&mut self.input, "a section's id")?;
                    visitor.ram(kind, id, None)?;
                    let kind = if kind == PartType::Part { "PART" } else { "END" };
                    self.ram_section(kind, offset, id, visitor)?;
                }
                PartType::Full => self.device(offset, visitor)?,
                PartType::Command => self.command(offset, visitor)?,
                PartType::Eof => {
                    visitor.end()?;
                    self.report.parts.push(Part::End(offset));
                    ended = true;
                }
                PartType::Description => {
                    let text = read_description(&mut self.input)?;
                    visitor.description(&text)?;
                    let size = text.len() as u64;
                    self.report.parts.push(Part::Description(DescriptionPart { offset, size }));
                }
            }
        }
    }

    fn failed(&self, what: &'static str, source: io::Error) -> Stop {
        WireError::BrokenOff { what, offset: self.input.offset(), source }.into()
    }

    /// The next byte, nothing at the end.
    fn next(&mut self) -> Result<Option<u8>, Stop> {
        match self.input.peek(1) {
            Ok(bytes) => Ok(bytes.first().copied()),
            Err(error) => Err(self.failed("what follows the end", error)),
        }
    }

    /// How many bytes there are behind the end.
    fn trailing(&mut self) -> Result<u64, Stop> {
        let mut count = 0_u64;
        loop {
            let n = match self.input.peek(4096) {
                Ok(bytes) => bytes.len().min(4096),
                Err(error) => return Err(self.failed("what follows the end", error)),
            };
            if n == 0 {
                return Ok(count);
            }
            count = count.saturating_add(n as u64);
            read_bytes(&mut self.input, n as u32, "what follows the end")?;
        }
    }

    fn ram_section(
        &mut self,
        kind: &'static str,
        offset: u64,
        id: u32,
        visitor: &mut dyn Visitor,
    ) -> Result<(), Stop> {
        let unexpected = |expected: &str, found| {
            let (what, expected) = ("a section", expected.to_owned());
            WireError::Unexpected { what, offset, expected, found }
        };
        let Some(key) = self.started.get(&id).cloned() else {
            let found = format!("id {id}, which no START section had");
            return Err(unexpected("a section that has begun", found).into());
        };
        if key.idstr != ram::SECTION {
            // Their bodies have no description at all.
            return Err(unexpected("ram", format!("{key}, sent in parts")).into());
        }
        let mut pages = Pages::default();
        let mut done = self.ram.section(&mut self.input, visitor, &mut pages);
        if done.is_ok() {
            done = read_footer(&mut self.input, &key, id).map_err(Stop::from);
        }
        let size = self.input.offset().saturating_sub(offset);
        match self.report.parts.last_mut() {
            Some(Part::Ram(last)) if last.kind == kind => {
                last.size = last.size.saturating_add(size);
                last.sections = last.sections.saturating_add(1);
                last.pages.add(&pages);
            }
            _ => self.report.parts.push(Part::Ram(RamPart {
                kind,
                offset,
                size,
                sections: 1,
                pages,
            })),
        }
        done?;
        Ok(visitor.footer(id)?)
    }

    fn device(&mut self, offset: u64, visitor: &mut dyn Visitor) -> Result<(), Stop> {
        let SectionHeader { id, key, version } = read_header(&mut self.input)?;
        if !std::mem::replace(&mut self.looked, true) {
            let tail = self.input.rest(MAX_TAIL);
            let tail =
                tail.map_err(|e| WireError::BrokenOff { what: "the devices", offset, source: e })?;
            self.description = tail.and_then(Description::find);
        }
        let body_offset = self.input.offset();
        let layout = self.description.as_ref().and_then(|d| d.section(&key.idstr, key.instance));
        let ahead = self.input.peek(MAX_SECTION_BODY as usize);
        let ahead = ahead.map_err(|e| WireError::BrokenOff {
            what: "a section",
            offset: body_offset,
            source: e,
        })?;
        let (value, len) = match layout.map(|layout| decode(layout, ahead)) {
            Some(Ok((value, len))) => (Some(value), len),
            Some(Err(error)) => {
                return Err(Stop::Broken(disagreement(&key, body_offset, &error)));
            }
            None => (None, find_footer(ahead, id).unwrap_or(ahead.len())),
        };
        let len = u32::try_from(len).unwrap_or(u32::MAX);
        let body = read_bytes(&mut self.input, len, "a section's body")?;
        let footer = read_footer(&mut self.input, &key, id);
        let section = DeviceSection { id, key, version, offset, body_offset, body, value };
        visitor.device(&section)?;
        self.report.parts.push(Part::Device(section));
        footer?;
        Ok(visitor.footer(id)?)
    }

    fn command(&mut self, offset: u64, visitor: &mut dyn Visitor) -> Result<(), Stop> {
        let command = RawCommand::read(&mut self.input)?;
        visitor.command(&command)?;
        self.report.parts.push(Part::Command(CommandPart { offset, command }));
        Ok(())
    }
}

fn disagreement(key: &SectionId, body_offset: u64, error: &DecodeError) -> Broken {
    let within = match error {
        DecodeError::Short { offset, .. } | DecodeError::Subsection { offset, .. } => *offset,
        DecodeError::Absurd { .. } => 0,
    };
    Broken {
        offset: body_offset.saturating_add(within),
        what: format!("{key} is not as the description at the stream's end says: {error}"),
        likely: "bytes that were changed, or a description of another stream",
    }
}

/// The length of a section's body whose layout is not known: up to a footer with its id behind which
/// another part begins.
fn find_footer(ahead: &[u8], id: u32) -> Option<usize> {
    let mut footer = [FOOTER; 5];
    for (to, from) in footer.iter_mut().skip(1).zip(id.to_be_bytes()) {
        *to = from;
    }
    let follows = |rest: &[u8]| match rest.split_first() {
        None => true,
        Some((0 | 1 | 2 | 3 | 8, _)) => true,
        Some((4, header)) => {
            let name = header.get(5..).zip(header.get(4));
            name.is_some_and(|(rest, len)| {
                let name = rest.get(..usize::from(*len)).unwrap_or_default();
                !name.is_empty() && name.iter().all(u8::is_ascii_graphic)
            })
        }
        Some(_) => false,
    };
    ahead.windows(footer.len()).enumerate().find_map(|(at, window)| {
        let rest = ahead.get(at.saturating_add(footer.len())..)?;
        (window == footer && follows(rest)).then_some(at)
    })
}
