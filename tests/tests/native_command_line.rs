//! What bad input gets: one clear error, the right exit status, nothing lost.

use std::fs;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Output;

use nix::sys::signal::Signal;
use system_tests::vm::{Vm, VmArgs, command};

fn stderr(out: &Output) -> String {
    String::from_utf8_lossy(&out.stderr).into_owned()
}

/// Runs `mini-vmm` and wants this exit status, and these words on standard error.
fn refused(runtime: &Path, args: &[&str], status: i32, words: &str) {
    let out = command(runtime).args(args).output().expect("mini-vmm starts");
    let errors = stderr(&out);
    assert_eq!(out.status.code(), Some(status), "{args:?}: {errors}");
    assert!(errors.contains(words), "{args:?} said: {errors}");
    assert!(!errors.contains("panicked"), "{args:?}: {errors}");
}

/// An ELF file with a PVH note, whose one segment of 4 KiB belongs at `address` (ELF-64 Object File
/// Format, version 1.5; Xen, docs/misc/pvh: note type 18 is the entry).
fn pvh_elf(address: u32) -> Vec<u8> {
    const SEGMENT: u64 = 4096;
    const NOTE_AT: u64 = 64 + 2 * 56;
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    let mut put = |bytes: &[u8]| file.extend_from_slice(bytes);
    let words = |values: &[u64]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>();
    put(&[2, 0, 62, 0, 1, 0, 0, 0]);
    put(&words(&[address.into(), 64, 0]));
    put(&[0, 0, 0, 0, 64, 0, 56, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
    // PT_LOAD, PT_NOTE, then the note.
    put(&[1, 0, 0, 0, 7, 0, 0, 0]);
    put(&words(&[NOTE_AT + 20, address.into(), address.into(), SEGMENT, SEGMENT, 4]));
    put(&[4, 0, 0, 0, 4, 0, 0, 0]);
    put(&words(&[NOTE_AT, 0, 0, 20, 20, 4]));
    put(b"\x04\0\0\0\x04\0\0\0\x12\0\0\0Xen\0");
    put(&address.to_le_bytes());
    put(&[0xf4; SEGMENT as usize]);
    file
}

#[test]
fn what_is_not_understood_is_named_and_ends_with_2() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("vm.toml");
    fs::write(&config, "selfcheck = ''\nmemry = '1G'\n").unwrap();
    let config = config.to_str().unwrap();
    for (args, words) in [
        (&["run", "--memroy", "1G"][..], "'--memory'"),
        (&["run", "--config", config], "did you mean 'memory'?"),
        (&["run"], "there is nothing to run"),
        (&["rnu"], "did you mean 'run'?"),
        (&["migarte", "tcp:localhost:1"], "'migrate'"),
        (&["run", "--selfcheck=sett=1M"], "did you mean 'set'?"),
        (&["run", "--selfcheck=nonsense=1"], "it has fill, set, rate"),
        (&["run", "--selfcheck=hz=5"], "a number from 10 to 1000"),
        (&["run", "--selfcheck", "--rng=virtio=modrn"], "did you mean 'modern'?"),
        (&["run", "--selfcheck", "--memory", "0M"], "a multiple of 1M from 4M"),
        (&["run", "--selfcheck", "--memory", "65537K"], "a multiple of 1M"),
        (&["run", "--selfcheck", "--memory", "3M"], "a multiple of 1M from 4M"),
        (&["run", "--selfcheck", "--memory", "512"], "a size with its unit"),
        (&["run", "--selfcheck", "--smp", "0"], "a number of vCPUs from 1 to 254"),
        (&["run", "--selfcheck", "--smp", "255"], "a number of vCPUs from 1 to 254"),
        (&["run", "--selfcheck", "--smp", "100000"], "a number of vCPUs from 1 to 254"),
        (&["run", "--selfcheck", "--machine", "pc-i440fx-7.1"], "did you mean 'pc-i440fx-7.2'?"),
        (&["run", "--selfcheck", "--disk", "pth=x"], "did you mean 'path'?"),
        (&["run", "--selfcheck", "--net", "mac=52:54:00:12:34:56"], "tap=NAME or stream=ADDR"),
        (&["run", "--migrate-listen", "tpc:localhost:1"], "did you mean 'tcp:localhost:1'?"),
        (&["run", "--like", "qemu-system-x86_64 -name 'x"], "a quote in it is not closed"),
        (&["run", "--like", "qemu-system-x86_64 -device e1000"], "-device e1000: mini-vmm has no"),
        (&["run", "--like", "-m 1G", "--config", config], "cannot be used with"),
        (&["qemu-command", "--config", config], "did you mean 'memory'?"),
        (&["qemu-command", "--incoming", "tpc:localhost:1"], "did you mean 'tcp:localhost:1'?"),
        (&["migrate", "tcp:localhost"], "tcp:HOST:PORT"),
        (&["migrate", "tcp:localhost:1", "--downtime", "300"], "a time with its unit"),
        (&["migrate", "tcp:localhost:1", "--on-timeout", "force"], "--timeout"),
    ] {
        refused(dir.path(), args, 2, words);
    }
}

#[test]
fn what_cannot_be_had_is_named_and_ends_with_1() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, content: &[u8]| {
        let path = dir.path().join(name);
        fs::write(&path, content).unwrap();
        path.to_str().unwrap().to_string()
    };
    let (empty, corrupt) = (file("empty", b""), file("corrupt", &[0x5a; 100_000]));
    let directory = dir.path().to_str().unwrap();
    let (good, low) = (file("good", &pvh_elf(1 << 20)), file("low", &pvh_elf(0)));
    let cut = file("cut", &pvh_elf(1 << 20)[..0x800]);
    for (args, words) in [
        (&["run", "--config", "/nonexistent.toml"][..], "/nonexistent.toml"),
        (&["run", "--kernel", "/nonexistent"], "/nonexistent"),
        (&["run", "--kernel", &empty], "empty"),
        (&["run", "--kernel", &corrupt], "corrupt"),
        (&["run", "--kernel", &cut], "cut short"),
        (&["run", "--kernel", directory], "not a regular file"),
        (&["run", "--kernel", &low], "linked at 1 MiB or above"),
        (&["run", "--kernel", &good, "--initrd", "/nonexistent.img"], "/nonexistent.img"),
        (&["run", "--selfcheck", "--disk", &format!("path={directory}")], "Is a directory"),
        (&["run", "--selfcheck", "--qmp", &format!("unix:{directory}/none/x")], "none/x"),
        (&["run", "--selfcheck", "--serial", &format!("unix:{directory}/none/x")], "none/x"),
        (&["run", "--selfcheck", "--net", "stream=tcp:127.0.0.1:1"], "127.0.0.1:1"),
        (&["run", "--migrate-listen", "tcp:no.such.invalid:1"], "no.such.invalid"),
        (&["run", "--selfcheck", "--memory", "3T"], "the host has only"),
        (&["run", "--selfcheck", "--disk", "path=/nonexistent.img"], "/nonexistent.img"),
        (&["run", "--selfcheck", "--net", "tap=absent0"], "absent0"),
        (&["status"], "no VM runs here"),
        (&["stop", "--vm", "nobody"], "no VM named 'nobody'"),
        (&["qemu-command", "--vm", "nobody"], "no VM named 'nobody'"),
        (&["migrate", "tcp:127.0.0.1:1"], "no VM runs here"),
    ] {
        refused(dir.path(), args, 1, words);
    }
    let left = fs::read_dir(dir.path().join("mini-vmm")).map_or(0, Iterator::count);
    assert_eq!(left, 0, "a VM that could not start leaves its directory behind");
}

#[test]
fn a_name_a_socket_and_a_port_are_taken_only_once() {
    let vm = Vm::selfcheck("64M", 1, "").start();
    let taken = format!("a VM named '{}' runs already", vm.name);
    refused(vm.dir(), &["run", "--name", &vm.name, "--selfcheck"], 1, &taken);

    let socket = format!("unix:{}", vm.qmp_path().display());
    refused(
        vm.dir(),
        &["run", "--name", "x", "--selfcheck", "--qmp", &socket],
        1,
        "another process",
    );

    let waits = Vm::incoming("64M", 1).start();
    let port = waits.migrate_uri();
    refused(vm.dir(), &["run", "--name", "y", "--migrate-listen", &port], 1, "127.0.0.1");
    assert_eq!(vm.qmp().status(), "running");
    assert_eq!(waits.qmp().status(), "inmigrate");
}

#[test]
fn a_name_is_free_again_after_its_process_was_killed() {
    let runtime = tempfile::tempdir().unwrap();
    let start = || {
        let args =
            ["run", "--name", "phoenix", "--selfcheck", "--memory", "64M", "--serial", "null"];
        let mut child = command(runtime.path()).args(args).spawn().unwrap();
        let socket = runtime.path().join("mini-vmm/phoenix/qmp.sock");
        system_tests::wait::until(
            "the control socket",
            30,
            || {
                assert!(child.try_wait().unwrap().is_none(), "mini-vmm run ended");
                std::os::unix::net::UnixStream::connect(&socket).ok()
            },
            || "",
        );
        child
    };
    let mut first = start();
    first.kill().unwrap();
    first.wait().unwrap();
    refused(runtime.path(), &["status"], 1, "no VM runs here");
    let mut second = start();
    let quit = command(runtime.path()).arg("quit").output().unwrap();
    assert!(quit.status.success(), "{}", stderr(&quit));
    assert!(second.wait().unwrap().success());
    assert_eq!(fs::read_dir(runtime.path().join("mini-vmm")).unwrap().count(), 0);
}

#[test]
fn a_vm_is_controlled_by_name_and_its_configuration_is_shown() {
    let mut vm = VmArgs::default()
        .args("--selfcheck= --memory 64M --smp 2 --rng --balloon=addr=02.0 --paused")
        .start();
    let status = |vm: &Vm| vm.qmp().status();
    let done = |vm: &Vm, command: &str| {
        let out = vm.cli(&[command]);
        assert!(out.status.success(), "{command}: {}", stderr(&out));
        String::from_utf8_lossy(&out.stdout).into_owned()
    };
    assert_eq!(status(&vm), "prelaunch");
    done(&vm, "cont");
    assert_eq!(status(&vm), "running");
    done(&vm, "stop");
    assert_eq!(status(&vm), "paused");
    assert!(done(&vm, "list").contains("paused"));

    let shown = vm.cli(&["status", "--json"]);
    let shown: serde_json::Value = serde_json::from_slice(&shown.stdout).unwrap();
    let beside = vm.qmp_path().with_file_name("config.json");
    let recorded: serde_json::Value = serde_json::from_slice(&fs::read(beside).unwrap()).unwrap();
    assert_eq!(shown["config"], recorded);
    assert_eq!(recorded["cpu"], "host,migratable=on");
    assert_eq!(recorded["balloon"]["addr"], "02.0");
    assert_eq!(recorded["rng"]["addr"], "03.0");

    // The guest has no driver, so it is asked and keeps what it has.
    assert_eq!(done(&vm, "balloon"), "64M\n");
    let asked = vm.cli(&["balloon", "32M"]);
    assert!(asked.status.success(), "{}", stderr(&asked));
    assert_eq!(done(&vm, "balloon"), "64M\n");
    refused(vm.dir(), &["balloon", "32"], 2, "32");

    refused(vm.dir(), &["cancel"], 1, "no migration to cancel");
    done(&vm, "quit");
    assert_eq!(vm.wait_exit(20), 0);
}

#[test]
fn a_migration_to_nobody_to_oneself_or_to_a_stranger_leaves_the_guest_running() {
    let vm = Vm::selfcheck("64M", 1, "").start();
    let fails = |uri: &str, words: &str| {
        let out = vm.migrate_command(uri).output().unwrap();
        assert_eq!(out.status.code(), Some(1), "{uri}: {}", stderr(&out));
        assert!(stderr(&out).contains(words), "{uri}: {}", stderr(&out));
        assert_eq!(vm.qmp().status(), "running", "after {uri}");
    };
    fails("tcp:127.0.0.1:1", "127.0.0.1:1");
    fails(&format!("unix:{}/nobody.sock", vm.dir().display()), "nobody.sock");
    // Itself: its control socket answers with a greeting, and not with a migration.
    fails(&format!("unix:{}", vm.qmp_path().display()), "migration failed");

    // A stranger that accepts, says something else, and hangs up.
    let path = vm.dir().join("stranger.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let stranger = std::thread::spawn(move || {
        use std::io::Write;
        let (mut stream, _) = listener.accept().unwrap();
        let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n");
    });
    fails(&format!("unix:{}", path.display()), "migration failed");
    stranger.join().unwrap();
}

#[test]
fn ctrl_c_cancels_and_the_guest_stays() {
    let mut vm = Vm::selfcheck("256M", 1, "set=64M,rate=0").start();
    vm.wait_serial("the guest to be ready", 120, |l| l.contains("selfcheck: ready").then_some(()));
    let there = Vm::incoming("256M", 1).start();
    // Slow enough that it cannot end by itself before the signal.
    let mut command = vm.migrate_command(&there.migrate_uri());
    command.args(["--bandwidth", "4M"]);
    command.stderr(std::process::Stdio::piped());
    let migrate = command.spawn().unwrap();
    let mut qmp = vm.qmp();
    system_tests::wait::until(
        "the migration to be under way",
        30,
        || (qmp.ask("query-migrate")["status"] == "active").then_some(()),
        || "",
    );
    let pid = nix::unistd::Pid::from_raw(i32::try_from(migrate.id()).unwrap());
    nix::sys::signal::kill(pid, Signal::SIGINT).unwrap();
    let out = migrate.wait_with_output().unwrap();
    assert_eq!(out.status.code(), Some(1), "{}", stderr(&out));
    assert!(stderr(&out).contains("was cancelled, the guest goes on here"), "{}", stderr(&out));
    assert_eq!(qmp.ask("query-migrate")["status"], "cancelled");
    assert_eq!(vm.qmp().status(), "running");
}

#[test]
fn a_single_letter_on_standard_input_reaches_the_guest_at_once() {
    use std::io::{Read, Write};
    use std::process::{Child, Stdio};

    struct Killed(Child);
    impl Drop for Killed {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    let dir = tempfile::tempdir().unwrap();
    let mut run = command(dir.path());
    // The guest says nothing by itself for longer than this test waits.
    run.args(["run", "--memory", "64M", "--selfcheck=set=0,every=10000000", "--serial", "stdio"]);
    run.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = Killed(run.spawn().expect("mini-vmm starts"));
    let (mut input, mut output) = (child.0.stdin.take().unwrap(), child.0.stdout.take().unwrap());
    let said = std::sync::Arc::new(std::sync::Mutex::new(String::new()));
    let kept = said.clone();
    std::thread::spawn(move || {
        let mut buf = [0; 4096];
        while let Ok(n @ 1..) = output.read(&mut buf) {
            kept.lock().unwrap().push_str(&String::from_utf8_lossy(&buf[..n]));
        }
    });
    let text = || said.lock().unwrap().clone();
    let wait = |what: &str, count: usize| {
        system_tests::wait::until(
            what,
            60,
            || (text().matches(what).count() == count).then_some(()),
            text,
        );
    };
    wait("selfcheck: ready", 1);
    for count in 1..=3 {
        input.write_all(b"s").unwrap();
        wait("up_ms=", count);
    }
    input.write_all(b"q").unwrap();
    let status = system_tests::wait::until(
        "the guest to switch off",
        60,
        || child.0.try_wait().unwrap(),
        text,
    );
    assert!(status.success());
}
