//! One machine that a QEMU and a mini-vmm can both be, and guests that go between them.

use std::collections::BTreeMap;
use std::path::Path;

use tempfile::TempDir;

use crate::linux::{Linux, Machine, Start, Terminal, file};
use crate::qemu::{Qemu, QemuArgs};

/// The same machine in both programs' words.
pub struct Pair {
    /// For mini-vmm.
    pub mini: Machine,
    /// For QEMU.
    pub qemu: QemuArgs,
    /// Where sockets go.
    pub dir: TempDir,
}

/// A guest in a QEMU.
pub struct InQemu {
    /// The process.
    pub qemu: Qemu,
    /// Its guest's terminal.
    pub terminal: Terminal,
}

impl Pair {
    /// A machine with these devices; `append` is for the kernel's command line.
    pub fn new(mini: &str, qemu: &str, append: &str) -> Self {
        let mini = Machine { args: mini.into(), append: append.into(), start: Start::Vmlinux };
        let qemu = QemuArgs::new(qemu)
            .args("-accel kvm -cpu host -kernel")
            .arg(file("MINI_VMM_GUEST_KERNEL").display().to_string())
            .arg("-initrd")
            .arg(file("MINI_VMM_GUEST_INITRD").display().to_string())
            .arg("-append")
            .arg(mini.command_line());
        Self { mini, qemu, dir: TempDir::new().expect("a directory") }
    }

    /// A machine whose guest boots from its first disk, not told of a kernel in either program.
    pub fn from_disk(mini: &str, qemu: &str) -> Self {
        let mini = Machine { args: mini.into(), append: String::new(), start: Start::Itself };
        let qemu = QemuArgs::new(qemu).args("-accel kvm -cpu host");
        Self { mini, qemu, dir: TempDir::new().expect("a directory") }
    }

    /// A machine with everything that moves: two processors, a disk, a network on the first tap for
    /// mini-vmm and on the second for QEMU, random numbers, a console and a balloon; and all work.
    /// `more` is for mini-vmm.
    pub fn full(image: &Path, taps: &[&str], more: &str) -> Self {
        let (disk, mini, qemu) = (image.display(), taps[0], taps[1]);
        Self::new(
            &format!(
                "--memory 256M --smp 2 --disk path={disk} --net tap={mini} --rng --console null \
                 --balloon {more}"
            ),
            &format!(
                "-m 256 -smp 2 -drive file={disk},if=none,id=disk0,format=raw \
                 -device virtio-blk-pci,drive=disk0 \
                 -netdev tap,id=net0,ifname={qemu},script=no,downscript=no \
                 -device virtio-net-pci,netdev=net0 -device virtio-rng-pci \
                 -device virtio-serial-pci -chardev null,id=con0 -device virtconsole,chardev=con0 \
                 -device virtio-balloon-pci"
            ),
            "guest.run=memory,disk,clock,fpu,tcp guest.ip=10.99.0.2/24",
        )
    }

    /// Boots a guest in QEMU, by its firmware.
    pub fn boot_qemu(&self) -> InQemu {
        let qemu = self.qemu.start();
        let terminal = qemu.terminal();
        terminal.wait_ready();
        InQemu { qemu, terminal }
    }

    /// Boots a guest in mini-vmm.
    pub fn boot_mini(&self) -> Linux {
        self.mini.boot(self.dir.path(), "first")
    }

    /// Moves a guest from QEMU to a new mini-vmm.
    pub fn to_mini(&self, guest: InQemu, name: &str, return_path: bool) -> Linux {
        let there = self.mini.incoming(self.dir.path(), name, "127.0.0.1");
        let end = guest.qemu.migrate(&there.vm.migrate_uri(), return_path);
        assert_eq!(end["status"], "completed", "{end}\nmini-vmm: {}", there.vm.stderr());
        println!("QEMU -> mini-vmm: {} ms, downtime {} ms", end["total-time"], end["downtime"]);
        guest.terminal.assert_calm();
        guest.qemu.terminate();
        there
    }

    /// A QEMU that waits.
    pub fn incoming_qemu(&self) -> Qemu {
        self.qemu.clone().args("-incoming tcp:127.0.0.1:0").start()
    }

    /// Moves a guest from mini-vmm to a new QEMU.
    pub fn to_qemu(&self, guest: Linux) -> InQemu {
        let qemu = self.incoming_qemu();
        let terminal = qemu.terminal();
        println!("mini-vmm -> QEMU: {}", guest.leave_for(&qemu.migrate_uri()));
        InQemu { qemu, terminal }
    }
}

/// How often each interrupt has come, on all processors together, and the local timers' each.
fn interrupts(report: &str) -> BTreeMap<String, u64> {
    let mut counts = BTreeMap::new();
    for line in report.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let numbers: Vec<u64> = words.iter().skip(1).map_while(|w| w.parse().ok()).collect();
        match (words.first(), words.last()) {
            (Some(&"LOC:"), _) => {
                for (cpu, n) in numbers.iter().enumerate() {
                    counts.insert(format!("timer of processor {cpu}"), *n);
                }
            }
            (_, Some(name)) if name.starts_with("virtio") && !numbers.is_empty() => {
                counts.insert((*name).to_string(), numbers.iter().sum());
            }
            _ => {}
        }
    }
    counts
}

/// Fails unless the guest's timers and all queues of its disk, network, random numbers and console
/// that are in use go on interrupting. Needs `guest.run=disk,tcp` and those devices.
pub fn assert_interrupts_go_on(guest: &mut Terminal, cpus: u32) {
    let before = interrupts(&guest.shell("report"));
    for cpu in 0..cpus {
        let mask = 1 << cpu;
        guest.shell(&format!(
            "taskset {mask:x} dd if=/dev/vda of=/dev/null bs=4096 count=1 iflag=direct 2>/dev/null"
        ));
    }
    guest.shell("dd if=/dev/hwrng of=/dev/null bs=64 count=16 2>/dev/null; echo hello >/dev/hvc0");
    guest.wait_new("tcp-server:", 30);
    let after = interrupts(&guest.shell("report"));
    let names = (0..cpus).map(|cpu| format!("timer of processor {cpu}"));
    let queues = after.keys().filter(|name| {
        ["-req.", "-input.", "-output."].iter().any(|q| name.contains(q))
            || *name == "virtio2-input"
    });
    let all: Vec<String> = names.chain(queues.cloned()).collect();
    assert!(all.len() as u32 >= 2 * cpus + 2, "timers, disk and network are there: {after:?}");
    for name in all {
        assert!(after[&name] > before[&name], "{name} goes on: {before:?}, then {after:?}");
    }
}

/// What each virtio device's driver and device have agreed on.
pub fn features(guest: &mut Terminal) -> Vec<String> {
    let said = guest.shell(
        "for d in /sys/bus/virtio/devices/*; do read -r f <$d/features; echo \"features ${d##*/} $f\"; done",
    );
    // Not by lines: what works in the background prints in between.
    let two_words = |text: &str| text.split_whitespace().take(2).collect::<Vec<_>>().join(" ");
    // A terminal that echoes shows the command, too.
    said.split("features ").skip(1).map(two_words).filter(|f| f.starts_with("virtio")).collect()
}
