//! `mini-vmm inspect` on streams of real VMs, and on what is left of broken ones.

use std::fs;
use std::path::Path;
use std::process::Output;

use serde_json::Value;
use system_tests::guest::Guest;
use system_tests::qemu::QemuArgs;
use system_tests::vm::{VmArgs, command, mini_vmm};
use system_tests::wait;
use tempfile::TempDir;

const DEVICES: &str = "--rng --balloon --console null";

fn directory() -> TempDir {
    TempDir::with_prefix("mini-vmm-inspect-").expect("a directory")
}

fn inspect(dir: &Path, args: &[&str]) -> Output {
    command(dir).arg("inspect").args(args).current_dir(dir).output().expect("mini-vmm starts")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// What it prints when it succeeds.
fn shown(dir: &Path, args: &[&str]) -> String {
    let out = inspect(dir, args);
    assert!(out.status.success(), "{args:?}: {}", text(&out.stderr));
    text(&out.stdout)
}

/// What it says when it fails, which it must.
fn refused(dir: &Path, args: &[&str]) -> String {
    let out = inspect(dir, args);
    assert_eq!(out.status.code(), Some(1), "{args:?}: {}", text(&out.stdout));
    text(&out.stderr)
}

/// Saves the VM to a file and waits for its end.
fn save(guest: &mut Guest, file: &Path) {
    let uri = format!("file:{}", file.display());
    let out = guest.vm.migrate_command(&uri).output().expect("mini-vmm migrate starts");
    assert!(out.status.success(), "{}", text(&out.stderr));
    assert_eq!(guest.vm.wait_exit(20), 0, "{}", guest.vm.stderr());
}

fn restore(file: &Path) -> Guest {
    let args = VmArgs::default().args("--memory 64M --smp 2 --paused --migrate-listen");
    Guest::start(args.arg(format!("file:{}", file.display())).args(DEVICES))
}

/// A stopped guest in a file.
fn saved(dir: &Path) -> Guest {
    let mut guest = Guest::start(
        system_tests::vm::Vm::selfcheck("64M", 2, "set=8M,rate=0,verify=20000").args(DEVICES),
    );
    guest.wait_ready();
    guest.vm.qmp().ask("stop");
    save(&mut guest, &dir.join("a.mig"));
    guest
}

#[test]
fn a_saved_vm_is_shown_and_saved_again_differs_in_its_clocks_only() {
    let dir = directory();
    let dir = dir.path();
    drop(saved(dir));
    let all = shown(dir, &["a.mig"]);
    for words in
        ["pc-i440fx-7.2", "complete", "pc.ram", "ram PART", "apic (instance 1)", "description"]
    {
        assert!(all.contains(words), "no '{words}' in:\n{all}");
    }
    let report: Value = serde_json::from_str(&shown(dir, &["a.mig", "--json"])).expect("JSON");
    assert_eq!(report["broken"], Value::Null);
    assert_eq!(report["bytes"], fs::metadata(dir.join("a.mig")).expect("the file").len());
    let parts = report["parts"].as_array().expect("parts");
    let of = |name: &str| parts.iter().find(|part| part["name"] == name).expect(name).clone();
    // The self-checking guest runs in long mode (EFER.LMA, bit 10), with paging on.
    assert_eq!(of("cpu")["values"]["env.efer"].as_u64().map(|efer| efer >> 10 & 1), Some(1));
    assert_eq!(of("0000:00:04.0/virtio-balloon")["version"], 1);

    let fields = shown(dir, &["a.mig", "--section", "virtio-rng"]);
    assert!(fields.contains("virtio/queues = 1"), "{fields}");
    assert!(refused(dir, &["a.mig", "--section", "nosuch"]).contains("there are: timer, "));

    // The same again.
    let mut again = restore(&dir.join("a.mig"));
    let arrived = || (again.vm.qmp().status() == "paused").then_some(());
    wait::until("the guest's arrival", 20, arrived, || again.vm.stderr());
    save(&mut again, &dir.join("b.mig"));
    assert_eq!(shown(dir, &["--diff", "a.mig", "a.mig"]).trim(), "no difference");
    let out = inspect(dir, &["--diff", "a.mig", "b.mig", "--json"]);
    let differences: Value = serde_json::from_slice(&out.stdout).expect("JSON");
    // A stopped guest's clocks go on (docs/save-restore.md); nothing else does.
    let clocks = [
        "apic/initial_count_load_time",
        "apic/next_time",
        "apic/timer_expiry",
        "apic (instance 1)/initial_count_load_time",
        "apic (instance 1)/next_time",
        "apic (instance 1)/timer_expiry",
        "cpu/env.tsc",
        "cpu (instance 1)/env.tsc",
        "i8254/",
        "kvmclock/clock",
        "mc146818rtc/",
        "timer/",
        "0000:00:01.3/piix4_pm/tmr",
    ];
    for difference in differences["fields"].as_array().expect("fields") {
        let place = difference["place"].as_str().expect("a place");
        assert!(clocks.iter().any(|clock| place.starts_with(clock)), "{difference}");
    }
    // And where a guest has its clock read to it: KVM writes that page when a vCPU is entered.
    let clock = |cpu: &Value| cpu["values"]["env.system_time_msr"].as_u64().map(|msr| msr & !0xfff);
    let pages = [clock(&of("cpu"))].map(|page| page.filter(|page| *page != 0));
    for block in differences["pages"].as_array().expect("pages") {
        let at = block["at"].as_array().expect("offsets").iter().map(Value::as_u64);
        assert!(
            at.into_iter().all(|at| pages.contains(&at)),
            "{block}, the clock is at {pages:x?}"
        );
    }

    // Its memory, as a file with holes.
    shown(dir, &["a.mig", "--ram", "a.ram"]);
    shown(dir, &["b.mig", "--ram", "b.ram"]);
    let image = fs::read(dir.join("a.ram")).expect("an image");
    assert_eq!(image.len(), 64 << 20);
    let other = fs::read(dir.join("b.ram")).expect("an image");
    let differ = image.chunks(4096).zip(other.chunks(4096)).filter(|(a, b)| a != b).count();
    assert!(differ <= pages.len(), "{differ} pages differ");
    assert!(image.iter().any(|byte| *byte != 0));
    assert!(refused(dir, &["a.mig", "--ram", "a.ram"]).contains("cannot make a.ram"));
    assert!(refused(dir, &["a.mig", "--ram", "c.ram", "--block", "vga.ram"]).contains("pc.ram"));
    assert!(!dir.join("c.ram").exists(), "nothing is left behind");
}

#[test]
fn a_broken_stream_is_shown_up_to_the_break() {
    let dir = directory();
    let dir = dir.path();
    drop(saved(dir));
    let whole = fs::read(dir.join("a.mig")).expect("the file");
    let put = |bytes: &[u8]| fs::write(dir.join("bad.mig"), bytes).expect("a file");

    put(&whole[..whole.len() / 4]);
    let said = refused(dir, &["bad.mig"]);
    assert!(said.contains("breaks at offset") && said.contains("Input/output error"), "{said}");

    let at = whole.windows(7).position(|w| w == b"\x06ioapic").expect("a section") + 40;
    let mut longer = whole.clone();
    longer.insert(at, 0);
    put(&longer);
    let out = inspect(dir, &["bad.mig"]);
    assert!(text(&out.stdout).contains("i8259 (instance 1)"), "what came before is shown");
    let said = text(&out.stderr);
    assert!(said.contains("ioapic") && said.contains("Missing section footer"), "{said}");

    put(b"#!/bin/sh\necho no stream\n");
    assert!(refused(dir, &["bad.mig"]).contains("not a migration stream"));
    put(b"");
    assert!(refused(dir, &["bad.mig"]).contains("broke off at offset 0x0"));
    assert!(refused(dir, &["missing.mig"]).contains("cannot open missing.mig"));
    assert_eq!(inspect(dir, &["a.mig", "b.mig"]).status.code(), Some(2), "two without --diff");
    assert_eq!(inspect(dir, &["--diff", "a.mig"]).status.code(), Some(2), "--diff with one");
}

#[test]
fn a_stream_is_read_from_a_pipe_and_from_a_socket() {
    let dir = directory();
    let dir = dir.path();
    // From a mini-vmm that sends it through a command.
    let args = system_tests::vm::Vm::selfcheck("64M", 1, "").arg("--allow-exec");
    let mut guest = Guest::start(args);
    guest.wait_ready();
    let seen = dir.join("seen");
    let command_line = format!("exec:'{}' inspect - >{}", mini_vmm().display(), seen.display());
    let out = guest.vm.migrate_command(&command_line).output().expect("mini-vmm migrate starts");
    assert!(out.status.success(), "{}", text(&out.stderr));
    let seen = fs::read_to_string(seen).expect("what it printed");
    assert!(seen.contains("complete") && seen.contains("cpu_common"), "{seen}");

    // From a QEMU, and of a machine that mini-vmm does not have.
    let socket = dir.join("sock");
    let uri = format!("unix:{}", socket.display());
    let reader = command(dir)
        .args(["inspect", &uri])
        .stdout(std::process::Stdio::piped())
        .spawn()
        .expect("mini-vmm starts");
    wait::until("the socket", 20, || socket.exists().then_some(()), || "");
    let qemu = QemuArgs::new("-m 32 -device e1000 -device piix3-usb-uhci -S").start();
    assert_eq!(qemu.migrate(&uri, false)["status"], "completed");
    let seen = text(&reader.wait_with_output().expect("its end").stdout);
    for words in ["complete", "e1000", "uhci", "0000:00:02.0"] {
        assert!(seen.contains(words), "no '{words}' in:\n{seen}");
    }
    assert!(!socket.exists(), "the socket is gone");
}
