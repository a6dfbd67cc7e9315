//! Commands from the source to the destination, QEMU's and our own.
//!
//! ```text
//! 0x08  u16 number  u16 length  payload
//! our own: length is 4, the payload a u32 n, and n bytes of JSON follow
//! ```

use serde::{Deserialize, Serialize};

use super::limits::{MAX_JSON, MAX_PROBE, MAX_SHORT_PAYLOAD};
use super::section::PartType;
use super::{WireError, read_bytes, read_json, read_u16, read_u32, skip, write_json};
use crate::fate::Question;
use crate::manifest::{Digests, Manifest, Rehearse};
use crate::vmstate::ByteSource;

/// The value of our ping. A QEMU echoes it; a mini-vmm knows by it who asks, and says hello first.
/// "mvmm".
pub const PING_MAGIC: u32 = 0x6d76_6d6d;

const OPEN_RETURN_PATH: u16 = 1;
const PING: u16 = 2;
const POSTCOPY: std::ops::RangeInclusive<u16> = 3..=7;
const POSTCOPY_RECOVERY: std::ops::RangeInclusive<u16> = 8..=9;
const COLO: u16 = 10;
const SWITCHOVER_START: u16 = 11;

// Our own numbers are far from QEMU's, which are counted up from 1.
const MANIFEST: u16 = 0x4d01;
const VERIFY: u16 = 0x4d02;
const COMMIT: u16 = 0x4d03;
const ABORT: u16 = 0x4d04;
const PROBE: u16 = 0x4d05;
const ASK: u16 = 0x4d06;
const SETTLED: u16 = 0x4d07;
const REHEARSE: u16 = 0x4d08;

/// Where in one of our own commands the JSON begins, counted from behind the type byte: number,
/// length, and the JSON's own length.
pub(crate) const JSON_AT: usize = 8;

/// What a source tells a destination outside of the sections.
#[derive(Debug, Clone, PartialEq)]
pub enum Command {
    /// Answers are wanted.
    OpenReturnPath,
    /// To be answered with a pong of the same value.
    Ping(u32),
    /// QEMU 10's notice that the source's guest has stopped; carries nothing.
    SwitchoverStart,
    /// What the VM is and needs.
    Manifest(Box<Manifest>),
    /// Digests to compare RAM with.
    Verify(Digests),
    /// The destination is to run the VM; the source has given it up.
    Commit(Commit),
    /// The source goes on running the VM itself.
    Abort(Abort),
    /// What became of an earlier migration? On a connection of its own.
    Ask(Question),
    /// The source knows what became of its guest, and will not ask any more.
    Settled,
    /// Behind a mere question: sections follow that are to be loaded and thrown away.
    Rehearse(Rehearse),
    /// So many bytes that mean nothing, for a measurement; at most
    /// [`MAX_PROBE`].
    Probe(u32),
}

/// What a probe consists of: not zero, lest something on the way makes it small.
const PROBE_BYTES: [u8; 16] = *b"mini-vmm probe \xa5";

/// Why a source gives up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Abort {
    /// In words.
    pub reason: String,
}

/// The order to run the guest.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Commit {
    /// How the source has left the disks, which only the machines understand; see
    /// [`SourceVm::left_disks`](crate::guest::SourceVm::left_disks). The order is good for such only.
    #[serde(default, skip_serializing_if = "serde_json::Value::is_null")]
    pub disks: serde_json::Value,
}

#[derive(Serialize, Deserialize)]
struct Settled {}

impl Command {
    /// Writes the command, type byte included.
    pub fn write(&self, out: &mut Vec<u8>) {
        out.push(PartType::Command as u8);
        let short = |out: &mut Vec<u8>, number: u16, payload: &[u8]| {
            out.extend_from_slice(&number.to_be_bytes());
            out.extend_from_slice(&(payload.len() as u16).to_be_bytes());
            out.extend_from_slice(payload);
        };
        match self {
            Self::OpenReturnPath => short(out, OPEN_RETURN_PATH, &[]),
            Self::Ping(value) => short(out, PING, &value.to_be_bytes()),
            Self::SwitchoverStart => short(out, SWITCHOVER_START, &[]),
            Self::Manifest(manifest) => write_json(out, MANIFEST, manifest),
            Self::Verify(digests) => write_json(out, VERIFY, digests),
            Self::Commit(commit) => write_json(out, COMMIT, commit),
            Self::Abort(abort) => write_json(out, ABORT, abort),
            Self::Ask(question) => write_json(out, ASK, question),
            Self::Rehearse(rehearse) => write_json(out, REHEARSE, rehearse),
            Self::Settled => write_json(out, SETTLED, &Settled {}),
            Self::Probe(len) => {
                let len = (*len).min(MAX_PROBE);
                short(out, PROBE, &len.to_be_bytes());
                out.extend(PROBE_BYTES.iter().cycle().take(len as usize));
            }
        }
    }

    /// Reads a command, after its type byte.
    pub fn read(source: &mut dyn ByteSource) -> Result<Self, WireError> {
        let offset = source.offset();
        let number = read_u16(source, "a command")?;
        let length = read_u16(source, "a command's length")?;
        let expect = |expected: u16| {
            if length == expected {
                return Ok(());
            }
            Err(WireError::Unexpected {
                what: "a command's length",
                offset,
                expected: format!("{expected} for command {number:#x}"),
                found: length.to_string(),
            })
        };
        let unsupported = |feature| Err(WireError::Unsupported { feature, offset });
        match number {
            OPEN_RETURN_PATH => expect(0).map(|()| Self::OpenReturnPath),
            PING => {
                expect(4)?;
                Ok(Self::Ping(read_u32(source, "a ping's value")?))
            }
            SWITCHOVER_START if length <= MAX_SHORT_PAYLOAD => {
                skip(source, length.into(), "a command's payload")?;
                Ok(Self::SwitchoverStart)
            }
            MANIFEST => {
                expect(4)?;
                Ok(Self::Manifest(read_json(source, "manifest")?))
            }
            VERIFY => {
                expect(4)?;
                Ok(Self::Verify(read_json(source, "verify")?))
            }
            COMMIT => {
                expect(4)?;
                Ok(Self::Commit(read_json(source, "commit")?))
            }
            ASK => {
                expect(4)?;
                Ok(Self::Ask(read_json(source, "ask")?))
            }
            REHEARSE => {
                expect(4)?;
                Ok(Self::Rehearse(read_json(source, "rehearse")?))
            }
            SETTLED => {
                expect(4)?;
                read_json::<Settled>(source, "settled").map(|_| Self::Settled)
            }
            ABORT => {
                expect(4)?;
                Ok(Self::Abort(read_json(source, "abort")?))
            }
            PROBE => {
                expect(4)?;
                let found = read_u32(source, "a probe's length")?;
                if found > MAX_PROBE {
                    let (found, max) = (found.into(), MAX_PROBE.into());
                    return Err(WireError::TooLarge { what: "a probe", offset, found, max });
                }
                skip(source, found, "a probe")?;
                Ok(Self::Probe(found))
            }
            n if POSTCOPY.contains(&n) => unsupported("postcopy-ram"),
            n if POSTCOPY_RECOVERY.contains(&n) => unsupported("postcopy recovery"),
            COLO => unsupported("x-colo"),
            _ => Err(WireError::Unexpected {
                what: "a command",
                offset,
                expected: "one that QEMU 7.2 or mini-vmm sends".into(),
                found: format!("number {number:#x} with {length} bytes"),
            }),
        }
    }
}

/// A command as it stands in a stream, whoever's it is: for those who only look.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RawCommand {
    /// Its number.
    pub number: u16,
    /// What it carries.
    pub payload: Vec<u8>,
}

impl RawCommand {
    /// Our own carry a length of four bytes, and so many bytes behind it.
    fn is_long(number: u16) -> bool {
        matches!(number, MANIFEST | VERIFY | COMMIT | ABORT | PROBE | ASK | SETTLED | REHEARSE)
    }

    /// Reads a command, after its type byte.
    pub fn read(source: &mut dyn ByteSource) -> Result<Self, WireError> {
        let offset = source.offset();
        let number = read_u16(source, "a command")?;
        let length = read_u16(source, "a command's length")?;
        if !Self::is_long(number) {
            let payload = read_bytes(source, length.into(), "a command's payload")?;
            return Ok(Self { number, payload });
        }
        if length != 4 {
            return Err(WireError::Unexpected {
                what: "a command's length",
                offset,
                expected: format!("4 for command {number:#x}"),
                found: length.to_string(),
            });
        }
        let found = read_u32(source, "a command's payload")?;
        let max = MAX_JSON.max(MAX_PROBE);
        if found > max {
            let (what, found, max) = ("a command's payload", found.into(), max.into());
            return Err(WireError::TooLarge { what, offset, found, max });
        }
        Ok(Self { number, payload: read_bytes(source, found, "a command's payload")? })
    }

    /// Writes the command as it was read, type byte included.
    pub fn write(&self, out: &mut Vec<u8>) {
        out.push(PartType::Command as u8);
        out.extend_from_slice(&self.number.to_be_bytes());
        let len = self.payload.len();
        if Self::is_long(self.number) {
            out.extend_from_slice(&4_u16.to_be_bytes());
            out.extend_from_slice(&(len as u32).to_be_bytes());
        } else {
            out.extend_from_slice(&(len as u16).to_be_bytes());
        }
        out.extend_from_slice(&self.payload);
    }

    /// What people call it.
    pub fn name(&self) -> &'static str {
        match self.number {
            OPEN_RETURN_PATH => "open-return-path",
            PING => "ping",
            3 => "postcopy-advise",
            4 => "postcopy-listen",
            5 => "postcopy-run",
            6 => "postcopy-ram-discard",
            7 => "packaged",
            8 => "recv-bitmap",
            9 => "postcopy-resume",
            COLO => "enable-colo",
            SWITCHOVER_START => "switchover-start",
            MANIFEST => "manifest (mini-vmm)",
            VERIFY => "verify (mini-vmm)",
            COMMIT => "commit (mini-vmm)",
            ABORT => "abort (mini-vmm)",
            PROBE => "probe (mini-vmm)",
            ASK => "ask (mini-vmm)",
            SETTLED => "settled (mini-vmm)",
            REHEARSE => "rehearse (mini-vmm)",
            _ => "unknown",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fate::MigrationId;
    use crate::guest::RamBlock;
    use crate::manifest::{BlockDigests, Scrap, SectionDigest, SectionManifest};
    use crate::vmstate::SliceSource;

    fn manifest() -> Manifest {
        Manifest {
            protocol: 1,
            program: "mini-vmm 0.1.0".into(),
            machine: "pc-i440fx-7.2".into(),
            vcpus: 2,
            ram: vec![RamBlock { name: "pc.ram".into(), len: 1 << 30 }],
            sections: vec![SectionManifest {
                id: "cpu".into(),
                instance: 1,
                version: 12,
                layout: "ab".into(),
            }],
            verify: true,
            only_asking: true,
            channels: None,
            memory: true,
            hears_running: true,
            id: Some(MigrationId::random()),
            commit_within_ms: 5,
            sent_at_ms: 7,
            details: serde_json::json!({ "slots": [2, 3] }),
        }
    }

    #[test]
    fn qemus_commands_are_qemus_bytes() {
        let bytes = |c: Command| {
            let mut out = Vec::new();
            c.write(&mut out);
            out
        };
        assert_eq!(bytes(Command::OpenReturnPath), b"\x08\0\x01\0\0");
        assert_eq!(bytes(Command::Ping(1)), b"\x08\0\x02\0\x04\0\0\0\x01");
    }

    #[test]
    fn every_command_comes_back_as_it_went() {
        let digests = Digests {
            blocks: vec![BlockDigests { name: "pc.ram".into(), chunk: 4096, digests: vec![7] }],
            sections: vec![SectionDigest { id: "timer".into(), instance: 0, digest: u64::MAX }],
            manifest: "0123456789abcdef".into(),
        };
        for command in [
            Command::OpenReturnPath,
            Command::Ping(PING_MAGIC),
            Command::SwitchoverStart,
            Command::Manifest(Box::new(manifest())),
            Command::Verify(digests),
            Command::Commit(Commit::default()),
            Command::Commit(Commit { disks: serde_json::json!([1]) }),
            Command::Ask(Question { id: MigrationId::random() }),
            Command::Settled,
            Command::Rehearse(Rehearse { scraps: vec![Scrap { address: 8, value: 9 }] }),
            Command::Abort(Abort { reason: "cancelled by the user".into() }),
            Command::Probe(100),
        ] {
            let mut out = Vec::new();
            command.write(&mut out);
            let mut source = SliceSource::new(&out[1..]);
            assert_eq!(Command::read(&mut source).unwrap(), command);
            assert!(source.rest().is_empty());
            // And for whoever only looks.
            let mut source = SliceSource::new(&out[1..]);
            let raw = RawCommand::read(&mut source).unwrap();
            assert!(source.rest().is_empty() && raw.name() != "unknown", "{command:?}");
            let mut again = Vec::new();
            raw.write(&mut again);
            assert_eq!(again, out);
            for cut in 1..out.len() {
                assert!(RawCommand::read(&mut SliceSource::new(&out[1..cut])).is_err());
                assert!(Command::read(&mut SliceSource::new(&out[1..cut])).is_err());
            }
        }
    }

    #[test]
    fn what_is_not_supported_says_so() {
        let read = |bytes: &[u8]| Command::read(&mut SliceSource::new(bytes)).unwrap_err();
        assert!(read(b"\0\x03\0\x10").to_string().contains("postcopy-ram"));
        assert!(read(b"\0\x07\0\x04").to_string().contains("postcopy-ram"));
        assert!(read(b"\0\x0a\0\0").to_string().contains("x-colo"));
        assert!(read(b"\0\x99\0\0").to_string().contains("number 0x99"));
        assert!(read(b"\0\x01\0\x01").to_string().contains("length"));
        assert!(matches!(read(b"\x4d\x05\0\x04\xff\0\0\0"), WireError::TooLarge { .. }));
        assert!(matches!(read(b"\x4d\x01\0\x04\xff\0\0\0"), WireError::TooLarge { .. }));
        assert!(matches!(read(b"\x4d\x01\0\x04\0\0\0\x02{}"), WireError::Json { .. }));
    }
}
