//! Which pages still have to be sent: one bit for each page of each RAM block.

use std::ops::Range;

use crate::guest::{PAGE_SIZE, RamBlock};

/// One bit for each page of each block; a set bit is a page that must be sent (again).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirtyBitmap {
    blocks: Vec<BlockBits>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct BlockBits {
    pages: u64,
    words: Vec<u64>,
}

impl BlockBits {
    /// The bits of word `n` that stand for pages inside the block.
    fn mask(&self, n: usize) -> u64 {
        let used = self.pages.saturating_sub(n as u64 * 64);
        if used >= 64 { u64::MAX } else { (1 << used) - 1 }
    }
}

impl DirtyBitmap {
    /// A bitmap for these blocks, with every page clean.
    pub fn new(blocks: &[RamBlock]) -> Self {
        let blocks = blocks
            .iter()
            .map(|b| {
                let pages = b.len / PAGE_SIZE;
                BlockBits { pages, words: vec![0; pages.div_ceil(64) as usize] }
            })
            .collect();
        Self { blocks }
    }

    /// Marks every page of every block.
    pub fn set_all(&mut self) {
        for block in &mut self.blocks {
            for n in 0..block.words.len() {
                let mask = block.mask(n);
                if let Some(word) = block.words.get_mut(n) {
                    *word = mask;
                }
            }
        }
    }

    /// Marks one page; a page that the block does not have is ignored.
    pub fn set(&mut self, block: usize, page: u64) {
        if let Some(b) = self.blocks.get_mut(block)
            && page < b.pages
            && let Some(word) = b.words.get_mut((page / 64) as usize)
        {
            *word |= 1 << (page % 64);
        }
    }

    /// ORs the words of a log in, bit `i` of `bits[n]` being page `first_page + 64 * n + i`.
    /// `first_page` must be a multiple of 64. Bits behind the block's end are dropped.
    pub fn or(&mut self, block: usize, first_page: u64, bits: &[u64]) {
        debug_assert_eq!(first_page % 64, 0);
        let Some(b) = self.blocks.get_mut(block) else { return };
        let first = (first_page / 64) as usize;
        for (n, more) in bits.iter().enumerate() {
            let mask = b.mask(first + n);
            if let Some(word) = b.words.get_mut(first + n) {
                *word |= more & mask;
            }
        }
    }

    /// Whether a page is marked.
    pub fn is_set(&self, block: usize, page: u64) -> bool {
        self.blocks
            .get(block)
            .and_then(|b| b.words.get((page / 64) as usize))
            .is_some_and(|word| word >> (page % 64) & 1 == 1)
    }

    /// How many pages are marked.
    pub fn count(&self) -> u64 {
        self.blocks.iter().flat_map(|b| &b.words).map(|w| u64::from(w.count_ones())).sum()
    }

    /// The number of pages in a block; 0 for a block that is not there.
    pub fn pages(&self, block: usize) -> u64 {
        self.blocks.get(block).map_or(0, |b| b.pages)
    }

    /// Takes the words of `pages` out of the bitmap, leaving them clean. `pages.start` must be a
    /// multiple of 64, and `pages.end` too unless it is the block's end. `None` when no page of
    /// them is marked.
    pub fn take(&mut self, block: usize, pages: Range<u64>) -> Option<Vec<u64>> {
        debug_assert_eq!(pages.start % 64, 0);
        let words = self
            .blocks
            .get_mut(block)?
            .words
            .get_mut((pages.start / 64) as usize..pages.end.div_ceil(64) as usize)?;
        if words.iter().all(|w| *w == 0) {
            return None;
        }
        let taken = words.to_vec();
        words.fill(0);
        Some(taken)
    }
}

/// Whether a bit is set; one behind the end is not.
pub fn has(bits: &[u64], at: u64) -> bool {
    bits.get((at / 64) as usize).is_some_and(|word| word >> (at % 64) & 1 == 1)
}

/// The runs of set bits in `bits`, as ranges of pages counted from `first_page`.
pub fn runs(first_page: u64, bits: &[u64]) -> impl Iterator<Item = Range<u64>> + '_ {
    let end = bits.len() as u64 * 64;
    let bit = |at: u64| bits.get((at / 64) as usize).map_or(0, |w| w >> (at % 64));
    // The next position from `at` on whose bit equals `set`.
    let find = move |mut at: u64, set: bool| {
        while at < end {
            let word = if set { bit(at) } else { !bit(at) & (u64::MAX >> (at % 64)) };
            if word != 0 {
                return at + u64::from(word.trailing_zeros());
            }
            at = (at / 64 + 1) * 64;
        }
        end
    };
    let mut at = 0;
    std::iter::from_fn(move || {
        let start = find(at, true);
        if start >= end {
            return None;
        }
        at = find(start, false);
        Some(first_page + start..first_page + at)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(pages: u64) -> RamBlock {
        RamBlock { name: "pc.ram".into(), len: pages * PAGE_SIZE }
    }

    #[test]
    fn all_pages_are_counted_and_none_behind_the_end() {
        for pages in [1, 63, 64, 65, 128, 1000] {
            let mut bitmap = DirtyBitmap::new(&[block(pages), block(3)]);
            bitmap.set_all();
            assert_eq!(bitmap.count(), pages + 3);
            bitmap.or(0, 0, &[u64::MAX; 20]);
            assert_eq!(bitmap.count(), pages + 3);
        }
    }

    #[test]
    fn what_is_taken_is_gone_and_what_is_not_stays() {
        let mut bitmap = DirtyBitmap::new(&[block(200)]);
        bitmap.set(0, 3);
        bitmap.set(0, 64);
        bitmap.set(0, 199);
        bitmap.set(0, 200);
        assert_eq!(bitmap.take(0, 0..64), Some(vec![8]));
        assert_eq!(bitmap.take(0, 0..64), None);
        assert_eq!(bitmap.count(), 2);
        assert!(bitmap.is_set(0, 64) && bitmap.is_set(0, 199) && !bitmap.is_set(0, 3));
        assert_eq!(bitmap.take(0, 64..200), Some(vec![1, 0, 1 << 7]));
        assert_eq!(bitmap.count(), 0);
    }

    #[test]
    fn runs_are_the_set_bits() {
        let found = |first, bits: &[u64]| -> Vec<(u64, u64)> {
            runs(first, bits).map(|r| (r.start, r.end)).collect()
        };
        assert_eq!(found(0, &[0, 0]), []);
        assert_eq!(found(0, &[u64::MAX, u64::MAX]), [(0, 128)]);
        assert_eq!(found(0, &[0b1011, 1 << 63]), [(0, 2), (3, 4), (127, 128)]);
        assert_eq!(found(0, &[1 << 63, 1]), [(63, 65)]);
        assert_eq!(found(0, &[!1, 0, 1 << 5]), [(1, 64), (133, 134)]);
        assert_eq!(found(640, &[0b110]), [(641, 643)]);
    }
}
