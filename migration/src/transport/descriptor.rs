//! What an open descriptor is that somebody has handed over.

use std::fs::File;
use std::net::TcpStream;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{
    AddressFamily, SockType, SockaddrLike, SockaddrStorage, getsockname, getsockopt, sockopt,
};
use nix::sys::stat::{SFlag, fstat};

use super::pipe::reopen_nonblocking;
use super::{Connection, StreamError};

const EXPECTED: &str = "a file, a pipe or a connected stream socket";

/// What a stream can go through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A file or a device.
    File,
    /// One end of a pipe.
    Pipe,
    /// A socket: it goes both ways.
    Socket,
}

/// What `fd` is.
pub fn kind(fd: &OwnedFd, name: &str) -> Result<Kind, StreamError> {
    let failed = |source: nix::Error| StreamError::Open {
        name: name.to_owned(),
        purpose: "a migration",
        source: source.into(),
    };
    let mode = fstat(fd).map_err(failed)?.st_mode;
    let found = match SFlag::from_bits_truncate(mode) & SFlag::S_IFMT {
        SFlag::S_IFREG | SFlag::S_IFBLK | SFlag::S_IFCHR => return Ok(Kind::File),
        SFlag::S_IFIFO => return Ok(Kind::Pipe),
        SFlag::S_IFSOCK => return Ok(Kind::Socket),
        SFlag::S_IFDIR => "a directory",
        _ => "something that no bytes go through",
    };
    Err(StreamError::Descriptor { name: name.to_owned(), found, expected: EXPECTED })
}

/// A file or pipe that can be written to, or read from; the pipe non-blocking.
pub(super) fn one_way(fd: OwnedFd, name: &str, write: bool) -> Result<(File, Kind), StreamError> {
    let purpose = if write { "writing" } else { "reading" };
    let failed = |source| StreamError::Open { name: name.to_owned(), purpose, source };
    let kind = kind(&fd, name)?;
    let flags = fcntl(&fd, FcntlArg::F_GETFL).map_err(|e| failed(e.into()))?;
    let mode = OFlag::from_bits_retain(flags) & OFlag::O_ACCMODE;
    let refused =
        |found, expected| Err(StreamError::Descriptor { name: name.to_owned(), found, expected });
    match (write, mode) {
        (true, OFlag::O_RDONLY) => return refused("open for reading only", "one to write to"),
        (false, OFlag::O_WRONLY) => return refused("open for writing only", "one to read from"),
        _ => {}
    }
    match kind {
        Kind::File => Ok((fd.into(), kind)),
        Kind::Pipe => Ok((reopen_nonblocking(fd, write).map_err(failed)?, kind)),
        Kind::Socket => refused("a socket", "a file or a pipe"),
    }
}

/// A connected stream socket as a connection.
pub fn connection(fd: OwnedFd, name: String) -> Result<Connection, StreamError> {
    let failed = |source: std::io::Error| StreamError::Open {
        name: name.clone(),
        purpose: "a migration",
        source,
    };
    let os = |e: nix::Error| failed(e.into());
    if getsockopt(&fd, sockopt::SockType).map_err(os)? != SockType::Stream {
        let found = "a socket of another kind";
        return Err(StreamError::Descriptor { name, found, expected: EXPECTED });
    }
    let address: SockaddrStorage =
        getsockname(std::os::fd::AsRawFd::as_raw_fd(&fd.as_fd())).map_err(os)?;
    match address.family() {
        Some(AddressFamily::Unix) => {
            let stream = UnixStream::from(fd);
            stream.set_nonblocking(false).map_err(failed)?;
            // A listening one has no peer.
            stream.peer_addr().map_err(failed)?;
            Ok(Connection::from_unix(stream, name))
        }
        Some(AddressFamily::Inet | AddressFamily::Inet6) => {
            let stream = TcpStream::from(fd);
            let peer = stream.peer_addr().map_err(failed)?;
            Connection::from_tcp(stream, peer).map_err(|e| failed(std::io::Error::other(e)))
        }
        _ => {
            let found = "a socket of another family";
            Err(StreamError::Descriptor { name, found, expected: EXPECTED })
        }
    }
}
