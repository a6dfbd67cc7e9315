//! The RAM sections: counted, and handed on page by page.

use super::visit::{PageContent, PageRecord, Place, Visitor};
use super::walk::Stop;
use crate::guest::{PAGE_SIZE, RamBlock};
use crate::vmstate::ByteSource;
use crate::wire::ram::{
    COMPRESS, CONTINUE, EOS, FLAGS, MEM_SIZE, MULTIFD_FLUSH, PAGE, RUN, XBZRLE, ZERO,
    read_block_list, read_fill, read_run,
};
use crate::wire::{
    WireError, read_array, read_bytes, read_str8, read_u8, read_u16, read_u32, read_u64,
};

/// Records of pages, by kind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Pages {
    /// Raw.
    pub normal: u64,
    /// All zero.
    pub zero: u64,
    /// All of another byte.
    pub filled: u64,
    /// Compressed, or a difference to what was sent before; not among the pages that are handed on.
    pub encoded: u64,
}

impl Pages {
    /// All of them.
    pub fn all(&self) -> u64 {
        [self.normal, self.zero, self.filled, self.encoded]
            .iter()
            .fold(0, |n, m| n.saturating_add(*m))
    }

    pub(super) fn add(&mut self, other: &Self) {
        for (mine, its) in [
            (&mut self.normal, other.normal),
            (&mut self.zero, other.zero),
            (&mut self.filled, other.filled),
            (&mut self.encoded, other.encoded),
        ] {
            *mine = mine.saturating_add(its);
        }
    }
}

/// One block, and what came for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockReport {
    /// Name and length.
    pub block: RamBlock,
    /// Its records.
    pub pages: Pages,
}

/// The beginning of a record of many pages.
struct Run {
    index: usize,
    same_block: bool,
    offset: u64,
    /// The flag that says what the pages are.
    kind: u64,
    /// Where the record stands.
    at: u64,
}

/// Reads RAM sections.
#[derive(Debug, Default)]
pub(super) struct RamReader {
    pub(super) blocks: Vec<BlockReport>,
    current: Option<usize>,
    /// The source shares memory with its destination: each block has an address.
    pub(super) addresses: bool,
}

impl RamReader {
    /// Reads one section's records, up to and with their end.
    pub(super) fn section(
        &mut self,
        from: &mut dyn ByteSource,
        visitor: &mut dyn Visitor,
        counted: &mut Pages,
    ) -> Result<(), Stop> {
        loop {
            let at = from.offset();
            let header = read_u64(from, "a RAM record")?;
            let (offset, flags) = (header & !FLAGS, header & FLAGS);
            match (flags, offset) {
                (EOS, 0) => return Ok(visitor.end_of_records()?),
                (MULTIFD_FLUSH, 0) => {
                    visitor.multifd_flush()?;
                    continue;
                }
                (MEM_SIZE, _) => {
                    self.list(from, offset, visitor)?;
                    continue;
                }
                _ => {}
            }
            let same_block = flags & CONTINUE != 0;
            let index = self.target(from, same_block, offset, at)?;
            if flags & RUN != 0 {
                let run = Run { index, same_block, offset, kind: flags & !CONTINUE & !RUN, at };
                self.run(from, &run, visitor, counted)?;
                continue;
            }
            let mut one = Pages::default();
            let (page, bytes);
            let content = match flags & !CONTINUE {
                ZERO => match read_fill(from)? {
                    0 => {
                        one.zero = 1;
                        PageContent::Filled(0)
                    }
                    byte => {
                        one.filled = 1;
                        PageContent::Filled(byte)
                    }
                },
                PAGE => {
                    one.normal = 1;
                    page = read_array(from, "a page")?;
                    PageContent::Bytes(&page)
                }
                XBZRLE => {
                    one.encoded = 1;
                    let encoding = read_u8(from, "an xbzrle page's encoding")?;
                    let len = read_u16(from, "an xbzrle page's length")?;
                    bytes = read_bytes(from, len.into(), "an xbzrle page")?;
                    PageContent::Xbzrle { encoding, bytes: &bytes }
                }
                COMPRESS => {
                    one.encoded = 1;
                    bytes = compressed(from)?;
                    PageContent::Compressed(&bytes)
                }
                _ => return Err(unknown(flags, at).into()),
            };
            counted.add(&one);
            if let Some(block) = self.blocks.get_mut(index) {
                block.pages.add(&one);
                let place = Place::Alone;
                let record = PageRecord { index, block: &block.block, same_block, offset, place };
                visitor.page(record, content)?;
            }
        }
    }

    /// Pages that follow each other.
    fn run(
        &mut self,
        from: &mut dyn ByteSource,
        run: &Run,
        visitor: &mut dyn Visitor,
        counted: &mut Pages,
    ) -> Result<(), Stop> {
        let Run { index, offset, at, .. } = *run;
        let Some(block) = self.blocks.get_mut(index) else { return Ok(()) };
        let count = read_run(from)?;
        let len = u64::from(count).saturating_mul(PAGE_SIZE);
        if len > block.block.len.saturating_sub(offset) {
            let what = "the number of pages in a run";
            let max = block.block.len.saturating_sub(offset) / PAGE_SIZE;
            let found = count.into();
            return Err(WireError::TooLarge { what, offset: at, found, max }.into());
        }
        let fill = match run.kind {
            PAGE => None,
            ZERO => Some(read_fill(from)?),
            other => return Err(unknown(other | RUN, at).into()),
        };
        let mut pages = Pages::default();
        let kind = match fill {
            None => &mut pages.normal,
            Some(0) => &mut pages.zero,
            Some(_) => &mut pages.filled,
        };
        *kind = count.into();
        counted.add(&pages);
        block.pages.add(&pages);
        for n in 0..count {
            let place = if n == 0 { Place::First(count) } else { Place::Behind };
            let offset = offset.saturating_add(u64::from(n).saturating_mul(PAGE_SIZE));
            let same_block = run.same_block || n > 0;
            let record = PageRecord { index, block: &block.block, same_block, offset, place };
            match fill {
                Some(byte) => visitor.page(record, PageContent::Filled(byte))?,
                None => {
                    visitor.page(record, PageContent::Bytes(&read_array(from, "a page")?))?;
                }
            }
        }
        Ok(())
    }

    fn list(
        &mut self,
        from: &mut dyn ByteSource,
        total: u64,
        visitor: &mut dyn Visitor,
    ) -> Result<(), Stop> {
        let blocks = read_block_list(from, total, self.addresses)?;
        visitor.blocks(self.blocks.len(), &blocks)?;
        let reports = blocks
            .into_iter()
            .map(|listed| BlockReport { block: listed.block, pages: Pages::default() });
        self.blocks.extend(reports);
        Ok(())
    }

    /// The block of a record.
    fn target(
        &mut self,
        from: &mut dyn ByteSource,
        same_block: bool,
        offset: u64,
        at: u64,
    ) -> Result<usize, WireError> {
        let unexpected = |what, expected: String, found| {
            Err(WireError::Unexpected { what, offset: at, expected, found })
        };
        let index = if same_block {
            self.current
        } else {
            let name = read_str8(from, "a RAM block's name")?;
            let found = self.blocks.iter().position(|b| b.block.name == name);
            if found.is_none() {
                return unexpected("a RAM record", "a block of the list".into(), name);
            }
            found
        };
        let Some((index, block)) = index.and_then(|i| Some((i, self.blocks.get(i)?))) else {
            let expected = "a block's name in the first record".into();
            return unexpected("a RAM record", expected, "\"the same block\"".into());
        };
        self.current = Some(index);
        if offset >= block.block.len {
            let expected =
                format!("an offset below {:#x} in {}", block.block.len, block.block.name);
            return unexpected("a RAM record", expected, format!("{offset:#x}"));
        }
        Ok(index)
    }
}

fn unknown(flags: u64, offset: u64) -> WireError {
    WireError::Unexpected {
        what: "the flags of a RAM record",
        offset,
        expected: "a known combination".into(),
        found: format!("{flags:#x}"),
    }
}

/// The bytes of a compressed page.
fn compressed(from: &mut dyn ByteSource) -> Result<Vec<u8>, WireError> {
    let (what, offset) = ("a compressed page's length", from.offset());
    let found = read_u32(from, what)?;
    // zlib makes what it can't compress a little longer.
    let max = 2 * PAGE_SIZE;
    if u64::from(found) > max {
        return Err(WireError::TooLarge { what, offset, found: found.into(), max });
    }
    read_bytes(from, found, "a compressed page")
}
