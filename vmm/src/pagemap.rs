//! What the host has memory for: `/proc/self/pagemap` (Linux, admin-guide/mm/pagemap.rst).
//!
//! Asking does not touch the memory, so that what was never written to stays free. Page by page the file is read;
//! its ioctl PAGEMAP_SCAN, which Linux 6.7 brought, says in one call where something is, however far that is.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;

use vmm_sys_util::ioctl::ioctl_with_mut_ref;
use vmm_sys_util::ioctl_iowr_nr;

use crate::memory::PAGE_SIZE;

/// The argument of PAGEMAP_SCAN (Linux, include/uapi/linux/fs.h, `struct pm_scan_arg`).
#[repr(C)]
#[derive(Debug, Default)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// What it answers (`struct page_region`): addresses.
#[repr(C)]
#[derive(Debug, Default, Clone, Copy)]
struct Region {
    start: u64,
    end: u64,
    categories: u64,
}

ioctl_iowr_nr!(PAGEMAP_SCAN, b'f' as u32, 16, ScanArg);

/// Categories of PAGEMAP_SCAN (`PAGE_IS_PRESENT`, `PAGE_IS_SWAPPED`).
const IN_MEMORY_OR_SWAPPED: u64 = 1 << 3 | 1 << 4;
/// Regions that one call may answer.
const REGIONS: usize = 64;
/// Calls after which counting is given up: memory in so many pieces is in use.
const CALLS: usize = 256;

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

/// The regions of `from..to` (host addresses) that have memory, as many as fit into `found` and no more than
/// `pages` pages of them; how many those are, and where the kernel stopped.
fn scan(from: u64, to: u64, pages: u64, found: &mut [Region]) -> io::Result<(usize, u64)> {
    let file = file().ok_or(io::ErrorKind::Unsupported)?;
    let mut arg = ScanArg {
        size: size_of::<ScanArg>() as u64,
        start: from,
        end: to,
        vec: found.as_mut_ptr() as u64,
        vec_len: found.len() as u64,
        max_pages: pages,
        category_anyof_mask: IN_MEMORY_OR_SWAPPED,
        return_mask: IN_MEMORY_OR_SWAPPED,
        ..Default::default()
    };
    // SAFETY: the kernel writes no more than `vec_len` regions to `found`, which is borrowed until it has, and
    // to `arg`; it looks at this process's page tables and changes nothing.
    match unsafe { ioctl_with_mut_ref(file, PAGEMAP_SCAN(), &mut arg) } {
        n if n >= 0 => Ok((n as usize, arg.walk_end)),
        _ => Err(io::Error::last_os_error()),
    }
}

/// How many of the `pages` pages from host address `address` on, one after the other, have no memory; 0 also
/// where the host doesn't tell.
pub(crate) fn absent_ahead(address: u64, pages: u64) -> u64 {
    let end = address.saturating_add(pages.saturating_mul(PAGE_SIZE));
    let mut first = [Region::default()];
    match scan(address, end, 1, &mut first) {
        Ok((0, _)) => pages,
        Ok(_) => first.first().map_or(0, |region| region.start.saturating_sub(address) / PAGE_SIZE),
        Err(error) => {
            tracing::trace!(%error, "PAGEMAP_SCAN");
            0
        }
    }
}

/// How many of the `pages` pages from host address `address` on have memory; `None` if they are more than
/// `most`, or lie so scattered that counting them takes long, and where the host doesn't tell.
pub(crate) fn present(address: u64, pages: u64, most: u64) -> Option<u64> {
    let end = address.checked_add(pages.checked_mul(PAGE_SIZE)?)?;
    let (mut at, mut count) = (address, 0);
    for _ in 0..CALLS {
        let mut found = [Region::default(); REGIONS];
        // No more than are needed: the kernel holds the lock of this process' mappings meanwhile.
        let enough = (most - count).saturating_add(1);
        let (n, stopped) = scan(at, end, enough, &mut found).ok()?;
        let found = found.get(..n)?.iter();
        count +=
            found.map(|region| region.end.saturating_sub(region.start) / PAGE_SIZE).sum::<u64>();
        if count > most {
            return None;
        }
        if stopped >= end || stopped <= at {
            return Some(count);
        }
        at = stopped;
    }
    None
}

#[cfg(test)]
mod tests {
    use vm_memory::mmap::MmapRegion;

    use super::*;

    /// Linux 6.7 and later; older ones are asked page by page.
    fn scans() -> bool {
        let mut none = [Region::default()];
        scan(PAGE_SIZE, 2 * PAGE_SIZE, 1, &mut none).is_ok()
    }

    #[test]
    fn what_was_written_to_is_found_and_counted() {
        let memory = MmapRegion::<()>::new(1 << 30).unwrap();
        let address = memory.as_ptr() as u64;
        let all = (1 << 30) / PAGE_SIZE;
        let write = |page: u64| {
            // SAFETY: inside the mapping, which nobody else has.
            unsafe { memory.as_ptr().add((page * PAGE_SIZE) as usize).write_volatile(1) };
        };
        if !scans() {
            assert_eq!((absent_ahead(address, all), present(address, all, all)), (0, None));
            return;
        }
        assert_eq!((absent_ahead(address, all), present(address, all, all)), (all, Some(0)));
        // Some apart, so that each is a region; more than one call answers.
        let written = (0..200).map(|n| 100_000 + 3 * n);
        written.clone().for_each(write);
        let found = present(address, all, all).expect("the host tells");
        let absent = absent(address, all).expect("the host tells");
        let counted = all - absent.iter().map(|word| u64::from(word.count_ones())).sum::<u64>();
        assert_eq!(found, counted, "both ways to ask agree");
        assert!(found >= 200, "{found}");
        assert_eq!(present(address, all, found), Some(found));
        assert_eq!(present(address, all, found - 1), None);
        let first = absent_ahead(address, all);
        assert!(first <= 100_000 && first > 100_000 - 1024, "{first}");
        assert!(absent[(first / 64) as usize] >> (first % 64) & 1 == 0);
        assert_eq!(absent_ahead(address + first * PAGE_SIZE, 1), 0);
        assert_eq!(absent_ahead(address, 5), 5);
        assert_eq!(absent_ahead(address, 0), 0);
    }
}
