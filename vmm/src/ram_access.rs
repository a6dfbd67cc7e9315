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

    fn lend(
        &self,
        pipe: BorrowedFd<'_>,
        block: usize,
        offset: u64,
        len: usize,
    ) -> io::Result<usize> {
        let roms = roms(self, block);
        let mut iov = Vec::with_capacity(2);
        self.stretches(roms.as_ref(), block, offset, len as u64, |p, n| iov.push(iovec(p, n)))?;
        loop {
            // SAFETY: every element is a stretch of this RAM's mappings or of `roms`. The kernel takes references to
            // their pages, which stay whole when the mappings end, and only reads from them.
            let n = unsafe { libc::vmsplice(pipe.as_raw_fd(), iov.as_ptr(), iov.len(), 0) };
            if n >= 0 {
                return Ok(n as usize);
            }
            let e = io::Error::last_os_error();
            if e.kind() != io::ErrorKind::Interrupted {
                return Err(e);
            }
        }
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
    /// Bytes of it that the host has given memory to already; 0 where that is not quickly found out.
    pub(crate) fn held(&self) -> u64 {
        if let Some(memory) = self.shared() {
            return memory.allocated().unwrap_or_default().min(self.size());
        }
        let mut pages = 0;
        let asked = self.stretches(None, 0, 0, self.size(), |p, n| {
            let all = n as u64 / PAGE_SIZE;
            pages += pagemap::present(p as u64, all, all).unwrap_or_default();
        });
        if asked.is_ok() { pages * PAGE_SIZE } else { 0 }
    }

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
mod tests;
