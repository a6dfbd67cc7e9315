//! The self-checking guest is saved to files, pipes and commands, and goes on from there.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use system_tests::guest::Guest;
use system_tests::qemu::QemuArgs;
use system_tests::serial::SerialLine;
use system_tests::vm::{Vm, VmArgs};
use system_tests::wait;
use tempfile::TempDir;

const PARAMS: &str = "set=8M,rate=4000,verify=20000";

fn directory() -> TempDir {
    TempDir::with_prefix("mini-vmm-save-").expect("a directory")
}

fn uri(path: &Path) -> String {
    format!("file:{}", path.display())
}

/// A VM that restores from `uri` as soon as it starts.
fn from(uri: &str) -> VmArgs {
    VmArgs::default().args("--memory 64M --smp 1 --migrate-listen").arg(uri)
}

fn restore(uri: &str) -> Guest {
    Guest::start(from(uri))
}

fn migrate(guest: &Guest, uri: &str) -> Output {
    guest.vm.migrate_command(uri).output().expect("mini-vmm migrate starts")
}

fn said(out: &Output) -> String {
    String::from_utf8_lossy(&out.stderr).into_owned()
}

/// Saves the guest, whose process must end well.
fn save(mut guest: Guest, uri: &str) {
    let out = migrate(&guest, uri);
    assert!(out.status.success(), "{}\n{}", said(&out), guest.vm.stderr());
    assert_eq!(guest.vm.wait_exit(20), 0, "the source ends well:\n{}", guest.vm.stderr());
    guest.nothing_is_left();
}

/// The save fails in these words, and the guest goes on as if nothing had been tried.
fn is_kept(guest: &mut Guest, uri: &str, words: &str) {
    let out = migrate(guest, uri);
    assert_eq!(out.status.code(), Some(1), "{uri}: {}", said(&out));
    assert!(said(&out).contains(words), "{uri}: {}", said(&out));
    assert_eq!(guest.vm.qmp().status(), "running", "{uri}");
}

/// Such a VM ends at once, with these words.
fn is_refused(args: VmArgs, words: &str) {
    let mut vm = args.spawn();
    assert_ne!(vm.wait_exit(60), 0, "{}", vm.stderr());
    assert!(vm.stderr().contains(words), "expected '{words}':\n{}", vm.stderr());
}

fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).expect("a directory").flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

/// A file with a guest in it.
fn saved(dir: &Path) -> PathBuf {
    let path = dir.join("vm.mig");
    save(Guest::ready("64M", 1, PARAMS), &uri(&path));
    path
}

#[test]
fn a_running_guest_is_saved_and_restored_as_often_as_one_likes() {
    let dir = directory();
    let path = saved(dir.path());
    assert_eq!(names(dir.path()), ["vm.mig"], "nothing else is left");
    let mode = fs::metadata(&path).expect("a file").permissions().mode();
    assert_eq!(mode & 0o777, 0o600, "guest memory is nobody else's business");
    let before = fs::read(&path).expect("the file");
    for _ in 0..2 {
        let mut guest = restore(&uri(&path));
        guest.is_whole();
        assert_eq!(guest.vm.qmp().status(), "running");
    }
    assert!(fs::read(&path).expect("the file") == before, "restoring changes nothing");
    // And what was restored can be saved over it, and moved.
    let guest = restore(&uri(&path));
    assert_eq!(guest.vm.qmp().wait_migrated(60)["status"], "completed");
    save(guest, &uri(&path));
    let mut guest = restore(&uri(&path));
    guest.is_whole();
    guest.moves_after_all("64M", 1, "");
}

#[test]
fn a_paused_guest_is_restored_paused_and_a_verified_one_is_compared() {
    let dir = directory();
    let path = dir.path().join("vm.mig");
    let mut guest = Guest::ready("64M", 1, PARAMS);
    guest.vm.qmp().ask("stop");
    let out = guest.vm.migrate_command(&uri(&path)).arg("--verify").output().expect("it starts");
    assert!(out.status.success(), "{}", said(&out));
    assert_eq!(guest.vm.wait_exit(20), 0);
    let mut guest = restore(&uri(&path));
    let mut qmp = guest.vm.qmp();
    assert_eq!(qmp.wait_migrated(60)["status"], "completed");
    assert_eq!(qmp.status(), "paused");
    qmp.ask("cont");
    guest.is_whole();

    // A bit that tips over in the middle of memory would be noticed.
    let mut bytes = fs::read(&path).expect("the file");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x10;
    fs::write(&path, bytes).expect("room");
    is_refused(from(&uri(&path)), "differs");
}

#[test]
fn two_vcpus_come_back_and_a_restore_can_be_told_later() {
    let dir = directory();
    let path = dir.path().join("vm.mig");
    save(Guest::ready("64M", 2, PARAMS), &uri(&path));
    let args = VmArgs::default().args("--memory 64M --smp 2 --migrate-listen defer");
    let mut guest = Guest::start(args);
    let mut qmp = guest.vm.qmp();
    let missing = json!({ "uri": uri(&dir.path().join("missing")) });
    let error = qmp.execute("migrate-incoming", missing).expect_err("there is none");
    assert!(error.desc.contains("can't be opened for reading"), "{error}");
    qmp.execute("migrate-incoming", json!({ "uri": uri(&path) })).expect("it is there");
    guest.is_whole();
}

#[test]
fn a_file_that_holds_no_whole_vm_is_refused_with_its_place() {
    let dir = directory();
    let path = saved(dir.path());
    let whole = fs::read(&path).expect("the file");
    let broken = dir.path().join("broken.mig");
    for len in [0, 3, 20, 60, 5000, whole.len() / 2, whole.len() - 20_000, whole.len() - 1] {
        fs::write(&broken, &whole[..len]).expect("room");
        is_refused(from(&uri(&broken)), "the stream broke off at offset 0x");
    }
    fs::write(&broken, b"#!/bin/sh\necho hello\n").expect("room");
    is_refused(from(&uri(&broken)), "there is no saved VM in");
    is_refused(
        from(&uri(&dir.path().join("none.mig"))),
        "can't be opened for reading: No such file",
    );
    is_refused(from(&uri(dir.path())), "is a directory: name a file in it");
    let larger = VmArgs::default().args("--memory 128M --migrate-listen").arg(uri(&path));
    is_refused(larger, "Size mismatch: pc.ram");
    assert!(fs::read(&path).expect("the file") == whole);
}

#[test]
fn a_qemu_takes_what_was_saved_and_what_it_saves_comes_back() {
    let dir = directory();
    let path = saved(dir.path());
    // It shows that MSR to a guest where it is not told not to, and cannot set it on every host.
    let there = QemuArgs::new("-accel kvm -cpu host,-arch-capabilities -m 64 -smp 1")
        .arg("-incoming")
        .arg(format!("exec:cat {}", path.display()))
        .start();
    let line = SerialLine::attach(&there.path("serial"));
    let ask = |command: &[u8], answer: &str| {
        let from = line.text().len();
        line.send(command);
        line.wait_line_from(from, answer, 120, |line| {
            assert!(!line.contains("FAIL"), "the guest found a difference: {line}");
            line.contains(answer).then_some(())
        });
    };
    ask(b"s", "up_ms=");
    ask(b"v", "verified all pages=");
    let again = dir.path().join("qemu.mig");
    let mut qmp = there.qmp();
    let fast = json!({ "max-bandwidth": 1u64 << 40 });
    qmp.execute("migrate-set-parameters", fast).expect("a bandwidth");
    qmp.execute("migrate", json!({ "uri": format!("exec:cat >{}", again.display()) }))
        .expect("it starts");
    assert_eq!(qmp.wait_migrated(60)["status"], "completed");
    drop(there);
    restore(&uri(&again)).is_whole();
}

#[test]
fn what_can_not_be_written_leaves_the_guest_and_the_file_before() {
    let dir = directory();
    let mut guest = Guest::ready("64M", 1, PARAMS);
    is_kept(&mut guest, &uri(dir.path()), "is a directory: name a file in it");
    is_kept(&mut guest, &uri(&dir.path().join("no/vm.mig")), "can't be opened for writing");

    let small = dir.path().join("small");
    fs::create_dir(&small).expect("a directory");
    let mounted = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=4M", "tmpfs"])
        .arg(&small)
        .status()
        .expect("mount starts");
    if mounted.success() {
        fs::write(small.join("vm.mig"), "the one before").expect("room");
        let out = migrate(&guest, &uri(&small.join("vm.mig")));
        let (left, kept) = (names(&small), fs::read(small.join("vm.mig")));
        let status = guest.vm.qmp().status();
        Command::new("umount").arg(&small).status().expect("umount starts");
        assert!(said(&out).contains("No space left on device"), "{}", said(&out));
        assert!(said(&out).contains("make room"), "{}", said(&out));
        assert_eq!(status, "running");
        assert_eq!(left, ["vm.mig"], "no half of a file is left");
        assert_eq!(kept.expect("a file"), b"the one before");
    } else {
        println!("no tmpfs can be mounted here; /dev/full has to do");
    }
    is_kept(&mut guest, "file:/dev/full", "No space left on device");
    guest.is_whole();
}

#[test]
fn what_stands_in_front_of_an_offset_is_left_alone() {
    let dir = directory();
    let path = dir.path().join("vm.mig");
    let header = b"a header of somebody else".repeat(20);
    fs::write(&path, &header).expect("room");
    let uri = format!("{},offset=0x1000", uri(&path));
    save(Guest::ready("64M", 1, PARAMS), &uri);
    let bytes = fs::read(&path).expect("the file");
    assert_eq!(bytes[..header.len()], header);
    assert_eq!(&bytes[0x1000..0x1004], b"QEVM");
    restore(&uri).is_whole();
}

#[test]
fn commands_take_and_give_a_guest() {
    let dir = directory();
    let path = dir.path().join("vm.mig.gz").display().to_string();
    let guest = Guest::boot_with("64M", 1, PARAMS, "--allow-exec");
    save(guest, &format!("exec:gzip -1 -c >{path}"));
    let from = |command: &str| from(&format!("exec:{command}")).args("--allow-exec");
    Guest::start(from(&format!("gzip -dc {path}"))).is_whole();

    is_refused(from("exit 3"), "the command 'exit 3' ended with status 3");
    is_refused(from(&format!("gzip -dc {path} | head -c 100000")), "ended with status 0, before");
    // The damage is noticed by gzip alone, and only at the very end.
    let mut bytes = fs::read(&path).expect("the file");
    let crc = bytes.len() - 6;
    bytes[crc] ^= 1;
    fs::write(&path, bytes).expect("room");
    is_refused(from(&format!("gzip -dc {path}")), "ended with status 1");
}

#[test]
fn commands_are_off_unless_the_vm_was_started_with_them() {
    let dir = directory();
    let mark = dir.path().join("mark");
    let command = format!("exec:touch {}", mark.display());
    is_refused(from(&command), "--allow-exec");
    let mut guest = Guest::ready("64M", 1, PARAMS);
    is_kept(&mut guest, &command, "--allow-exec");
    // A file can't switch it on.
    let config = dir.path().join("vm.toml");
    fs::write(&config, "memory = \"64M\"\nallow-exec = true\n").expect("room");
    is_refused(VmArgs::default().args("--config").arg(config.display().to_string()), "unknown key");
    assert!(!mark.exists(), "nothing was run");
}

#[test]
fn a_command_that_fails_leaves_the_guest_and_its_status_is_told() {
    let dir = directory();
    let disk = dir.path().join("disk.img");
    File::create(&disk).and_then(|file| file.set_len(16 << 20)).expect("an image");
    let disk = format!("--disk path={}", disk.display());
    let more = format!("--allow-exec {disk}");
    let mut guest = Guest::boot_with("64M", 1, PARAMS, &more);
    guest.wait_ready();
    for command in ["exit 3", "head -c 1000000 >/dev/null; exit 3", "cat >/dev/null; exit 3"] {
        is_kept(&mut guest, &format!("exec:{command}"), "ended with status 3");
    }
    // Nothing of the VM is open in it.
    let open = directory();
    let list = open.path().join("fds");
    let command = format!("exec:ls /proc/$$/fd >{}; exit 3", list.display());
    is_kept(&mut guest, &command, "ended with status 3");
    let fds = fs::read_to_string(&list).expect("a list");
    let fds: Vec<u32> = fds.lines().filter_map(|fd| fd.parse().ok()).collect();
    // A shell keeps its own out of the way, from 10 on.
    assert!(fds.iter().all(|&fd| fd <= 2 || fd == 10), "{fds:?}");
    is_kept(&mut guest, "exec:kill -9 $$", "was ended by signal 9");
    is_kept(&mut guest, "exec:no-such-program", "ended with status 127");
    assert!(guest.vm.stderr().contains("no-such-program"), "what it says is shown");
    guest.is_whole();
    // The disk is its own again, until it leaves; then it is there for the next.
    let busy = Vm::selfcheck("64M", 1, PARAMS).args(&disk);
    is_refused(busy, "disk.img");
    let path = dir.path().join("vm.mig");
    save(guest, &format!("exec:cat >{}", path.display()));
    Guest::start(from(&uri(&path)).args(&disk)).is_whole();
}

#[test]
fn a_cancel_ends_a_command_that_takes_nothing_and_leaves_no_trace() {
    let dir = directory();
    let pid = dir.path().join("pid");
    let mut guest = Guest::boot_with("64M", 1, PARAMS, "--allow-exec");
    guest.wait_ready();
    for command in ["sleep 1000", "cat >/dev/null; sleep 1000"] {
        let command = format!("exec:echo $$ >{}; {command}", pid.display());
        let mut qmp = guest.begin(&command, &json!({}));
        let shell = wait::until(
            "the shell to have started",
            20,
            || fs::read_to_string(&pid).ok().filter(|text| text.ends_with('\n')),
            || "",
        );
        // It stands still: in the middle of memory, or at the very end.
        let (mut before, mut since) = (Value::Null, Instant::now());
        wait::until(
            "the save to be stuck",
            20,
            || {
                let sent = qmp.ask("query-migrate")["ram"]["transferred"].clone();
                if sent != before {
                    (before, since) = (sent, Instant::now());
                }
                (before.is_number() && since.elapsed() > Duration::from_millis(300)).then_some(())
            },
            || "",
        );
        qmp.ask("migrate_cancel");
        assert_eq!(qmp.wait_migrated(20)["status"], "cancelled");
        assert_eq!(qmp.status(), "running");
        assert!(!Path::new("/proc").join(shell.trim()).exists(), "no process is left");
        fs::remove_file(&pid).expect("a file");
    }
    // Ctrl-C at the command line does the same.
    let mut command = guest.vm.migrate_command("exec:sleep 1000");
    let child = command.stderr(Stdio::piped()).spawn().expect("it starts");
    let mut qmp = guest.vm.qmp();
    wait::until(
        "the migration to be under way",
        20,
        || (qmp.ask("query-migrate")["status"] == "active").then_some(()),
        || "",
    );
    let process = nix::unistd::Pid::from_raw(child.id() as i32);
    nix::sys::signal::kill(process, nix::sys::signal::Signal::SIGINT).expect("our own child");
    let out = child.wait_with_output().expect("our own child");
    assert!(said(&out).contains("was cancelled, the guest goes on here"), "{}", said(&out));
    guest.is_whole();
}

/// Makes `command` start with `fd` as its descriptor 7; a shell does it.
fn with_fd(command: &mut Command, fd: OwnedFd) -> &mut Command {
    let mut shell = Command::new("/bin/sh");
    shell.arg("-c").arg("exec \"$0\" \"$@\" 7<&0 </dev/null");
    shell.arg(command.get_program()).args(command.get_args());
    shell.envs(command.get_envs().filter_map(|(key, value)| Some((key, value?))));
    shell.stdin(fd);
    *command = shell;
    command
}

#[test]
fn descriptors_are_handed_over_or_inherited() {
    let dir = directory();
    let path = dir.path().join("vm.mig");
    let mut guest = Guest::ready("64M", 1, PARAMS);
    is_kept(&mut guest, "fd:9", "the VM has no descriptor '9'");
    let reading: OwnedFd = File::open("/dev/zero").expect("a device").into();
    let out = with_fd(&mut guest.vm.migrate_command("fd:7"), reading).output().expect("it starts");
    assert!(said(&out).contains("is open for reading only"), "{}", said(&out));
    assert_eq!(guest.vm.qmp().status(), "running");

    // The command's descriptor goes to the VM.
    let mut file = File::options()
        .create(true)
        .truncate(false)
        .read(true)
        .write(true)
        .open(&path)
        .expect("a file");
    file.write_all(b"in front").expect("room");
    let fd = file.try_clone().expect("a second handle").into();
    let out = with_fd(&mut guest.vm.migrate_command("fd:7"), fd).output().expect("it starts");
    assert!(out.status.success(), "{}\n{}", said(&out), guest.vm.stderr());
    assert_eq!(guest.vm.wait_exit(20), 0);

    // And `run` is started with one: a pipe, whose other end a program fills.
    file.seek(SeekFrom::Start(8)).expect("a file");
    let (pipe, mut fill) = std::io::pipe().expect("a pipe");
    let filler = std::thread::spawn(move || std::io::copy(&mut file, &mut fill));
    let runtime = directory();
    let serial = runtime.path().join("serial");
    let mut run = system_tests::vm::command(runtime.path());
    run.args(["run", "--name", "fd", "--memory", "64M", "--migrate-listen", "fd:7"]);
    run.args(["--serial", &format!("file:{}", serial.display())]);
    let child = with_fd(&mut run, pipe.into()).stderr(Stdio::piped()).spawn();
    let mut child = child.expect("mini-vmm starts");
    filler.join().expect("no panic").expect("all of it is read");
    wait::until(
        "the guest to go on",
        60,
        || fs::read_to_string(&serial).ok().filter(|text| text.matches("verified=").count() > 2),
        || "",
    );
    let text = fs::read_to_string(&serial).expect("a file");
    assert!(!text.contains("FAIL"), "{text}");
    child.kill().expect("our own child");
    let mut rest = String::new();
    child.stderr.take().expect("a pipe").read_to_string(&mut rest).expect("text");
    child.wait().expect("our own child");
}

#[test]
fn a_socket_that_was_handed_over_goes_both_ways() {
    let (here, there) = std::os::unix::net::UnixStream::pair().expect("two sockets");
    let mut guest = Guest::ready("64M", 1, PARAMS);
    let runtime = directory();
    let serial = runtime.path().join("serial");
    let mut run = system_tests::vm::command(runtime.path());
    run.args(["run", "--name", "fd", "--memory", "64M", "--migrate-listen", "fd:7"]);
    run.args(["--serial", &format!("file:{}", serial.display())]);
    let mut child = with_fd(&mut run, there.into()).spawn().expect("mini-vmm starts");
    let mut command = guest.vm.migrate_command("fd:7");
    command.arg("--verify");
    let out = with_fd(&mut command, here.into()).output().expect("it starts");
    assert!(out.status.success(), "{}\n{}", said(&out), guest.vm.stderr());
    assert!(String::from_utf8_lossy(&out.stdout).contains("verified:"), "the other side answered");
    assert_eq!(guest.vm.wait_exit(20), 0);
    child.kill().expect("our own child");
    child.wait().expect("our own child");
}

#[test]
fn an_address_that_can_not_be_understood_is_a_usage_error() {
    let guest = Vm::selfcheck("64M", 1, PARAMS).start();
    for (uri, words) in [
        ("flie:vm.mig", "did you mean 'file:vm.mig'?"),
        ("file:x,offset=many", "number of bytes"),
        ("vm.mig", "file:PATH[,offset=N]"),
        ("fd:0", "3<&0"),
        ("exec:", "a command for a shell"),
    ] {
        let out = guest.migrate_command(uri).output().expect("it starts");
        assert_eq!(out.status.code(), Some(2), "{uri}: {}", said(&out));
        assert!(said(&out).contains(words), "{uri}: {}", said(&out));
    }
}
