//! Ports that take everything and do nothing: the power-on self-test's display (0x80), which
//! Linux also uses to wait a microsecond, and the coprocessor's error latch (0xf0).

use super::{FLOATING, byte_ports};

/// Both ports.
pub const PORTS: [u16; 2] = [0x80, 0xf0];

/// A port that nobody reads back.
#[derive(Debug, Default)]
pub struct SinkPort;

impl SinkPort {
    fn read_port(&mut self, _: u16) -> u8 {
        FLOATING
    }

    fn write_port(&mut self, _: u16, _: u8) {}
}

byte_ports!(SinkPort);
