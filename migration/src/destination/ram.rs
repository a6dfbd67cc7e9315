//! The records of the `ram` section, into guest memory.

use std::sync::Arc;

use super::DestinationError;
use super::ahead::Ahead;
use crate::guest::{DestinationVm, GuestRam, PAGE_SIZE, RamBlock};
use crate::stats::{MigrationStats, Moved};
use crate::transport::StreamReader;
use crate::vmstate::ByteSource;
use crate::wire::ram::{RecordHeader, read_blocks, read_fill, read_run};
use crate::wire::read_str8;

/// The header of a page's record.
const PAGE_AHEAD: usize = 8;
/// The header of a run's record.
const RUN_AHEAD: usize = 12;
/// Bytes of a run that are read before it is told how many have come.
const STEP: u64 = 1 << 20;
/// Pages after which the statistics are brought up to date.
const REPORT_PAGES: u64 = 4096;

/// A run of pages that hold one byte, not yet written.
#[derive(Debug)]
struct Fill {
    block: usize,
    offset: u64,
    len: u64,
    byte: u8,
}

/// Reads RAM sections.
pub(super) struct RamLoader {
    ram: Arc<dyn GuestRam>,
    blocks: Vec<RamBlock>,
    /// The block whose memory has come as a descriptor.
    given: Option<usize>,
    /// The block of the last record.
    current: Option<usize>,
    fill: Option<Fill>,
    ahead: Ahead,
    moved: Moved,
    counted: u64,
}

impl RamLoader {
    pub(super) fn new(ram: Arc<dyn GuestRam>) -> Self {
        let blocks = ram.blocks();
        Self {
            ram,
            blocks,
            given: None,
            current: None,
            fill: None,
            ahead: Ahead::default(),
            moved: Moved::default(),
            counted: 0,
        }
    }

    /// No page of this block may come: its memory has, and the source's guest runs in it.
    pub(super) fn has_come(&mut self, block: usize) {
        self.given = Some(block);
    }

    /// Reads the records of one section, up to and with their end.
    pub(super) fn read_section(
        &mut self,
        reader: &mut StreamReader,
        vm: &mut dyn DestinationVm,
        stats: &MigrationStats,
    ) -> Result<(), DestinationError> {
        loop {
            match RecordHeader::read(reader)? {
                RecordHeader::Page { offset, same_block } => {
                    let block = self.target(reader, same_block, offset)?;
                    self.read_pages(reader, block, offset, PAGE_SIZE, PAGE_AHEAD)?;
                }
                RecordHeader::Zero { offset, same_block } => {
                    let block = self.target(reader, same_block, offset)?;
                    let byte = read_fill(reader)?;
                    self.fill_pages(block, offset, PAGE_SIZE, byte)?;
                }
                RecordHeader::PageRun { offset, same_block } => {
                    let block = self.target(reader, same_block, offset)?;
                    let len = self.run(reader, block, offset)?;
                    self.read_pages(reader, block, offset, len, RUN_AHEAD)?;
                }
                RecordHeader::ZeroRun { offset, same_block } => {
                    let block = self.target(reader, same_block, offset)?;
                    let len = self.run(reader, block, offset)?;
                    let byte = read_fill(reader)?;
                    self.fill_pages(block, offset, len, byte)?;
                }
                RecordHeader::MemSize(total) => {
                    // The verdict on a manifest may have added some.
                    self.blocks = self.ram.blocks();
                    for block in read_blocks(reader, total)? {
                        self.check_block(vm, &block)?;
                    }
                }
                RecordHeader::Eos => {
                    self.flush_fill()?;
                    self.report(reader, stats);
                    return Ok(());
                }
            }
            if self.moved.normal_pages.saturating_add(self.moved.zero_pages) >= REPORT_PAGES {
                self.report(reader, stats);
            }
        }
    }

    fn report(&mut self, reader: &StreamReader, stats: &MigrationStats) {
        let taken = reader.offset();
        self.moved.bytes = taken.saturating_sub(self.counted);
        self.counted = taken;
        stats.moved(std::mem::take(&mut self.moved));
    }

    fn find(&self, name: &str) -> Option<(usize, &RamBlock)> {
        self.blocks.iter().enumerate().find(|(_, b)| b.name == name)
    }

    /// Compares a block that the source announces with this machine's; one that the machine has
    /// not becomes its last.
    fn check_block(
        &mut self,
        vm: &mut dyn DestinationVm,
        block: &RamBlock,
    ) -> Result<(), DestinationError> {
        match self.find(&block.name) {
            Some((_, ours)) if ours.len == block.len => Ok(()),
            Some((_, ours)) => Err(DestinationError::BlockSize {
                name: block.name.clone(),
                expected: ours.len,
                found: block.len,
            }),
            None if vm.accept_block(block) => {
                self.blocks = self.ram.blocks();
                Ok(())
            }
            None => Err(DestinationError::UnknownBlock { name: block.name.clone() }),
        }
    }

    /// Where the page of a record goes; reads the block's name if the record has one.
    fn target(
        &mut self,
        reader: &mut StreamReader,
        same_block: bool,
        offset: u64,
    ) -> Result<usize, DestinationError> {
        let index = if same_block {
            self.current.ok_or(DestinationError::NoBlock { offset: reader.offset() })?
        } else {
            let name = read_str8(reader, "a RAM block's name")?;
            match self.find(&name) {
                Some((index, _)) => index,
                None => return Err(DestinationError::UnknownBlock { name }),
            }
        };
        self.current = Some(index);
        let block = self.blocks.get(index);
        let (name, len) = block.map_or(("", 0), |b| (b.name.as_str(), b.len));
        if self.given == Some(index) {
            return Err(DestinationError::AlreadyHere { name: name.to_owned() });
        }
        // Offsets and lengths are whole pages.
        if offset >= len {
            return Err(DestinationError::Offset { name: name.to_owned(), offset, len });
        }
        Ok(index)
    }

    /// The length in bytes of a run that begins at `offset`, which is inside its block.
    fn run(
        &self,
        reader: &mut StreamReader,
        block: usize,
        offset: u64,
    ) -> Result<u64, DestinationError> {
        let run = u64::from(read_run(reader)?).saturating_mul(PAGE_SIZE);
        let (name, len) = self.blocks.get(block).map_or(("", 0), |b| (b.name.as_str(), b.len));
        match offset.checked_add(run) {
            Some(end) if end <= len => Ok(run),
            _ => {
                let offset = offset.saturating_add(run);
                Err(DestinationError::Offset { name: name.to_owned(), offset, len })
            }
        }
    }

    /// Reads pages that follow each other; behind them a header of `next` bytes is expected.
    fn read_pages(
        &mut self,
        reader: &mut StreamReader,
        block: usize,
        offset: u64,
        len: u64,
        next: usize,
    ) -> Result<(), DestinationError> {
        self.flush_fill()?;
        let block_len = self.blocks.get(block).map_or(0, |b| b.len);
        self.ahead.pages(&self.ram, block, offset, len, block_len);
        let mut done = 0u64;
        // In steps, so that what has come is told.
        while done < len {
            let step = len.saturating_sub(done).min(STEP);
            let at = reader.offset();
            let to = offset.saturating_add(done);
            let last = step == len.saturating_sub(done);
            reader
                .read_ram(&*self.ram, block, to, step as usize, if last { next } else { 0 })
                .map_err(|source| DestinationError::Page { offset: at, source })?;
            let pages = step / PAGE_SIZE;
            self.moved.normal_pages = self.moved.normal_pages.saturating_add(pages);
            done = done.saturating_add(step);
        }
        Ok(())
    }

    /// Notes pages of one byte; neighbours are filled together.
    fn fill_pages(
        &mut self,
        block: usize,
        offset: u64,
        len: u64,
        byte: u8,
    ) -> Result<(), DestinationError> {
        self.moved.zero_pages = self.moved.zero_pages.saturating_add(len / PAGE_SIZE);
        if let Some(fill) = &mut self.fill
            && fill.block == block
            && fill.byte == byte
            && fill.offset.checked_add(fill.len) == Some(offset)
        {
            fill.len = fill.len.saturating_add(len);
            return Ok(());
        }
        self.flush_fill()?;
        self.fill = Some(Fill { block, offset, len, byte });
        Ok(())
    }

    fn flush_fill(&mut self) -> Result<(), DestinationError> {
        let Some(fill) = self.fill.take() else { return Ok(()) };
        self.ram
            .fill(fill.block, fill.offset, fill.len, fill.byte)
            .map_err(|source| DestinationError::Memory { source })
    }
}
