//! A hand-over that was cut when nobody could know any more who has the guest, and the operator who
//! settles it: what he is told, what he is granted and what not.

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use system_tests::guest::Guest;
use system_tests::image::{COMMIT, Disk};
use system_tests::proxy::{Direction, Harm, Proxy};
use system_tests::vm::Vm;
use system_tests::wait;

const MEMORY: &str = "64M";
/// The beginning of shut(0).
const SHUT: &[u8] = b"\0\x01\0\x04\0";

/// A source in doubt, and its destination: cut in the order to run, which the destination then never
/// does, or in its last word, when it runs.
struct Doubt {
    here: Guest,
    there: Guest,
}

impl Doubt {
    fn new(harm: (Direction, &'static [u8]), more: &str) -> Self {
        let mut here = Guest::boot_with(MEMORY, 1, "set=16M,rate=0,verify=20000", more);
        here.wait_ready();
        let there = Guest::incoming_with(MEMORY, 1, more);
        let (direction, bytes) = harm;
        let proxy = Proxy::new(&there.vm.migrate_uri(), direction, Harm::CutBehind(bytes, 0));
        // What follows is the operator's; and nobody will ask the destination.
        let parameters = json!({ "x-settle": false, "x-stall-timeout": 10_000 });
        let mut qmp = here.begin(&proxy.uri(), &parameters);
        let info = qmp.wait_migrated(60);
        assert_eq!(info["status"], "failed", "{info}");
        wait::until(
            "the doubt",
            20,
            || qmp.ask("query-status")["x-in-doubt"].is_object().then_some(()),
            || here.vm.stderr(),
        );
        Self { here, there }
    }

    fn in_the_order(more: &str) -> Self {
        Self::new((Direction::There, COMMIT), more)
    }

    fn in_the_last_word(more: &str) -> Self {
        let mut doubt = Self::new((Direction::Back, SHUT), more);
        doubt.there.is_whole();
        doubt
    }

    /// What `recover` with these words says when it is refused; the doubt stays.
    fn refused(&self, words: &[&str]) -> String {
        let (status, said) = recover(&self.here, words);
        assert_eq!(status, Some(1), "{words:?}: {said}");
        assert!(said.contains("refused"), "{words:?}: {said}");
        let state = self.here.vm.qmp().ask("query-status");
        assert!(state["x-in-doubt"].is_object(), "{words:?}: {state}");
        assert_eq!(state["running"], false, "{words:?}: {state}");
        said
    }

    /// `recover` with these words lets the guest go on here, whole.
    fn resumes(&mut self, words: &[&str]) {
        let (status, said) = recover(&self.here, words);
        assert_eq!(status, Some(0), "{words:?}: {said}");
        let state = self.here.vm.qmp().ask("query-status");
        assert_eq!((&state["status"], &state["x-in-doubt"]), (&json!("running"), &Value::Null));
        self.here.is_whole();
    }

    /// `recover` with these words ends the copy here, and the guest lives there.
    fn ends(mut self, words: &[&str]) {
        let (status, said) = recover(&self.here, words);
        assert_eq!(status, Some(0), "{words:?}: {said}");
        assert_eq!(self.here.vm.wait_exit(20), 0, "{}", self.here.vm.stderr());
        self.here.nothing_is_left();
        self.there.is_whole();
        assert_eq!(self.there.vm.qmp().status(), "running");
    }

    fn destination_is_killed(&mut self) {
        self.there.vm.signal(Signal::SIGKILL);
        self.there.vm.wait_exit(20);
    }
}

fn recover(guest: &Guest, words: &[&str]) -> (Option<i32>, String) {
    let out = guest.vm.cli(&[&["recover"], words].concat());
    let both = [out.stdout, out.stderr].concat();
    (out.status.code(), String::from_utf8_lossy(&both).into_owned())
}

#[test]
fn a_doubt_is_told_wherever_one_may_look_and_free_disks_let_the_guest_go_on() {
    let disk = Disk::new();
    let mut doubt = Doubt::in_the_order(&disk.argument());
    // It has not heard the whole order, and gives up.
    assert_eq!(doubt.there.vm.wait_exit(60), 1, "{}", doubt.there.vm.stderr());

    let (status, said) = recover(&doubt.here, &[]);
    assert_eq!(status, Some(0), "{said}");
    for words in [
        "not known whether the destination runs the guest",
        "closed the connection",
        "nobody holds the guest's disks, and nobody has written",
        "'recover --resume' lets the guest go on",
    ] {
        assert!(said.contains(words), "'{words}' is not in: {said}");
    }
    let (_, known) = recover(&doubt.here, &["--json"]);
    let known: Value = serde_json::from_str(&known).unwrap();
    assert!(known["for-seconds"].is_u64() && known["disks"].is_string(), "{known}");
    for command in ["status", "list"] {
        let out = doubt.here.vm.cli(&[command]);
        let said = String::from_utf8_lossy(&out.stdout).to_lowercase();
        assert!(said.contains("in doubt"), "{command}: {said}");
    }
    let mut qmp = doubt.here.vm.qmp();
    let migrate = json!({ "uri": "tcp:127.0.0.1:1" });
    for (command, arguments) in [("cont", json!({})), ("migrate", migrate)] {
        let error = qmp.execute(command, arguments).expect_err("in doubt").to_string();
        assert!(error.contains("mini-vmm recover"), "{command}: {error}");
    }

    let said = doubt.refused(&["--discard"]);
    assert!(said.contains("it runs nowhere, and this may be its last copy"), "{said}");
    doubt.resumes(&["--resume"]);
    let (status, said) = recover(&doubt.here, &["--resume"]);
    assert_eq!(status, Some(1), "{said}");
    assert!(said.contains("nothing to recover"), "{said}");
    // Its disk is locked again, and the guest moves after all.
    let mut second = Vm::selfcheck(MEMORY, 1, "").args(&disk.argument()).spawn();
    assert_eq!(second.wait_exit(20), 1, "{}", second.stderr());
    assert!(second.stderr().contains("in use by another virtual machine"), "{}", second.stderr());
    doubt.here.moves_after_all(MEMORY, 1, &disk.argument());
}

#[test]
fn a_destination_that_runs_forbids_to_resume_and_allows_to_discard() {
    let disk = Disk::new();
    let doubt = Doubt::in_the_last_word(&disk.argument());
    let (_, said) = recover(&doubt.here, &[]);
    assert!(said.contains("held by a mini-vmm in which the guest has started"), "{said}");
    let all = [
        "--resume",
        "--i-know-the-destination-does-not-run",
        "--even-though-the-disks-have-changed",
    ];
    for words in [&all[..1], &all[..2], &all[..]] {
        let said = doubt.refused(words);
        assert!(said.contains("in use by another virtual machine"), "{said}");
        assert!(said.contains("must not run here too"), "{said}");
    }
    doubt.ends(&["--discard"]);
}

#[test]
fn a_destination_that_ran_and_was_killed_gives_the_guest_back() {
    let disk = Disk::new();
    let mut doubt = Doubt::in_the_last_word(&disk.argument());
    doubt.refused(&["--resume"]);
    doubt.destination_is_killed();
    doubt.resumes(&["--resume"]);
    doubt.here.moves_after_all(MEMORY, 1, &disk.argument());
}

#[test]
fn memory_does_not_go_on_over_a_disk_that_was_written_to_unless_one_insists() {
    let disk = Disk::new();
    let mut doubt = Doubt::in_the_last_word(&disk.argument());
    doubt.destination_is_killed();
    disk.write();
    let (_, said) = recover(&doubt.here, &[]);
    assert!(said.contains("has been written to since"), "{said}");
    for words in [&["--resume"][..], &["--resume", "--i-know-the-destination-does-not-run"]] {
        let said = doubt.refused(words);
        assert!(said.contains("its memory here is older than its disks"), "{said}");
    }
    // What was taken to look at is given up again.
    let mut other = Vm::selfcheck(MEMORY, 1, "").args(&disk.argument()).start();
    other.qmp().ask("quit");
    assert_eq!(other.wait_exit(20), 0, "{}", other.stderr());
    doubt.resumes(&["--resume", "--even-though-the-disks-have-changed"]);
}

#[test]
fn a_disk_that_a_stranger_holds_proves_neither_way() {
    let disk = Disk::new();
    let mut doubt = Doubt::in_the_order(&disk.argument());
    assert_eq!(doubt.there.vm.wait_exit(60), 1, "{}", doubt.there.vm.stderr());
    let mut stranger = Vm::selfcheck(MEMORY, 1, "").args(&disk.argument()).start();
    assert_eq!(stranger.qmp().status(), "running");
    let said = doubt.refused(&["--resume"]);
    assert!(said.contains("in use by another virtual machine"), "{said}");
    let said = doubt.refused(&["--discard"]);
    assert!(said.contains("nothing says that it is the guest that runs there"), "{said}");
    stranger.qmp().ask("quit");
    assert_eq!(stranger.wait_exit(20), 0, "{}", stranger.stderr());
    doubt.resumes(&["--resume"]);
}

#[test]
fn without_disks_the_operator_must_say_what_is_so_there() {
    let mut doubt = Doubt::in_the_order("");
    assert_eq!(doubt.there.vm.wait_exit(60), 1, "{}", doubt.there.vm.stderr());
    let (_, said) = recover(&doubt.here, &[]);
    assert!(said.contains("no disk whose lock would show"), "{said}");
    let said = doubt.refused(&["--resume"]);
    assert!(said.contains("--i-know-the-destination-does-not-run"), "{said}");
    let said = doubt.refused(&["--discard"]);
    assert!(said.contains("--i-know-the-destination-runs"), "{said}");
    doubt.resumes(&["--resume", "--i-know-the-destination-does-not-run"]);
    doubt.here.moves_after_all(MEMORY, 1, "");

    let doubt = Doubt::in_the_last_word("");
    doubt.refused(&["--resume"]);
    doubt.refused(&["--discard"]);
    doubt.ends(&["--discard", "--i-know-the-destination-runs"]);
}

#[test]
fn where_there_is_no_doubt_there_is_nothing_to_recover() {
    let mut guest = Guest::ready(MEMORY, 1, "");
    for words in [&[][..], &["--resume"], &["--discard", "--i-know-the-destination-runs"]] {
        let (status, said) = recover(&guest, words);
        assert_eq!(status, Some(1), "{words:?}: {said}");
        assert!(said.contains("nothing to recover"), "{words:?}: {said}");
    }
    // Words that do not belong together are not understood.
    for words in [
        &["--resume", "--discard"][..],
        &["--i-know-the-destination-runs"],
        &["--resume", "--i-know-the-destination-runs"],
    ] {
        let (status, said) = recover(&guest, words);
        assert_eq!(status, Some(2), "{words:?}: {said}");
    }
    guest.is_whole();
}
