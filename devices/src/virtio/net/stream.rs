//! A stream socket to connect to, as QEMU's `-netdev stream` is: each frame behind its length.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use super::backend::{HEADER, MAX_FRAME, NetBackend, Offloads, Sent};

/// How long a peer may take to accept.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Bytes of the length in front of each frame, big-endian.
const LENGTH: usize = 4;
/// What may wait for the peer before the guest's frames are held up.
const MAX_UNSENT: usize = 256 << 10;
/// How much is read at once.
const CHUNK: usize = 64 << 10;

/// Where a peer listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StreamAddress {
    /// Host and port.
    Tcp(String, u16),
    /// A socket in the file system.
    Unix(PathBuf),
}

impl std::fmt::Display for StreamAddress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Tcp(host, port) => write!(f, "tcp:{host}:{port}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

trait Socket: Read + Write + AsRawFd + Send {}
impl<T: Read + Write + AsRawFd + Send> Socket for T {}

/// A connection on which frames travel one after the other.
pub struct StreamSocket {
    address: StreamAddress,
    socket: Option<Box<dyn Socket>>,
    unsent: VecDeque<u8>,
    received: Vec<u8>,
    /// How much of `received` has been given away.
    consumed: usize,
    chunk: Vec<u8>,
}

impl StreamSocket {
    /// A peer, to which nobody is connected yet.
    pub fn new(address: StreamAddress) -> Self {
        Self {
            address,
            socket: None,
            unsent: VecDeque::new(),
            received: Vec::new(),
            consumed: 0,
            chunk: vec![0; CHUNK],
        }
    }

    /// The peer is gone, or talks nonsense: from now on frames are lost.
    fn hang_up(&mut self, why: &dyn std::fmt::Display) {
        tracing::warn!("{}: {why}: the network is cut off", self.name());
        self.close();
    }

    fn write_out(&mut self) -> io::Result<()> {
        while !self.unsent.is_empty() {
            let (front, _) = self.unsent.as_slices();
            let Some(socket) = &mut self.socket else { break };
            match socket.write(front) {
                Ok(n) => drop(self.unsent.drain(..n)),
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// The next whole frame of what was received: where it begins and ends.
    fn next_frame(&self) -> Result<Option<(usize, usize)>, usize> {
        let rest = self.received.get(self.consumed..).unwrap_or_default();
        let Some(length) = rest.first_chunk::<LENGTH>() else { return Ok(None) };
        let length = usize::try_from(u32::from_be_bytes(*length)).unwrap_or(usize::MAX);
        if length > MAX_FRAME {
            return Err(length);
        }
        let whole = rest.len() >= LENGTH + length;
        let start = self.consumed + LENGTH;
        Ok(whole.then_some((start, start + length)))
    }
}

fn connect(address: &StreamAddress) -> io::Result<Box<dyn Socket>> {
    match address {
        StreamAddress::Unix(path) => {
            let socket = UnixStream::connect(path)?;
            socket.set_nonblocking(true)?;
            Ok(Box::new(socket))
        }
        StreamAddress::Tcp(host, port) => {
            let mut failure = io::Error::new(ErrorKind::NotFound, "the host has no address");
            for address in (host.as_str(), *port).to_socket_addrs()? {
                let address: SocketAddr = address;
                match TcpStream::connect_timeout(&address, CONNECT_TIMEOUT) {
                    Ok(socket) => {
                        socket.set_nodelay(true)?;
                        socket.set_nonblocking(true)?;
                        return Ok(Box::new(socket));
                    }
                    Err(error) => failure = error,
                }
            }
            Err(failure)
        }
    }
}

impl NetBackend for StreamSocket {
    fn name(&self) -> String {
        format!("stream {}", self.address)
    }
    fn has_vnet_header(&self) -> bool {
        false
    }

    fn open(&mut self) -> io::Result<RawFd> {
        let socket = connect(&self.address)?;
        let fd = socket.as_raw_fd();
        self.socket = Some(socket);
        Ok(fd)
    }

    fn close(&mut self) {
        self.socket = None;
        self.unsent.clear();
        self.received.clear();
        self.consumed = 0;
    }

    fn set_offloads(&mut self, _: Offloads) -> io::Result<()> {
        Ok(())
    }

    fn receive(&mut self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        loop {
            match self.next_frame() {
                Err(length) => {
                    self.hang_up(&format_args!("the peer announces a frame of {length} bytes"));
                    return Ok(None);
                }
                Ok(Some((start, end))) => {
                    let (header, rest) = buffer.split_at_mut_checked(HEADER).unwrap_or_default();
                    header.fill(0);
                    let frame = self.received.get(start..end).unwrap_or_default();
                    let n = frame.len().min(rest.len());
                    for (to, from) in rest.iter_mut().zip(frame) {
                        *to = *from;
                    }
                    self.consumed = end;
                    if n > 0 {
                        return Ok(Some(HEADER + n));
                    }
                }
                Ok(None) => {
                    self.received.drain(..self.consumed);
                    self.consumed = 0;
                    let Some(socket) = &mut self.socket else { return Ok(None) };
                    match socket.read(&mut self.chunk) {
                        Ok(0) => {
                            self.hang_up(&"the peer has closed the connection");
                            return Ok(None);
                        }
                        Ok(n) => {
                            self.received.extend_from_slice(self.chunk.get(..n).unwrap_or_default())
                        }
                        Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(None),
                        Err(e) if e.kind() == ErrorKind::Interrupted => {}
                        Err(e) => {
                            self.hang_up(&e);
                            return Ok(None);
                        }
                    }
                }
            }
        }
    }

    fn flush(&mut self) {
        if let Err(error) = self.write_out() {
            self.hang_up(&error);
        }
    }

    fn send(&mut self, frame: &[u8]) -> io::Result<Sent> {
        if self.socket.is_none() {
            return Ok(Sent::Done);
        }
        self.flush();
        if self.unsent.len() > MAX_UNSENT {
            return Ok(Sent::Blocked);
        }
        let frame = frame.get(HEADER..).unwrap_or_default();
        let length = u32::try_from(frame.len()).map_err(io::Error::other)?;
        self.unsent.extend(length.to_be_bytes());
        self.unsent.extend(frame);
        self.flush();
        Ok(Sent::Done)
    }
}
