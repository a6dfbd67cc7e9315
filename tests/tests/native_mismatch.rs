//! A destination that is not as the source is: refused before a page moves, and both sides say in
//! what they differ. The guest stays, whole, with its disk, and moves to one that fits.

use std::fs::File;
use std::path::Path;

use serde_json::json;
use system_tests::guest::Guest;
use system_tests::proxy::{Direction, Harm, Proxy};
use system_tests::vm::command;
use system_tests::wait;

/// A difference: what is started, and the words that name it.
struct Difference {
    memory: &'static str,
    smp: u32,
    devices: String,
    words: &'static [&'static str],
}

fn image(dir: &Path, name: &str, len: u64) -> String {
    let path = dir.join(name);
    File::create(&path).and_then(|file| file.set_len(len)).expect("a disk image");
    path.display().to_string()
}

/// The disk can't be had by another VM: the source has given nothing up.
fn is_locked(disk: &str) {
    let runtime = tempfile::tempdir().expect("a directory");
    let disk = format!("path={disk}");
    let args = ["run", "--selfcheck", "--memory", "64M", "--serial", "null", "--disk", &disk];
    let out = command(runtime.path()).args(args).output().expect("mini-vmm starts");
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!(out.status.code(), Some(1), "{said}");
    assert!(said.contains("in use by another virtual machine"), "{said}");
}

/// Both sides have said these words, the source in `said`; its guest runs, and the destination waits,
/// untouched, for a source that fits.
fn named_on_both_sides(words: &[&str], here: &Guest, said: &str, there: &Guest) {
    for words in words {
        assert!(said.contains(words), "'{words}' is not in the source's words: {said}");
        // The destination answers first, and writes to its log then.
        wait::until(
            &format!("'{words}' in the destination's words"),
            20,
            || there.vm.stderr().contains(words).then_some(()),
            || there.vm.stderr(),
        );
    }
    assert_eq!(here.vm.qmp().status(), "running", "{said}");
    assert_eq!(there.vm.qmp().status(), "inmigrate", "{said}");
}

#[test]
fn every_difference_of_the_machines_is_named_on_both_sides() {
    let dir = tempfile::tempdir().expect("a directory");
    let disk = image(dir.path(), "disk.img", 8 << 20);
    let smaller = image(dir.path(), "smaller.img", 4 << 20);
    let devices = format!("--disk path={disk},queues=2,addr=05 --rng=addr=04");
    let mut here = Guest::start(
        system_tests::vm::Vm::selfcheck("64M", 1, "set=16M,rate=0,verify=20000")
            .args(&format!("{devices} --uuid 12345678-1234-5678-1234-567812345678")),
    );
    here.wait_ready();
    is_locked(&disk);

    let same = || devices.clone();
    let differences = [
        Difference {
            memory: "128M",
            smp: 1,
            devices: same(),
            words: &["RAM block pc.ram", "134217728 bytes", "67108864 bytes", "--memory 64M"],
        },
        Difference {
            memory: "64M",
            smp: 2,
            devices: same(),
            words: &["number of vCPUs", "--smp 1"],
        },
        Difference {
            memory: "64M",
            smp: 1,
            devices: format!("{devices} --uuid 87654321-4321-8765-4321-876543218765"),
            words: &["UUID received is 12345678-", "and local is 87654321-", "--uuid"],
        },
        // A device less, one more, and one at another place.
        Difference {
            memory: "64M",
            smp: 1,
            devices: format!("--disk path={disk},queues=2,addr=05"),
            words: &["PCI slot 04", "virtio-rng", "nothing"],
        },
        Difference {
            memory: "64M",
            smp: 1,
            devices: format!("{devices} --balloon=addr=07"),
            words: &["PCI slot 07", "virtio-balloon", "nothing"],
        },
        Difference {
            memory: "64M",
            smp: 1,
            devices: format!("--disk path={disk},queues=2,addr=05 --rng=addr=06"),
            words: &["PCI slot 04", "PCI slot 06", "virtio-rng", "addr="],
        },
        Difference {
            memory: "64M",
            smp: 1,
            devices: format!("--disk path={disk},queues=2,addr=05 --balloon=addr=04"),
            words: &["PCI slot 04", "virtio-rng", "virtio-balloon"],
        },
        Difference {
            memory: "64M",
            smp: 1,
            devices: format!("--disk path={disk},queues=1,addr=05 --rng=addr=04"),
            words: &["number of queues", "virtio-blk in PCI slot 05", "queues="],
        },
        Difference {
            memory: "64M",
            smp: 1,
            devices: format!("--disk path={smaller},queues=2,addr=05 --rng=addr=04"),
            words: &["capacity", "16384 sectors", "8192 sectors"],
        },
    ];
    for Difference { memory, smp, devices, words } in differences {
        let there = Guest::incoming_with(memory, smp, &devices);
        let out = here.vm.migrate_command(&there.vm.migrate_uri()).output().expect("it starts");
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert_eq!(out.status.code(), Some(1), "{devices}: {said}");
        named_on_both_sides(words, &here, &said, &there);
    }
    here.is_whole();
    is_locked(&disk);
    here.moves_after_all("64M", 1, &devices);
}

#[test]
fn another_machine_type_is_named_on_both_sides() {
    // There is one machine type so far, so another is put into the stream on its way.
    let mut here = Guest::ready("64M", 1, "set=16M,rate=0,verify=20000");
    let there = Guest::incoming("64M", 1);
    let harm = Harm::Replace(b"pc-i440fx-7.2", b"pc-i440fx-7.1");
    let proxy = Proxy::new(&there.vm.migrate_uri(), Direction::There, harm);
    let mut qmp = here.begin(&proxy.uri(), &json!({}));
    let info = qmp.wait_migrated(60);
    assert_eq!(info["status"], "failed", "{info}");
    let why = info["error-desc"].as_str().unwrap_or_default();
    let words = ["machine type", "pc-i440fx-7.1", "pc-i440fx-7.2"];
    named_on_both_sides(&words, &here, why, &there);
    here.is_whole();
    drop(there);
    here.moves_after_all("64M", 1, "");
}
