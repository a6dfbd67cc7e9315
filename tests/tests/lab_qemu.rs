//! Running guests between QEMU and mini-vmm, both ways, under real KVM.

use std::fs::File;
use std::path::Path;

use system_tests::linux::{Linux, Machine, Terminal, file};
use system_tests::qemu::{Qemu, QemuArgs};
use tempfile::TempDir;

/// The same machine for both programs.
struct Pair {
    mini: Machine,
    qemu: QemuArgs,
}

fn pair(image: &Path, smp: u32, work: &str) -> Pair {
    let image = image.display();
    let mini = Machine {
        args: format!("--memory 256M --smp {smp} --disk path={image} --rng --balloon"),
        append: format!("guest.run={work}"),
    };
    let qemu = QemuArgs::new(&format!(
        "-accel kvm -cpu host -m 256 -smp {smp} \
         -drive file={image},if=none,id=disk0,format=raw -device virtio-blk-pci,drive=disk0 \
         -device virtio-rng-pci -device virtio-balloon-pci"
    ))
    .arg("-kernel")
    .arg(file("MINI_VMM_GUEST_KERNEL").display().to_string())
    .arg("-initrd")
    .arg(file("MINI_VMM_GUEST_INITRD").display().to_string())
    .arg("-append")
    .arg(mini.command_line());
    Pair { mini, qemu }
}

fn disk(dir: &TempDir) -> std::path::PathBuf {
    let path = dir.path().join("disk.img");
    File::create(&path).and_then(|file| file.set_len(64 << 20)).expect("a disk image");
    path
}

/// A guest in a QEMU.
struct InQemu {
    qemu: Qemu,
    terminal: Terminal,
}

impl Pair {
    fn boot_qemu(&self) -> InQemu {
        let qemu = self.qemu.start();
        let terminal = qemu.terminal();
        terminal.wait_ready();
        InQemu { qemu, terminal }
    }

    fn to_mini(&self, guest: InQemu, dir: &Path, name: &str, return_path: bool) -> Linux {
        let there = self.mini.incoming(dir, name, "127.0.0.1");
        let end = guest.qemu.migrate(&there.vm.migrate_uri(), return_path);
        assert_eq!(end["status"], "completed", "{end}\nmini-vmm: {}", there.vm.stderr());
        println!("QEMU -> mini-vmm: {} ms, downtime {} ms", end["total-time"], end["downtime"]);
        guest.terminal.assert_calm();
        guest.qemu.terminate();
        there
    }

    fn to_qemu(&self, guest: Linux) -> InQemu {
        let qemu = self.qemu.clone().args("-incoming tcp:127.0.0.1:0").start();
        let terminal = qemu.terminal();
        println!("mini-vmm -> QEMU: {}", guest.leave_for(&qemu.migrate_uri()));
        InQemu { qemu, terminal }
    }
}

#[test]
fn a_guest_goes_from_qemu_to_mini_vmm_and_back() {
    let dir = TempDir::new().expect("a directory");
    let pair = pair(&disk(&dir), 2, "memory,disk,clock,fpu");
    let guest = pair.boot_qemu();
    let durable = guest.terminal.next_number("disk: record");
    let mut guest = pair.to_mini(guest, dir.path(), "there", true);
    assert!(guest.next_number("disk: record") > durable, "the disk writer went on");
    guest.assert_content();
    let mut guest = pair.to_qemu(guest);
    guest.terminal.next_number("disk: record");
    guest.terminal.assert_content();
}
