//! Memory in vectors, with a dirty log as KVM keeps one, or a ring.

use std::cell::Cell;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use migration::dirty::DirtyBitmap;
use migration::guest::{DirtyTracker, GuestRam, IoPart, PAGE_SIZE, RamBlock, ReadPart, VmError};
use nix::fcntl::{SpliceFFlags, splice};
use nix::sys::memfd::{MFdFlags, memfd_create};

/// How often the engine has asked for what.
#[derive(Default)]
pub(crate) struct Calls {
    /// Vectored writes.
    pub(crate) writes: AtomicU64,
    /// Bytes that were lent to a pipe, and not written.
    pub(crate) lent: AtomicU64,
    /// Vectored reads.
    pub(crate) reads: AtomicU64,
    /// Looks at a page, whether it is zero.
    pub(crate) looks: AtomicU64,
    /// Bytes that were copied from a buffer, and not read straight into memory.
    pub(crate) copied: AtomicU64,
    /// Bytes that came in on threads that give way to others.
    pub(crate) behind: AtomicU64,
}

thread_local! {
    /// Whether the thread gives way to others.
    pub(crate) static GIVES_WAY: Cell<bool> = const { Cell::new(false) };
}

pub(crate) struct FakeRam {
    pub(crate) calls: Calls,
    blocks: Mutex<Vec<RamBlock>>,
    data: Mutex<Vec<Vec<u8>>>,
    /// The log; `None` while nobody asks for it.
    log: Mutex<Option<DirtyBitmap>>,
    /// Pages that the guest writes just after the first clear of a block's log, and just before the
    /// second.
    pub(crate) ambush: Option<(u64, u64)>,
    clears: AtomicU64,
    /// Its log clears itself when it is read, and tells who wrote: the first of two vCPUs.
    pub(crate) rings: AtomicBool,
    found: AtomicU64,
    /// Whoever sends pages of it, or takes them in, panics.
    pub(crate) panics: AtomicBool,
    /// The first block's bytes again, in a file whose pages can be lent by reference: whoever receives them gets what
    /// is there by then.
    by_reference: Mutex<Option<File>>,
    /// A page of it that the guest writes as soon as it was lent, each time.
    pub(crate) late: Mutex<Option<u64>>,
    /// It can only be written, as the memory of a host that has no such call.
    pub(crate) lends_nothing: AtomicBool,
    /// It can't be read.
    pub(crate) unreadable: AtomicBool,
    /// Pages of the first block that the host has no memory for.
    pub(crate) unused: Mutex<Range<u64>>,
    /// One of them that the guest writes as soon as somebody has heard that nothing is there.
    pub(crate) first_use: Mutex<Option<u64>>,
}

impl FakeRam {
    pub(crate) fn new(blocks: &[(&str, u64)]) -> Arc<Self> {
        Self::with_ambush(blocks, None)
    }

    pub(crate) fn with_ambush(blocks: &[(&str, u64)], ambush: Option<(u64, u64)>) -> Arc<Self> {
        let blocks: Vec<_> = blocks
            .iter()
            .map(|(name, pages)| RamBlock { name: (*name).into(), len: pages * PAGE_SIZE })
            .collect();
        let data = blocks.iter().map(|b| vec![0; b.len as usize]).collect();
        Arc::new(Self {
            calls: Calls::default(),
            blocks: Mutex::new(blocks),
            data: Mutex::new(data),
            log: Mutex::new(None),
            ambush,
            clears: AtomicU64::new(0),
            rings: AtomicBool::new(false),
            found: AtomicU64::new(0),
            panics: AtomicBool::new(false),
            by_reference: Mutex::new(None),
            late: Mutex::new(None),
            lends_nothing: AtomicBool::new(false),
            unreadable: AtomicBool::new(false),
            unused: Mutex::new(0..0),
            first_use: Mutex::new(None),
        })
    }

    /// A write by the guest or a device: into memory, then into the log.
    pub(crate) fn write(&self, block: usize, offset: u64, bytes: &[u8]) {
        self.set(block, offset, bytes);
        if let Some(log) = &mut *self.log.lock().unwrap() {
            for page in offset / PAGE_SIZE..=(offset + bytes.len() as u64 - 1) / PAGE_SIZE {
                log.set(block, page);
            }
        }
    }

    /// Takes in a block that it has not got.
    pub(super) fn add(&self, block: &RamBlock) {
        self.blocks.lock().unwrap().push(block.clone());
        self.data.lock().unwrap().push(vec![0; block.len as usize]);
    }

    /// Whether the dirty log is on.
    pub(super) fn is_logged(&self) -> bool {
        self.log.lock().unwrap().is_some()
    }

    pub(crate) fn contents(&self) -> Vec<Vec<u8>> {
        self.data.lock().unwrap().clone()
    }

    fn put(&self, block: usize, offset: u64, bytes: &[u8]) {
        if GIVES_WAY.get() {
            self.calls.behind.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        }
        self.set(block, offset, bytes);
    }

    fn set(&self, block: usize, offset: u64, bytes: &[u8]) {
        let at = offset as usize;
        self.data.lock().unwrap()[block][at..at + bytes.len()].copy_from_slice(bytes);
        if let (0, Some(file)) = (block, &*self.by_reference.lock().unwrap()) {
            file.write_all_at(bytes, offset).unwrap();
        }
    }

    /// From here on the first block is lent by reference.
    pub(crate) fn lend_by_reference(&self) {
        let file = File::from(memfd_create("lent", MFdFlags::MFD_CLOEXEC).unwrap());
        file.write_all_at(&self.data.lock().unwrap()[0], 0).unwrap();
        *self.by_reference.lock().unwrap() = Some(file);
    }

    /// Bytes of the first block to a pipe, if its pages can be lent.
    fn refer(&self, pipe: BorrowedFd<'_>, offset: u64, len: usize) -> Option<io::Result<usize>> {
        let file = self.by_reference.lock().unwrap();
        let mut from = offset as i64;
        let flags = SpliceFFlags::empty();
        let lent = splice(file.as_ref()?, Some(&mut from), pipe, None, len, flags);
        Some(lent.map_err(io::Error::from))
    }

    fn moves(&self) {
        assert!(!self.panics.load(Ordering::Relaxed), "memory was told to panic");
    }

    fn check(&self, block: usize, offset: u64, len: u64) -> io::Result<()> {
        let inside = self
            .blocks
            .lock()
            .unwrap()
            .get(block)
            .is_some_and(|b| offset.checked_add(len).is_some_and(|end| end <= b.len));
        if inside { Ok(()) } else { Err(io::ErrorKind::InvalidInput.into()) }
    }
}

impl GuestRam for FakeRam {
    fn blocks(&self) -> Vec<RamBlock> {
        self.blocks.lock().unwrap().clone()
    }

    fn write_parts(
        &self,
        out: BorrowedFd<'_>,
        parts: &[IoPart<'_>],
        full: &mut dyn FnMut() -> io::Result<()>,
    ) -> io::Result<()> {
        self.calls.writes.fetch_add(1, Ordering::Relaxed);
        let mut all = Vec::new();
        for part in parts {
            match *part {
                IoPart::Bytes(bytes) => all.extend_from_slice(bytes),
                IoPart::Ram { block, offset, len } => {
                    self.moves();
                    self.check(block, offset, len as u64)?;
                    let at = offset as usize;
                    all.extend_from_slice(&self.data.lock().unwrap()[block][at..at + len]);
                }
            }
        }
        let mut rest = &all[..];
        while !rest.is_empty() {
            match nix::unistd::write(out, rest) {
                Ok(n) => rest = &rest[n..],
                Err(nix::Error::EINTR) => {}
                Err(nix::Error::EAGAIN) => full()?,
                Err(e) => return Err(e.into()),
            }
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
        if self.lends_nothing.load(Ordering::Relaxed) {
            return Err(io::ErrorKind::Unsupported.into());
        }
        self.calls.writes.fetch_add(1, Ordering::Relaxed);
        self.calls.lent.fetch_add(len as u64, Ordering::Relaxed);
        self.moves();
        self.check(block, offset, len as u64)?;
        if block == 0
            && let Some(lent) = self.refer(pipe, offset, len)
        {
            let late = *self.late.lock().unwrap();
            if let Some(page) =
                late.filter(|page| (offset..offset + len as u64).contains(&(page * PAGE_SIZE)))
            {
                self.write(0, page * PAGE_SIZE, b"late");
            }
            return lent;
        }
        let at = offset as usize;
        Ok(nix::unistd::write(pipe, &self.data.lock().unwrap()[block][at..at + len])?)
    }

    fn read_parts(&self, from: BorrowedFd<'_>, parts: &mut [ReadPart<'_>]) -> io::Result<usize> {
        let len = |p: &ReadPart<'_>| match p {
            ReadPart::Bytes(b) => b.len(),
            ReadPart::Ram { len, .. } => *len,
        };
        self.calls.reads.fetch_add(1, Ordering::Relaxed);
        let mut all = vec![0; parts.iter().map(len).sum()];
        let n = loop {
            match nix::unistd::read(from, &mut all) {
                Err(nix::Error::EINTR) => {}
                other => break other?,
            }
        };
        let mut rest = &all[..n];
        for part in parts {
            let (head, tail) = rest.split_at(len(part).min(rest.len()));
            match part {
                ReadPart::Bytes(b) => b[..head.len()].copy_from_slice(head),
                ReadPart::Ram { block, offset, len } => {
                    self.moves();
                    self.check(*block, *offset, *len as u64)?;
                    self.put(*block, *offset, head);
                }
            }
            rest = tail;
        }
        Ok(n)
    }

    fn copy_in(&self, block: usize, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.calls.copied.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        self.check(block, offset, bytes.len() as u64)?;
        self.put(block, offset, bytes);
        Ok(())
    }

    fn copy_out(&self, block: usize, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.check(block, offset, buf.len() as u64)?;
        if self.unreadable.load(Ordering::Relaxed) {
            return Err(io::ErrorKind::Other.into());
        }
        let at = offset as usize;
        buf.copy_from_slice(&self.data.lock().unwrap()[block][at..at + buf.len()]);
        Ok(())
    }

    fn fill(&self, block: usize, offset: u64, len: u64, byte: u8) -> io::Result<()> {
        self.check(block, offset, len)?;
        let at = offset as usize;
        self.data.lock().unwrap()[block][at..at + len as usize].fill(byte);
        Ok(())
    }

    fn populate(&self, _block: usize, _offset: u64, _len: u64) {}

    fn absent_ahead(&self, block: usize, offset: u64, len: u64) -> u64 {
        let (first, end) = (offset / PAGE_SIZE, (offset + len) / PAGE_SIZE);
        let mut unused = self.unused.lock().unwrap();
        if block != 0 || !unused.contains(&first) {
            return 0;
        }
        let ahead = unused.end.min(end) - first;
        if let Some(page) =
            self.first_use.lock().unwrap().take_if(|page| (first..first + ahead).contains(page))
        {
            unused.end = page;
            self.write(0, page * PAGE_SIZE, b"used");
        }
        ahead
    }

    fn is_zero(&self, block: usize, offset: u64) -> bool {
        self.calls.looks.fetch_add(1, Ordering::Relaxed);
        let at = offset as usize;
        self.data.lock().unwrap()[block][at..at + PAGE_SIZE as usize].iter().all(|b| *b == 0)
    }
}

pub(super) struct FakeLog(pub(super) Arc<FakeRam>);

impl DirtyTracker for FakeLog {
    fn start(&mut self) -> Result<(), VmError> {
        *self.0.log.lock().unwrap() = Some(DirtyBitmap::new(&self.0.blocks()));
        Ok(())
    }
    // As KVM does it with manual protection: reading the log does not clear it.
    fn fetch(&mut self, into: &mut DirtyBitmap) -> Result<(), VmError> {
        let mut log = self.0.log.lock().unwrap();
        let log = log.as_mut().ok_or_else(|| VmError::new("the log is not started"))?;
        for (index, block) in self.0.blocks().iter().enumerate() {
            for page in 0..block.len / PAGE_SIZE {
                if log.is_set(index, page) {
                    into.set(index, page);
                }
            }
        }
        if self.0.rings.load(Ordering::SeqCst) {
            self.0.found.fetch_add(log.count(), Ordering::SeqCst);
            *log = DirtyBitmap::new(&self.0.blocks());
        }
        Ok(())
    }
    fn clear(&mut self, block: usize, first_page: u64, bits: &[u64]) -> Result<(), VmError> {
        assert_eq!(first_page % 64, 0);
        let nth = if block == 0 { self.0.clears.fetch_add(1, Ordering::SeqCst) + 1 } else { 0 };
        let strike = |page| self.0.write(0, page * PAGE_SIZE + 50, b"in between");
        if let (Some((_, before)), 2) = (self.0.ambush, nth) {
            strike(before);
        }
        if self.0.rings.load(Ordering::SeqCst) {
            return Ok(());
        }
        let mut guard = self.0.log.lock().unwrap();
        let log = guard.as_mut().ok_or_else(|| VmError::new("the log is not started"))?;
        let end = (first_page + bits.len() as u64 * 64).min(log.pages(block));
        if let Some(was) = log.take(block, first_page..end) {
            let stays: Vec<u64> = was.iter().zip(bits).map(|(was, bit)| was & !bit).collect();
            log.or(block, first_page, &stays);
        }
        drop(guard);
        if let (Some((after, _)), 1) = (self.0.ambush, nth) {
            strike(after);
        }
        Ok(())
    }
    fn by_vcpu(&self) -> Option<Vec<u64>> {
        let rings = self.0.rings.load(Ordering::SeqCst);
        rings.then(|| vec![self.0.found.load(Ordering::SeqCst), 0])
    }
    fn stop(&mut self) {
        assert!(self.0.log.lock().unwrap().take().is_some(), "stopped without a start");
    }
}
