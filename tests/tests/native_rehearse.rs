//! A migration that is rehearsed: the state of devices and vCPUs is loaded at the destination and thrown
//! away, while the guest runs on; and the real one goes to the same destination afterwards.

use std::fs::File;

use serde_json::{Value, json};
use system_tests::guest::Guest;
use system_tests::proxy::{Direction, Harm, Proxy};

const MEMORY: &str = "64M";
const WORK: &str = "set=16M,rate=200,verify=20000";

fn rehearse(guest: &Guest, uri: &str, more: &[&str]) -> (Option<i32>, String) {
    let out = guest.vm.cli(&[&["migrate", "--rehearse", uri], more].concat());
    let both = [out.stdout, out.stderr].concat();
    (out.status.code(), String::from_utf8_lossy(&both).into_owned())
}

/// The guest runs here, nothing has migrated, and `there` waits.
fn nothing_has_changed(here: &mut Guest, there: &Guest) {
    assert_eq!(here.vm.qmp().status(), "running");
    // No migration has begun, and so no page was sent.
    assert_eq!(here.vm.qmp().ask("query-migrate")["status"], Value::Null);
    assert_eq!(there.vm.qmp().status(), "inmigrate");
    assert_eq!(there.vm.qmp().ask("query-migrate")["ram"], Value::Null);
    here.is_whole();
}

#[test]
fn a_rehearsal_says_how_long_the_guest_stood_still_and_the_migration_follows_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.img");
    File::create(&path).unwrap().set_len(1 << 20).unwrap();
    let disk = format!("--disk path={}", path.display());
    let disk = disk.as_str();
    let mut here = Guest::boot_with(MEMORY, 2, WORK, disk);
    here.wait_ready();
    let mut there = Guest::incoming_with(MEMORY, 2, disk);
    let uri = there.vm.migrate_uri();
    for _ in 0..2 {
        let (status, said) = rehearse(&here, &uri, &[]);
        assert_eq!(status, Some(0), "{said}\n{}", there.vm.stderr());
        for words in ["would move", "the guest stood still for", "loaded there and thrown away"] {
            assert!(said.contains(words), "'{words}' is not in: {said}");
        }
        nothing_has_changed(&mut here, &there);
    }
    let (status, said) = rehearse(&here, &uri, &["--json"]);
    assert_eq!(status, Some(0), "{said}");
    let answer: Value = serde_json::from_str(&said).expect("JSON");
    let rehearsal = &answer["rehearsal"];
    assert_eq!((&answer["would-move"], &rehearsal["loaded"]), (&json!(true), &json!(true)));
    assert!(rehearsal["pause-us"].as_u64().is_some_and(|us| us > 0), "{answer}");
    assert!(rehearsal["compared-sections"].as_u64().is_some_and(|n| n > 10), "{answer}");
    nothing_has_changed(&mut here, &there);
    // The real one, compared to the last bit.
    here.migrate_to(&there, true);
    there.is_whole();
    assert_eq!(there.vm.qmp().status(), "running");
}

#[test]
fn what_only_shows_when_it_is_loaded_is_told_while_the_guest_runs_on() {
    let mut here = Guest::ready(MEMORY, 1, WORK);
    let mut there = Guest::incoming(MEMORY, 1);
    let uri = there.vm.migrate_uri();
    // In the manifest, which is JSON, no length stands before the name: it is the section that has
    // another one.
    let harm = Harm::Replace(b"\x05i8254", b"\x05i8255");
    let proxy = Proxy::new(&uri, Direction::There, harm);
    let (status, said) = rehearse(&here, &proxy.uri(), &[]);
    assert_eq!(status, Some(1), "{said}");
    for words in [
        "FATAL   rehearsal",
        "Unknown savevm section or instance 'i8255' 0",
        "the guest stood still for",
        "not loaded there",
        "would not move",
    ] {
        assert!(said.contains(words), "'{words}' is not in: {said}");
    }
    nothing_has_changed(&mut here, &there);
    here.migrate_to(&there, true);
    there.is_whole();
}

#[test]
fn a_vm_that_does_not_fit_is_not_stopped_to_rehearse() {
    let mut here = Guest::ready(MEMORY, 1, WORK);
    let there = Guest::incoming("128M", 1);
    let (status, said) = rehearse(&here, &there.vm.migrate_uri(), &["--json"]);
    assert_eq!(status, Some(1), "{said}");
    let text = said.rsplit_once('}').map_or("", |(json, _)| json).to_owned() + "}";
    let answer: Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!(answer["rehearsal"], Value::Null);
    assert_eq!(answer["problems"][0]["code"], "ram-size");
    nothing_has_changed(&mut here, &there);
}
