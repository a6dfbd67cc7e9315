//! The description that ends a stream: in QEMU's words, section by section.

use std::collections::BTreeMap;
use std::fs;
use std::process::Command;

use serde_json::{Map, Value};
use system_tests::guest::Guest;

/// Where ours is not QEMU's, and why. An entry is the beginning of a place.
const EXCEPTIONS: &[(&str, &str)] = &[
    (
        "cpu/env.fpregs/",
        "QEMU shows a register as one value of the type 'tmp', of which nothing is said; here its two \
         parts are",
    ),
    (
        "kvm-tpr-opt/",
        "QEMU shows the option ROM's table as a structure 'rom_state'; here its fields are the section's \
         own, by which earlier releases know the layout",
    ),
];

/// The description at the end of a stream: type byte 6, a length of four bytes, JSON.
fn description(stream: &[u8]) -> Value {
    let ends_with = |at: usize| {
        let len = stream.get(at + 1..at + 5)?.try_into().map(u32::from_be_bytes).ok()? as usize;
        (stream[at] == 6 && at + 5 + len == stream.len()).then(|| &stream[at + 5..])
    };
    let json = (0..stream.len()).find_map(ends_with).expect("a description");
    serde_json::from_slice(json).expect("JSON")
}

/// The description of a stream that was recorded once.
fn golden(name: &str) -> Value {
    let file = format!("{}/golden/{name}.mig.xz", env!("CARGO_MANIFEST_DIR"));
    let out = Command::new("xz").args(["-dc", &file]).output().expect("xz is installed");
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    description(&out.stdout)
}

fn devices(description: &Value) -> impl Iterator<Item = (String, &Map<String, Value>)> {
    description["devices"].as_array().expect("devices").iter().map(|device| {
        let name = device["name"].as_str().expect("a name");
        (format!("{name}#{}", device["instance_id"]), device.as_object().expect("an object"))
    })
}

/// Notes where two structures' descriptions differ, but for subsections that only one has: what is sent
/// depends on the guest.
fn compare(place: &str, ours: &Value, theirs: &Value, found: &mut Vec<String>) {
    for member in ["vmsd_name", "version"] {
        if ours[member] != theirs[member] {
            found.push(format!("{place} {member}: {} for {}", ours[member], theirs[member]));
        }
    }
    let list = |of: &Value, member: &str| of[member].as_array().cloned().unwrap_or_default();
    let (a, b) = (list(ours, "fields"), list(theirs, "fields"));
    if a.len() != b.len() {
        found.push(format!("{place} {} fields for {}", a.len(), b.len()));
    }
    for (ours, theirs) in a.iter().zip(&b) {
        let place = format!("{place}{}/", theirs["name"].as_str().expect("a name"));
        let structure = ours.get("struct").is_some() && theirs.get("struct").is_some();
        // The size of a structure is that of its parts.
        let members = ["name", "type", "array_len", "index", "size"];
        for member in members.into_iter().take(if structure { 4 } else { 5 }) {
            if ours[member] != theirs[member] {
                found.push(format!("{place} {member}: {} for {}", ours[member], theirs[member]));
            }
        }
        if structure {
            compare(&place, &ours["struct"], &theirs["struct"], found);
        } else if ours.get("struct").is_some() != theirs.get("struct").is_some() {
            found.push(format!("{place} is a structure on one side"));
        }
    }
    let subsections = list(theirs, "subsections");
    for ours in list(ours, "subsections") {
        let same = |other: &&Value| other["vmsd_name"] == ours["vmsd_name"];
        if let Some(theirs) = subsections.iter().find(same) {
            let name = ours["vmsd_name"].as_str().expect("a name");
            compare(&format!("{place}{{{name}}}/"), &ours, theirs, found);
        }
    }
}

#[test]
fn our_sections_are_described_as_qemu_describes_its_own() {
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("a.mig");
    let devices_of_theirs = "--rng=addr=04 --console=null,addr=05 --balloon=addr=06";
    let mut guest =
        Guest::boot_with("64M", 2, "vcpus=2,set=1M,rate=100,verify=2000", devices_of_theirs);
    guest.wait_ready();
    let out = guest.vm.migrate_command(&format!("file:{}", file.display())).output();
    let out = out.expect("mini-vmm migrate starts");
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let ours = description(&fs::read(&file).expect("a stream"));

    let theirs = golden("linux-2cpu-from-qemu");

    let (mut found, mut compared) = (Vec::new(), 0);
    for (name, theirs) in devices(&theirs) {
        let Some((_, ours)) = devices(&ours).find(|(ours, _)| *ours == name) else {
            // What this VM was not given.
            assert!(name.contains("virtio-"), "{name} is not described");
            continue;
        };
        compared += 1;
        let place = format!("{}/", theirs["vmsd_name"].as_str().expect("a name"));
        let (ours, theirs) = (Value::Object(ours.clone()), Value::Object(theirs.clone()));
        // The size of all that a virtio device has depends on what its driver has chosen.
        if !name.contains("virtio-") {
            compare(&place, &ours, &theirs, &mut found);
        }
    }
    assert!(compared >= 35, "only {compared} sections were compared");
    for (known, why) in EXCEPTIONS {
        let before = found.len();
        found.retain(|difference| !difference.starts_with(known));
        assert!(found.len() < before, "nothing differs at {known} any more ({why})");
    }
    assert!(found.is_empty(), "{found:#?}");

    // Words are not layouts, which earlier releases compare with theirs.
    let layouts = |of: &Value| -> BTreeMap<String, String> {
        let sections =
            of["mini-vmm"]["manifest"]["sections"].as_array().expect("a manifest").iter();
        let layout =
            |s: &Value| (format!("{}#{}", s["id"], s["instance"]), s["layout"].to_string());
        sections.map(layout).filter(|(name, _)| !name.contains("virtio-")).collect()
    };
    let recorded = layouts(&golden("linux-2cpu-from-mini-vmm"));
    assert!(recorded.len() >= 30, "{recorded:#?}");
    assert_eq!(layouts(&ours), recorded);
}
