//! Migrations that are attacked, each in a way that follows from a seed and a number: what the rules
//! are, and how to run more of them, is told in docs/faults.md.

use std::fs::OpenOptions;
use std::io::{Seek, SeekFrom, Write};
use std::path::PathBuf;
use std::time::Duration;

use system_tests::faults::campaign::Campaign;
use system_tests::faults::witness::Witness;
use system_tests::guest::{Guest, number};

#[test]
fn whatever_is_done_to_a_migration_one_side_has_the_guest_whole() {
    let campaign = Campaign {
        seed: 20,
        cases: 0..400,
        jobs: 3,
        // The machine may do much else; these are begun in the order of their numbers.
        budget: Some(Duration::from_secs(150)),
        verbose: false,
    };
    let table = campaign.run().expect("a migration without faults succeeds");
    println!("{}", table.markdown());
    assert_eq!(table.failures.len(), 0, "of {} cases; see above", table.cases());
    assert!(table.cases() >= 40, "only {} cases in all that time", table.cases());
    assert!(table.done() * 10 >= table.cases() * 8, "most faults have no place");
}

/// A blank image, and the argument that gives it to a guest.
fn image() -> (tempfile::TempDir, PathBuf, String) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log.img");
    std::fs::File::create(&path).unwrap().set_len(1 << 20).unwrap();
    let argument = format!("--disk path={}", path.display());
    (dir, path, argument)
}

#[test]
fn a_guest_under_disk_load_moves_and_both_sides_compare_equal() {
    let (_dir, path, disk) = image();
    let witness = Witness::new(&path);
    let params = "fill=8M,set=2M,rate=4000,disk=100";
    let mut guest = Guest::boot_with("32M", 1, params, &disk);
    guest.wait_ready();
    witness.wait_for_more_than(20);
    for _ in 0..10 {
        let mut there = Guest::incoming_with("32M", 1, &disk);
        guest.migrate_to(&there, true);
        there.is_whole();
        guest = there;
    }
    guest.vm.qmp().ask("quit");
    assert_eq!(guest.vm.wait_exit(20), 0, "{}", guest.vm.stderr());
    assert!(witness.testify().unwrap() > 20);
}

#[test]
fn a_guest_notices_who_else_writes_its_log() {
    for (ahead, words) in [(true, "is there already"), (false, "is not whole")] {
        let (_dir, path, disk) = image();
        let mut guest = Guest::boot_with("32M", 1, "fill=8M,set=1M,disk=100", &disk);
        guest.wait_ready();
        let records = number(&guest.ask(b"s", "records=", 60), "records");
        let mut file = OpenOptions::new().write(true).open(&path).unwrap();
        let sector = if ahead { records + 10 } else { 0 };
        file.seek(SeekFrom::Start(sector * 512)).unwrap();
        file.write_all(b"somebody else").unwrap();
        guest.line.send(b"v");
        let said = guest.line.wait_for("FAIL disk", 60);
        assert!(said.contains(words), "{said}");
    }
}
