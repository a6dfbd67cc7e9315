//! VMs that go to files and commands, and come back.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use crate::common::*;
use migration::destination::{self, Failure};
use migration::guest::Machine;
use migration::source::{self, Outcome};
use migration::transport::{Sink, Supply};
use migration::vmstate::Audience;
use serde_json::{Value, json};

fn save(sink: Sink) -> (Outcome, FakeVm) {
    let (mut source, _, _) = two_vms(64);
    let outcome = source::save(&mut source, sink, &control_with(|p| p.verify = true));
    (outcome, source)
}

fn restore(supply: Supply) -> (Result<(), Failure>, FakeVm) {
    let mut destination = FakeVm::new("destination", &Arc::default(), 64);
    let result = destination::restore(&mut destination, supply, &control());
    (result.map(drop), destination)
}

fn runs(vm: &FakeVm) -> bool {
    vm.world.runs() == Some(vm.who)
}

fn states(vm: &FakeVm) -> Vec<FakeState> {
    (0..vm.devices.len()).map(|n| vm.device(n)).collect()
}

fn saved(path: &Path) -> FakeVm {
    let (outcome, source) = save(Sink::file(path, 0).unwrap());
    assert!(matches!(outcome, Outcome::Completed(_)), "{outcome:?}");
    source
}

#[test]
fn a_saved_vm_comes_back_whole_and_as_often_as_one_likes() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vm.mig");
    let source = saved(&path);
    for _ in 0..2 {
        let (result, destination) = restore(Supply::file(&path, 0).unwrap());
        result.unwrap();
        assert_eq!(source.ram.contents(), destination.ram.contents());
        assert_eq!(states(&source), states(&destination));
    }
}

#[test]
fn every_cut_is_refused_with_its_place() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vm.mig");
    saved(&path);
    let whole = fs::read(&path).unwrap();
    let cut = dir.path().join("cut.mig");
    for len in (0..whole.len()).step_by(97).chain(whole.len() - 40..whole.len()) {
        fs::write(&cut, &whole[..len]).unwrap();
        let (result, destination) = restore(Supply::file(&cut, 0).unwrap());
        let error = result.expect_err("it is not whole").error.chain();
        assert!(error.contains("offset 0x"), "{len}: {error}");
        assert!(!runs(&destination), "{len}");
    }
}

#[test]
fn damaged_memory_is_found_by_its_digest() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vm.mig");
    saved(&path);
    let mut bytes = fs::read(&path).unwrap();
    // In the middle of a page.
    let page = bytes.windows(64).position(|w| w.iter().all(|b| *b == w[0] && *b != 0));
    bytes[page.expect("a page of one byte") + 32] ^= 1;
    fs::write(&path, bytes).unwrap();
    let (result, destination) = restore(Supply::file(&path, 0).unwrap());
    let error = result.unwrap_err().error.chain();
    assert!(error.contains("RAM block pc.ram differs"), "{error}");
    assert!(!runs(&destination));
}

#[test]
fn commands_take_and_give_and_their_failure_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vm.gz").display().to_string();
    let (outcome, source) = save(Sink::command(&format!("gzip -c >{path}")).unwrap());
    assert!(matches!(outcome, Outcome::Completed(_)), "{outcome:?}");
    let (result, destination) = restore(Supply::command(&format!("gzip -dc <{path}")).unwrap());
    result.unwrap();
    assert_eq!(source.ram.contents(), destination.ram.contents());

    for command in ["exit 3", "head -c 100 >/dev/null; exit 3", "cat >/dev/null; exit 3"] {
        let (outcome, source) = save(Sink::command(command).unwrap());
        let Outcome::Kept { error } = outcome else { panic!("{command}: {outcome:?}") };
        assert!(error.chain().contains("ended with status 3"), "{command}: {}", error.chain());
        assert!(runs(&source), "{command}");
    }
    let late = format!("gzip -dc <{path}; exit 4");
    for command in [late.as_str(), "exit 4"] {
        let (result, destination) = restore(Supply::command(command).unwrap());
        let error = result.unwrap_err().error.chain();
        assert!(error.contains("ended with status 4"), "{command}: {error}");
        assert!(!runs(&destination), "{command}");
    }
}

#[test]
fn a_cancel_ends_a_command_that_takes_nothing() {
    let (mut source, _, _) = two_vms(4096);
    source.dirty(300, 20);
    let control = control();
    let theirs = control.clone();
    let thread = std::thread::spawn(move || {
        let sink = Sink::command("sleep 1000").unwrap();
        (source::save(&mut source, sink, &theirs), source)
    });
    wait_until_stuck(&control);
    control.cancel().unwrap();
    let (outcome, source) = join(thread);
    assert!(matches!(outcome, Outcome::Kept { error: source::SourceError::Cancelled }));
    assert!(runs(&source));
}

#[test]
fn what_can_not_be_written_leaves_the_guest_and_the_file_before() {
    let (outcome, source) = save(Sink::file(Path::new("/dev/full"), 0).unwrap());
    let Outcome::Kept { error } = outcome else { panic!("{outcome:?}") };
    assert!(error.chain().contains("writing to /dev/full failed (a VM needs"), "{}", error.chain());
    assert!(runs(&source));
}

#[test]
fn a_description_that_does_not_fit_is_refused_before_anything_is_applied() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vm.mig");
    let source = saved(&path);
    let whole = fs::read(&path).unwrap();
    let at = whole.windows(2).rposition(|w| w == b"\x00\x06").unwrap() + 2;
    // The last such pair may be in the length that follows it.
    let at = if whole[at + 4] == b'{' { at } else { at - 1 };
    let description: Value = serde_json::from_slice(&whole[at + 4..]).unwrap();
    let section = &source.sections()[0];
    let hex = |bytes: &[u8]| bytes.iter().map(|b| format!("{b:02x}")).collect::<String>();
    let body = hex(&section.save(Audience::MiniVmm).unwrap());
    let (id, version) = (section.id().idstr, section.version());
    let fuller = |id: &str, version: u32, body: &str| json!([{ "id": id, "instance": 0, "version": version, "body": body }]);
    let cases = [
        ("/mini-vmm/sections", fuller(&id, version, &body), None),
        ("/mini-vmm/sections", fuller("nobody", 1, ""), Some("nobody")),
        ("/mini-vmm/sections", fuller(&id, version + 1, &body), Some("version")),
        ("/mini-vmm/sections", fuller(&id, version, &body[2..]), Some("can't be loaded")),
        ("/mini-vmm/sections", fuller(&id, version, &format!("{body}00")), Some("1 bytes more")),
        ("/mini-vmm/sections", fuller(&id, version, "0x"), Some("hexadecimal")),
        ("/mini-vmm/manifest/protocol", json!(99), Some("protocol 99")),
        ("/mini-vmm/manifest/vcpus", json!(7), Some("number of vCPUs")),
        ("/mini-vmm/manifest/ram/0/len", json!(4096), Some("RAM block pc.ram")),
        ("/mini-vmm/digests/blocks", json!([]), Some("RAM digests")),
        ("/mini-vmm/manifest", json!(null), Some("can't be read")),
    ];
    let other = dir.path().join("other.mig");
    for (pointer, value, words) in cases {
        let mut changed = description.clone();
        *changed.pointer_mut(pointer).unwrap() = value;
        let text = changed.to_string();
        let mut bytes = whole[..at].to_vec();
        bytes.extend_from_slice(&(text.len() as u32).to_be_bytes());
        bytes.extend_from_slice(text.as_bytes());
        fs::write(&other, bytes).unwrap();
        let (result, destination) = restore(Supply::file(&other, 0).unwrap());
        let Some(words) = words else {
            result.unwrap();
            continue;
        };
        let error = result.unwrap_err().error.chain();
        assert!(error.contains(words), "{pointer}: {error}");
        assert!(!runs(&destination), "{pointer}");
    }
}
