//! Memory that another process can be given: a file that is nowhere but in memory (memfd_create(2)), and
//! nobody can make shorter or longer.
//!
//! What a process has mapped of it says nothing about what there is: `/proc/self/pagemap` and mincore(2)
//! know of one process, or of what is not swapped out. The file itself is asked (lseek(2), SEEK_DATA).

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::{Mutex, PoisonError};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, FcntlArg, OFlag, SealFlag, fallocate, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::stat::{SFlag, fstat};
use nix::sys::statfs::{TMPFS_MAGIC, fstatfs};
use nix::unistd::{Whence, ftruncate, lseek64};

use crate::memory::PAGE_SIZE;

/// Without these, whoever else has it could take memory away that is mapped here, and the next look at it
/// would end this process (SIGBUS).
const NEEDED: SealFlag = SealFlag::F_SEAL_SHRINK.union(SealFlag::F_SEAL_GROW);

/// Memory came that can't be used.
#[derive(Debug, thiserror::Error)]
pub enum ForeignMemory {
    /// It can't be looked at.
    #[error("the descriptor of {what} can't be looked at")]
    Look {
        /// What it was to be.
        what: &'static str,
        /// The reason.
        #[source]
        source: io::Error,
    },
    /// Something else.
    #[error("the descriptor of {0} is no memory (memfd)")]
    NoMemory(&'static str),
    /// Not as much as is needed, or more.
    #[error("{what} has {found} bytes, expected {expected}")]
    Length {
        /// What it was to be.
        what: &'static str,
        /// What is needed.
        expected: u64,
        /// What came.
        found: i64,
    },
    /// It could change its length, or can't be written to.
    #[error(
        "{what} has the seals {found:#x}, expected F_SEAL_SHRINK and F_SEAL_GROW, and none that forbids to \
         write: memory that is cut off while it is mapped would end this process"
    )]
    Seals {
        /// What it was to be.
        what: &'static str,
        /// Those that there are.
        found: i32,
    },
    /// Nobody could write to it through this descriptor.
    #[error("the descriptor of {0} is open for reading only")]
    ReadOnly(&'static str),
}

/// Such memory.
#[derive(Debug)]
pub struct Memfd {
    file: File,
    len: u64,
    /// A stretch that was found to be there. What has been given back meanwhile reads as zero, and is
    /// no loss if it is taken for present; a stretch that was not there is never remembered.
    present: Mutex<Range<u64>>,
}

impl Memfd {
    /// `len` bytes of zeros that take no memory yet; `name` shows in `/proc/PID/maps`.
    pub fn new(name: &CStr, len: u64) -> io::Result<Self> {
        let fd = memfd_create(name, MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
        let signed = i64::try_from(len).map_err(|_| io::ErrorKind::FileTooLarge)?;
        ftruncate(&fd, signed)?;
        fcntl(&fd, FcntlArg::F_ADD_SEALS(NEEDED | SealFlag::F_SEAL_SEAL))?;
        Ok(Self::from_parts(fd, len))
    }

    /// Takes what another process has sent, if it is such memory of `len` bytes; `what` is its name in an
    /// error.
    pub fn received(fd: OwnedFd, len: u64, what: &'static str) -> Result<Self, ForeignMemory> {
        let look = |source: Errno| ForeignMemory::Look { what, source: source.into() };
        let stat = fstat(&fd).map_err(look)?;
        let file = SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT == SFlag::S_IFREG;
        // Not of huge pages (hugetlbfs), which can't be mapped in parts.
        if !file || fstatfs(&fd).map_err(look)?.filesystem_type() != TMPFS_MAGIC {
            return Err(ForeignMemory::NoMemory(what));
        }
        let seals = match fcntl(&fd, FcntlArg::F_GET_SEALS) {
            Ok(seals) => seals,
            Err(Errno::EINVAL) => return Err(ForeignMemory::NoMemory(what)),
            Err(error) => return Err(look(error)),
        };
        let flags = fcntl(&fd, FcntlArg::F_GETFL).map_err(look)?;
        if OFlag::from_bits_retain(flags) & OFlag::O_ACCMODE != OFlag::O_RDWR {
            return Err(ForeignMemory::ReadOnly(what));
        }
        let forbidden = libc::F_SEAL_WRITE | libc::F_SEAL_FUTURE_WRITE;
        if seals & NEEDED.bits() != NEEDED.bits() || seals & forbidden != 0 {
            return Err(ForeignMemory::Seals { what, found: seals });
        }
        // Only now: what is not sealed may have another length by the next line.
        let found = fstat(&fd).map_err(look)?.st_size;
        if u64::try_from(found) != Ok(len) {
            return Err(ForeignMemory::Length { what, expected: len, found });
        }
        Ok(Self::from_parts(fd, len))
    }

    fn from_parts(fd: OwnedFd, len: u64) -> Self {
        Self { file: fd.into(), len, present: Mutex::new(0..0) }
    }

    /// Length in bytes, for ever.
    pub fn size(&self) -> u64 {
        self.len
    }

    /// A second descriptor of it, to be given away or mapped.
    pub fn descriptor(&self) -> io::Result<OwnedFd> {
        Ok(self.file.try_clone()?.into())
    }

    /// Which of the `pages` pages from byte `offset` on have no memory, as bits: bit `i` of word `n` is page
    /// `64 * n + i`. They read as zero. `None` where the host doesn't tell.
    pub(crate) fn absent(&self, offset: u64, pages: u64) -> Option<Vec<u64>> {
        let mut bits = vec![0u64; usize::try_from(pages.div_ceil(64)).ok()?];
        let end = offset.checked_add(pages.checked_mul(PAGE_SIZE)?)?;
        let mut at = offset;
        while at < end {
            let data = match self.data_from(at) {
                Ok(data) => data,
                Err(error) => {
                    tracing::debug!(%error, "looking for data in shared memory");
                    return None;
                }
            };
            for n in (at - offset) / PAGE_SIZE..(data.start.clamp(at, end) - offset) / PAGE_SIZE {
                if let Some(word) = bits.get_mut((n / 64) as usize) {
                    *word |= 1 << (n % 64);
                }
            }
            at = data.end.max(at.checked_add(PAGE_SIZE)?);
        }
        Some(bits)
    }

    /// How many of the `pages` pages from byte `offset` on, one after the other, have no memory; 0 also where the
    /// host doesn't tell.
    pub(crate) fn absent_ahead(&self, offset: u64, pages: u64) -> u64 {
        match self.data_from(offset) {
            Ok(data) => (data.start.saturating_sub(offset) / PAGE_SIZE).min(pages),
            Err(error) => {
                tracing::debug!(%error, "looking for data in shared memory");
                0
            }
        }
    }

    /// Bytes that have memory, if the host tells.
    pub(crate) fn allocated(&self) -> Option<u64> {
        // In units of 512 bytes, whatever the block size is (stat(2)).
        Some(self.file.metadata().ok()?.blocks().saturating_mul(512))
    }

    /// The first stretch of data that ends behind `at`; it may begin before. Empty and behind the end if
    /// there is none.
    fn data_from(&self, at: u64) -> io::Result<Range<u64>> {
        let mut present = self.present.lock().unwrap_or_else(PoisonError::into_inner);
        // Where a long stretch ends takes the kernel as long as it is, so that is not asked again for each of
        // its pieces.
        if present.contains(&at) {
            return Ok(present.clone());
        }
        let seek = |from: u64, whence| {
            let from = i64::try_from(from).map_err(|_| Errno::EOVERFLOW)?;
            lseek64(&self.file, from, whence).map(|found| found.unsigned_abs())
        };
        let start = match seek(at, Whence::SeekData) {
            Ok(start) => start,
            Err(Errno::ENXIO) => return Ok(self.len..self.len),
            Err(error) => return Err(error.into()),
        };
        if start == present.start && !present.is_empty() {
            return Ok(present.clone());
        }
        *present = start..match seek(start, Whence::SeekHole) {
            Ok(end) => end,
            // It was given back in between.
            Err(Errno::ENXIO) => self.len,
            Err(error) => return Err(error.into()),
        };
        Ok(present.clone())
    }

    /// Copies from byte `offset` on into `buf`, and allocates nothing.
    pub(crate) fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(buf, offset)
    }

    /// Gives the memory of `len` bytes from byte `offset` on back to the host, whoever has mapped it. They
    /// read as zero then.
    pub(crate) fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        let signed = |n: u64| i64::try_from(n).map_err(|_| io::Error::from(Errno::EOVERFLOW));
        let how = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        Ok(fallocate(&self.file, how, signed(offset)?, signed(len)?)?)
    }
}

impl AsFd for Memfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEN: u64 = 4 << 20;

    fn memory() -> Memfd {
        Memfd::new(c"test", LEN).unwrap()
    }

    fn present(memory: &Memfd, offset: u64, pages: u64) -> Vec<u64> {
        let absent = memory.absent(offset, pages).unwrap();
        (0..pages).filter(|n| absent[(n / 64) as usize] >> (n % 64) & 1 == 0).collect()
    }

    #[test]
    fn what_is_there_is_found_whether_it_is_mapped_or_not() {
        let memory = memory();
        assert!(present(&memory, 0, 1024).is_empty());
        memory.file.write_all_at(&[1; 3 * 4096], 0x5000).unwrap();
        memory.file.write_all_at(&[1], 1023 * PAGE_SIZE).unwrap();
        // Without huge pages, as it is on hosts that have not asked for more.
        let found = present(&memory, 0, 1024);
        assert!([5, 6, 7, 1023].iter().all(|page| found.contains(page)), "{found:?}");
        let whole = |from: u64, pages: u64| {
            found.iter().filter(|n| (from..from + pages).contains(n)).map(|n| n - from).collect()
        };
        for (from, pages) in [(0, 5), (5, 1), (6, 100), (8, 1015), (900, 124), (1023, 1)] {
            let expected: Vec<u64> = whole(from, pages);
            assert_eq!(present(&memory, from * PAGE_SIZE, pages), expected, "{from}+{pages}");
        }
    }

    #[test]
    fn what_comes_later_is_never_overlooked() {
        let memory = memory();
        memory.file.write_all_at(&[1; 8192], 0x5000).unwrap();
        assert!(present(&memory, 0, 1024).contains(&5));
        for page in [0, 4, 7, 500, 1023, 300] {
            memory.file.write_all_at(&[1], page * PAGE_SIZE).unwrap();
            assert!(present(&memory, 0, 1024).contains(&page), "page {page}");
        }
        memory.discard(0, LEN).unwrap();
        memory.file.write_all_at(&[1], 77 * PAGE_SIZE).unwrap();
        assert!(present(&memory, 0, 1024).contains(&77));
    }

    #[test]
    fn what_is_given_back_is_zero() {
        let memory = memory();
        memory.file.write_all_at(&[7; 4 * 4096], 0x4000).unwrap();
        memory.discard(0x5000, 8192).unwrap();
        let mut bytes = [1; 4 * 4096];
        memory.file.read_exact_at(&mut bytes, 0x4000).unwrap();
        for (n, page) in bytes.chunks(4096).enumerate() {
            let expected = if n == 1 || n == 2 { 0 } else { 7 };
            assert!(page.iter().all(|byte| *byte == expected), "page {n}");
        }
    }

    #[test]
    fn its_length_is_for_ever() {
        let memory = memory();
        for len in [0, 4096, 2 * LEN as i64] {
            assert_eq!(ftruncate(&memory.file, len), Err(Errno::EPERM), "{len}");
        }
        let more = FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_WRITE);
        assert_eq!(fcntl(&memory.file, more), Err(Errno::EPERM));
    }

    #[test]
    fn what_comes_from_elsewhere_is_taken_only_if_nobody_can_cut_it_off() {
        let take =
            |fd: OwnedFd| Memfd::received(fd, LEN, "guest memory").map(|memory| memory.size());
        let made = |len: u64, seals: SealFlag| {
            let fd = memfd_create(c"test", MFdFlags::MFD_ALLOW_SEALING).unwrap();
            ftruncate(&fd, len as i64).unwrap();
            fcntl(&fd, FcntlArg::F_ADD_SEALS(seals)).unwrap();
            fd
        };
        assert_eq!(take(memory().descriptor().unwrap()).unwrap(), LEN);
        assert_eq!(take(made(LEN, NEEDED)).unwrap(), LEN);
        for seals in [
            SealFlag::empty(),
            SealFlag::F_SEAL_SHRINK,
            SealFlag::F_SEAL_GROW,
            NEEDED | SealFlag::F_SEAL_WRITE,
            NEEDED | SealFlag::from_bits_retain(libc::F_SEAL_FUTURE_WRITE),
        ] {
            let refused = take(made(LEN, seals));
            assert!(matches!(refused, Err(ForeignMemory::Seals { .. })), "{seals:?}: {refused:?}");
        }
        for len in [0, LEN - 4096, LEN + 4096, 1 << 40] {
            let refused = take(made(len, NEEDED)).unwrap_err();
            assert!(matches!(refused, ForeignMemory::Length { .. }), "{len}: {refused}");
            assert!(refused.to_string().contains("guest memory"), "{refused}");
        }
        let memory = memory().descriptor().unwrap();
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&memory));
        let refused = take(File::open(path).unwrap().into());
        assert!(matches!(refused, Err(ForeignMemory::ReadOnly(_))), "{refused:?}");
        let file = tempfile::tempfile().unwrap();
        file.set_len(LEN).unwrap();
        let directory = File::open("/").unwrap();
        let null = File::options().read(true).write(true).open("/dev/null").unwrap();
        let (socket, _) = std::os::unix::net::UnixStream::pair().unwrap();
        for fd in [file.into(), directory.into(), null.into(), OwnedFd::from(socket)] {
            let refused = take(fd);
            let other =
                matches!(refused, Err(ForeignMemory::NoMemory(_) | ForeignMemory::Seals { .. }));
            assert!(other, "{refused:?}");
        }
    }
}
