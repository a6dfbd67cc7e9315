//! What a host may lack or refuse: `/dev/kvm`, a disk, a tap. Each is said once, with what to do,
//! and nothing is left behind.

use std::fs::{self, File, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output};

use nix::unistd::Uid;
use system_tests::vm::{Vm, mini_vmm};

/// A shell in a mount namespace of its own (and as root of a user namespace, unless this is root
/// already): `script` finds `mini-vmm` in `$0` and a directory of its own in `$1`.
fn in_namespace(more: &[&str], directory: &Path, script: &str) -> Output {
    let mut unshare = Command::new("unshare");
    unshare.args(["--mount", "--propagation", "private"]).args(more);
    if !Uid::effective().is_root() {
        unshare.arg("--map-root-user");
    }
    unshare.args(["--", "sh", "-c", script]).arg(mini_vmm()).arg(directory);
    unshare.env("XDG_RUNTIME_DIR", directory).output().expect("unshare starts")
}

/// It failed with status 1 and these words, once, and its runtime directory is empty.
fn refused(out: &Output, directory: &Path, words: &[&str]) {
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!(out.status.code(), Some(1), "{said}");
    for words in words {
        assert_eq!(said.matches(words).count(), 1, "'{words}' is not there once: {said}");
    }
    assert!(!said.contains("panicked"), "{said}");
    let left = fs::read_dir(directory.join("mini-vmm")).map_or(0, Iterator::count);
    assert_eq!(left, 0, "a VM that could not start leaves its directory behind");
}

const RUN: &str = r#""$0" run --selfcheck --memory 64M --serial null"#;

/// Runs what follows without capabilities: file modes then count for root, too.
const POWERLESS: &str = "exec setpriv --bounding-set=-all --inh-caps=-all --";

#[test]
fn a_user_without_permission_for_kvm_is_told_what_to_do() {
    let dir = tempfile::tempdir().expect("a directory");
    let script = format!(
        "touch $1/kvm && chmod 000 $1/kvm && mount --bind $1/kvm /dev/kvm && {POWERLESS} {RUN}"
    );
    let out = in_namespace(&[], dir.path(), &script);
    refused(&out, dir.path(), &["no permission to open /dev/kvm", "run as root", "group"]);
}

#[test]
fn a_host_without_kvm_is_told_what_it_needs() {
    let dir = tempfile::tempdir().expect("a directory");
    // Nothing else of /dev is needed to say so.
    let out = in_namespace(&[], dir.path(), &format!("mount -t tmpfs none /dev && exec {RUN}"));
    let words = ["/dev/kvm does not exist", "kvm_intel or kvm_amd", "firmware"];
    refused(&out, dir.path(), &words);
}

#[test]
fn what_is_not_kvm_behind_its_name_is_said() {
    let dir = tempfile::tempdir().expect("a directory");
    let script = format!("touch $1/kvm && mount --bind $1/kvm /dev/kvm && exec {RUN}");
    let out = in_namespace(&[], dir.path(), &script);
    refused(&out, dir.path(), &["/dev/kvm"]);
}

#[test]
fn a_disk_that_may_only_be_read_is_named_and_readonly_helps() {
    let dir = tempfile::tempdir().expect("a directory");
    let image = dir.path().join("disk.img");
    File::create(&image).and_then(|file| file.set_len(1 << 20)).expect("an image");
    fs::set_permissions(&image, Permissions::from_mode(0o444)).expect("a mode");
    let disk = format!("{POWERLESS} {RUN} --disk path=$1/disk.img");
    let out = in_namespace(&[], dir.path(), &disk);
    refused(&out, dir.path(), &["disk.img", "readonly=on"]);

    // A file system that may only be read, which stops root as well.
    let script = format!(
        "mount --bind $1/disk.img $1/disk.img && mount -o remount,bind,ro $1/disk.img && exec {RUN} --disk path=$1/disk.img"
    );
    let out = in_namespace(&[], dir.path(), &script);
    refused(&out, dir.path(), &["disk.img", "readonly=on"]);

    let with = format!("path={},readonly=on", image.display());
    let vm = Vm::selfcheck("64M", 1, "").args(&format!("--disk {with}")).start();
    assert_eq!(vm.qmp().status(), "running");
}

#[test]
fn a_disk_that_another_vm_writes_to_is_not_opened() {
    let dir = tempfile::tempdir().expect("a directory");
    let image = dir.path().join("disk.img");
    File::create(&image).and_then(|file| file.set_len(1 << 20)).expect("an image");
    let disk = format!("--disk path={}", image.display());
    let mut first = Vm::selfcheck("64M", 1, "").args(&disk).start();
    // Its socket is there before its disks are open; it answers afterwards.
    assert_eq!(first.qmp().status(), "running");
    for second in ["", ",readonly=on"] {
        let script = format!("exec {RUN} --disk path=$1/disk.img{second}");
        let out = in_namespace(&[], dir.path(), &script);
        refused(&out, dir.path(), &["disk.img is in use by another virtual machine"]);
    }
    assert_eq!(first.qmp().status(), "running");
    // Its lock goes with it.
    first.qmp().ask("quit");
    assert_eq!(first.wait_exit(20), 0, "{}", first.stderr());
    let second = Vm::selfcheck("64M", 1, "").args(&disk).start();
    assert_eq!(second.qmp().status(), "running");
}

#[test]
fn a_tap_that_another_vm_has_is_said_to_be_busy() {
    let dir = tempfile::tempdir().expect("a directory");
    // The tap and both VMs are in a network of their own. The first runs until it is told to end.
    let script = format!(
        r#"mount -t sysfs none /sys && ip tuntap add name busy0 mode tap || exit 99
        {RUN} --name first --net tap=busy0 & first=$!
        n=0
        until "$0" status --vm first >/dev/null 2>&1; do
            n=$((n + 1)); [ $n -lt 600 ] || exit 98; sleep 0.1
        done
        {RUN} --name second --net tap=busy0; second=$?
        "$0" status --vm first >/dev/null || exit 97
        kill $first; wait $first || exit 96
        exit $second"#
    );
    let out = in_namespace(&["--net"], dir.path(), &script);
    refused(&out, dir.path(), &["busy0 is in use by another process"]);
}
