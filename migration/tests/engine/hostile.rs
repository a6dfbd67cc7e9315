//! Streams with errors in them: a clear refusal, never a panic or a hang.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Duration;

use proptest::prelude::*;

use crate::common::*;
use migration::destination;
use migration::manifest::{Manifest, SectionManifest};
use migration::transport::Connection;
use migration::vmstate::SliceSource;
use migration::wire::command::{Command, PING_MAGIC};
use migration::wire::header::{self, Configuration};
use migration::wire::ram;
use migration::wire::return_path::Message;
use migration::wire::section::{self, PartType, SectionHeader};

/// A whole stream from a mini-vmm whose guest has `pages` pages of which none is zero.
fn stream(vm: &FakeVm) -> Vec<u8> {
    parts(vm, false).concat()
}

/// What comes before the verdict, and what comes behind it. `memory` promises it as a descriptor.
pub(crate) fn parts(vm: &FakeVm, memory: bool) -> [Vec<u8>; 2] {
    use migration::guest::{GuestRam, Machine};
    let mut out = Vec::new();
    let machine: String = MACHINE.into();
    header::write(&mut out, &Configuration { machine: machine.clone(), ..Default::default() });
    Command::OpenReturnPath.write(&mut out);
    Command::Ping(PING_MAGIC).write(&mut out);
    let manifest = Manifest {
        protocol: 1,
        program: "test".into(),
        machine,
        vcpus: 2,
        ram: vm.ram.blocks(),
        sections: vm
            .devices
            .iter()
            .map(|(id, _)| SectionManifest {
                id: id.idstr.clone(),
                instance: id.instance,
                version: 3,
                layout: String::new(),
            })
            .collect(),
        verify: false,
        only_asking: false,
        channels: None,
        memory,
        hears_running: false,
        id: None,
        commit_within_ms: 0,
        sent_at_ms: 0,
        details: vm.details(),
    };
    Command::Manifest(Box::new(manifest)).write(&mut out);
    let before = std::mem::take(&mut out);
    let key = migration::vmstate::SectionId::new("ram", 0);
    section::write_header(&mut out, PartType::Start, &SectionHeader { id: 2, key, version: 4 });
    ram::write_blocks(&mut out, &vm.ram.blocks());
    ram::write_eos(&mut out);
    section::write_footer(&mut out, 2);
    section::write_part_header(&mut out, PartType::End, 2);
    zero_page(&mut out, Some("pc.ram"), 0);
    ram::write_record(&mut out, None, 0x1000, ram::PAGE);
    out.extend_from_slice(&[7; 4096]);
    ram::write_record(&mut out, Some("pc.bios"), 0x2000, ram::PAGE);
    out.extend_from_slice(&[8; 4096]);
    ram::write_record(&mut out, None, 0, ram::PAGE | ram::RUN);
    ram::write_run(&mut out, 2);
    out.extend_from_slice(&[9; 8192]);
    ram::write_record(&mut out, Some("pc.ram"), 0x2000, ram::ZERO | ram::RUN);
    ram::write_run(&mut out, 14);
    out.push(0);
    ram::write_eos(&mut out);
    section::write_footer(&mut out, 2);
    for (section, id) in vm.sections().iter().zip(3..) {
        let header = SectionHeader { id, key: section.id(), version: section.version() };
        section::write_header(&mut out, PartType::Full, &header);
        out.extend(section.save(migration::vmstate::Audience::MiniVmm).unwrap());
        section::write_footer(&mut out, id);
    }
    section::write_end(&mut out, "{}");
    Command::Commit(Default::default()).write(&mut out);
    [before, out]
}

/// Feeds bytes to a destination, which must end by itself.
fn feed(bytes: Vec<u8>) -> Result<(), String> {
    let (_, mut destination, world) = two_vms(16);
    // The disks are free, as after a COMMIT.
    use migration::guest::SourceVm;
    FakeVm::new("source", &world, 1).pause().unwrap();
    let (a, b) = UnixStream::pair().unwrap();
    let writing = thread::spawn(move || {
        let _ = (&a).write_all(&bytes);
        let _ = a.shutdown(std::net::Shutdown::Write);
        let mut buf = [0; 4096];
        while (&a).read(&mut buf).is_ok_and(|n| n > 0) {}
    });
    let here = thread::spawn(move || {
        let connection = Connection::from_unix(b, "unix:b".into());
        destination::run(&mut destination, connection, &control())
            .map(|_| ())
            .map_err(|e| e.error.chain())
    });
    let result = join(here);
    join(writing);
    result
}

#[test]
fn the_stream_as_it_is_gets_as_far_as_the_disks() {
    let (source, _, _) = two_vms(16);
    let words = feed(stream(&source)).unwrap_err();
    assert!(words.contains("disk0.raw is locked by source"), "{words}");
}

#[test]
fn a_run_that_leaves_its_block_is_refused() {
    let (source, _, _) = two_vms(16);
    let bytes = stream(&source);
    for (kind, pages) in [(ram::ZERO, 14_u32), (ram::PAGE, 2)] {
        let mut run = Vec::new();
        match kind {
            ram::ZERO => ram::write_record(&mut run, Some("pc.ram"), 0x2000, kind | ram::RUN),
            _ => ram::write_record(&mut run, None, 0, kind | ram::RUN),
        }
        let at = run.len() + bytes.windows(run.len()).position(|w| w == run).unwrap();
        assert_eq!(bytes[at..at + 4], pages.to_be_bytes());
        for pages in [pages + 1 + 16 * u32::from(kind == ram::PAGE), u32::MAX, 0] {
            let mut changed = bytes.clone();
            changed[at..at + 4].copy_from_slice(&pages.to_be_bytes());
            let words = feed(changed).unwrap_err();
            let known = ["Illegal RAM offset", "pages in a run"];
            assert!(known.iter().any(|known| words.contains(known)), "{words}");
        }
    }
}

#[test]
fn a_source_that_stands_still_is_said_to_wherever_it_stops() {
    let (source, _, _) = two_vms(16);
    let bytes = stream(&source);
    let page = bytes.windows(64).position(|w| w == [7; 64]).unwrap();
    let commit = bytes.len() - 3;
    let device = commit - 300;
    for at in [3, 30, 60, page + 10, device, commit] {
        let (_, mut destination, _) = two_vms(16);
        let (mut a, b) = UnixStream::pair().unwrap();
        a.write_all(&bytes[..at]).unwrap();
        let connection = Connection::from_unix(b, "unix:b".into());
        let control = control_with(|p| p.stall_timeout = Duration::from_millis(150));
        let ended = destination::run(&mut destination, connection, &control);
        let words = ended.map(|_| ()).unwrap_err().error.chain();
        let stalled = "the source stands still: nothing for 150ms: the stream broke off at offset";
        let late = "did not give the order to run the guest within the 150ms";
        assert!(
            words.contains(stalled)
                || (at == commit && words.contains(late))
                || words.contains("no migration source"),
            "{at}: {words}"
        );
        drop(a);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn changed_bytes_do_no_harm(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        skip_pages in any::<bool>(),
    ) {
        let (source, _, _) = two_vms(16);
        let mut bytes = stream(&source);
        let len = if skip_pages { 900 } else { bytes.len() };
        for (at, byte) in changes {
            let at = at.index(len);
            bytes[at] = byte;
        }
        let _ = feed(bytes);
    }

    #[test]
    fn missing_and_repeated_pieces_do_no_harm(
        from in any::<prop::sample::Index>(),
        to in any::<prop::sample::Index>(),
        repeat in any::<bool>(),
    ) {
        let (source, _, _) = two_vms(16);
        let bytes = stream(&source);
        let (a, b) = (from.index(bytes.len()), to.index(bytes.len()));
        let (from, to) = (a.min(b), a.max(b));
        let mut changed = bytes[..from].to_vec();
        if repeat {
            changed.extend_from_slice(&bytes[from..to]);
            changed.extend_from_slice(&bytes[from..to]);
        }
        changed.extend_from_slice(&bytes[to..]);
        let _ = feed(changed);
    }

    #[test]
    fn any_bytes_are_a_message_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = Message::read(&mut SliceSource::new(&bytes));
        let _ = Command::read(&mut SliceSource::new(&bytes));
        let _ = header::read_configuration(&mut SliceSource::new(&bytes));
        let _ = section::read_header(&mut SliceSource::new(&bytes));
        let _ = ram::read_blocks(&mut SliceSource::new(&bytes), 1 << 40);
    }
}
