//! Waits for the one connection that brings a VM.

use std::fs;
use std::io;
use std::net::TcpListener;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, recv};

use super::{Address, Connection, TransportError};

/// A listening socket. A Unix socket's file is removed when the listener goes.
#[derive(Debug)]
pub struct Listener {
    socket: Socket,
    address: Address,
}

#[derive(Debug)]
enum Socket {
    Tcp(TcpListener),
    Unix(UnixListener, PathBuf),
}

impl Listener {
    /// Listens on `address`. The file of a Unix socket that nobody listens on any more is
    /// replaced; any other file is left alone.
    pub fn bind(address: &Address) -> Result<Self, TransportError> {
        let failed = |source| TransportError::Listen { address: address.to_string(), source };
        match address {
            Address::Tcp { host, port } => {
                let host = if host.is_empty() { "::" } else { host.as_str() };
                let listener = TcpListener::bind((host, *port))
                    .or_else(|e| {
                        // A host without IPv6.
                        if host == "::" { TcpListener::bind(("0.0.0.0", *port)) } else { Err(e) }
                    })
                    .map_err(failed)?;
                listener.set_nonblocking(true).map_err(failed)?;
                let local = listener.local_addr().map_err(failed)?;
                let address = Address::Tcp { host: local.ip().to_string(), port: local.port() };
                Ok(Self { socket: Socket::Tcp(listener), address })
            }
            Address::Unix(path) => {
                remove_stale(path);
                let listener = UnixListener::bind(path).map_err(failed)?;
                listener.set_nonblocking(true).map_err(failed)?;
                Ok(Self { socket: Socket::Unix(listener, path.clone()), address: address.clone() })
            }
        }
    }

    /// Where it listens, with the port that was chosen.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// Takes all connections that wait to be accepted, and hangs up on them; says whether one of
    /// them has begun with these bytes.
    pub fn waiting_with(&self, magic: [u8; 4]) -> Result<bool, TransportError> {
        let mut found = false;
        while let Some(connection) = self.accept(Duration::ZERO)? {
            let mut first = [0; 4];
            // What has not come by now is not waited for: whoever means it has sent it at once.
            let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_PEEK;
            let n = recv(connection.as_fd().as_raw_fd(), &mut first, flags).unwrap_or(0);
            found |= n == first.len() && first == magic;
        }
        Ok(found)
    }

    /// Waits at most `timeout` for a connection; `None` when none came.
    pub fn accept(&self, timeout: Duration) -> Result<Option<Connection>, TransportError> {
        let failed = |source| TransportError::SetUp { address: self.address.to_string(), source };
        let timeout = PollTimeout::try_from(timeout).unwrap_or(PollTimeout::MAX);
        let mut fds = [PollFd::new(self.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, timeout) {
            Ok(0) | Err(nix::Error::EINTR) => return Ok(None),
            Ok(_) => {}
            Err(error) => return Err(failed(error.into())),
        }
        let result = match &self.socket {
            Socket::Tcp(l) => match l.accept() {
                Ok((stream, peer)) => return Connection::from_tcp(stream, peer).map(Some),
                Err(error) => Err(error),
            },
            Socket::Unix(l, _) => l.accept().and_then(|(stream, _)| {
                stream.set_nonblocking(false)?;
                Ok(Connection::from_unix(stream, self.address.to_string()))
            }),
        };
        match result {
            Ok(connection) => Ok(Some(connection)),
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock
                        | io::ErrorKind::Interrupted
                        | io::ErrorKind::ConnectionAborted
                ) =>
            {
                Ok(None)
            }
            Err(error) => Err(failed(error)),
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.socket {
            Socket::Tcp(l) => l.as_fd(),
            Socket::Unix(l, _) => l.as_fd(),
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Socket::Unix(_, path) = &self.socket
            && let Err(error) = fs::remove_file(path)
        {
            tracing::debug!(path = %path.display(), %error, "removing the socket's file");
        }
    }
}

/// Removes a socket's file that a process left behind when it died.
fn remove_stale(path: &PathBuf) {
    let is_socket = fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_socket());
    let refused =
        || UnixStream::connect(path).is_err_and(|e| e.kind() == io::ErrorKind::ConnectionRefused);
    if is_socket
        && refused()
        && let Err(error) = fs::remove_file(path)
    {
        tracing::debug!(path = %path.display(), %error, "removing a dead socket's file");
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn connections_that_wait_are_told_apart_by_how_they_begin() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("socket");
        let listener = Listener::bind(&Address::Unix(path.clone())).expect("a listener");
        let magic = *b"\x11\x22\x33\x44";
        assert!(!listener.waiting_with(magic).expect("nobody waits"));
        let silent = UnixStream::connect(&path).expect("a connection");
        let mut other = UnixStream::connect(&path).expect("a connection");
        other.write_all(b"QEVM").expect("room");
        assert!(!listener.waiting_with(magic).expect("two strangers"));
        let mut short = UnixStream::connect(&path).expect("a connection");
        short.write_all(&magic[..3]).expect("room");
        let mut channel = UnixStream::connect(&path).expect("a connection");
        channel.write_all(b"\x11\x22\x33\x44\0\0\0\x01").expect("room");
        assert!(listener.waiting_with(magic).expect("a channel"));
        assert!(!listener.waiting_with(magic).expect("nobody is left"));
        drop((silent, short));
    }
}
