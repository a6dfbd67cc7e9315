//! What hangs on the keyboard controller: a keyboard and a mouse that answer every command and
//! that nobody ever touches.

pub mod keyboard;
pub mod mouse;
mod queue;

pub use keyboard::Keyboard;
pub use mouse::Mouse;

/// Answer: understood.
pub(crate) const ACK: u8 = 0xfa;
/// Answer: not understood, send again.
pub(crate) const RESEND: u8 = 0xfe;
/// Self-test passed.
pub(crate) const TEST_PASSED: u8 = 0xaa;

/// One of the two, as the controller sees it.
pub(crate) trait Ps2Port {
    /// A byte from the host.
    fn send(&mut self, byte: u8);
    /// The next byte for the host.
    fn take(&mut self) -> Option<u8>;
    /// Whether [`take`](Self::take) would give a byte.
    fn has_data(&self) -> bool;
}
