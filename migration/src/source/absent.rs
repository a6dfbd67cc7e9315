//! Pages that the host has no memory for, which the first pass sends as zero without looking at them.
//!
//! A guest of many GiB may have used few of them. So the first pass goes in leaps over what was never there, and asks
//! page by page only where something is. What is asked ahead says how far a leap may go; what counts is asked
//! again when the log has been cleared for it, as with every page that is looked at.

use std::ops::Range;

use super::out::Out;
use super::pass::CHUNK_PAGES;
use crate::dirty::has;

/// The longest leap, in pages: 256 MiB, so that progress is told and a cancel heeded in between.
const LEAP: u64 = 64 << 10;

/// Where a chunk ends that begins with page `first` of `pages`.
pub(super) fn chunk_end(out: &Out<'_>, block: usize, first: u64, pages: u64) -> u64 {
    let near = pages.min(first + CHUNK_PAGES);
    let far = pages.min(first + LEAP);
    let gone = first + out.absent_ahead(block, first..far);
    // A chunk ends where a word of the log does, or with the block.
    if gone >= far { far } else { near.max(gone - gone % CHUNK_PAGES) }
}

/// What is known of the pages of one chunk.
#[derive(Default)]
pub(super) struct Absent {
    first: u64,
    /// None before this page is there.
    from: u64,
    /// The others, page by page.
    bits: Option<Vec<u64>>,
}

impl Absent {
    /// Asks for `pages`.
    pub(super) fn of(out: &Out<'_>, block: usize, pages: Range<u64>) -> Self {
        let first = pages.start;
        let leap = pages.end - first > CHUNK_PAGES;
        let from = first + if leap { out.absent_ahead(block, pages.clone()) } else { 0 };
        let bits = (from < pages.end).then(|| out.absent(block, pages)).flatten();
        Self { first, from, bits }
    }

    /// How many pages of `run`, from its start on, are known not to be there without a look at each.
    pub(super) fn ahead(&self, run: &Range<u64>) -> u64 {
        self.from.min(run.end).saturating_sub(run.start)
    }

    /// Whether this page is not there.
    pub(super) fn has(&self, page: u64) -> bool {
        self.bits.as_ref().is_some_and(|bits| has(bits, page - self.first))
    }
}
