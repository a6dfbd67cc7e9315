//! The migration's way to guest memory: vectored reads and writes straight between a socket and
//! the guest's pages, with no copy in user space.
//!
//! This file, with `zero.rs`, is the only place where guest memory is reached by raw pointer. Guest memory is
//! shared with running vCPUs, so no Rust reference to it is ever made: the kernel reads and writes
//! it, and the few loops here use volatile accesses.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;

use devices::virtio::PageDiscard;
use migration::dirty::has;
use migration::guest::{GuestRam, IoPart, PAGE_SIZE, RamBlock, ReadPart};

use crate::memory::Ram;
use crate::pagemap;
use crate::rom::RomList;
use crate::zero;

/// The name of the board's RAM on the wire.
pub const PC_RAM: &str = "pc.ram";

/// The most parts that one call may have (Linux, UIO_MAXIOV).
const IOV_MAX: usize = 1024;
/// What is filled at once, in bytes; no mapping's border lies inside.
const FILL: u64 = 2 << 20;

fn out_of_range(offset: u64, len: u64) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidInput,
        format!("{offset:#x}+{len:#x} is not inside the RAM block"),
    )
}

/// The blocks behind the first, if `block` is one of them; kept while a pointer to them is used.
fn roms(ram: &Ram, block: usize) -> Option<RomList> {
    (block != 0).then(|| ram.roms().list())
}

impl Ram {
    /// Calls `f` with the address of each contiguous stretch of `offset..offset + len`.
    ///
    /// Every stretch lies inside one of this RAM's mappings, which live as long as `self`, or of
    /// `roms`, which are the blocks from 1 on.
    fn stretches(
        &self,
        roms: Option<&RomList>,
        block: usize,
        offset: u64,
        len: u64,
        mut f: impl FnMut(*mut u8, usize),
    ) -> io::Result<()> {
        let rom = block.checked_sub(1).map(|index| roms.and_then(|roms| roms.get(index)));
        let size = match rom {
            None => self.size(),
            Some(rom) => rom.map_or(0, |rom| rom.size()),
        };
        let end = offset.checked_add(len).filter(|&end| end <= size);
        let end = end.ok_or_else(|| out_of_range(offset, len))?;
        if let Some(rom) = rom.flatten() {
            f((rom.host_address() + offset) as *mut u8, len as usize);
            return Ok(());
        }
        for slot in self.slots() {
            let from = offset.max(slot.block_offset);
            let to = end.min(slot.block_offset + slot.len);
            if from < to {
                f(
                    (slot.host_address + (from - slot.block_offset)) as *mut u8,
                    (to - from) as usize,
                );
            }
        }
        Ok(())
    }
}

fn iovec(base: *mut u8, len: usize) -> libc::iovec {
    libc::iovec { iov_base: base.cast(), iov_len: len }
}

/// Drops the first `n` bytes of what `iov[*first..]` describes.
fn advance(iov: &mut [libc::iovec], first: &mut usize, mut n: usize) {
    while let Some(v) = iov.get_mut(*first) {
        if n < v.iov_len {
            v.iov_base = v.iov_base.wrapping_byte_add(n);
            v.iov_len -= n;
            return;
        }
        n -= v.iov_len;
        *first += 1;
    }
}

impl GuestRam for Ram {
    fn blocks(&self) -> Vec<RamBlock> {
        let mut blocks = vec![RamBlock { name: PC_RAM.into(), len: self.size() }];
        blocks.extend(self.roms().list().iter().map(|rom| rom.block()));
        blocks
    }

    fn write_parts(
        &self,
        out: BorrowedFd<'_>,
        parts: &[IoPart<'_>],
        full: &mut dyn FnMut() -> io::Result<()>,
    ) -> io::Result<()> {
        let roms = self.roms().list();
        let mut iov = Vec::with_capacity(parts.len() + 1);
        for part in parts {
            match *part {
                IoPart::Bytes(bytes) => iov.push(iovec(bytes.as_ptr().cast_mut(), bytes.len())),
                IoPart::Ram { block, offset, len } => {
                    self.stretches(Some(&roms), block, offset, len as u64, |p, n| {
                        iov.push(iovec(p, n))
                    })?
                }
            }
        }
        let mut first = 0;
        advance(&mut iov, &mut first, 0);
        while let Some(rest) = iov.get(first..).filter(|rest| !rest.is_empty()) {
            let count = rest.len().min(IOV_MAX) as libc::c_int;
            // SAFETY: every element is either a borrowed slice of `parts` or a stretch of this
            // RAM's mappings or of `roms`, and the kernel only reads from them.
            let n = unsafe { libc::writev(out.as_raw_fd(), rest.as_ptr(), count) };
            if n < 0 {
                let e = io::Error::last_os_error();
                match e.kind() {
                    io::ErrorKind::Interrupted => {}
                    io::ErrorKind::WouldBlock => full()?,
                    _ => return Err(e),
                }
                continue;
            }
            advance(&mut iov, &mut first, n as usize);
        }
        Ok(())
    }

    fn read_parts(&self, from: BorrowedFd<'_>, parts: &mut [ReadPart<'_>]) -> io::Result<usize> {
        let roms = self.roms().list();
        let mut iov = Vec::with_capacity(parts.len() + 1);
        for part in parts {
            match part {
                ReadPart::Bytes(bytes) => iov.push(iovec(bytes.as_mut_ptr(), bytes.len())),
                ReadPart::Ram { block, offset, len } => {
                    self.stretches(Some(&roms), *block, *offset, *len as u64, |p, n| {
                        iov.push(iovec(p, n));
                    })?
                }
            }
        }
        let count = iov.len().min(IOV_MAX) as libc::c_int;
        loop {
            // SAFETY: every element is either an exclusively borrowed slice of `parts` or a
            // stretch of this RAM's mappings or of `roms`, to which no Rust reference exists.
            let n = unsafe { libc::readv(from.as_raw_fd(), iov.as_ptr(), count) };
            if n >= 0 {
                return Ok(n as usize);
            }
            let e = io::Error::last_os_error();
            if e.kind() != io::ErrorKind::Interrupted {
                return Err(e);
            }
        }
    }

    fn copy_in(&self, block: usize, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let mut done = 0;
        self.stretches(roms(self, block).as_ref(), block, offset, bytes.len() as u64, |p, n| {
            // SAFETY: the stretch is writable memory of `n` bytes, `bytes` has at least `done + n`
            // (the stretches add up to its length), and the two do not overlap.
            unsafe { ptr::copy_nonoverlapping(bytes.as_ptr().add(done), p, n) };
            done += n;
        })
    }

    fn copy_out(&self, block: usize, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        // To look at shared memory that was never touched would allocate it; to read it does not.
        if block == 0
            && let Some(memory) = self.shared()
        {
            return memory.read(offset, buf);
        }
        let mut done = 0;
        let to = buf.as_mut_ptr();
        self.stretches(roms(self, block).as_ref(), block, offset, buf.len() as u64, |p, n| {
            // SAFETY: as in `copy_in`, the other way round.
            unsafe { ptr::copy_nonoverlapping(p, to.add(done), n) };
            done += n;
        })
    }

    fn fill(&self, block: usize, offset: u64, len: u64, byte: u8) -> io::Result<()> {
        let end = offset.checked_add(len).ok_or_else(|| out_of_range(offset, len))?;
        let mut at = offset;
        while at < end {
            if byte == 0 && at.is_multiple_of(PAGE_SIZE) && end.is_multiple_of(PAGE_SIZE) {
                at += self.absent_ahead(block, at, end - at) * PAGE_SIZE;
                if at >= end {
                    break;
                }
            }
            let stretch = at..(at / FILL + 1).saturating_mul(FILL).min(end);
            // A page that was never touched reads as zero. Writing zero would allocate it, and even a
            // look would make the host map something there.
            let whole = at.is_multiple_of(PAGE_SIZE) && end.is_multiple_of(PAGE_SIZE);
            let len = stretch.end - stretch.start;
            let absent = if byte == 0 && whole { self.absent(block, at, len) } else { None };
            while at < stretch.end {
                let n = (PAGE_SIZE - at % PAGE_SIZE).min(end - at);
                let skip = byte == 0
                    && n == PAGE_SIZE
                    && (absent
                        .as_ref()
                        .is_some_and(|absent| has(absent, (at - stretch.start) / PAGE_SIZE))
                        || self.is_zero(block, at));
                if !skip {
                    self.stretches(roms(self, block).as_ref(), block, at, n, |p, n| {
                        // SAFETY: the stretch is writable memory of `n` bytes.
                        unsafe { ptr::write_bytes(p, byte, n) }
                    })?;
                }
                at += n;
            }
        }
        Ok(())
    }

    fn absent(&self, block: usize, offset: u64, len: u64) -> Option<Vec<u64>> {
        // What this process has not mapped of shared memory may be there all the same.
        if block == 0
            && let Some(memory) = self.shared()
        {
            offset.checked_add(len).filter(|end| *end <= self.size())?;
            return memory.absent(offset, len / PAGE_SIZE);
        }
        let mut stretch = None;
        let mut several = false;
        let found = self.stretches(roms(self, block).as_ref(), block, offset, len, |p, _| {
            several = stretch.replace(p as u64).is_some();
        });
        // Over the PCI hole the two stretches are asked for one after the other by whoever goes on.
        if found.is_err() || several {
            return None;
        }
        pagemap::absent(stretch?, len / PAGE_SIZE)
    }

    fn absent_ahead(&self, block: usize, offset: u64, len: u64) -> u64 {
        if block == 0
            && let Some(memory) = self.shared()
        {
            let inside = offset.checked_add(len).is_some_and(|end| end <= self.size());
            return if inside { memory.absent_ahead(offset, len / PAGE_SIZE) } else { 0 };
        }
        let (mut ahead, mut whole) = (0, true);
        let asked = self.stretches(roms(self, block).as_ref(), block, offset, len, |p, n| {
            if whole {
                let pages = n as u64 / PAGE_SIZE;
                let found = pagemap::absent_ahead(p as u64, pages);
                ahead += found;
                whole = found == pages;
            }
        });
        if asked.is_ok() { ahead } else { 0 }
    }

    fn populate(&self, block: usize, offset: u64, len: u64) {
        let asked = self.stretches(roms(self, block).as_ref(), block, offset, len, |p, n| {
            // SAFETY: the stretch lies inside one of this RAM's mappings; populating it changes no
            // content. Linux before 5.14 does not know it and refuses.
            let done = unsafe { libc::madvise(p.cast(), n, libc::MADV_POPULATE_WRITE) };
            if done != 0 {
                tracing::trace!("not populated: {}", io::Error::last_os_error());
            }
        });
        if let Err(error) = asked {
            tracing::debug!(%error, "not populated");
        }
    }

    fn is_zero(&self, block: usize, offset: u64) -> bool {
        if !offset.is_multiple_of(PAGE_SIZE) {
            return false;
        }
        let mut zero = true;
        let whole = self.stretches(roms(self, block).as_ref(), block, offset, PAGE_SIZE, |p, n| {
            // SAFETY: the stretch lies inside one of this RAM's mappings, and is a whole page.
            zero &= unsafe { zero::is_zero(p, n) };
        });
        whole.is_ok() && zero
    }
}

impl Ram {
    /// Whether the host has memory for no more than a quarter of it, as far as that is quickly found out.
    pub(crate) fn is_sparse(&self) -> bool {
        let most = self.size() / PAGE_SIZE / 4;
        if let Some(memory) = self.shared() {
            return memory.allocated().is_some_and(|bytes| bytes / PAGE_SIZE <= most);
        }
        let mut present = Some(0);
        let asked = self.stretches(None, 0, 0, self.size(), |p, n| {
            present = present.and_then(|before: u64| {
                let left = most.saturating_sub(before);
                Some(before + pagemap::present(p as u64, n as u64 / PAGE_SIZE, left)?)
            });
        });
        asked.is_ok() && present.is_some()
    }
}

impl PageDiscard for Ram {
    fn discard(&self, address: u64, len: u64) -> io::Result<()> {
        let end = address.checked_add(len).ok_or_else(|| out_of_range(address, len))?;
        // Nobody asks for more than one slot's pages: between any two there is a hole.
        let slot = self
            .slots()
            .iter()
            .find(|s| address >= s.guest_address && end <= s.guest_address + s.len)
            .ok_or_else(|| out_of_range(address, len))?;
        // To forget the mapping of shared memory (MADV_DONTNEED) would free nothing.
        if let Some(memory) = self.shared() {
            return memory.discard(slot.block_offset + (address - slot.guest_address), len);
        }
        let host = slot.host_address + (address - slot.guest_address);
        // SAFETY: the range lies inside one of this RAM's private mappings, whose pages then read
        // as zero; no Rust reference to them exists.
        match unsafe { libc::madvise(host as *mut _, len as usize, libc::MADV_DONTNEED) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use super::*;

    fn timeout() -> io::Result<()> {
        Err(io::ErrorKind::WouldBlock.into())
    }

    fn ram() -> Ram {
        Ram::new(4 << 20, 40).unwrap()
    }

    /// Private memory, and such as can be given to another process.
    fn both() -> [Ram; 2] {
        [ram(), Ram::new_shared(4 << 20, 40).unwrap()]
    }

    #[test]
    fn pages_go_out_and_come_in_between_headers() {
        let ram = ram();
        ram.copy_in(0, 0x3000, &[7; 8192]).unwrap();
        let (a, mut b) = UnixStream::pair().unwrap();
        let parts = [
            IoPart::Bytes(b"head"),
            IoPart::Ram { block: 0, offset: 0x3ffe, len: 4 },
            IoPart::Bytes(b""),
            IoPart::Bytes(b"tail"),
        ];
        ram.write_parts(a.as_fd(), &parts, &mut timeout).unwrap();
        let mut got = [0; 12];
        b.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"head\x07\x07\x07\x07tail");

        b.write_all(b"xyPAGE").unwrap();
        let mut head = [0; 2];
        let n = ram
            .read_parts(
                a.as_fd(),
                &mut [
                    ReadPart::Bytes(&mut head),
                    ReadPart::Ram { block: 0, offset: 0x10_0000, len: 4096 },
                ],
            )
            .unwrap();
        let mut page = [0; 5];
        ram.copy_out(0, 0x10_0000, &mut page).unwrap();
        assert_eq!((n, &head, &page), (6, b"xy", b"PAGE\0"));
        a.shutdown(std::net::Shutdown::Both).unwrap();
    }

    #[test]
    fn zeroes_go_where_something_was_and_allocate_nothing_else() {
        both().iter().for_each(zeroes_allocate_nothing);
    }

    fn zeroes_allocate_nothing(ram: &Ram) {
        let all = |ram: &Ram| ram.absent(0, 0, 4 << 20).expect("the host tells");
        let present = |ram: &Ram| {
            let absent: u32 = all(ram).iter().map(|word| word.count_ones()).sum();
            1024 - absent
        };
        assert_eq!(present(ram), 0);
        ram.fill(0, 0, 4 << 20, 0).unwrap();
        assert_eq!(present(ram), 0, "zero was zero");
        ram.copy_in(0, 0x20_1000, &[7; 4096]).unwrap();
        // One page, or a huge one.
        let touched = present(ram);
        assert!((1..=512).contains(&touched), "{touched}");
        assert!(!has(&all(ram), 0x201));
        ram.fill(0, 0, 4 << 20, 0).unwrap();
        assert!(ram.is_zero(0, 0x20_1000));
        assert_eq!(present(ram), touched);
        ram.fill(0, 0x1ffe, 4, 9).unwrap();
        let mut bytes = [1; 6];
        ram.copy_out(0, 0x1ffd, &mut bytes).unwrap();
        assert_eq!(bytes, [0, 9, 9, 9, 9, 0]);
        assert!(!has(&all(ram), 1) && ram.fill(0, 4 << 20, 1, 0).is_err());
    }

    #[test]
    fn more_parts_than_one_call_takes_all_arrive() {
        let ram = ram();
        for page in 0..700u64 {
            ram.copy_in(0, page * 4096, &[page as u8; 4096]).unwrap();
        }
        let (a, mut b) = UnixStream::pair().unwrap();
        let reader = std::thread::spawn(move || {
            let mut all = Vec::new();
            b.read_to_end(&mut all).map(|_| all)
        });
        let parts: Vec<_> = (0..700)
            .flat_map(|page| {
                [IoPart::Bytes(b"h"), IoPart::Ram { block: 0, offset: page * 4096, len: 4096 }]
            })
            .collect();
        ram.write_parts(a.as_fd(), &parts, &mut timeout).unwrap();
        drop(a);
        let all = reader.join().unwrap().unwrap();
        assert_eq!(all.len(), 700 * 4097);
        for (page, record) in all.chunks(4097).enumerate() {
            assert_eq!(record[0], b'h');
            assert!(record[1..].iter().all(|b| *b == page as u8), "page {page}");
        }
    }

    #[test]
    fn zero_is_seen_and_filling_writes_every_byte() {
        let ram = ram();
        assert!(ram.is_zero(0, 0x5000));
        ram.copy_in(0, 0x5fff, &[1]).unwrap();
        assert!(!ram.is_zero(0, 0x5000) && ram.is_zero(0, 0x6000));
        ram.fill(0, 0x5000, 4096, 0).unwrap();
        assert!(ram.is_zero(0, 0x5000));
        ram.fill(0, 0x6ffc, 8, 9).unwrap();
        let mut got = [0; 10];
        ram.copy_out(0, 0x6ffb, &mut got).unwrap();
        assert_eq!(got, [0, 9, 9, 9, 9, 9, 9, 9, 9, 0]);
    }

    #[test]
    fn populating_changes_nothing_and_takes_any_range() {
        let ram = ram();
        ram.copy_in(0, 0x5000, &[7; 16]).unwrap();
        ram.populate(0, 0, ram.size());
        ram.populate(0, ram.size(), 1);
        ram.populate(9, 0, 4096);
        let mut got = [0; 17];
        ram.copy_out(0, 0x5000, &mut got).unwrap();
        assert_eq!((&got[..16], got[16]), (&[7; 16][..], 0));
    }

    #[test]
    fn discarded_pages_read_as_zeros_and_their_neighbours_stay() {
        for ram in both() {
            ram.copy_in(0, 0x4000, &[7; 4 * 4096]).unwrap();
            ram.discard(0x5000, 2 * 4096).unwrap();
            if ram.shared().is_some() {
                // They are nobody's any more, also not in the file.
                let absent = ram.absent(0, 0x4000, 4 * 4096);
                assert_eq!(absent, Some(vec![0b0110]));
            }
            let zero = |page: u64| ram.is_zero(0, page * 4096);
            assert_eq!([4, 5, 6, 7].map(zero), [false, true, true, false]);
            for (address, len) in [(ram.size() - 4096, 8192), (1 << 32, 4096), (u64::MAX, 4096)] {
                assert!(ram.discard(address, len).is_err(), "{address:#x}+{len:#x}");
            }
        }
    }

    #[test]
    fn nothing_outside_of_the_block_is_reached() {
        let ram = ram();
        let len = ram.size();
        assert!(ram.copy_in(0, len - 1, &[0; 2]).is_err());
        assert!(ram.copy_in(0, u64::MAX, &[0; 2]).is_err());
        assert!(ram.copy_in(1, 0, &[0; 2]).is_err());
        assert!(ram.fill(0, len, 1, 1).is_err());
        assert!(!ram.is_zero(0, len));
    }
}
