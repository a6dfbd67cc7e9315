//! Where a network device's frames go.

use std::io;
use std::os::fd::RawFd;

/// Bytes of the virtio-net header in front of each frame that a backend gives or takes
/// (virtio 1.2, 5.1.6).
pub const HEADER: usize = 12;
/// The largest frame, which segmentation offload makes possible.
pub const MAX_FRAME: usize = 65536 + 18;

/// What a guest is willing to receive.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Offloads {
    /// Frames without a complete checksum.
    pub csum: bool,
    /// TCP over IPv4 in pieces larger than a frame.
    pub tso4: bool,
    /// TCP over IPv6.
    pub tso6: bool,
    /// TCP with congestion notification.
    pub ecn: bool,
    /// UDP in fragments larger than a frame.
    pub ufo: bool,
}

/// What became of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sent {
    /// It is on its way, or lost.
    Done,
    /// There was no room for it: try again when the descriptor becomes writable.
    Blocked,
}

/// The host side of a network device. Nothing in it blocks.
pub trait NetBackend: Send {
    /// What errors call it, for example `tap tap0`.
    fn name(&self) -> String;
    /// Whether it understands the header in front of a frame. One that does not gives and takes
    /// zeros there.
    fn has_vnet_header(&self) -> bool;
    /// Opens it. The descriptor is watched, edge-triggered, until [`close`](Self::close).
    fn open(&mut self) -> io::Result<RawFd>;
    /// Closes it.
    fn close(&mut self);
    /// Says what the guest is willing to receive.
    fn set_offloads(&mut self, offloads: Offloads) -> io::Result<()>;
    /// The next frame behind its header, and how many bytes that is; `None` when there is none now.
    fn receive(&mut self, buffer: &mut [u8]) -> io::Result<Option<usize>>;
    /// The descriptor may have become writable: sends what it has taken and not sent yet.
    fn flush(&mut self);
    /// Sends a frame that stands behind its header.
    fn send(&mut self, frame: &[u8]) -> io::Result<Sent>;
}
