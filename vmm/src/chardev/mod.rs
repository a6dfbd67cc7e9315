//! The host's end of a serial line: terminal, file, socket, pseudo-terminal or nothing.
//!
//! Output is written on the thread of the vCPU that sends it and never blocks: a byte that does
//! not fit is kept by the device, and the I/O thread sends it on when there is room. Input is read
//! on the I/O thread only while the device has room for it, so nothing is lost and nothing piles
//! up here.

mod backend;
mod service;

pub use backend::{CharError, Chardev, TerminalMode};
pub use service::CharService;

/// A device with a character line, as the line sees it.
pub trait CharFrontend: Send {
    /// Whether [`receive`](Self::receive) would take a byte now.
    fn wants_input(&self) -> bool;
    /// Takes as many bytes as there is room for, and says how many.
    fn receive(&mut self, bytes: &[u8]) -> usize;
    /// Whether bytes wait because the line took none.
    fn has_pending_output(&self) -> bool;
    /// Tries to send them.
    fn flush_output(&mut self);
}

impl CharFrontend for devices::isa::serial::SerialPort {
    fn wants_input(&self) -> bool {
        self.wants_input()
    }
    fn receive(&mut self, bytes: &[u8]) -> usize {
        self.receive(bytes)
    }
    fn has_pending_output(&self) -> bool {
        self.has_pending_output()
    }
    fn flush_output(&mut self) {
        self.flush_output();
    }
}

impl CharFrontend for devices::virtio::ConsoleLine {
    fn wants_input(&self) -> bool {
        self.wants_input()
    }
    fn receive(&mut self, bytes: &[u8]) -> usize {
        Self::receive(self, bytes)
    }
    fn has_pending_output(&self) -> bool {
        self.has_pending_output()
    }
    fn flush_output(&mut self) {
        Self::flush_output(self);
    }
}
