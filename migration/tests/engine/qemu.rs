//! A QEMU on the other side, played by hand from its wire format.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::thread;

use crate::common::*;
use migration::destination::{self, DestinationError, Failure};
use migration::guest::{GuestRam, PAGE_SIZE, RamBlock};
use migration::problem::{Problem, kind};
use migration::source::Outcome;
use migration::stats::Report;
use migration::transport::{Connection, StreamReader};
use migration::vmstate::{ByteSource, Section, SectionId};
use migration::wire::command::{Command, PING_MAGIC};
use migration::wire::header::{self, Configuration};
use migration::wire::ram::{self, RecordHeader};
use migration::wire::return_path::Message;
use migration::wire::section::{self, PartType, SectionHeader};

// --- a QEMU as the source ---------------------------------------------------------------------

/// A stream as QEMU 7.2 writes it, in pieces that a test can change.
struct Stream {
    configuration: Configuration,
    return_path: bool,
    blocks: Vec<RamBlock>,
    version: u32,
    records: Vec<u8>,
    sections: Vec<(SectionId, u32, Vec<u8>)>,
    description: bool,
}

impl Stream {
    fn of(vm: &FakeVm) -> Self {
        let mut records = Vec::new();
        let mut contents = vm.ram.contents();
        for (block, data) in vm.ram.blocks().iter().zip(&mut contents) {
            let mut named = Some(block.name.as_str());
            for (n, page) in data.chunks(PAGE_SIZE as usize).enumerate() {
                let offset = n as u64 * PAGE_SIZE;
                if page.iter().all(|b| *b == 0) {
                    zero_page(&mut records, named.take(), offset);
                } else {
                    ram::write_record(&mut records, named.take(), offset, ram::PAGE);
                    records.extend_from_slice(page);
                }
            }
        }
        use migration::guest::Machine;
        let save = |s: &dyn Section| {
            (s.id(), s.version(), s.save(migration::vmstate::Audience::Qemu).unwrap())
        };
        Self {
            configuration: Configuration { machine: MACHINE.into(), ..Configuration::default() },
            return_path: true,
            blocks: vm.ram.blocks(),
            version: 4,
            records,
            sections: vm.sections().iter().map(|s| save(&**s)).collect(),
            description: true,
        }
    }

    fn bytes(&self) -> Vec<u8> {
        let mut out = Vec::new();
        header::write(&mut out, &self.configuration);
        if self.return_path {
            Command::OpenReturnPath.write(&mut out);
            Command::Ping(1).write(&mut out);
        }
        let key = SectionId::new("ram", 0);
        let start = SectionHeader { id: 2, key, version: self.version };
        section::write_header(&mut out, PartType::Start, &start);
        ram::write_blocks(&mut out, &self.blocks);
        ram::write_eos(&mut out);
        section::write_footer(&mut out, 2);
        section::write_part_header(&mut out, PartType::Part, 2);
        out.extend_from_slice(&self.records);
        ram::write_eos(&mut out);
        section::write_footer(&mut out, 2);
        section::write_part_header(&mut out, PartType::End, 2);
        ram::write_eos(&mut out);
        section::write_footer(&mut out, 2);
        for ((key, version, body), id) in self.sections.iter().zip(40..) {
            let header = SectionHeader { id, key: key.clone(), version: *version };
            section::write_header(&mut out, PartType::Full, &header);
            out.extend_from_slice(body);
            section::write_footer(&mut out, id);
        }
        if self.description {
            section::write_end(&mut out, r#"{"devices": []}"#);
        } else {
            out.push(0);
        }
        out
    }
}

/// Feeds `bytes` to a destination; gives its answers too.
fn feed(vm: &mut FakeVm, bytes: Vec<u8>) -> (Result<Box<Report>, Failure>, Vec<u8>) {
    let (a, b) = UnixStream::pair().unwrap();
    let mut writer = a.try_clone().unwrap();
    let writing = thread::spawn(move || drop(writer.write_all(&bytes)));
    let reading = thread::spawn(move || {
        let mut answers = Vec::new();
        let mut a = a;
        a.read_to_end(&mut answers).unwrap();
        answers
    });
    let connection = Connection::from_unix(b, "unix:b".into());
    let result = destination::run(vm, connection, &control());
    join(writing);
    (result, join(reading))
}

fn qemu_and_us() -> (Stream, FakeVm, Vec<Vec<u8>>) {
    let (mut source, destination, world) = two_vms(64);
    let contents = source.ram.contents();
    let stream = Stream::of(&source);
    // QEMU gives up its disks before it ends the stream.
    use migration::guest::SourceVm;
    source.pause().unwrap();
    source.release_disks().unwrap();
    assert_eq!(world.runs(), None);
    (stream, destination, contents)
}

#[test]
fn its_stream_is_taken_with_and_without_a_return_path() {
    for (return_path, description, answers) in [
        (true, true, &b"\0\x02\0\x04\0\0\0\x01\0\x01\0\x04\0\0\0\0"[..]),
        (true, false, b"\0\x02\0\x04\0\0\0\x01\0\x01\0\x04\0\0\0\0"),
        (false, true, b""),
    ] {
        let (mut stream, mut vm, contents) = qemu_and_us();
        (stream.return_path, stream.description) = (return_path, description);
        let (result, said) = feed(&mut vm, stream.bytes());
        result.unwrap();
        assert_eq!(said, answers);
        assert_eq!(vm.world.runs(), Some("destination"));
        assert!(vm.ram.contents() == contents);
        assert_eq!(vm.device(2).regs[3], 0x0404_0406);
    }
}

#[test]
fn blocks_of_firmware_are_kept_and_sections_may_be_missing() {
    let (mut stream, mut vm, contents) = qemu_and_us();
    stream.blocks.push(RamBlock { name: "/rom@etc/acpi/tables".into(), len: 2 * PAGE_SIZE });
    ram::write_record(&mut stream.records, Some("/rom@etc/acpi/tables"), 0, ram::PAGE);
    stream.records.extend_from_slice(&[0xaa; PAGE_SIZE as usize]);
    zero_page(&mut stream.records, None, PAGE_SIZE);
    stream.sections.remove(1);
    stream.sections.reverse();
    vm.keeps = vec!["/rom@etc/acpi/tables".into()];
    feed(&mut vm, stream.bytes()).0.unwrap();
    let mut expected = contents;
    expected.push([[0xaa; PAGE_SIZE as usize], [0; PAGE_SIZE as usize]].concat());
    assert!(vm.ram.contents() == expected);
    assert_eq!(vm.device(1).counter, 0);
    assert_ne!(vm.device(2).counter, 0);
}

#[test]
fn what_does_not_fit_is_refused_by_name_with_shut_1() {
    type Change = fn(&mut Stream);
    let cases: [(Change, &str); 18] = [
        (|s| s.configuration.uuid = Some([7; 16]), "capability 'validate-uuid' on"),
        (
            |s| s.configuration.machine = "pc-i440fx-7.1".into(),
            "Machine type received is 'pc-i440fx-7.1' and local is 'pc-i440fx-7.2'",
        ),
        (|s| s.configuration.machine = "pc".into(), "Machine type received is 'pc'"),
        (|s| s.blocks[0].len += PAGE_SIZE, "Size mismatch: pc.ram: 0x41000 != 0x40000"),
        (|s| s.blocks[0].name = "pc.rom".into(), "Unknown ramblock \"pc.rom\""),
        (|s| s.version = 3, "unsupported version 3 of the RAM section"),
        (|s| s.records = 0x20u64.to_be_bytes().to_vec(), "0x0"),
        (|s| s.records = 0x28u64.to_be_bytes().to_vec(), "Ack, bad migration stream"),
        (|s| s.records = 0x48u64.to_be_bytes().to_vec(), "flags"),
        (|s| s.records = 0x40u64.to_be_bytes().to_vec(), "xbzrle is not supported"),
        (|s| s.records = 0x100u64.to_be_bytes().to_vec(), "compress is not supported"),
        (
            |s| {
                s.records.clear();
                zero_page(&mut s.records, Some("pc.ram"), 0x40000)
            },
            "Illegal RAM offset 0x40000 in pc.ram",
        ),
        (
            |s| {
                s.records.clear();
                zero_page(&mut s.records, Some("pc.rom"), 0)
            },
            "Unknown ramblock \"pc.rom\"",
        ),
        (
            |s| s.sections[2].0.idstr = "0000:00:03.0/virtio-net".into(),
            "Unknown savevm section or instance '0000:00:03.0/virtio-net' 0",
        ),
        (|s| s.sections[1].0.instance = 0, "section cpu came twice"),
        (|s| s.sections[0].1 = 4, "version 4 is not supported, this side takes 2 to 3"),
        (|s| s.sections[0].2.push(0), "missing section footer for cpu"),
        (
            |s| {
                s.sections[0].2.pop();
            },
            "missing section footer for cpu",
        ),
    ];
    for (change, words) in cases {
        let (mut stream, mut vm, _) = qemu_and_us();
        change(&mut stream);
        let (result, said) = feed(&mut vm, stream.bytes());
        let text = result.unwrap_err().error.chain();
        assert!(text.contains(words), "'{words}' is not in: {text}");
        assert!(said.ends_with(b"\0\x01\0\x04\0\0\0\x01"), "{words}: {said:x?}");
        assert_eq!(vm.world.runs(), None);
    }
}

#[test]
fn postcopy_is_refused_by_name() {
    let (stream, mut vm, _) = qemu_and_us();
    let mut bytes = Vec::new();
    header::write(&mut bytes, &stream.configuration);
    Command::OpenReturnPath.write(&mut bytes);
    bytes.extend_from_slice(b"\x08\0\x03\0\x10\0\0\0\0\0\0\x10\0\0\0\0\0\0\0\x10\0");
    let failure = feed(&mut vm, bytes).0.unwrap_err();
    assert!(failure.vm_untouched);
    assert!(failure.error.chain().contains("postcopy-ram is not supported"));
}

#[test]
fn a_source_that_poses_as_a_mini_vmm_must_behave_as_one() {
    let manifest_missing = |out: &mut Vec<u8>| {
        let key = SectionId::new("ram", 0);
        section::write_header(out, PartType::Start, &SectionHeader { id: 2, key, version: 4 });
    };
    let early_commit = |out: &mut Vec<u8>| Command::Commit(Default::default()).write(out);
    type More = fn(&mut Vec<u8>);
    let cases: [(More, &str); 2] = [
        (manifest_missing, "no manifest before the first section"),
        (early_commit, "COMMIT before PREPARED"),
    ];
    for (more, words) in cases {
        let (_, mut vm, _) = qemu_and_us();
        let mut bytes = Vec::new();
        let machine = MACHINE.into();
        header::write(&mut bytes, &Configuration { machine, ..Configuration::default() });
        Command::OpenReturnPath.write(&mut bytes);
        Command::Ping(PING_MAGIC).write(&mut bytes);
        more(&mut bytes);
        let (result, said) = feed(&mut vm, bytes);
        assert!(matches!(result.unwrap_err().error, DestinationError::OutOfTurn { .. }));
        let said = String::from_utf8_lossy(&said).into_owned();
        assert!(said.contains(words), "{said}");
    }
}

// --- a QEMU as the destination ----------------------------------------------------------------

/// What it does when everything has come.
#[derive(Clone, Copy, PartialEq)]
enum End {
    Shut(u32),
    Close,
}

/// Reads a stream as QEMU 7.2 would, knowing nothing of mini-vmm, and answers.
fn qemu_destination(stream: UnixStream, vm: &FakeVm, end: End) -> Vec<String> {
    use migration::guest::Machine;
    let mut answers = stream.try_clone().unwrap();
    let mut reader = StreamReader::new(Connection::from_unix(stream, "unix:q".into()));
    let say = |answers: &mut UnixStream, message: Message| {
        let mut bytes = Vec::new();
        message.write(&mut bytes);
        let _ = answers.write_all(&bytes);
    };
    let mut seen = Vec::new();
    header::read_magic(&mut reader).unwrap();
    assert_eq!(header::read_configuration(&mut reader).unwrap().machine, MACHINE);
    let sections = vm.sections();
    let mut block = 0;
    loop {
        let part = section::read_part_type(&mut reader).unwrap();
        match part {
            PartType::Command => match Command::read(&mut reader).unwrap() {
                Command::OpenReturnPath => seen.push("open".into()),
                Command::Ping(value) => say(&mut answers, Message::Pong(value)),
                other => panic!("a QEMU knows no {other:?}"),
            },
            PartType::Start | PartType::Part | PartType::End => {
                let id = if part == PartType::Start {
                    let header = section::read_header(&mut reader).unwrap();
                    assert_eq!((header.key.idstr.as_str(), header.version), ("ram", 4));
                    header.id
                } else {
                    migration::wire::read_u32(&mut reader, "id").unwrap()
                };
                loop {
                    let header = RecordHeader::read(&mut reader).unwrap();
                    let (offset, same) = match header {
                        RecordHeader::Eos => break,
                        RecordHeader::MemSize(total) => {
                            let blocks = ram::read_blocks(&mut reader, total).unwrap();
                            assert_eq!(blocks, vm.ram.blocks());
                            continue;
                        }
                        RecordHeader::Zero { offset, same_block }
                        | RecordHeader::Page { offset, same_block } => (offset, same_block),
                        run => panic!("a QEMU knows no {run:?}"),
                    };
                    if !same {
                        let name = migration::wire::read_str8(&mut reader, "name").unwrap();
                        block = vm.ram.blocks().iter().position(|b| b.name == name).unwrap();
                    }
                    if matches!(header, RecordHeader::Zero { .. }) {
                        let byte = ram::read_fill(&mut reader).unwrap();
                        vm.ram.fill(block, offset, PAGE_SIZE, byte).unwrap();
                    } else {
                        reader.read_ram(&*vm.ram, block, offset, PAGE_SIZE as usize, 8).unwrap();
                    }
                }
                section::read_footer(&mut reader, &SectionId::new("ram", 0), id).unwrap();
            }
            PartType::Full => {
                let header = section::read_header(&mut reader).unwrap();
                let device = sections.iter().find(|s| s.id() == header.key).unwrap();
                device.decode(header.version, &mut reader).unwrap();
                section::read_footer(&mut reader, &header.key, header.id).unwrap();
                seen.push(header.key.to_string());
            }
            PartType::Eof => break,
            PartType::Description => panic!("a description before the end"),
        }
    }
    // QEMU waits for one more byte.
    let mut byte = [0];
    reader.read_exact(&mut byte).unwrap();
    assert_eq!(byte, [6]);
    section::skip_description(&mut reader).unwrap();
    match end {
        End::Shut(status) => {
            say(&mut answers, Message::Shut(status));
            // Nothing may follow the description.
            assert_eq!(reader.peek(1).unwrap(), b"");
        }
        End::Close => drop(answers),
    }
    seen
}

fn to_qemu(end: End) -> (Outcome, FakeVm, FakeVm, Vec<String>) {
    let (source, destination, _) = two_vms(64);
    vm_to_qemu(source, destination, end)
}

fn vm_to_qemu(
    mut source: FakeVm,
    destination: FakeVm,
    end: End,
) -> (Outcome, FakeVm, FakeVm, Vec<String>) {
    let (a, b) = UnixStream::pair().unwrap();
    let destination = Arc::new(Mutex::new(destination));
    let theirs = destination.clone();
    let there = thread::spawn(move || qemu_destination(b, &theirs.lock().unwrap(), end));
    let connection = Connection::from_unix(a, "unix:a".into());
    let outcome = migration::source::run(&mut source, connection, &control());
    let seen = join(there);
    let destination = Arc::into_inner(destination).unwrap().into_inner().unwrap();
    (outcome, source, destination, seen)
}

#[test]
fn a_qemu_gets_its_own_stream_and_nothing_else() {
    let (outcome, source, destination, seen) = to_qemu(End::Shut(0));
    assert!(matches!(outcome, Outcome::Completed(_)), "{outcome:?}");
    assert_eq!(seen, ["open", "cpu", "cpu (instance 1)", "0000:00:02.0/virtio-net"]);
    assert!(source.ram.contents() == destination.ram.contents());
    assert_eq!((source.world.runs(), source.world.disks()), (None, None));
}

#[test]
fn a_qemu_that_refuses_gives_the_guest_back() {
    let (outcome, source, ..) = to_qemu(End::Shut(1));
    let Outcome::Kept { error } = outcome else { panic!("{outcome:?}") };
    assert!(error.to_string().contains("status 1"));
    let world = source.world;
    assert_eq!((world.runs(), world.disks()), (Some("source"), Some("source")));
}

#[test]
fn a_qemu_that_closes_without_a_word_leaves_a_doubt() {
    let (outcome, source, ..) = to_qemu(End::Close);
    assert!(matches!(outcome, Outcome::InDoubt { .. }), "{outcome:?}");
    assert_eq!(source.world.runs(), None);
}

/// Answers a source's ping as a QEMU does, and gives what came.
fn pong_only(stream: UnixStream) -> Vec<u8> {
    let mut answer = Vec::new();
    Message::Pong(PING_MAGIC).write(&mut answer);
    (&stream).write_all(&answer).unwrap();
    let mut came = Vec::new();
    let _ = (&stream).read_to_end(&mut came);
    came
}

#[test]
fn what_a_qemu_would_lose_keeps_the_guest_here_before_the_first_page() {
    let (mut source, ..) = two_vms(64);
    let what = "vCPU 0: MSR 0x140";
    let problem = |kind| Problem::new(kind, what, "0x0", "0x1", "");
    source.against_qemu = vec![problem(kind::QEMU_REGISTER_HARMLESS), problem(kind::QEMU_REGISTER)];
    let (a, b) = UnixStream::pair().unwrap();
    let there = thread::spawn(move || pong_only(b));
    let connection = Connection::from_unix(a, "unix:a".into());
    let outcome = migration::source::run(&mut source, connection, &control());
    let came = join(there);
    let Outcome::Kept { error } = outcome else { panic!("{outcome:?}") };
    assert!(error.chain().contains(what), "{}", error.chain());
    assert!(came.len() < 200, "{} bytes were sent", came.len());
    assert_eq!(source.world.runs(), Some("source"));

    // The same beforehand, and what is fatal first.
    let answer = migration::source::preflight_for_qemu(&source).unwrap();
    assert!(!answer.would_move);
    let codes: Vec<_> = answer.problems.iter().map(|p| p.code.as_str()).collect();
    assert_eq!(codes, ["qemu-register", "qemu-register-harmless"]);
}

#[test]
fn what_a_guest_can_do_without_does_not_keep_it() {
    let (mut source, destination, _) = two_vms(64);
    source.against_qemu =
        vec![Problem::new(kind::QEMU_REGISTER_HARMLESS, "vCPU 0: MSR 0x1fc", "0x0", "0x1", "")];
    assert!(migration::source::preflight_for_qemu(&source).unwrap().would_move);
    let (outcome, ..) = vm_to_qemu(source, destination, End::Shut(0));
    assert!(matches!(outcome, Outcome::Completed(_)), "{outcome:?}");
}
