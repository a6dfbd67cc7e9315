//! The part that keyboard and mouse have in common: the bytes on their way to the host, and the
//! command that waits for its argument.

use std::collections::VecDeque;

use migration::vmstate::{Bytes, FieldError};
use serde::{Deserialize, Serialize};

/// How many answer bytes a device keeps. QEMU's limit too.
const CAPACITY: usize = 16;
/// The ring's size on the wire.
const RING: usize = 256;

/// Bytes for the host, and an unfinished command.
#[derive(Debug, Default)]
pub(super) struct Channel {
    bytes: VecDeque<u8>,
    /// The command whose argument comes next.
    pub(super) command: Option<u8>,
}

impl Channel {
    /// Queues an answer; what doesn't fit is lost.
    pub(super) fn answer(&mut self, bytes: &[u8]) {
        let room = CAPACITY.saturating_sub(self.bytes.len());
        self.bytes.extend(bytes.iter().take(room));
    }

    pub(super) fn take(&mut self) -> Option<u8> {
        self.bytes.pop_front()
    }

    pub(super) fn clear(&mut self) {
        self.bytes.clear();
    }

    pub(super) fn has_data(&self) -> bool {
        !self.bytes.is_empty()
    }

    pub(super) fn save(&self) -> ChannelState {
        let count = self.bytes.len();
        ChannelState {
            write_cmd: self.command.map_or(-1, i32::from),
            rptr: 0,
            wptr: i32::try_from(count).unwrap_or(0),
            count: i32::try_from(count).unwrap_or(0),
            data: Bytes::from_fn(|i| self.bytes.get(i).copied().unwrap_or(0)),
        }
    }

    /// Takes a state that has been checked. As QEMU does, keeps the oldest bytes if there are more
    /// than the queue may hold.
    pub(super) fn restore(&mut self, state: &ChannelState) {
        let count = usize::try_from(state.count).unwrap_or(0).min(CAPACITY);
        let start = usize::try_from(state.rptr).unwrap_or(0);
        self.bytes = state.data.iter().cycle().skip(start).take(count).copied().collect();
        self.command = u8::try_from(state.write_cmd).ok();
    }
}

/// The first 272 bytes of both sections: `count` bytes from `rptr` on, in a ring.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename = "PS2 Common State@3")]
pub(super) struct ChannelState {
    /// -1 for none.
    pub(super) write_cmd: i32,
    #[serde(rename = "queue.rptr")]
    pub(super) rptr: i32,
    #[serde(rename = "queue.wptr")]
    pub(super) wptr: i32,
    #[serde(rename = "queue.count")]
    pub(super) count: i32,
    #[serde(rename = "queue.data")]
    pub(super) data: Bytes<RING>,
}

impl ChannelState {
    pub(super) fn check(&self) -> Result<(), FieldError> {
        let in_range = |field: &str, value: i32, min: i32, max: i32| {
            if (min..=max).contains(&value) {
                Ok(())
            } else {
                Err(FieldError::new(field, format!("{min} to {max}"), value))
            }
        };
        in_range("write_cmd", self.write_cmd, -1, 255)?;
        in_range("queue.rptr", self.rptr, 0, 255)?;
        in_range("queue.wptr", self.wptr, 0, 255)?;
        in_range("queue.count", self.count, 0, 256)
    }
}

/// A state whose every field differs from an idle channel's: "abc", across the ring's end.
#[cfg(test)]
pub(super) fn full_state() -> ChannelState {
    let mut data = Bytes::default();
    data[254..].copy_from_slice(b"ab");
    data[0] = b'c';
    ChannelState { write_cmd: 0xf3, rptr: 254, wptr: 1, count: 3, data }
}

/// What [`full_state`] becomes when it is saved again: the ring turned to its start.
#[cfg(test)]
pub(super) fn full_state_turned() -> ChannelState {
    let mut data = Bytes::default();
    data[..3].copy_from_slice(b"abc");
    ChannelState { write_cmd: 0xf3, rptr: 0, wptr: 3, count: 3, data }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bad_rings_are_named() {
        let refused = |change: fn(&mut ChannelState)| {
            let mut state = full_state();
            state.check().unwrap();
            change(&mut state);
            state.check().unwrap_err().field
        };
        assert_eq!(refused(|s| s.write_cmd = 256), "write_cmd");
        assert_eq!(refused(|s| s.rptr = -1), "queue.rptr");
        assert_eq!(refused(|s| s.wptr = 256), "queue.wptr");
        assert_eq!(refused(|s| s.count = 257), "queue.count");
    }

    #[test]
    fn a_full_queue_loses_the_newest() {
        let mut channel = Channel::default();
        channel.answer(&[1; 15]);
        channel.answer(&[2, 3]);
        assert_eq!(channel.bytes.len(), 16);
        assert_eq!(channel.bytes.back(), Some(&2));
    }
}
