//! What the host has memory for: `/proc/self/pagemap` (Linux, admin-guide/mm/pagemap.rst).
//!
//! Asking does not touch the memory, so that what was never written to stays free.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;

use crate::memory::PAGE_SIZE;

/// A page is in memory (pagemap.rst, bit 63).
const PRESENT: u64 = 1 << 63;
/// A page is swapped out, or on its way (bit 62).
const SWAPPED: u64 = 1 << 62;
/// Entries that are read at once.
const BATCH: usize = 512;

fn file() -> Option<&'static File> {
    static FILE: OnceLock<Option<File>> = OnceLock::new();
    let open = || {
        let opened = File::open("/proc/self/pagemap");
        opened.inspect_err(|error| tracing::debug!(%error, "/proc/self/pagemap")).ok()
    };
    FILE.get_or_init(open).as_ref()
}

/// Which of the `pages` pages from host address `address` on have no memory, as bits: bit `i` of word
/// `n` is page `64 * n + i`. In private anonymous memory such a page reads as zero. `None` where the
/// host doesn't tell.
pub(crate) fn absent(address: u64, pages: u64) -> Option<Vec<u64>> {
    let file = file()?;
    let mut bits = vec![0u64; usize::try_from(pages.div_ceil(64)).ok()?];
    let mut entries = [0u8; BATCH * size_of::<u64>()];
    for first in (0..pages).step_by(BATCH) {
        let count = usize::try_from(pages - first).map_or(BATCH, |left| left.min(BATCH));
        let entries = entries.get_mut(..count * size_of::<u64>())?;
        let at = (address / PAGE_SIZE + first) * size_of::<u64>() as u64;
        if let Err(error) = file.read_exact_at(entries, at) {
            tracing::debug!(%error, "reading /proc/self/pagemap");
            return None;
        }
        for (n, entry) in (first..).zip(entries.chunks_exact(size_of::<u64>())) {
            let entry = u64::from_ne_bytes(entry.try_into().ok()?);
            if entry & (PRESENT | SWAPPED) == 0
                && let Some(word) = bits.get_mut((n / 64) as usize)
            {
                *word |= 1 << (n % 64);
            }
        }
    }
    Some(bits)
}
