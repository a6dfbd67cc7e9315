//! A stream's memory as files.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use migration::guest::PAGE_SIZE;
use migration::inspect::{PageContent, PageRecord, Visitor};
use migration::wire::ram::ListedBlock;

const PAGE: usize = PAGE_SIZE as usize;
/// How many differing pages are told by their offset.
const TOLD: usize = 8;
/// How much is compared at once, in bytes.
const CHUNK: usize = 1 << 20;

/// One block in a file with holes.
struct Block {
    file: File,
    len: u64,
    /// A bit for each page that has been written: what has not is a hole, and zero.
    written: Vec<u64>,
}

impl Block {
    fn new(file: File, len: u64) -> io::Result<Self> {
        file.set_len(len)?;
        let words = len.div_ceil(PAGE_SIZE).div_ceil(64);
        let words = usize::try_from(words).map_err(io::Error::other)?;
        Ok(Self { file, len, written: vec![0; words] })
    }

    fn page(&mut self, offset: u64, content: PageContent<'_>) -> io::Result<()> {
        let page = offset / PAGE_SIZE;
        let bit = 1 << (page % 64);
        let Some(word) = self.written.get_mut((page / 64) as usize) else { return Ok(()) };
        let filled;
        let bytes = match content {
            PageContent::Filled(0) if *word & bit == 0 => return Ok(()),
            PageContent::Filled(byte) => {
                filled = [byte; PAGE];
                &filled
            }
            PageContent::Bytes(bytes) => bytes,
            PageContent::Xbzrle { .. } | PageContent::Compressed(_) => {
                return Err(io::Error::other(
                    "its pages are compressed (xbzrle or compress): save it without that",
                ));
            }
        };
        *word |= bit;
        self.file.write_all_at(bytes, offset)
    }
}

/// One block's image in a file of its own.
pub(super) struct ImageFile {
    wanted: String,
    file: Option<File>,
    block: Option<(usize, Block)>,
    known: Vec<String>,
}

impl ImageFile {
    /// For the block of that name. The file must be new.
    pub(super) fn new(path: &Path, wanted: &str) -> io::Result<Self> {
        let file = File::create_new(path)?;
        Ok(Self { wanted: wanted.into(), file: Some(file), block: None, known: Vec::new() })
    }

    /// Fails if there was no such block.
    pub(super) fn check(&self, path: &Path) -> Result<(), String> {
        if self.block.is_some() {
            return Ok(());
        }
        // Empty, and made by us.
        let _ = std::fs::remove_file(path);
        let known = self.known.join(", ");
        Err(format!("the stream has no RAM block {}; there are: {known}", self.wanted))
    }
}

impl Visitor for ImageFile {
    fn blocks(&mut self, first: usize, blocks: &[ListedBlock]) -> io::Result<()> {
        for (index, ListedBlock { block, .. }) in (first..).zip(blocks) {
            self.known.push(block.name.clone());
            if block.name == self.wanted
                && let Some(file) = self.file.take()
            {
                self.block = Some((index, Block::new(file, block.len)?));
            }
        }
        Ok(())
    }

    fn page(&mut self, record: PageRecord<'_>, content: PageContent<'_>) -> io::Result<()> {
        match &mut self.block {
            Some((index, block)) if *index == record.index => block.page(record.offset, content),
            _ => Ok(()),
        }
    }
}

/// All blocks, in files without a name.
#[derive(Default)]
pub(super) struct Images(BTreeMap<String, Block>);

/// Pages of a block that differ.
pub(super) struct PageDifference {
    /// The block.
    pub(super) name: String,
    /// How many.
    pub(super) pages: u64,
    /// Where the first ones are, in bytes.
    pub(super) first: Vec<u64>,
}

impl Visitor for Images {
    fn blocks(&mut self, _: usize, blocks: &[ListedBlock]) -> io::Result<()> {
        for ListedBlock { block, .. } in blocks {
            let made = Block::new(tempfile::tempfile()?, block.len)?;
            self.0.insert(block.name.clone(), made);
        }
        Ok(())
    }

    fn page(&mut self, record: PageRecord<'_>, content: PageContent<'_>) -> io::Result<()> {
        match self.0.get_mut(&record.block.name) {
            Some(block) => block.page(record.offset, content),
            None => Ok(()),
        }
    }
}

impl Images {
    /// The pages that differ in blocks that both have in the same size.
    pub(super) fn differences(&self, other: &Self) -> io::Result<Vec<PageDifference>> {
        let mut found = Vec::new();
        for (name, block) in &self.0 {
            let Some(second) = other.0.get(name).filter(|second| second.len == block.len) else {
                continue;
            };
            let mut difference = PageDifference { name: name.clone(), pages: 0, first: Vec::new() };
            block.compare(second, &mut difference)?;
            if difference.pages > 0 {
                found.push(difference);
            }
        }
        Ok(found)
    }
}

impl Block {
    fn compare(&self, other: &Self, difference: &mut PageDifference) -> io::Result<()> {
        let (mut a, mut b) = (vec![0; CHUNK], vec![0; CHUNK]);
        let mut at = 0;
        while at < self.len {
            let n = usize::try_from(self.len - at).map_or(CHUNK, |left| left.min(CHUNK));
            let (a, b) = (&mut a[..n], &mut b[..n]);
            let pages = (at / PAGE_SIZE)..(at + n as u64).div_ceil(PAGE_SIZE);
            if self.any_written(pages.clone()) || other.any_written(pages) {
                self.file.read_exact_at(a, at)?;
                other.file.read_exact_at(b, at)?;
                for (page, (a, b)) in (0_u64..).zip(a.chunks(PAGE).zip(b.chunks(PAGE))) {
                    if a != b {
                        difference.pages += 1;
                        if difference.first.len() < TOLD {
                            difference.first.push(at + page * PAGE_SIZE);
                        }
                    }
                }
            }
            at += n as u64;
        }
        Ok(())
    }

    fn any_written(&self, mut pages: std::ops::Range<u64>) -> bool {
        pages.any(|page| {
            self.written
                .get((page / 64) as usize)
                .is_some_and(|word| word & (1 << (page % 64)) != 0)
        })
    }
}
