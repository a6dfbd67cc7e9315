//! The destination's messages to the source, on the same socket.
//!
//! ```text
//! u16 type  u16 length  payload
//! our own: length is 4, the payload a u32 n, and n bytes of JSON follow
//! ```

use serde::{Deserialize, Serialize};

use super::{WireError, read_json, read_u16, read_u32, write_json};
use crate::fate::Answer;
use crate::manifest::{Hello, Prepared, Running, Verdict};
use crate::vmstate::ByteSource;

const SHUT: u16 = 1;
const PONG: u16 = 2;
const REQ_PAGES: std::ops::RangeInclusive<u16> = 3..=4;

const HELLO: u16 = 0x4d01;
const VERDICT: u16 = 0x4d02;
const PREPARED: u16 = 0x4d03;
const FAILED: u16 = 0x4d04;
const FATE: u16 = 0x4d05;
const RUNNING: u16 = 0x4d06;

/// What a destination tells a source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// The last message: 0 says that the VM is loaded and good, anything else that it is not.
    Shut(u32),
    /// The answer to a ping.
    Pong(u32),
    /// The destination is a mini-vmm. Comes ahead of the pong.
    Hello(Hello),
    /// The answer to a manifest.
    Verdict(Verdict),
    /// Everything is loaded and checked, and nothing runs.
    Prepared(Prepared),
    /// The destination has given up, and will not run the VM.
    Failed(Failed),
    /// What became of a migration that was asked for.
    Fate(Answer),
    /// The guest runs there, and since when.
    Running(Running),
}

/// Why a destination has given up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failed {
    /// In words that name the part, what was expected and what was found.
    pub reason: String,
}

impl Message {
    /// The message's name in logs and errors.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Shut(_) => "shut",
            Self::Pong(_) => "pong",
            Self::Hello(_) => "hello",
            Self::Verdict(_) => "verdict",
            Self::Prepared(_) => "prepared",
            Self::Failed(_) => "failed",
            Self::Fate(_) => "fate",
            Self::Running(_) => "running",
        }
    }

    /// Writes the message.
    pub fn write(&self, out: &mut Vec<u8>) {
        let short = |out: &mut Vec<u8>, number: u16, value: u32| {
            out.extend_from_slice(&number.to_be_bytes());
            out.extend_from_slice(&4u16.to_be_bytes());
            out.extend_from_slice(&value.to_be_bytes());
        };
        match self {
            Self::Shut(status) => short(out, SHUT, *status),
            Self::Pong(value) => short(out, PONG, *value),
            Self::Hello(hello) => write_json(out, HELLO, hello),
            Self::Verdict(verdict) => write_json(out, VERDICT, verdict),
            Self::Prepared(prepared) => write_json(out, PREPARED, prepared),
            Self::Failed(failed) => write_json(out, FAILED, failed),
            Self::Fate(answer) => write_json(out, FATE, answer),
            Self::Running(running) => write_json(out, RUNNING, running),
        }
    }

    /// Reads the next message.
    pub fn read(source: &mut dyn ByteSource) -> Result<Self, WireError> {
        let offset = source.offset();
        let number = read_u16(source, "a return-path message")?;
        let length = read_u16(source, "a return-path message's length")?;
        if REQ_PAGES.contains(&number) {
            return Err(WireError::Unsupported { feature: "postcopy-ram", offset });
        }
        if length != 4 {
            return Err(WireError::Unexpected {
                what: "a return-path message's length",
                offset,
                expected: format!("4 for type {number:#x}"),
                found: length.to_string(),
            });
        }
        match number {
            SHUT => read_u32(source, "a shut message").map(Self::Shut),
            PONG => read_u32(source, "a pong").map(Self::Pong),
            HELLO => read_json(source, "hello").map(Self::Hello),
            VERDICT => read_json(source, "verdict").map(Self::Verdict),
            PREPARED => read_json(source, "prepared").map(Self::Prepared),
            FAILED => read_json(source, "failed").map(Self::Failed),
            FATE => read_json(source, "fate").map(Self::Fate),
            RUNNING => read_json(source, "running").map(Self::Running),
            _ => Err(WireError::Unexpected {
                what: "a return-path message",
                offset,
                expected: "one that QEMU 7.2 or mini-vmm sends".into(),
                found: format!("type {number:#x}"),
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fate::{Fate, MigrationId};
    use crate::problem::{Problem, kind};
    use crate::vmstate::SliceSource;

    #[test]
    fn qemus_messages_are_qemus_bytes() {
        let mut out = Vec::new();
        Message::Pong(1).write(&mut out);
        Message::Shut(0).write(&mut out);
        assert_eq!(out, b"\0\x02\0\x04\0\0\0\x01\0\x01\0\x04\0\0\0\0");
    }

    #[test]
    fn every_message_comes_back_as_it_went() {
        let problem = Problem::new(
            kind::RAM_SIZE,
            "RAM block pc.ram",
            "1 GiB",
            "2 GiB",
            "start the destination with --memory 2G",
        );
        let warning = Problem { fatal: false, vcpu: Some(3), ..problem.clone() };
        let (problems, warnings) = (vec![problem], vec![warning]);
        let verdict = Verdict { problems, warnings, left_out: 1, prepared_for_ms: 2 };
        let hello = Hello { program: "mini-vmm".into(), protocols: vec![1], abilities: vec![] };
        for message in [
            Message::Shut(1),
            Message::Running(Running { since_us: 700 }),
            Message::Pong(0xffff_ffff),
            Message::Hello(hello),
            Message::Verdict(verdict),
            Message::Prepared(Prepared { verified_ram_bytes: 4096, verified_sections: 3 }),
            Message::Failed(Failed { reason: "no".into() }),
            Message::Fate(Answer { id: MigrationId::random(), fate: Fate::NeverHere }),
        ] {
            let mut out = Vec::new();
            message.write(&mut out);
            let mut source = SliceSource::new(&out);
            assert_eq!(Message::read(&mut source).unwrap(), message);
            assert!(source.rest().is_empty());
            for cut in 0..out.len() {
                assert!(Message::read(&mut SliceSource::new(&out[..cut])).is_err());
            }
        }
    }

    #[test]
    fn bad_messages_are_refused() {
        let read = |bytes: &[u8]| Message::read(&mut SliceSource::new(bytes)).unwrap_err();
        assert!(read(b"\0\x03\0\x0c").to_string().contains("postcopy"));
        assert!(read(b"\0\x01\0\x08").to_string().contains("length"));
        assert!(read(b"\0\x63\0\x04").to_string().contains("type 0x63"));
        assert!(matches!(read(b"\x4d\x04\0\x04\xff\xff\xff\xff"), WireError::TooLarge { .. }));
    }
}
