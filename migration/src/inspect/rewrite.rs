//! Writes a stream anew from what was understood of it.

use std::io::{self, Write};

use super::report::DeviceSection;
use super::visit::{PageContent, PageRecord, Place, Visitor};
use crate::wire::command::RawCommand;
use crate::wire::header::{self, Configuration};
use crate::wire::ram::{self, ListedBlock};
use crate::wire::section::{
    PartType, SectionHeader, write_footer, write_header, write_part_header,
};

/// A visitor that writes what it is shown, with the encoders that a source uses. If the result is what
/// was read, nothing was overlooked.
pub struct Rewriter<W> {
    to: W,
    out: Vec<u8>,
    pages: bool,
}

impl<W: Write> Rewriter<W> {
    /// Writes to `to`.
    pub fn new(to: W) -> Self {
        Self { to, out: Vec::new(), pages: true }
    }

    /// Leaves every page out: what stays is the machine, without what its guest had in memory.
    pub fn without_pages(self) -> Self {
        Self { pages: false, ..self }
    }

    /// What it has written to.
    pub fn into_inner(self) -> W {
        self.to
    }

    fn write(&mut self, write: impl FnOnce(&mut Vec<u8>)) -> io::Result<()> {
        self.out.clear();
        write(&mut self.out);
        self.to.write_all(&self.out)
    }
}

impl<W: Write> Visitor for Rewriter<W> {
    fn begin(&mut self, configuration: &Configuration) -> io::Result<()> {
        self.write(|out| header::write(out, configuration))
    }

    fn ram(&mut self, kind: PartType, id: u32, header: Option<&SectionHeader>) -> io::Result<()> {
        self.write(|out| match header {
            Some(header) => write_header(out, kind, header),
            None => write_part_header(out, kind, id),
        })
    }

    fn blocks(&mut self, _: usize, blocks: &[ListedBlock]) -> io::Result<()> {
        self.write(|out| ram::write_block_list(out, blocks))
    }

    fn page(&mut self, record: PageRecord<'_>, content: PageContent<'_>) -> io::Result<()> {
        if !self.pages {
            return Ok(());
        }
        let PageRecord { block, same_block, offset, place, .. } = record;
        let name = (!same_block).then_some(block.name.as_str());
        let begin = |out: &mut Vec<u8>, kind| match place {
            Place::Alone => ram::write_record(out, name, offset, kind),
            Place::First(pages) => {
                ram::write_record(out, name, offset, kind | ram::RUN);
                ram::write_run(out, pages);
            }
            Place::Behind => {}
        };
        self.write(|out| match content {
            PageContent::Filled(_) if place == Place::Behind => {}
            PageContent::Filled(byte) => {
                begin(out, ram::ZERO);
                out.push(byte);
            }
            PageContent::Bytes(page) => {
                begin(out, ram::PAGE);
                out.extend_from_slice(page);
            }
            PageContent::Xbzrle { encoding, bytes } => {
                ram::write_record(out, name, offset, ram::XBZRLE);
                out.push(encoding);
                out.extend_from_slice(&(bytes.len() as u16).to_be_bytes());
                out.extend_from_slice(bytes);
            }
            PageContent::Compressed(bytes) => {
                ram::write_record(out, name, offset, ram::COMPRESS);
                out.extend_from_slice(&(bytes.len() as u32).to_be_bytes());
                out.extend_from_slice(bytes);
            }
        })
    }

    fn multifd_flush(&mut self) -> io::Result<()> {
        self.to.write_all(&ram::MULTIFD_FLUSH.to_be_bytes())
    }

    fn end_of_records(&mut self) -> io::Result<()> {
        self.write(ram::write_eos)
    }

    fn footer(&mut self, id: u32) -> io::Result<()> {
        self.write(|out| write_footer(out, id))
    }

    fn device(&mut self, section: &DeviceSection) -> io::Result<()> {
        let DeviceSection { id, key, version, .. } = section;
        let header = SectionHeader { id: *id, key: key.clone(), version: *version };
        self.write(|out| {
            write_header(out, PartType::Full, &header);
            match &section.value {
                Some(value) => value.write(out),
                None => out.extend_from_slice(&section.body),
            }
        })
    }

    fn command(&mut self, command: &RawCommand) -> io::Result<()> {
        self.write(|out| command.write(out))
    }

    fn end(&mut self) -> io::Result<()> {
        self.to.write_all(&[PartType::Eof as u8])
    }

    fn description(&mut self, text: &[u8]) -> io::Result<()> {
        self.write(|out| {
            out.push(PartType::Description as u8);
            out.extend_from_slice(&(text.len() as u32).to_be_bytes());
            out.extend_from_slice(text);
        })
    }
}
