//! What the network around a VM sees of its move.

use std::thread;
use std::time::Duration;

use serde_json::json;
use system_tests::guest::Guest;
use system_tests::network::{RARP, Sniffer, Tap, is_rarp, isolate};

const MAC: [u8; 6] = [0x52, 0x54, 0, 0xaa, 0xbb, 0xcc];

/// The pauses between the five rounds, by default.
const PAUSES: Duration = Duration::from_millis(50 + 150 + 250 + 350);

fn on(tap: &Tap) -> String {
    format!("--net tap={},mac=52:54:00:aa:bb:cc", tap.name())
}

#[test]
fn a_guest_that_has_arrived_is_announced_on_its_tap_in_five_rounds() {
    isolate();
    let (old, new) = (Tap::up("announce0"), Tap::up("announce1"));
    let mut here = Guest::boot_with("64M", 1, "", &on(&old));
    here.wait_ready();
    let mut there = Guest::incoming_with("64M", 1, &on(&new));
    let sniffer = Sniffer::new(RARP);
    let rounds = thread::spawn(move || sniffer.hear(5, 60, |frame| is_rarp(frame, MAC)));
    here.migrate_to(&there, false);
    let heard = rounds.join().expect("five rounds");
    // The first may be heard late, but not by this much.
    let span = heard[4].duration_since(heard[0]);
    assert!(span >= PAUSES - Duration::from_millis(400), "{span:?} from the first to the last");

    // And again when it is asked for, for one interface or all.
    let sniffer = Sniffer::new(RARP);
    let mut qmp = there.vm.qmp();
    let rounds =
        json!({ "initial": 20, "max": 20, "rounds": 3, "step": 1, "interfaces": ["net0"] });
    qmp.execute("announce-self", rounds).expect("announced");
    sniffer.hear(3, 10, |frame| is_rarp(frame, MAC));
    let unknown = json!({ "initial": 0, "max": 0, "rounds": 1, "step": 1, "interfaces": ["net7"] });
    let refused = qmp.execute("announce-self", unknown).expect_err("no such interface");
    assert!(refused.to_string().contains("'net7'; there are: net0"), "{refused}");
    there.is_whole();
}
