//! QEMU's command line, printed and read: by a mini-vmm that becomes the like of another, and by
//! QEMU itself.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use nix::sys::signal::Signal;
use serde_json::Value;
use system_tests::qmp::Qmp;
use system_tests::vm::{Vm, VmArgs, command};

/// What a command that succeeds says on standard output.
fn said(runtime: &Path, args: &[&str]) -> String {
    let out = command(runtime).args(args).output().expect("mini-vmm starts");
    let errors = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{args:?}: {errors}");
    String::from_utf8(out.stdout).expect("text")
}

#[test]
fn a_vm_goes_on_in_the_like_of_the_qemu_that_would_equal_it() {
    let files = tempfile::tempdir().unwrap();
    let disk = files.path().join("a disk, with 'odd' name.img");
    fs::write(&disk, vec![0; 1 << 20]).unwrap();
    let doubled = disk.display().to_string().replace(',', ",,");
    let vm = Vm::selfcheck("64M", 2, "")
        .args("--rng --balloon=addr=1f,virtio=modern --console null,id=hvc")
        .arg("--disk")
        .arg(format!("path={doubled},id=data,addr=9,virtio=legacy"))
        .start();

    let line = said(vm.dir(), &["qemu-command", "--incoming", "tcp:127.0.0.1:0"]);
    let json = said(vm.dir(), &["qemu-command", "--incoming", "tcp:127.0.0.1:0", "--json"]);
    let words: Vec<String> = serde_json::from_str(&json).unwrap();
    assert!(words.iter().any(|word| word.contains(&doubled)));
    // A shell finds the same words in it.
    let by_shell = Command::new("sh").args(["-c", &format!("printf '%s\\n' {line}")]).output();
    let by_shell = String::from_utf8(by_shell.unwrap().stdout).unwrap();
    assert_eq!(by_shell.lines().collect::<Vec<_>>(), words);

    let mut like = VmArgs::default().arg("--like").arg(line.trim_end()).start();
    let out = vm.migrate_command(&like.migrate_uri()).output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    assert_eq!(like.qmp().status(), "running");
    assert!(!like.has_ended());
    like.signal(Signal::SIGTERM);
    like.wait_exit(20);
}

struct Killed(Child);
impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Everything but the processor: this host's KVM need not be one that QEMU can run on.
#[test]
fn qemu_takes_the_line_and_puts_all_where_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    for image in ["a, b.img", "c:d.img"] {
        fs::write(path(image), vec![0; 1 << 20]).unwrap();
    }
    let config = path("vm.toml");
    let text = format!(
        "name = 'web'\nuuid = '12345678-1234-5678-1234-567812345678'\nmemory = '64M'\nsmp = 2\n\
         serial = 'null'\nrng = true\nballoon = {{ addr = '1f', virtio = 'legacy' }}\n\
         console = 'null'\nqmp = 'unix:{}'\n\
         disk = [{{ path = '{}', cache = 'none', readonly = true }}, {{ path = 'c:d.img', virtio = 'modern', queues = 4 }}]\n\
         net = [{{ stream = 'unix:{}', mac = '52:54:00:aa:bb:cc' }}]\n",
        path("q, mp.sock"),
        path("a, b.img"),
        path("net.sock")
    );
    fs::write(&config, text).unwrap();
    let line = said(
        dir.path(),
        &["qemu-command", "--config", &config, "--incoming", "tcp:127.0.0.1:0", "--json"],
    );
    let words: Vec<String> = serde_json::from_str(&line).unwrap();
    assert_eq!(words[0], "qemu-system-x86_64");
    let words = words[1..].iter().map(|word| match word.as_str() {
        "kvm" => "tcg",
        "host" => "qemu64",
        other => other,
    });

    let log = fs::File::create(dir.path().join("log")).unwrap();
    let child = Command::new("qemu-system-x86_64")
        .args(words)
        .current_dir(dir.path())
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .spawn()
        .expect("qemu-system-x86_64 is installed");
    let mut qemu = Killed(child);
    let socket = dir.path().join("q, mp.sock");
    let log = || fs::read_to_string(dir.path().join("log")).unwrap_or_default();
    system_tests::wait::until(
        "QEMU's control socket",
        30,
        || {
            assert!(qemu.0.try_wait().unwrap().is_none(), "QEMU ended: {}", log());
            socket.exists().then_some(())
        },
        log,
    );
    let mut qmp = Qmp::connect(&socket);
    assert_eq!(qmp.status(), "inmigrate");
    assert_eq!(qmp.ask("query-name")["name"], "web");
    assert_eq!(qmp.ask("query-uuid")["UUID"], "12345678-1234-5678-1234-567812345678");
    assert_eq!(qmp.ask("query-memory-size-summary")["base-memory"], 64 << 20);
    assert_eq!(qmp.ask("query-cpus-fast").as_array().map(Vec::len), Some(2));

    // The id of a device, its slot, and its PCI device id (0x10xx: not for old drivers only).
    let pci = qmp.ask("query-pci");
    let devices = pci[0]["devices"].as_array().expect("a bus").iter();
    let named = devices.filter(|device| device["qdev_id"] != "");
    let seen: Vec<(&str, u64, u64)> = named
        .map(|device| {
            let number = |value: &Value| value.as_u64().unwrap_or_default();
            let id = device["qdev_id"].as_str().unwrap_or_default();
            (id, number(&device["slot"]), number(&device["id"]["device"]))
        })
        .collect();
    let want = [
        ("disk0", 2, 0x1001),
        ("disk1", 3, 0x1042),
        ("net0", 4, 0x1000),
        ("rng0", 5, 0x1005),
        ("console0", 6, 0x1003),
        ("balloon0", 31, 0x1002),
    ];
    assert_eq!(seen, want);
    let disks = qmp.ask("query-block");
    let first = &disks[0]["inserted"];
    assert_eq!((&first["ro"], &first["drv"]), (&Value::from(true), &Value::from("raw")));
    assert_eq!(first["cache"]["direct"], true);
    assert_eq!(disks[1]["inserted"]["cache"]["direct"], false);
    qmp.execute("quit", serde_json::json!({})).expect("QEMU quits");
    assert!(qemu.0.wait().unwrap().success(), "{}", log());
}
