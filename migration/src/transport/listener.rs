//! Waits for the one connection that brings a VM.

use std::fs;
use std::io;
use std::net::TcpListener;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

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
