//! Running guests between QEMU and mini-vmm, both ways, under real KVM.

use system_tests::linux::Terminal;
use system_tests::network::Bridge;
use system_tests::pair::{Pair, assert_interrupts_go_on, features};
use system_tests::work::{Session, check_disk, disk};
use tempfile::TempDir;

/// What holds after every hop.
struct Watch {
    session: Session,
    features: Vec<String>,
    durable: u64,
    generation: u64,
}

impl Watch {
    fn new(guest: &mut Terminal) -> Self {
        Self {
            session: Session::start("10.99.0.2"),
            features: features(guest),
            durable: guest.next_number("disk: record"),
            generation: guest.next_number("memory: generation"),
        }
    }

    fn check(&mut self, guest: &mut Terminal) {
        let durable = guest.next_number("disk: record");
        assert!(durable > self.durable, "the disk writer went on");
        self.durable = durable;
        let generation = guest.next_number("memory: generation");
        assert!(generation >= self.generation, "the memory worker went on");
        self.generation = generation;
        for work in ["fpu:", "clock:", "tcp-server:"] {
            guest.wait_new(work, 30);
        }
        self.session.assert_alive();
        assert_eq!(features(guest), self.features, "all features are as negotiated");
        assert_interrupts_go_on(guest, 2);
        guest.assert_content();
    }
}

#[test]
fn four_hops_between_qemu_and_mini_vmm_lose_nothing() {
    let dir = TempDir::new().expect("a directory");
    let image = disk(dir.path());
    let bridge = Bridge::new("mvbr0", "10.99.0.1/24", &["mvtapm", "mvtapq"]);
    let taps: Vec<_> = bridge.taps().collect();
    let pair = Pair::full(&image, &taps, "");
    let mut guest = pair.boot_qemu();
    let mut watch = Watch::new(&mut guest.terminal);
    for round in 1..=2 {
        let mut here = pair.to_mini(guest, &format!("mini{round}"), true);
        watch.check(&mut here);
        guest = pair.to_qemu(here);
        watch.check(&mut guest.terminal);
    }
    let Watch { session, durable, .. } = watch;
    session.finish();
    // The firmware that has travelled starts the guest again.
    guest.terminal.tell("reboot -f");
    guest.terminal.wait_new("GUEST READY", 90);
    guest.qemu.qmp().ask("system_powerdown");
    assert_eq!(guest.qemu.wait_exit(60), 0, "{}", guest.qemu.log());
    check_disk(&image, durable);
}
