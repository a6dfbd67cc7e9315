//! The memory itself, from one process to another of the same host: how it travels, and the page that says
//! whose it is (`migration::handover::ledger`).

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::AtomicU32;

use migration::guest::VmError;
use migration::handover::ledger::{Entry, Ledger, Mark};
use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use vm_memory::mmap::MmapRegion;
use vm_memory::{FileOffset, VolatileMemory};

use crate::memfd::{ForeignMemory, Memfd};
use crate::memory::PAGE_SIZE;

/// What the descriptors come with. No part of a migration stream begins with it.
const MEMORY: u8 = b'M';
/// The memory and the ledger.
const COUNT: usize = 2;
/// The most descriptors of one message (Linux, SCM_MAX_FD). There is room for as many: of a message that is cut
/// some would be open, and nobody would know which.
const MOST: usize = 253;

/// The memory or its ledger did not come.
#[derive(Debug, thiserror::Error)]
pub(super) enum PassError {
    /// The socket failed.
    #[error("the socket")]
    Socket(#[from] io::Error),
    /// The other side is gone.
    #[error("the connection ended in their place")]
    Closed,
    /// Something else came.
    #[error("byte {0:#04x} came in their place")]
    Other(u8),
    /// Not as many as there are to be.
    #[error("{0} came, expected {COUNT}: the memory and its ledger")]
    Count(usize),
    /// One of them can't be used.
    #[error(transparent)]
    Foreign(#[from] ForeignMemory),
}

/// Gives both to whoever is at the other end of this Unix socket.
pub(super) fn send(
    over: BorrowedFd<'_>,
    memory: BorrowedFd<'_>,
    ledger: BorrowedFd<'_>,
) -> io::Result<()> {
    let fds = [memory.as_raw_fd(), ledger.as_raw_fd()];
    let (parts, control) = ([IoSlice::new(&[MEMORY])], [ControlMessage::ScmRights(&fds)]);
    loop {
        match sendmsg::<()>(over.as_raw_fd(), &parts, &control, MsgFlags::MSG_NOSIGNAL, None) {
            Ok(_) => return Ok(()),
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Takes both.
pub(super) fn receive(from: BorrowedFd<'_>) -> Result<[OwnedFd; COUNT], PassError> {
    let mut byte = [0];
    let mut space = nix::cmsg_space!([RawFd; MOST]);
    let mut fds = Vec::new();
    let bytes = loop {
        let mut parts = [IoSliceMut::new(&mut byte)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let message = match recvmsg::<()>(from.as_raw_fd(), &mut parts, Some(&mut space), flags) {
            Err(Errno::EINTR) => continue,
            message => message.map_err(io::Error::from)?,
        };
        for control in message.cmsgs().into_iter().flatten() {
            if let ControlMessageOwned::ScmRights(found) = control {
                // SAFETY: the kernel has just opened them for this call, and nobody else knows them.
                fds.extend(found.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
            }
        }
        break message.bytes;
    };
    match byte {
        _ if bytes == 0 => return Err(PassError::Closed),
        [MEMORY] => {}
        [other] => return Err(PassError::Other(other)),
    }
    <[OwnedFd; COUNT]>::try_from(fds).map_err(|fds| PassError::Count(fds.len()))
}

/// The ledger of one attempt, in a page that both processes have mapped.
pub(super) struct LedgerPage {
    memory: Memfd,
    page: MmapRegion,
}

impl LedgerPage {
    /// A new one.
    pub(super) fn new() -> Result<Self, VmError> {
        let memory = Memfd::new(c"ledger", PAGE_SIZE);
        let failed = |e| VmError::with("no memory for the ledger of who has the guest's memory", e);
        Self::map(memory.map_err(failed)?)
    }

    /// The source's, which sent this.
    pub(super) fn received(fd: OwnedFd) -> Result<Self, VmError> {
        let memory = Memfd::received(fd, PAGE_SIZE, "the ledger");
        Self::map(memory.map_err(|e| VmError::with("the source's ledger can't be used", e))?)
    }

    fn map(memory: Memfd) -> Result<Self, VmError> {
        let failed = |e| VmError::with("the ledger can't be mapped", e);
        let file = std::fs::File::from(memory.descriptor().map_err(failed)?);
        let page = MmapRegion::from_file(FileOffset::new(file, 0), PAGE_SIZE as usize);
        let page = page.map_err(|e| VmError::with("the ledger can't be mapped", e))?;
        Ok(Self { memory, page })
    }

    fn with<T>(&self, f: impl FnOnce(Ledger<'_>) -> T) -> Option<T> {
        // Its first word is there, and aligned.
        let word = self.page.get_atomic_ref::<AtomicU32>(0).ok()?;
        Some(f(Ledger::new(word)))
    }

    /// What stands there.
    pub(super) fn entry(&self) -> Entry {
        self.with(|ledger| ledger.entry()).unwrap_or(Entry::Taken)
    }

    /// See [`Ledger::mark`].
    pub(super) fn mark(&self, mark: Mark) -> Result<Entry, Entry> {
        self.with(|ledger| ledger.mark(mark)).unwrap_or(Err(Entry::Taken))
    }
}

impl AsFd for LedgerPage {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.memory.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write;
    use std::os::unix::fs::MetadataExt;
    use std::os::unix::net::UnixStream;
    use std::time::Duration;

    use super::*;

    fn full() -> OwnedFd {
        File::open("/dev/full").unwrap().into()
    }

    fn send_all(over: &UnixStream, byte: u8, fds: &[OwnedFd]) {
        let fds: Vec<_> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let control = [ControlMessage::ScmRights(&fds)];
        let control = if fds.is_empty() { &control[..0] } else { &control[..] };
        let bytes = [byte];
        let parts = [IoSlice::new(&bytes)];
        sendmsg::<()>(over.as_raw_fd(), &parts, control, MsgFlags::empty(), None).unwrap();
    }

    #[test]
    fn both_processes_see_one_ledger_and_one_memory() {
        let (a, b) = UnixStream::pair().unwrap();
        let memory = Memfd::new(c"test", 1 << 20).unwrap();
        let ours = LedgerPage::new().unwrap();
        (&a).write_all(b"before").unwrap();
        send(a.as_fd(), memory.as_fd(), ours.as_fd()).unwrap();
        (&a).write_all(b"behind").unwrap();
        let mut before = [0; 6];
        std::io::Read::read_exact(&mut &b, &mut before).unwrap();
        let [there, theirs] = receive(b.as_fd()).unwrap();
        let there = Memfd::received(there, 1 << 20, "memory").unwrap();
        let theirs = LedgerPage::received(theirs).unwrap();
        // No byte of what follows has been taken.
        std::io::Read::read_exact(&mut &b, &mut before).unwrap();
        assert_eq!(&before, b"behind");
        assert_eq!(theirs.entry(), Entry::Unused);
        ours.mark(Mark::Offer).unwrap();
        assert_eq!(theirs.mark(Mark::Take), Ok(Entry::Taken));
        assert_eq!(ours.mark(Mark::Keep), Err(Entry::Taken));
        theirs.mark(Mark::Start).unwrap();
        drop((theirs, there));
        assert_eq!(ours.entry(), Entry::Runs);
    }

    #[test]
    fn what_is_not_the_memory_and_its_ledger_is_refused_and_closed() {
        // Each of which would stay open for ever.
        let device = std::fs::metadata("/dev/full").unwrap().rdev();
        let open = || {
            let all = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
            let files = all.filter_map(|entry| std::fs::metadata(entry.path()).ok());
            files.filter(|file| file.rdev() == device).count()
        };
        for (byte, count, expected) in [
            (MEMORY, 0, "0 came"),
            (MEMORY, 1, "1 came"),
            (MEMORY, 3, "3 came"),
            (MEMORY, MOST, "253 came"),
            (8, 2, "byte 0x08 came"),
            (0, 0, "byte 0x00 came"),
        ] {
            let (a, b) = UnixStream::pair().unwrap();
            let fds: Vec<_> = (0..count).map(|_| full()).collect();
            send_all(&a, byte, &fds);
            drop(fds);
            let error = receive(b.as_fd()).unwrap_err().to_string();
            assert!(error.contains(expected), "{byte} {count}: {error}");
        }
        let (a, b) = UnixStream::pair().unwrap();
        b.set_read_timeout(Some(Duration::from_millis(1))).unwrap();
        assert!(matches!(receive(b.as_fd()), Err(PassError::Socket(_))));
        drop(a);
        assert!(matches!(receive(b.as_fd()), Err(PassError::Closed)));
        assert_eq!(open(), 0);
        for fd in [full(), Memfd::new(c"test", 2 * PAGE_SIZE).unwrap().descriptor().unwrap()] {
            assert!(LedgerPage::received(fd).is_err());
        }
    }

    #[test]
    fn only_a_unix_socket_takes_descriptors() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let tcp = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (peer, _) = listener.accept().unwrap();
        let ledger = LedgerPage::new().unwrap();
        // The byte goes all the same.
        send(tcp.as_fd(), ledger.as_fd(), ledger.as_fd()).unwrap();
        assert!(matches!(receive(peer.as_fd()), Err(PassError::Count(0))));
    }
}
