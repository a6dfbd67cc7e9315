//! A raw disk image, or a block device, on the host.
//!
//! While a VM may write to an image it holds locks on it that QEMU understands, so that neither a
//! second mini-vmm nor a QEMU runs on the same image: QEMU announces what it does by read locks on
//! bytes 100 and up, and what it does not want others to do on bytes 200 and up. A byte behind these
//! is ours: it is locked when a guest that was migrated here has started, so that a source that has
//! lost its connection to us can see it.

use std::cell::Cell;
use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use nix::fcntl::{AT_FDCWD, FallocateFlags, FcntlArg, fallocate, fcntl};
use nix::sys::stat::UtimensatFlags::FollowSymlink;
use nix::sys::stat::utimensat;
use nix::sys::time::TimeSpec;
use serde::{Deserialize, Serialize};

use super::chain::Buffers;

/// Bytes of a sector, the unit of every request.
pub(super) const SECTOR: u64 = 512;
/// `O_DIRECT` wants buffers and offsets aligned; this is enough for any disk.
const ALIGNMENT: usize = 4096;
/// Size of the buffer that direct and zeroing requests go through.
const BUFFER: usize = 1 << 20;

/// How often an image's time is set until it differs, and how long in between: together more than the
/// second that the coarsest file systems tell apart.
const TOUCHES: u32 = 120;
const TOUCH_PAUSE: Duration = Duration::from_millis(10);

/// How an image is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CacheMode {
    /// Through the host's page cache; a guest's flush reaches the disk.
    #[default]
    Writeback,
    /// Through the host's page cache; every write reaches the disk.
    Writethrough,
    /// Around the host's page cache; a guest's flush reaches the disk.
    Direct,
    /// Through the host's page cache; a guest's flush does nothing.
    Unsafe,
}

/// An image that is not necessarily open.
#[derive(Debug, Clone)]
pub struct DiskImage {
    /// Where it is.
    pub path: PathBuf,
    /// Whether the guest may only read it.
    pub readonly: bool,
    /// How it is written.
    pub cache: CacheMode,
}

impl DiskImage {
    /// How large it is, in bytes. Takes no lock.
    pub fn size(&self) -> io::Result<u64> {
        File::open(&self.path)?.seek(SeekFrom::End(0))
    }

    /// Whether the locks on it tell who may run the guest: it is written to, and is a file. Those on a
    /// block device are not seen by other hosts.
    pub fn arbitrates(&self) -> bool {
        !self.readonly && self.path.metadata().is_ok_and(|m| m.is_file())
    }

    /// Who holds it; takes no lock.
    pub fn holder(&self) -> io::Result<ImageHolder> {
        let file = File::open(&self.path)?;
        let held = |start, len| -> io::Result<bool> {
            let mut lock = flock(libc::F_WRLCK, start, len);
            fcntl(&file, FcntlArg::F_OFD_GETLK(&mut lock))?;
            Ok(i32::from(lock.l_type) != libc::F_UNLCK)
        };
        Ok(if !held(lock_byte::FIRST, lock_byte::COUNT)? {
            ImageHolder::Nobody
        } else if held(lock_byte::GUEST_STARTED, 1)? {
            ImageHolder::StartedGuest
        } else {
            ImageHolder::Someone
        })
    }

    /// What shows whether it has been written to.
    pub fn stamp(&self) -> io::Result<ImageStamp> {
        // An open makes a network file system look anew.
        let meta = File::open(&self.path)?.metadata()?;
        Ok(ImageStamp {
            device: meta.dev(),
            inode: meta.ino(),
            size: meta.len(),
            written: meta.modified()?,
        })
    }

    /// Changes its stamp without changing what is in it. Whoever may write to an image may do that, but
    /// only to the present time, so it can take as long as the host's file times are coarse.
    pub fn touch(&self) -> io::Result<()> {
        let before = self.stamp()?;
        for _ in 0..TOUCHES {
            utimensat(
                AT_FDCWD,
                &self.path,
                &TimeSpec::UTIME_NOW,
                &TimeSpec::UTIME_NOW,
                FollowSymlink,
            )?;
            if self.stamp()? != before {
                return Ok(());
            }
            std::thread::sleep(TOUCH_PAUSE);
        }
        Err(io::Error::other("its file system does not show when it was last written to"))
    }

    /// Opens and locks it.
    pub fn open(&self) -> io::Result<OpenDisk> {
        let direct = self.cache == CacheMode::Direct;
        let mut file = OpenOptions::new()
            .read(true)
            .write(!self.readonly)
            .custom_flags(if direct { libc::O_DIRECT } else { 0 })
            .open(&self.path)
            .map_err(|e| match e.kind() {
                io::ErrorKind::InvalidInput if direct => io::Error::new(
                    io::ErrorKind::Unsupported,
                    "its file system has no direct I/O: use cache=writeback",
                ),
                kind @ (io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem)
                    if !self.readonly && File::open(&self.path).is_ok() =>
                {
                    io::Error::new(kind, format!("it may only be read ({e}): use readonly=on"))
                }
                _ => e,
            })?;
        lock(&file, self.readonly).map_err(|e| locked(&self.path, e))?;
        let size = file.seek(SeekFrom::End(0))?;
        let buffer = if direct { vec![0; BUFFER + ALIGNMENT] } else { Vec::new() };
        Ok(OpenDisk {
            file,
            size,
            buffer,
            cache: self.cache,
            readonly: self.readonly,
            unsynced: Cell::new(true),
            owed: Cell::new(None),
        })
    }
}

/// Who holds an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ImageHolder {
    /// Nobody.
    Nobody,
    /// A virtual machine of which nothing more is known.
    Someone,
    /// A mini-vmm in which a guest that was migrated there has started.
    StartedGuest,
}

/// What an image was like at some time. It differs afterwards if somebody has written to it, or has
/// put another one in its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageStamp {
    device: u64,
    inode: u64,
    size: u64,
    /// When it was last written to.
    pub written: SystemTime,
}

impl ImageStamp {
    /// Whether `other`, perhaps of another host, is of the same image: file systems that hosts share
    /// show the same number for it, while each host numbers the file systems as it likes.
    pub fn is_of_same_image(&self, other: &Self) -> bool {
        self.inode == other.inode
    }

    /// Whether nobody has written in between; to be asked of the same image.
    pub fn is_as_left(&self, left: &Self) -> bool {
        (self.size, self.written) == (left.size, left.written)
    }
}

/// Another virtual machine holds the locks on an image; the source of an [`io::Error`].
#[derive(Debug, thiserror::Error)]
#[error("{} is in use by another virtual machine", path.display())]
pub struct ImageInUse {
    /// The image.
    pub path: PathBuf,
}

/// What can be known of an image without opening it for use.
#[derive(Debug)]
pub struct Inspected {
    /// In bytes.
    pub size: u64,
    /// Why it can't be opened as it will be.
    pub refused: Option<io::Error>,
    /// Whether somebody holds a lock on it.
    pub locked: bool,
}

impl DiskImage {
    /// Measures it, and tries whether it could be opened for use. Takes no lock.
    pub fn inspect(&self) -> io::Result<Inspected> {
        let mut reading = File::open(&self.path)?;
        let size = reading.seek(SeekFrom::End(0))?;
        let writing = OpenOptions::new().read(true).write(!self.readonly).open(&self.path);
        let mut held = flock(libc::F_WRLCK, lock_byte::FIRST, lock_byte::COUNT);
        fcntl(&reading, FcntlArg::F_OFD_GETLK(&mut held))?;
        let locked = i32::from(held.l_type) != libc::F_UNLCK;
        Ok(Inspected { size, refused: writing.err(), locked })
    }
}

fn locked(path: &Path, error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::PermissionDenied => {
            io::Error::new(io::ErrorKind::ResourceBusy, ImageInUse { path: path.to_owned() })
        }
        _ => error,
    }
}

/// The bytes that QEMU locks: what a program does with an image (from 100 on), and what it does
/// not want others to do (from 200 on).
mod lock_byte {
    /// Reads and relies on what it reads.
    pub(super) const READS: i64 = 100;
    /// Writes.
    pub(super) const WRITES: i64 = 101;
    /// Changes the size.
    pub(super) const RESIZES: i64 = 103;
    /// Nobody else may write.
    pub(super) const NO_WRITERS: i64 = 201;
    /// Nobody else may change the size.
    pub(super) const NO_RESIZERS: i64 = 203;
    /// All of them.
    pub(super) const FIRST: i64 = 100;
    pub(super) const COUNT: i64 = 200;
    /// A migrated guest has started. No QEMU looks here.
    pub(super) const GUEST_STARTED: i64 = 310;
}

fn flock(kind: i32, start: i64, len: i64) -> libc::flock {
    let narrow = |value: i32| i16::try_from(value).unwrap_or(0);
    libc::flock {
        l_type: narrow(kind),
        l_whence: narrow(libc::SEEK_SET),
        l_start: start,
        l_len: len,
        l_pid: 0,
    }
}

/// A writer shuts out everyone. Readers tolerate each other.
fn lock(file: &File, readonly: bool) -> io::Result<()> {
    let take = |kind, start, len| -> io::Result<()> {
        fcntl(file, FcntlArg::F_OFD_SETLK(&flock(kind, start, len)))?;
        Ok(())
    };
    if !readonly {
        return take(libc::F_WRLCK, lock_byte::FIRST, lock_byte::COUNT);
    }
    for byte in [lock_byte::READS, lock_byte::NO_WRITERS, lock_byte::NO_RESIZERS] {
        take(libc::F_RDLCK, byte, 1)?;
    }
    for byte in [lock_byte::WRITES, lock_byte::RESIZES] {
        let mut held = flock(libc::F_WRLCK, byte, 1);
        fcntl(file, FcntlArg::F_OFD_GETLK(&mut held))?;
        if i32::from(held.l_type) != libc::F_UNLCK {
            return Err(io::ErrorKind::WouldBlock.into());
        }
    }
    Ok(())
}

/// An open image.
#[derive(Debug)]
pub struct OpenDisk {
    file: File,
    /// In bytes, when it was opened.
    size: u64,
    /// What direct requests go through; empty for all others.
    buffer: Vec<u8>,
    cache: CacheMode,
    readonly: bool,
    /// Something may not be on the disk yet; at first, what others have left in the page cache.
    unsynced: Cell<bool>,
    /// The error of a flush that the guest has not heard of.
    owed: Cell<Option<i32>>,
}

impl OpenDisk {
    /// Lets everyone see that a migrated guest has started on it.
    pub(super) fn mark_started(&self) -> io::Result<()> {
        if self.readonly {
            return Ok(());
        }
        let mark = flock(libc::F_WRLCK, lock_byte::GUEST_STARTED, 1);
        fcntl(&self.file, FcntlArg::F_OFD_SETLK(&mark))?;
        Ok(())
    }

    /// Its size in bytes, when it was opened.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Reads at byte `offset` until `to` is full; zeros behind the image's end.
    pub fn read(&mut self, offset: u64, to: &mut Buffers<'_>) -> io::Result<()> {
        if self.cache == CacheMode::Direct {
            return self.read_direct(offset, to);
        }
        self.file.seek(SeekFrom::Start(offset))?;
        to.fill_from(&mut self.file)?;
        zero(to);
        Ok(())
    }

    /// Writes all of `from` at byte `offset`.
    pub fn write(&mut self, offset: u64, from: &mut Buffers<'_>) -> io::Result<()> {
        self.unsynced.set(true);
        if self.cache == CacheMode::Direct {
            self.write_direct(offset, from)?;
        } else {
            self.file.seek(SeekFrom::Start(offset))?;
            from.drain_to(&mut self.file)?;
        }
        Ok(())
    }

    fn read_direct(&mut self, offset: u64, to: &mut Buffers<'_>) -> io::Result<()> {
        let (file, buffer) = (&self.file, aligned(&mut self.buffer));
        let mut at = offset;
        while !to.is_empty() {
            let wanted = to.len().min(buffer.len());
            let Some(piece) = buffer.get_mut(..wanted) else { break };
            let mut got = 0;
            // What comes in parts ends at a boundary, except at the image's end.
            while let Some(rest) = piece.get_mut(got..).filter(|rest| !rest.is_empty()) {
                match file.read_at(rest, at.saturating_add(to_u64(got))) {
                    Ok(0) => break,
                    Ok(n) => got += n,
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                    // Behind an unaligned end nothing more can be read directly.
                    Err(_) if got % 512 != 0 => break,
                    Err(e) => return Err(e),
                }
            }
            if let Some(rest) = piece.get_mut(got..) {
                rest.fill(0);
            }
            to.write(piece);
            at = at.saturating_add(to_u64(wanted));
        }
        Ok(())
    }

    fn write_direct(&mut self, offset: u64, from: &mut Buffers<'_>) -> io::Result<()> {
        let (file, buffer) = (&self.file, aligned(&mut self.buffer));
        let mut at = offset;
        while !from.is_empty() {
            let n = from.read(buffer);
            file.write_all_at(buffer.get(..n).unwrap_or_default(), at)?;
            at = at.saturating_add(to_u64(n));
        }
        Ok(())
    }

    /// Brings to the disk what was written since the last time.
    pub fn flush(&self) -> io::Result<()> {
        if self.readonly || self.cache == CacheMode::Unsafe {
            return Ok(());
        }
        if let Some(error) = self.owed.take() {
            return Err(io::Error::from_raw_os_error(error));
        }
        if self.unsynced.get() {
            self.file.sync_data()?;
            self.unsynced.set(false);
        }
        Ok(())
    }

    /// The same, unasked: an error is for whoever asks next.
    pub(super) fn flush_unasked(&self) {
        // One that nobody has heard of yet stays for whoever asks.
        if self.owed.get().is_none()
            && let Err(error) = self.flush()
        {
            self.owe(&error);
        }
    }

    #[cfg(test)]
    pub(super) fn is_synced(&self) -> bool {
        !self.unsynced.get()
    }

    /// A flush that the guest did not ask for has failed: its next one will, and until then every other. The
    /// kernel says only once that something did not get to the disk (fsync(2)), and a guest that was given
    /// away would never hear of it.
    pub(super) fn owe(&self, error: &io::Error) {
        self.owed.set(Some(error.raw_os_error().unwrap_or(libc::EIO)));
    }

    /// Gives up what is stored in a range. A host file system that cannot do that keeps it.
    pub fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        match self.fallocate(flags, offset, len) {
            Err(e) if e.kind() == io::ErrorKind::Unsupported => Ok(()),
            other => other,
        }
    }

    /// Makes a range read as zeros; `unmap` allows to give up its storage.
    pub fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        let how = if unmap {
            FallocateFlags::FALLOC_FL_PUNCH_HOLE
        } else {
            FallocateFlags::FALLOC_FL_ZERO_RANGE
        };
        match self.fallocate(how | FallocateFlags::FALLOC_FL_KEEP_SIZE, offset, len) {
            Err(e) if e.kind() == io::ErrorKind::Unsupported => {}
            other => return other,
        }
        let mut zeros = vec![0; BUFFER + ALIGNMENT];
        let zeros = aligned(&mut zeros);
        let end = offset.saturating_add(len);
        let mut at = offset;
        while at < end {
            let n = usize::try_from(end - at).unwrap_or(usize::MAX).min(zeros.len());
            self.file.write_all_at(zeros.get(..n).unwrap_or_default(), at)?;
            at = at.saturating_add(to_u64(n));
        }
        Ok(())
    }

    fn fallocate(&self, flags: FallocateFlags, offset: u64, len: u64) -> io::Result<()> {
        self.unsynced.set(true);
        let signed =
            |n: u64| i64::try_from(n).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput));
        Ok(fallocate(&self.file, flags, signed(offset)?, signed(len)?)?)
    }
}

fn zero(to: &mut Buffers<'_>) {
    let zeros = [0; 512];
    while to.write(&zeros) != 0 {}
}

/// The aligned part of `buffer`.
fn aligned(buffer: &mut [u8]) -> &mut [u8] {
    let start = buffer.as_ptr().align_offset(ALIGNMENT);
    let end = start.saturating_add(BUFFER);
    buffer.get_mut(start..end).unwrap_or_default()
}

fn to_u64(n: usize) -> u64 {
    u64::try_from(n).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(readonly: bool) -> (DiskImage, tempfile::NamedTempFile) {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(8192).unwrap();
        (DiskImage { path: file.path().into(), readonly, cache: CacheMode::Writeback }, file)
    }

    #[test]
    fn locks_show_who_holds_an_image_and_a_mark_that_its_guest_has_started() {
        let (image, _file) = image(false);
        assert!(image.arbitrates());
        assert_eq!(image.holder().unwrap(), ImageHolder::Nobody);
        let disk = image.open().unwrap();
        assert_eq!(image.holder().unwrap(), ImageHolder::Someone);
        let error = image.open().unwrap_err();
        assert!(error.get_ref().is_some_and(|e| e.is::<ImageInUse>()), "{error}");
        disk.mark_started().unwrap();
        assert_eq!(image.holder().unwrap(), ImageHolder::StartedGuest);
        drop(disk);
        assert_eq!(image.holder().unwrap(), ImageHolder::Nobody);
    }

    #[test]
    fn a_touched_image_is_the_same_one_and_not_as_it_was_left() {
        let (image, file) = image(false);
        let left = image.stamp().unwrap();
        assert!(image.stamp().unwrap().is_as_left(&left));
        image.touch().unwrap();
        let now = image.stamp().unwrap();
        assert!(now.is_of_same_image(&left) && !now.is_as_left(&left), "{left:?} {now:?}");
        assert_eq!(std::fs::read(file.path()).unwrap(), [0; 8192]);
        let (another, _file) = self::image(false);
        assert!(!another.stamp().unwrap().is_of_same_image(&left));
    }

    #[test]
    fn an_image_that_is_only_read_says_nothing_and_neither_does_a_block_device() {
        let (read, _file) = image(true);
        assert!(!read.arbitrates());
        let disk = read.open().unwrap();
        disk.mark_started().unwrap();
        assert_eq!(read.holder().unwrap(), ImageHolder::Someone);
        let device = DiskImage { path: "/dev/null".into(), ..read };
        assert!(!DiskImage { readonly: false, ..device }.arbitrates());
    }

    #[test]
    fn a_stamp_tells_a_write_and_another_file_but_not_a_lock() {
        let (image, file) = image(false);
        let before = image.stamp().unwrap();
        drop(image.open().unwrap());
        assert_eq!(image.stamp().unwrap(), before);
        // Further from the file's creation than its time is coarse.
        let later = before.written + std::time::Duration::from_millis(20);
        file.as_file().write_all_at(b"x", 0).unwrap();
        file.as_file().set_modified(later).unwrap();
        assert_ne!(image.stamp().unwrap(), before);
        file.as_file().set_modified(before.written).unwrap();
        assert_eq!(image.stamp().unwrap(), before);
        let other = file.path().with_extension("other");
        std::fs::copy(file.path(), &other).unwrap();
        File::open(&other).unwrap().set_modified(before.written).unwrap();
        std::fs::rename(&other, file.path()).unwrap();
        assert_ne!(image.stamp().unwrap(), before);
    }

    /// What a flush needs of an open image that is this file.
    fn over(file: File) -> OpenDisk {
        OpenDisk {
            file,
            size: 4096,
            buffer: Vec::new(),
            cache: CacheMode::Writeback,
            readonly: false,
            unsynced: Cell::new(true),
            owed: Cell::new(None),
        }
    }

    #[test]
    fn a_flush_does_what_is_left_to_do() {
        // A pipe can't be synchronised, which shows when it is tried.
        let (pipe, _other) = nix::unistd::pipe().unwrap();
        let disk = over(File::from(pipe));
        for _ in 0..2 {
            assert_eq!(disk.flush().unwrap_err().raw_os_error(), Some(libc::EINVAL));
        }
        disk.unsynced.set(false);
        disk.flush().unwrap();

        let disk = over(tempfile::tempfile().unwrap());
        disk.flush().unwrap();
        assert!(!disk.unsynced.get());
        disk.write_zeroes(0, 512, false).unwrap();
        assert!(disk.unsynced.get());
        disk.flush().unwrap();
        disk.discard(0, 512).unwrap();
        assert!(disk.unsynced.get());
    }

    #[test]
    fn an_unasked_flush_leaves_its_failure_to_whoever_asks() {
        let (pipe, _other) = nix::unistd::pipe().unwrap();
        let disk = over(File::from(pipe));
        // The second does not take the first one's failure.
        disk.flush_unasked();
        disk.flush_unasked();
        disk.unsynced.set(false);
        assert_eq!(disk.flush().unwrap_err().raw_os_error(), Some(libc::EINVAL));
        disk.flush().unwrap();
    }

    #[test]
    fn a_failure_that_the_guest_has_not_heard_of_is_its_next_flush() {
        let disk = over(tempfile::tempfile().unwrap());
        disk.owe(&io::Error::from_raw_os_error(libc::ENOSPC));
        assert_eq!(disk.flush().unwrap_err().raw_os_error(), Some(libc::ENOSPC));
        disk.flush().unwrap();
        disk.owe(&io::Error::other("not the kernel's"));
        assert_eq!(disk.flush().unwrap_err().raw_os_error(), Some(libc::EIO));
    }
}
