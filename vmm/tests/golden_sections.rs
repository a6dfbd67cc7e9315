//! Streams that were recorded once, from QEMU and from mini-vmm, go through the real devices: each
//! section is taken, and written as it was.

mod common;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use migration::estimate::HandOver;
use migration::inspect::{self, DeviceSection, Part, Value};
use migration::vmstate::{Audience, ByteSource, SliceSource};
use vm_memory::{Bytes, GuestAddress};
use vmm::control::RunState;
use vmm::grants::Grants;
use vmm::machine::Machine;
use vmm::vm::Vm;

/// Sections that are not written as they were read, and why.
const NOT_THE_SAME: &[(&str, &str)] = &[
    ("timer", "a clock that goes on"),
    ("mc146818rtc", "a clock that goes on"),
    ("kvmclock", "KVM's: it gets its state when all of a guest has arrived"),
    ("cpu", "KVM's as well"),
    ("apic", "KVM's as well"),
    ("i8259", "KVM's as well"),
    ("ioapic", "KVM's as well"),
    ("i8254", "KVM's as well"),
    ("ps2kbd", "bytes that the guest has read are forgotten"),
    ("ps2mouse", "bytes that the guest has read are forgotten"),
];

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden")
}

/// A number in a tree of values.
fn number(value: &Value, name: &str) -> Option<u64> {
    let Value::Struct(members) = value else { return None };
    match &members.iter().find(|member| member.name == name)?.value {
        Value::Int { bits, .. } => Some(*bits),
        _ => None,
    }
}

fn list<'a>(value: &'a Value, name: &str) -> Option<&'a [Value]> {
    let Value::Struct(members) = value else { return None };
    match &members.iter().find(|member| member.name == name)?.value {
        Value::Array(all) => Some(all),
        _ => None,
    }
}

fn part<'a>(value: &'a Value, name: &str) -> Option<&'a Value> {
    let Value::Struct(members) = value else { return None };
    members.iter().find(|member| member.name == name).map(|member| &member.value)
}

/// The memory was not recorded; a queue needs its used ring there, all requests answered.
fn put_rings(machine: &Machine, section: &DeviceSection) {
    let Some(device) = section.value.as_ref().and_then(|value| part(value, "virtio")) else {
        return;
    };
    let rings = part(device, "virtio/virtqueues").and_then(|rings| list(rings, "ring"));
    let queues = list(device, "vq").unwrap_or_default();
    for (queue, ring) in queues.iter().zip(rings.unwrap_or_default()) {
        let (last, used) = (number(queue, "last_avail_idx"), number(ring, "used"));
        let Some((last, used)) = last.zip(used).filter(|(_, used)| *used != 0) else { continue };
        // Flags, then the index (virtio 1.2, 2.7.8).
        let at = GuestAddress(used + 2);
        machine.ram.guest().write_obj((last as u16).to_le(), at).expect("memory of the guest's");
    }
}

fn read(path: &Path) -> inspect::Report {
    let mut unpack = Command::new("xz");
    unpack.arg("-dc").arg(path).stdout(Stdio::piped());
    let mut child = unpack.spawn().expect("xz is installed");
    let from = child.stdout.take().expect("its output");
    let mut report = inspect::read(from, &mut (), &mut |_| {}).expect("no visitor that fails");
    assert!(child.wait().expect("its end").success());
    assert!(report.broken.is_none(), "{}: {:?}", path.display(), report.broken);
    devices::virtio::take_apart(&mut report);
    report
}

#[test]
fn every_recorded_section_is_taken_and_written_as_it_was() {
    let mut seen = 0;
    for entry in golden().read_dir().expect("recorded streams") {
        let path = entry.expect("a directory entry").path();
        let report = read(&path);
        let directory = tempfile::tempdir().expect("a directory");
        let disk = common::disk(directory.path(), 64 << 20);
        // The tap is opened by nobody, since no guest runs.
        let (machine, queue) =
            common::machine("256M", &format!(r#"{{ path = "{disk}" }}"#), r#"{ tap = "golden0" }"#);
        report.devices().for_each(|section| put_rings(&machine, section));
        let vm = Vm::new(machine, queue, Grants::default());
        let mut sections = vm.sections(RunState::Paused);
        for recorded in report.devices() {
            let what = format!("{}: {}", path.display(), recorded.key);
            let of_it =
                |section: &&mut Box<dyn migration::vmstate::Section>| section.id() == recorded.key;
            let section = sections.iter_mut().find(of_it).unwrap_or_else(|| panic!("{what}: none"));
            let mut source = SliceSource::new(&recorded.body);
            let state = section.decode(recorded.version, &mut source);
            let state = state.unwrap_or_else(|e| panic!("{what}: {e}"));
            assert_eq!(source.offset(), recorded.body.len() as u64, "{what}: all of it is read");
            section.apply(state).unwrap_or_else(|e| panic!("{what}: {e}"));
            if NOT_THE_SAME.iter().any(|(name, _)| recorded.key.idstr == *name) {
                continue;
            }
            let again = section.save(Audience::Qemu).expect("a state that can be written");
            let at = again.iter().zip(&recorded.body).position(|(a, b)| a != b);
            assert_eq!(
                (at, again.len()),
                (None, recorded.body.len()),
                "{what} is written as it was"
            );
            seen += 1;
        }
    }
    assert!(seen > 40, "only {seen} sections were compared");
}

/// The source's estimate, made while the guest runs, of what will have to travel while it stands still.
#[test]
fn the_hand_over_to_a_qemu_is_expected_to_be_as_long_as_it_was() {
    let report = read(&golden().join("linux-2cpu-from-mini-vmm.mig.xz"));
    let first = report.devices().next().expect("devices").offset;
    let found = report.bytes - first;
    let described = report.parts.iter().find_map(|part| match part {
        Part::Description(description) => Some(description.size),
        _ => None,
    });
    let directory = tempfile::tempdir().expect("a directory");
    let disk = common::disk(directory.path(), 64 << 20);
    let (machine, queue) =
        common::machine("256M", &format!(r#"{{ path = "{disk}" }}"#), r#"{ tap = "golden0" }"#);
    let sections = Vm::new(machine, queue, Grants::default()).sections(RunState::Running);
    let expected = HandOver::of(&sections, Audience::Qemu, Duration::ZERO).bytes;
    println!("{expected} bytes expected, {found} found, {described:?} of them the description");
    assert!(expected.abs_diff(found) < found / 10, "{expected} bytes expected, {found} found");
}
