//! When what a guest has written to an image is on the disk, for several who bring it there.
//!
//! The guest's own flushes, the one before a VM is given away, and those that go before that one while
//! the guest still runs share what they know: nothing is brought to the disk that is there already.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};

/// What is known of one open image.
#[derive(Debug)]
struct Shared {
    /// Counts the writes that are complete, and one for what others may have left in the page cache.
    written: AtomicU64,
    /// How many of them are on the disk.
    synced: AtomicU64,
    /// The kernel says once only that something could not be brought to the disk (fsync(2)), and has said
    /// it to somebody who could do nothing about it: its error, or 0.
    lost: AtomicI32,
}

/// Brings to the disk what was written to an image. A copy of it keeps the image open, with its locks.
#[derive(Debug)]
pub struct Flusher {
    /// Nothing where a flush has no meaning.
    file: Option<File>,
    shared: Arc<Shared>,
}

impl Flusher {
    /// For a file that has just been opened.
    pub(super) fn new(file: Option<File>) -> Self {
        let (written, synced) = (AtomicU64::new(1), AtomicU64::new(0));
        Self { file, shared: Arc::new(Shared { written, synced, lost: AtomicI32::new(0) }) }
    }

    /// Another one for the same image.
    pub(super) fn another(&self) -> io::Result<Self> {
        let file = self.file.as_ref().map(File::try_clone).transpose()?;
        Ok(Self { file, shared: Arc::clone(&self.shared) })
    }

    /// Something was written. Not before it is: a flush at the same time may have missed it.
    pub(super) fn has_written(&self) {
        self.shared.written.fetch_add(1, Ordering::Release);
    }

    /// Whether something may not be on the disk yet.
    pub fn is_needed(&self) -> bool {
        let Shared { written, synced, lost } = &*self.shared;
        let on_disk = written.load(Ordering::Acquire) == synced.load(Ordering::Acquire);
        self.file.is_some() && (!on_disk || lost.load(Ordering::Acquire) != 0)
    }

    /// Returns when all that was written before is on the disk.
    pub fn flush(&self) -> io::Result<()> {
        let Some(file) = self.file.as_ref().filter(|_| self.is_needed()) else { return Ok(()) };
        match self.shared.lost.swap(0, Ordering::AcqRel) {
            0 => {}
            error => return Err(io::Error::from_raw_os_error(error)),
        }
        let written = self.shared.written.load(Ordering::Acquire);
        file.sync_data()?;
        self.shared.synced.fetch_max(written, Ordering::AcqRel);
        Ok(())
    }

    /// The same ahead of time: what fails is kept for the next [`flush`](Self::flush) to say.
    pub fn flush_ahead(&self) {
        if self.shared.lost.load(Ordering::Acquire) != 0 {
            return;
        }
        if let Err(error) = self.flush() {
            tracing::warn!("a disk image can't be flushed ahead of time: {error}");
            self.shared.lost.store(error.raw_os_error().unwrap_or(libc::EIO), Ordering::Release);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn a_flush_is_needed_after_a_write_only() {
        let file = tempfile::tempfile().unwrap();
        let flusher = Flusher::new(Some(file.try_clone().unwrap()));
        let ahead = flusher.another().unwrap();
        assert!(flusher.is_needed(), "others may have left something");
        ahead.flush_ahead();
        assert!(!flusher.is_needed() && !ahead.is_needed());
        file.write_all_at(b"new", 0).unwrap();
        flusher.has_written();
        assert!(flusher.is_needed() && ahead.is_needed());
        flusher.flush().unwrap();
        assert!(!ahead.is_needed());
        assert!(!Flusher::new(None).is_needed());
    }

    #[test]
    fn what_could_not_be_flushed_ahead_of_time_is_said_to_the_next_who_asks_and_once() {
        // A pipe can't be synchronised.
        let (pipe, _other) = nix::unistd::pipe().unwrap();
        let flusher = Flusher::new(Some(File::from(pipe)));
        let ahead = flusher.another().unwrap();
        ahead.flush_ahead();
        assert!(flusher.is_needed());
        assert_eq!(flusher.flush().unwrap_err().raw_os_error(), Some(libc::EINVAL));
        assert!(flusher.is_needed(), "it is tried again");
        let file = tempfile::tempfile().unwrap();
        let flusher = Flusher { file: Some(file), shared: flusher.shared };
        ahead.flush_ahead();
        // The next attempt would succeed, and is not made before somebody knows of the first.
        assert_eq!(flusher.flush().unwrap_err().raw_os_error(), Some(libc::EINVAL));
        flusher.flush().unwrap();
        assert!(!ahead.is_needed());
    }
}
