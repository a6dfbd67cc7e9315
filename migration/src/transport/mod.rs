//! What a VM travels through.
//!
//! ```text
//! Connection        both ways: TCP, Unix sockets; blocking, with deadlines
//! Sink → … → Supply one way: files, pipes, commands; nobody answers, and there may be years between
//! ```
//!
//! On a connection every read and write has a timeout in which at least one byte must move, so that a peer that
//! stands still is noticed; keep-alive probes and `TCP_USER_TIMEOUT` notice one that is gone while
//! nobody sends. A pipe is waited for as long as it takes while the guest runs. [`Abort`] ends a
//! blocked call from another thread.

pub(crate) mod arrival;
mod command;
pub mod descriptor;
pub mod lender;
mod listener;
mod one_host;
mod pipe;
mod reader;
mod saving;
mod sink;
mod stream_error;
mod supply;

pub use listener::Listener;
pub use reader::{Input, StreamReader};
pub use sink::{Settled, Sink};
pub use stream_error::StreamError;
pub use supply::Supply;

use std::fmt;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};

/// How often an idle TCP connection is probed, and how soon the first time.
const KEEPALIVE_S: u32 = 5;

/// Where a migration goes to or comes from.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Address {
    /// TCP.
    Tcp {
        /// A name, an IPv4 or an IPv6 address without brackets; for a listener, empty is any.
        host: String,
        /// The port; 0 lets a listener choose.
        port: u16,
    },
    /// A socket in the file system.
    Unix(PathBuf),
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { host, port } if host.contains(':') => write!(f, "tcp:[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "tcp:{host}:{port}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// The name has no address.
    #[error("the host name '{host}' can't be resolved")]
    Resolve {
        /// The name.
        host: String,
        /// The resolver's reason.
        #[source]
        source: io::Error,
    },
    /// Nobody answers there.
    #[error("can't connect to {address}: is the destination running, and listening there?")]
    Connect {
        /// Where.
        address: String,
        /// The operating system's reason.
        #[source]
        source: io::Error,
    },
    /// The connection would end in the socket it begins in.
    #[error("{address} is this connection itself: nobody listens there")]
    Myself {
        /// Where.
        address: String,
    },
    /// The address can't be listened on.
    #[error("can't listen on {address}")]
    Listen {
        /// Where.
        address: String,
        /// The operating system's reason.
        #[source]
        source: io::Error,
    },
    /// A connection could not be taken or set up.
    #[error("the connection with {address} can't be set up")]
    SetUp {
        /// With whom.
        address: String,
        /// The operating system's reason.
        #[source]
        source: io::Error,
    },
}

#[derive(Debug)]
enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

/// An open connection. Clones share the socket.
#[derive(Debug, Clone)]
pub struct Connection {
    socket: Arc<Socket>,
    peer: String,
}

/// The connections of one migration on its source.
#[derive(Debug)]
pub struct Links {
    /// The one that is spoken on.
    pub main: Connection,
    /// Those that only pages go through; may be none.
    pub pages: Vec<Connection>,
}

impl From<Connection> for Links {
    fn from(main: Connection) -> Self {
        Self { main, pages: Vec::new() }
    }
}

/// Ends whatever waits for a connection or a pipe.
#[derive(Debug, Clone)]
pub enum Abort {
    /// Closes both directions.
    Connection(Connection),
    /// Read by whoever waits.
    Flag(Arc<AtomicBool>),
}

impl Abort {
    /// Ends it; nothing happens if it has ended already.
    pub fn shutdown(&self) {
        match self {
            Self::Connection(connection) => connection.shutdown(Shutdown::Both),
            Self::Flag(flag) => flag.store(true, Ordering::Relaxed),
        }
    }
}

impl Connection {
    /// Connects, trying every address of a name, each for at most `timeout`.
    pub fn connect(address: &Address, timeout: Duration) -> Result<Self, TransportError> {
        let failed = |source| TransportError::Connect { address: address.to_string(), source };
        match address {
            Address::Unix(path) => {
                let stream = UnixStream::connect(path).map_err(failed)?;
                Ok(Self::from_unix(stream, address.to_string()))
            }
            Address::Tcp { host, port } => {
                let resolved = (host.as_str(), *port)
                    .to_socket_addrs()
                    .map_err(|source| TransportError::Resolve { host: host.clone(), source })?;
                let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
                for to in resolved {
                    match one_host::connect(to, timeout) {
                        Ok(stream) => return Self::from_tcp(stream, to),
                        Err(error) => last = error,
                    }
                }
                Err(failed(last))
            }
        }
    }

    /// A connected TCP socket, with the options that a migration wants.
    pub fn from_tcp(stream: TcpStream, peer: SocketAddr) -> Result<Self, TransportError> {
        let address = format!("tcp:{peer}");
        if stream.local_addr().is_ok_and(|local| local == peer) {
            return Err(TransportError::Myself { address });
        }
        let set_up = || -> io::Result<()> {
            stream.set_nonblocking(false)?;
            stream.set_nodelay(true)?;
            setsockopt(&stream, sockopt::KeepAlive, &true)?;
            setsockopt(&stream, sockopt::TcpKeepIdle, &KEEPALIVE_S)?;
            setsockopt(&stream, sockopt::TcpKeepInterval, &KEEPALIVE_S)?;
            if one_host::is_both(stream.local_addr()?.ip(), peer.ip()) {
                one_host::set_up(&stream);
            }
            Ok(())
        };
        match set_up() {
            Ok(()) => Ok(Self { socket: Arc::new(Socket::Tcp(stream)), peer: address }),
            Err(source) => Err(TransportError::SetUp { address, source }),
        }
    }

    /// A connected Unix socket; `peer` is its name in messages.
    pub fn from_unix(stream: UnixStream, peer: String) -> Self {
        Self { socket: Arc::new(Socket::Unix(stream)), peer }
    }

    /// The other side's address, for messages.
    pub fn peer(&self) -> &str {
        &self.peer
    }

    /// Sets how long the peer may stand still: a read or a write in which no byte moves for so
    /// long fails with `WouldBlock`, and a TCP connection whose bytes are not acknowledged for so
    /// long breaks.
    pub fn set_stall_timeout(&self, timeout: Duration) -> io::Result<()> {
        let timeout = timeout.max(Duration::from_millis(1));
        match &*self.socket {
            Socket::Tcp(s) => {
                s.set_read_timeout(Some(timeout))?;
                s.set_write_timeout(Some(timeout))?;
                let ms = u32::try_from(timeout.as_millis()).unwrap_or(u32::MAX);
                setsockopt(s, sockopt::TcpUserTimeout, &ms)?;
                let probes = (timeout.as_secs() / u64::from(KEEPALIVE_S)).clamp(2, 100) as u32;
                setsockopt(s, sockopt::TcpKeepCount, &probes)?;
            }
            Socket::Unix(s) => {
                s.set_read_timeout(Some(timeout))?;
                s.set_write_timeout(Some(timeout))?;
            }
        }
        Ok(())
    }

    /// Lets a read wait for as long as the peer lives.
    pub fn set_patient(&self) -> io::Result<()> {
        match &*self.socket {
            Socket::Tcp(s) => s.set_read_timeout(None),
            Socket::Unix(s) => s.set_read_timeout(None),
        }
    }

    /// A handle that ends blocked calls from another thread.
    pub fn abort_handle(&self) -> Abort {
        Abort::Connection(self.clone())
    }

    /// Closes one direction or both. A connection that is closed already is no error.
    pub fn shutdown(&self, how: Shutdown) {
        let result = match &*self.socket {
            Socket::Tcp(s) => s.shutdown(how),
            Socket::Unix(s) => s.shutdown(how),
        };
        if let Err(error) = result
            && error.kind() != io::ErrorKind::NotConnected
        {
            tracing::debug!(peer = %self.peer, %error, "shutting down the connection");
        }
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &*self.socket {
            Socket::Tcp(s) => s.as_fd(),
            Socket::Unix(s) => s.as_fd(),
        }
    }
}

impl Read for &Connection {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match &*self.socket {
            Socket::Tcp(s) => (&*s).read(buf),
            Socket::Unix(s) => (&*s).read(buf),
        }
    }
}

impl Write for &Connection {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        match &*self.socket {
            Socket::Tcp(s) => (&*s).write(buf),
            Socket::Unix(s) => (&*s).write(buf),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Whether an error says that the peer stood still for the whole timeout.
pub fn is_stall(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}
