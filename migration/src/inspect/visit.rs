//! Whoever wants to see a stream's parts as they pass.

use std::io;

use super::report::DeviceSection;
use crate::guest::{PAGE_SIZE, RamBlock};
use crate::wire::command::RawCommand;
use crate::wire::header::Configuration;
use crate::wire::ram::ListedBlock;
use crate::wire::section::{PartType, SectionHeader};

/// A page as it stands in the stream.
#[derive(Debug, Clone, Copy)]
pub enum PageContent<'a> {
    /// All bytes are this.
    Filled(u8),
    /// These.
    Bytes(&'a [u8; PAGE_SIZE as usize]),
    /// A difference to what was sent before.
    Xbzrle {
        /// How it is written; always 1.
        encoding: u8,
        /// The difference.
        bytes: &'a [u8],
    },
    /// By zlib.
    Compressed(&'a [u8]),
}

/// A page among those of its record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// The only one.
    Alone,
    /// The first of so many.
    First(u32),
    /// Behind the first.
    Behind,
}

/// Where a page belongs.
#[derive(Debug, Clone, Copy)]
pub struct PageRecord<'a> {
    /// The block's place in the list.
    pub index: usize,
    /// The block.
    pub block: &'a RamBlock,
    /// The record does not name it, since it is that of the record before.
    pub same_block: bool,
    /// Offset in the block, in bytes.
    pub offset: u64,
    /// Among the pages of its record.
    pub place: Place,
}

/// Is shown every part of a stream, in order. An error ends the reading.
#[allow(unused_variables)]
pub trait Visitor {
    /// The first bytes.
    fn begin(&mut self, configuration: &Configuration) -> io::Result<()> {
        Ok(())
    }
    /// A RAM section begins; only a START section has a header.
    fn ram(&mut self, kind: PartType, id: u32, header: Option<&SectionHeader>) -> io::Result<()> {
        Ok(())
    }
    /// RAM blocks, from that number on.
    fn blocks(&mut self, first: usize, blocks: &[ListedBlock]) -> io::Result<()> {
        Ok(())
    }
    /// A page. Of several for the same place the last one counts.
    fn page(&mut self, record: PageRecord<'_>, content: PageContent<'_>) -> io::Result<()> {
        Ok(())
    }
    /// A mark for further connections.
    fn multifd_flush(&mut self) -> io::Result<()> {
        Ok(())
    }
    /// A RAM section's records end.
    fn end_of_records(&mut self) -> io::Result<()> {
        Ok(())
    }
    /// A section's footer.
    fn footer(&mut self, id: u32) -> io::Result<()> {
        Ok(())
    }
    /// A device, up to its footer.
    fn device(&mut self, section: &DeviceSection) -> io::Result<()> {
        Ok(())
    }
    /// A command.
    fn command(&mut self, command: &RawCommand) -> io::Result<()> {
        Ok(())
    }
    /// The end of the sections.
    fn end(&mut self) -> io::Result<()> {
        Ok(())
    }
    /// The description's text.
    fn description(&mut self, text: &[u8]) -> io::Result<()> {
        Ok(())
    }
}

/// Nobody looks.
impl Visitor for () {}
