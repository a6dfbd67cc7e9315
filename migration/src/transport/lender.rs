//! Guest memory on its way into a socket, without a copy on this side.
//!
//! ```text
//! long parts    memory ──lend──→ pipe ──splice──→ socket      pages by reference
//! all others    ───────────vectored writes──────→ socket      copied by the kernel
//! ```
//! What is lent is read when it leaves the host (again, if it has to be sent again, until the peer has acknowledged
//! it), or, where the peer is on the same one, when the peer reads it. Until then the guest may write to it. That is
//! right for a migration:
//!
//! - While the guest runs, a page is cleared in the dirty log before it is sent, so that what is written to it behind that
//!   makes it dirty, and it is sent again.
//! - A guest that stands still writes nothing, and its destination runs nothing before it has read everything.
//! - A guest that stays after all goes on writing to what is still under way. Whoever reads that runs nothing; what it
//!   finds wrong may come of that, so it looks whether the source has given up first.
//!
//! The kernel keeps lent pages for as long as it needs them, whatever becomes of this process. Until then whoever has
//! the other end and reads nothing can look at what they hold now, where a copy would be as old as the call.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, splice};
use nix::libc::MSG_MORE;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, getsockopt, send, sockopt};
use nix::sys::time::TimeValLike;
use nix::unistd::pipe2;

use crate::guest::{GuestRam, IoPart};

/// What is shorter is copied: two calls and a reference for each page take longer than to copy these. Measured:
/// with 32 KiB about as long, with 64 KiB a third of the sender's time.
const LONG: usize = 64 << 10;
/// How many bytes the pipe is to hold, by the page: what an unprivileged process may ask for (pipe(7),
/// /proc/sys/fs/pipe-max-size).
const ROOM: usize = 1 << 20;

/// A TCP socket that can be written to has room for more than this part of its buffer: for a third of it (Linux,
/// `sk_stream_is_writeable`).
const WRITABLE: usize = 4;

/// Writes to one connection, and has a pipe to itself.
#[derive(Debug, Default)]
pub struct Lender {
    way: Way,
}

#[derive(Debug, Default)]
enum Way {
    /// Nothing long has been written yet.
    #[default]
    Untried,
    Pipe(Pipe),
    /// The host has no such way, or the connection.
    Never,
}

#[derive(Debug)]
struct Pipe {
    from: OwnedFd,
    to: OwnedFd,
    /// Bytes that it holds when it is empty.
    room: usize,
}

/// Why a part was not lent, and how much of it was.
enum NotLent {
    /// It can't be, and what is not lent may be written.
    Refused { error: io::Error, lent: usize },
    /// The connection has failed.
    Failed(io::Error),
}

impl Lender {
    /// Writes all parts to `out`, a socket, in order; `full` as in [`GuestRam::write_parts`].
    ///
    /// # Errors
    /// What the socket said, or `full`. Nothing more may be written to that socket behind it: some of a part may be
    /// missing.
    pub fn write_parts(
        &mut self,
        ram: &dyn GuestRam,
        out: BorrowedFd<'_>,
        parts: &[IoPart<'_>],
        full: &mut dyn FnMut() -> io::Result<()>,
    ) -> io::Result<()> {
        let mut rest = parts;
        while let Some(at) = rest.iter().position(is_long) {
            let Some(pipe) = self.pipe() else { break };
            let (before, from) = rest.split_at(at);
            let Some((IoPart::Ram { block, offset, len }, behind)) = from.split_first() else {
                break;
            };
            write_ahead(ram, out, before, full)?;
            let more = behind.iter().any(|part| !is_empty(part));
            let lent = pipe.lend(ram, out, (*block, *offset, *len), more, full);
            if lent.is_err() {
                // What may be left in the pipe goes with it.
                self.way = Way::Never;
            }
            match lent {
                Ok(()) => {}
                Err(NotLent::Refused { error, lent }) => {
                    tracing::debug!(%error, "memory is copied to the socket");
                    let (offset, len) = (offset + lent as u64, len - lent);
                    ram.write_parts(out, &[IoPart::Ram { block: *block, offset, len }], full)?;
                }
                Err(NotLent::Failed(error)) => return Err(error),
            }
            rest = behind;
        }
        if rest.is_empty() { Ok(()) } else { ram.write_parts(out, rest, full) }
    }

    /// The pipe, if there is or may be one.
    fn pipe(&mut self) -> Option<&Pipe> {
        if matches!(self.way, Way::Untried) {
            self.way = Pipe::new().map_or_else(
                |error| {
                    tracing::debug!(%error, "no pipe for memory, which is copied");
                    Way::Never
                },
                Way::Pipe,
            );
        }
        match &self.way {
            Way::Pipe(pipe) => Some(pipe),
            Way::Untried | Way::Never => None,
        }
    }
}

impl Pipe {
    fn new() -> io::Result<Self> {
        let (from, to) = pipe2(OFlag::O_CLOEXEC)?;
        // An administrator may allow less than usual, or this user has many of them.
        if let Err(error) = fcntl(&to, FcntlArg::F_SETPIPE_SZ(ROOM as i32)) {
            tracing::debug!(%error, "a pipe of {ROOM} bytes");
        }
        let room = fcntl(&to, FcntlArg::F_GETPIPE_SZ)?;
        let room = usize::try_from(room).unwrap_or_default();
        // A user who has very many pipes gets such of a page or two (pipe(7), /proc/sys/fs/pipe-user-pages-soft).
        if room < LONG {
            return Err(io::Error::other(format!("a pipe holds no more than {room} bytes")));
        }
        Ok(Self { from, to, room })
    }

    /// Block, offset and length to `out`; with `more`, something follows soon.
    fn lend(
        &self,
        ram: &dyn GuestRam,
        out: BorrowedFd<'_>,
        (block, offset, len): (usize, u64, usize),
        more: bool,
        full: &mut dyn FnMut() -> io::Result<()>,
    ) -> Result<(), NotLent> {
        let mut lent = 0;
        while lent < len {
            let most = (len - lent).min(self.room);
            let mut waits = match ram.lend(self.to.as_fd(), block, offset + lent as u64, most) {
                Ok(0) => Err(io::ErrorKind::WriteZero.into()),
                waits => waits,
            }
            .map_err(|error| NotLent::Refused { error, lent })?;
            let more = more || lent + waits < len;
            while waits > 0 {
                let len = waits.min(wait_for_room(out, full).map_err(NotLent::Failed)?);
                match self.pass_on(out, len, more || len < waits) {
                    Ok(0) => return Err(NotLent::Failed(io::ErrorKind::WriteZero.into())),
                    Ok(n) => {
                        waits -= n;
                        lent += n;
                    }
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        full().map_err(NotLent::Failed)?;
                    }
                    Err(error) if is_refusal(&error) => {
                        return Err(NotLent::Refused { error, lent });
                    }
                    Err(error) => return Err(NotLent::Failed(error)),
                }
            }
        }
        Ok(())
    }

    /// At most `len` bytes of what is in it, to `out`.
    fn pass_on(&self, out: BorrowedFd<'_>, len: usize, more: bool) -> io::Result<usize> {
        let flags = if more { SpliceFFlags::SPLICE_F_MORE } else { SpliceFFlags::empty() };
        Ok(splice(&self.from, None, out, None, len, flags)?)
    }
}

/// Waits until `out`, if it is a TCP socket, takes bytes or has failed, calling `full` each time its send timeout is
/// over; says how many it takes without waiting any more.
///
/// The kernel tells once why a connection broke, and splice(2) forgets that if it has moved anything in the same call,
/// as it does with a timeout that is over. So no call is to have to wait. A Unix socket is broken by its peer alone, and
/// its buffer is so small that it has to be filled: half of it takes twice as long.
fn wait_for_room(
    out: BorrowedFd<'_>,
    full: &mut dyn FnMut() -> io::Result<()>,
) -> io::Result<usize> {
    loop {
        if getsockopt(&out, sockopt::TcpUserTimeout).is_err() {
            return Ok(usize::MAX);
        }
        let buffer = getsockopt(&out, sockopt::SndBuf)?;
        let mut fds = [PollFd::new(out, PollFlags::POLLOUT)];
        match poll(&mut fds, send_timeout(out)?) {
            Ok(0) => full()?,
            Ok(_) => {
                let [fd] = fds;
                if fd.revents().is_some_and(|events| events.contains(PollFlags::POLLERR)) {
                    match getsockopt(&out, sockopt::SocketError)? {
                        0 => {}
                        error => return Err(io::Error::from_raw_os_error(error)),
                    }
                }
                return Ok((buffer / WRITABLE).max(1));
            }
            Err(nix::Error::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// How long a write to a socket may wait. None is for ever (socket(7), SO_SNDTIMEO).
fn send_timeout(out: BorrowedFd<'_>) -> io::Result<PollTimeout> {
    let time = getsockopt(&out, sockopt::SendTimeout)?;
    Ok(match time.num_milliseconds() {
        0 if time.num_microseconds() == 0 => PollTimeout::NONE,
        ms => PollTimeout::try_from(ms.max(1)).unwrap_or(PollTimeout::MAX),
    })
}

fn is_empty(part: &IoPart<'_>) -> bool {
    match part {
        IoPart::Bytes(bytes) => bytes.is_empty(),
        IoPart::Ram { len, .. } => *len == 0,
    }
}

fn is_long(part: &IoPart<'_>) -> bool {
    matches!(part, IoPart::Ram { len, .. } if *len >= LONG)
}

/// Whether a descriptor takes nothing from a pipe at all.
fn is_refusal(error: &io::Error) -> bool {
    use io::ErrorKind::{InvalidInput, PermissionDenied, Unsupported};
    matches!(error.kind(), InvalidInput | PermissionDenied | Unsupported)
}

/// Writes what comes before something that is lent. A header alone is told to wait for it: a packet of its own
/// would wake the peer for a few bytes.
fn write_ahead(
    ram: &dyn GuestRam,
    out: BorrowedFd<'_>,
    parts: &[IoPart<'_>],
    full: &mut dyn FnMut() -> io::Result<()>,
) -> io::Result<()> {
    let mut header = Vec::new();
    for part in parts {
        match part {
            IoPart::Bytes(bytes) => header.extend_from_slice(bytes),
            IoPart::Ram { .. } => return ram.write_parts(out, parts, full),
        }
    }
    let more = MsgFlags::MSG_NOSIGNAL | MsgFlags::from_bits_retain(MSG_MORE);
    let mut rest = header.as_slice();
    while !rest.is_empty() {
        match send(out.as_raw_fd(), rest, more) {
            Ok(n) => rest = rest.get(n..).unwrap_or_default(),
            Err(nix::Error::EINTR) => {}
            Err(nix::Error::EAGAIN) => full()?,
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}
