//! The port to which SeaBIOS writes what it does (QEMU's `isa-debugcon`), for people who look for why a
//! guest does not boot. It has no state.

use super::byte_ports;

/// Where SeaBIOS looks for it.
pub const PORT: u16 = 0x402;
/// What it must read there to take it for one (QEMU's Bochs-compatible debug console).
const PRESENT: u8 = 0xe9;
/// What one line may have, so that a guest that ends none takes no memory.
const MAX_LINE: usize = 256;

/// The port. Each line becomes a message of level `debug`.
#[derive(Debug, Default)]
pub struct DebugConsole {
    line: String,
}

impl DebugConsole {
    fn read_port(&mut self, _: u16) -> u8 {
        PRESENT
    }

    fn write_port(&mut self, _: u16, value: u8) {
        let end = value == b'\n';
        if !end {
            // Nothing that a terminal would obey.
            self.line.extend(char::from(value).escape_default());
        }
        if end || self.line.len() >= MAX_LINE {
            tracing::debug!("firmware: {}", self.line);
            self.line.clear();
        }
    }
}

byte_ports!(DebugConsole);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_ends_at_its_end_or_when_it_is_long() {
        let mut port = DebugConsole::default();
        b"abc\x1b".iter().for_each(|byte| port.write_port(0, *byte));
        assert_eq!(port.read_port(0), 0xe9);
        assert_eq!(port.line, "abc\\u{1b}");
        port.write_port(0, b'\n');
        assert!(port.line.is_empty());
        (0..10 * MAX_LINE).for_each(|_| port.write_port(0, b'x'));
        assert!(port.line.len() < MAX_LINE);
    }
}
