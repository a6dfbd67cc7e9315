//! `mini-vmm preflight`: every problem in one answer, before a page moves, and nothing changed by it.

use std::fs::{self, File};
use std::io::Write;
use std::net::TcpListener;
use std::path::Path;
use std::process::Output;
use std::thread;

use serde_json::{Value, json};
use system_tests::guest::Guest;
use system_tests::proxy::{Direction, Harm, Proxy};
use system_tests::vm::{Vm, command};

const QUIET: &str = "set=4M,rate=1000,verify=20000";

fn image(dir: &Path, name: &str, len: u64) -> String {
    let path = dir.join(name);
    File::create(&path).and_then(|file| file.set_len(len)).expect("a disk image");
    path.display().to_string()
}

fn ask(here: &Guest, uri: &str, more: &[&str]) -> Output {
    let mut args = vec!["preflight", "--vm", &here.vm.name, uri];
    args.extend(more);
    here.vm.cli(&args)
}

fn said(out: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr))
}

/// The answer as JSON, and the codes in it.
fn answer(here: &Guest, uri: &str, status: i32, more: &[&str]) -> (Value, Vec<String>) {
    let mut args = vec!["--json"];
    args.extend(more);
    let out = ask(here, uri, &args);
    assert_eq!(out.status.code(), Some(status), "{}", said(&out));
    let answer: Value = serde_json::from_slice(&out.stdout).expect("JSON");
    assert_eq!(answer["would-move"], status == 0, "{answer}");
    let code = |problem: &Value| problem["code"].as_str().unwrap_or_default().to_string();
    let codes = answer["problems"].as_array().expect("a list").iter().map(code).collect();
    (answer, codes)
}

/// Nothing tells of a migration on either side.
fn nothing_happened(here: &Guest, there: &Guest) {
    assert_eq!(here.vm.qmp().status(), "running");
    assert_eq!(here.vm.qmp().ask("query-migrate").get("status"), None);
    assert_eq!(there.vm.qmp().status(), "inmigrate");
    let info = there.vm.qmp().ask("query-migrate");
    assert_eq!(info["status"], "setup", "{info}");
    assert!(!there.vm.stderr().contains("sent away"), "{}", there.vm.stderr());
}

const NO_FORECAST: &[&str] = &["--sample", "0s"];

#[test]
fn what_fits_would_move_and_moves_afterwards_to_the_same_destination() {
    let dir = tempfile::tempdir().expect("a directory");
    let disk = image(dir.path(), "disk.img", 8 << 20);
    let devices = format!("--disk path={disk},queues=2 --rng --balloon");
    let args = Vm::selfcheck("128M", 2, "vcpus=2,set=8M,rate=2000,verify=20000");
    let mut here = Guest::start(args.args(&devices));
    here.wait_ready();
    let mut there = Guest::incoming_with("128M", 2, &devices);
    let uri = there.vm.migrate_uri();

    let out = ask(&here, &uri, &[]);
    let text = said(&out);
    assert_eq!(out.status.code(), Some(0), "{text}");
    for words in ["the VM would move", "forecast: about", "pass(es)", "stands still for about"] {
        assert!(text.contains(words), "'{words}' is not in {text}");
    }
    let (answer, codes) = answer(&here, &uri, 0, &["--sample", "300ms"]);
    assert!(codes.is_empty(), "{answer:#}");
    let forecast = &answer["forecast"];
    assert_eq!(forecast["converges"], true, "{answer:#}");
    assert_eq!(forecast["ram-bytes"], 128 << 20, "{answer:#}");
    assert!(forecast["bandwidth"].as_u64().is_some_and(|rate| rate > 10 << 20), "{answer:#}");
    assert!(forecast["dirtied-bytes"].as_u64().is_some_and(|n| n > 0), "{answer:#}");
    nothing_happened(&here, &there);
    here.is_whole();
    // The log of written pages was on and off before, and misses none now.
    here.migrate_to(&there, true);
    here.nothing_is_left();
    there.is_whole();
}

#[test]
fn several_differences_are_all_in_one_answer() {
    let dir = tempfile::tempdir().expect("a directory");
    let disk = image(dir.path(), "disk.img", 8 << 20);
    let smaller = image(dir.path(), "smaller.img", 4 << 20);
    let devices = format!("--disk path={disk},queues=2,addr=05 --rng=addr=04");
    let mut here = Guest::start(Vm::selfcheck("64M", 1, QUIET).args(&devices));
    here.wait_ready();
    let other = format!("--disk path={smaller},queues=1,addr=05,readonly=on --balloon=addr=07");
    let there = Guest::incoming_with("128M", 2, &other);
    let uri = there.vm.migrate_uri();
    let (answer, codes) = answer(&here, &uri, 1, NO_FORECAST);
    for code in [
        "vcpus",
        "ram-size",
        "device-missing",
        "device-extra",
        "pci-slot",
        "queues",
        "disk-size",
        "disk-readonly",
        "device-layout",
    ] {
        // The layout follows from the number of queues, where it does.
        let there = codes.iter().any(|found| found == code);
        assert!(there || code == "device-layout", "{code} is not in {answer:#}");
    }
    assert_eq!(answer["forecast"], Value::Null);
    let out = ask(&here, &uri, &[]);
    let text = said(&out);
    assert_eq!(out.status.code(), Some(1), "{text}");
    for words in [
        "Length mismatch: pc.ram",
        "Unknown savevm section or instance",
        "--memory 64M",
        "--smp 1",
        "PCI slot 04",
        "PCI slot 07",
        "would not move",
        "FATAL",
    ] {
        assert!(text.contains(words), "'{words}' is not in {text}");
    }
    nothing_happened(&here, &there);
    // The migration itself says the same, and has sent no page.
    let out = here.vm.migrate_command(&uri).output().expect("it starts");
    assert_eq!(out.status.code(), Some(1), "{}", said(&out));
    for words in ["Length mismatch: pc.ram", "--smp 1", "PCI slot 07"] {
        assert!(said(&out).contains(words), "'{words}' is not in {}", said(&out));
    }
    let info = here.vm.qmp().ask("query-migrate");
    assert_eq!(info.pointer("/ram/normal").and_then(Value::as_u64).unwrap_or(0), 0, "{info}");
    here.is_whole();
}

#[test]
fn what_kvm_refuses_is_found_on_a_spare_vcpu() {
    let mut here = Guest::ready("64M", 1, QUIET);
    let there = Guest::incoming("64M", 1);
    let (plain, _) = answer(&here, &there.vm.migrate_uri(), 0, NO_FORECAST);
    assert_eq!(plain["problems"].as_array().map(Vec::len), Some(0), "{plain:#}");
    // Number and value: MTRRs of a memory type that there is not, and KVM_POLL_CONTROL as a register
    // that no kernel has yet.
    let cases: [(&'static [u8], &'static [u8], &str, &str); 2] = [
        (b"[767,3078]", b"[767,9078]", "msr-refused", "MSR 0x2ff"),
        (b"[1263947013,1]", b"[1263947999,1]", "msr-unknown", "MSR 0x4b5650df"),
    ];
    for (old, new, code, field) in cases {
        let proxy = Proxy::new(&there.vm.migrate_uri(), Direction::There, Harm::Replace(old, new));
        let (answer, codes) = answer(&here, &proxy.uri(), 1, NO_FORECAST);
        assert_eq!(codes, [code], "{answer:#}");
        let problem = &answer["problems"][0];
        assert_eq!((&problem["vcpu"], &problem["field"]), (&0.into(), &field.into()), "{answer:#}");
        let known = problem["known-as"].as_str().unwrap_or_default();
        assert!(known.starts_with(&format!("failed to set {field} to 0x")), "{answer:#}");
    }
    // x87 can't be switched off; and no processor has component 3 without 4.
    for (old, new, code) in [
        (&b"\"xcr0\":1"[..], &b"\"xcr0\":4"[..], "xcr0-refused"),
        (b"\"xstate\":0", b"\"xstate\":8", "xsave-refused"),
    ] {
        let proxy = Proxy::new(&there.vm.migrate_uri(), Direction::There, Harm::Replace(old, new));
        let out = ask(&here, &proxy.uri(), &["--sample", "0s", "--json"]);
        if out.status.success() && code == "xsave-refused" {
            // Some kernels say that components hold something although it is what they begin with.
            continue;
        }
        assert_eq!(out.status.code(), Some(1), "{}", said(&out));
        let answer: Value = serde_json::from_slice(&out.stdout).expect("JSON");
        assert_eq!(answer["problems"][0]["code"], code, "{answer:#}");
        assert!(
            answer["problems"][0]["known-as"].as_str().is_some_and(|k| k.contains("KVM_SET_X"))
        );
    }
    nothing_happened(&here, &there);
    here.is_whole();
}

#[test]
fn a_disk_that_changed_under_the_destination_is_found() {
    let dir = tempfile::tempdir().expect("a directory");
    let disk = image(dir.path(), "disk.img", 8 << 20);
    let copy = image(dir.path(), "copy.img", 8 << 20);
    let here = Guest::start(Vm::selfcheck("64M", 1, QUIET).args(&format!("--disk path={disk}")));
    let there = Guest::incoming_with("64M", 1, &format!("--disk path={copy}"));
    let uri = there.vm.migrate_uri();
    // Nobody holds a lock on it, so it is not the source's.
    let (_, codes) = answer(&here, &uri, 0, NO_FORECAST);
    assert_eq!(codes, ["disk-unlocked"]);
    let file = File::options().write(true).open(&copy).expect("the image");
    file.set_len(4 << 20).expect("a smaller image");
    let (_, codes) = answer(&here, &uri, 1, NO_FORECAST);
    assert_eq!(codes, ["disk-size", "disk-unlocked"]);
    fs::remove_file(&copy).expect("it can be removed");
    let (gone, codes) = answer(&here, &uri, 1, NO_FORECAST);
    assert_eq!(codes, ["disk-missing"], "{gone:#}");
    assert!(gone["problems"][0]["known-as"].as_str().is_some_and(|k| k.contains("Could not open")));
    nothing_happened(&here, &there);
}

#[test]
fn a_vm_that_may_not_move_at_all_says_so_together_with_the_rest() {
    let here = Guest::boot_with("64M", 1, QUIET, "--cpu host,migratable=off");
    let there = Guest::incoming("128M", 1);
    let (answer, codes) = answer(&here, &there.vm.migrate_uri(), 1, NO_FORECAST);
    for code in ["blocked", "ram-size"] {
        assert!(codes.iter().any(|found| found == code), "{code} is not in {answer:#}");
    }
    assert!(answer.to_string().contains("invtsc"), "{answer:#}");
}

#[test]
fn a_guest_that_writes_faster_than_is_sent_is_told_what_would_do() {
    let mut here = Guest::ready("128M", 1, "set=64M,rate=0,verify=0");
    let there = Guest::incoming("128M", 1);
    let uri = there.vm.migrate_uri();
    let slow = ["--bandwidth", "1M", "--downtime", "10ms", "--sample", "300ms"];
    let (answer, codes) = answer(&here, &uri, 1, &slow);
    assert_eq!(codes, ["not-converging"], "{answer:#}");
    let ms = answer["forecast"]["needed-downtime-ms"].as_u64().expect("a downtime that would do");
    let downtime = format!("{}ms", ms * 2);
    let slow = ["--bandwidth", "1M", "--downtime", &downtime, "--sample", "300ms"];
    let (_, codes) = self::answer(&here, &uri, 0, &slow);
    assert!(codes.is_empty(), "{codes:?}");
    nothing_happened(&here, &there);
    here.is_whole();
}

#[test]
fn a_source_that_dies_while_it_asks_leaves_a_destination_that_takes_the_next() {
    let mut here = Guest::ready("64M", 1, QUIET);
    let there = Guest::incoming("64M", 1);
    // Cut in the manifest, and in the middle of the probes.
    for harm in
        [Harm::CutBehind(b"\"only_asking\":true", 5), Harm::CutBehind(b"mini-vmm probe", 100_000)]
    {
        let proxy = Proxy::new(&there.vm.migrate_uri(), Direction::There, harm);
        let out = ask(&here, &proxy.uri(), &[]);
        assert_eq!(out.status.code(), Some(1), "{}", said(&out));
        assert!(said(&out).contains("could be asked"), "{}", said(&out));
        assert_eq!(there.vm.qmp().status(), "inmigrate");
        assert_eq!(here.vm.qmp().status(), "running");
    }
    here.migrate_to(&there, true);
    here.nothing_is_left();
}

#[test]
fn nobody_a_stranger_and_what_is_no_place_to_ask_are_told_apart() {
    let here = Guest::ready("64M", 1, QUIET);
    let refused = |uri: &str, words: &[&str]| {
        let out = ask(&here, uri, &[]);
        assert_eq!(out.status.code(), Some(1), "{uri}: {}", said(&out));
        for words in words {
            assert!(said(&out).contains(words), "'{words}' is not in {}", said(&out));
        }
    };
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("its address");
    let stranger = thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("somebody connects");
        let _ = stream.write_all(b"SSH-2.0-OpenSSH_9.2\r\n");
        // Gone with the listener.
    });
    let uri = format!("tcp:{address}");
    refused(&uri, &["is it a mini-vmm that waits for a migration?"]);
    stranger.join().expect("it ends");
    refused(&uri, &["can't connect", "is the destination running"]);
    let out = ask(&here, &uri, &["--json"]);
    let answer: Value = serde_json::from_slice(&out.stdout).expect("JSON");
    assert_eq!(answer["would-move"], Value::Null, "{answer}");
    assert!(answer["error"].as_str().is_some_and(|why| why.contains("can't connect")), "{answer}");
    let file = here.vm.dir().join("saved");
    refused(&format!("file:{}", file.display()), &["no place where a mini-vmm answers"]);
    assert!(!file.exists(), "a question has written a file");
    refused("fd:7", &["no place where a mini-vmm answers"]);

    let usage: [&[&str]; 3] =
        [&["preflight"], &["preflight", "tpc:a:1"], &["preflight", "tcp:a:1", "--sample", "x"]];
    for args in usage {
        let out = command(here.vm.dir()).args(args).output().expect("mini-vmm starts");
        assert_eq!(out.status.code(), Some(2), "{args:?}: {}", said(&out));
    }
    assert_eq!(here.vm.qmp().status(), "running");
}

#[test]
fn a_host_without_room_is_named() {
    // As much as the host has in all is more than it has free.
    let info = fs::read_to_string("/proc/meminfo").expect("the host's memory");
    let total = info.lines().find_map(|line| line.strip_prefix("MemTotal:")).expect("its total");
    let kib: u64 = total.trim().trim_end_matches(" kB").parse().expect("a number");
    let memory = format!("{}M", kib / 1024 / 2 * 2 - 2);
    // The guest touches hardly any of it.
    let mut here = Guest::ready(&memory, 1, "fill=16M,set=4M,rate=1000,verify=20000");
    let there = Guest::incoming(&memory, 1);
    let (answer, codes) = answer(&here, &there.vm.migrate_uri(), 1, NO_FORECAST);
    assert_eq!(codes, ["host-memory"], "{answer:#}");
    assert!(answer.to_string().contains("Cannot allocate memory"), "{answer:#}");
    nothing_happened(&here, &there);
    here.is_whole();
}

#[test]
fn a_preflight_and_a_migration_exclude_each_other_and_a_cancel_ends_it() {
    let mut here = Guest::ready("64M", 1, QUIET);
    let there = Guest::incoming("64M", 1);
    let uri = there.vm.migrate_uri();
    let asking = {
        let mut command = command(here.vm.dir());
        command.args(["preflight", "--vm", &here.vm.name, &uri, "--sample", "25s"]);
        thread::spawn(move || command.output().expect("mini-vmm starts"))
    };
    let mut qmp = here.vm.qmp();
    // Nobody listens there, so that nothing begins as long as nothing else has.
    let mut busy = || {
        let refused = qmp.execute("migrate", json!({ "uri": "tcp:127.0.0.1:1" }));
        let refused = refused.expect_err("nobody is there").to_string();
        refused.contains("There's a migration process in progress").then_some(())
    };
    system_tests::wait::until("the preflight to be under way", 20, &mut busy, || "");
    let out = ask(&here, &uri, NO_FORECAST);
    assert!(said(&out).contains("There's a migration process in progress"), "{}", said(&out));
    qmp.ask("migrate_cancel");
    let out = asking.join().expect("it ends");
    assert_eq!(out.status.code(), Some(1), "{}", said(&out));
    assert!(said(&out).contains("cancelled"), "{}", said(&out));
    here.migrate_to(&there, true);
    here.nothing_is_left();
}
