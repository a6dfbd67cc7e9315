//! A preflight where the VM has a network: taps are tried at the destination, and the guest's stays
//! its own.

use serde_json::Value;
use system_tests::guest::Guest;
use system_tests::network::{Tap, isolate};

fn on(tap: &Tap) -> String {
    format!("--net tap={},mac=52:54:00:aa:bb:cc", tap.name())
}

fn codes(here: &Guest, uri: &str) -> Vec<String> {
    let out = here.vm.cli(&["preflight", "--vm", &here.vm.name, uri, "--json", "--sample", "0s"]);
    let answer: Value = serde_json::from_slice(&out.stdout).expect("JSON");
    let problems = answer["problems"].as_array().expect("a list");
    assert_eq!(out.status.code(), Some(i32::from(!problems.is_empty())), "{answer:#}");
    problems.iter().filter_map(|p| p["code"].as_str()).map(str::to_string).collect()
}

#[test]
fn a_tap_is_tried_and_one_that_is_gone_is_named() {
    isolate();
    let (old, new) = (Tap::up("ask0"), Tap::up("ask1"));
    let mut here = Guest::boot_with("64M", 1, "", &on(&old));
    here.wait_ready();
    let uses = |tap: &Tap| Guest::incoming_with("64M", 1, &on(tap));

    // The source's own, which it will give up, and one of the destination's.
    let there = uses(&old);
    assert_eq!(codes(&here, &there.vm.migrate_uri()), Vec::<String>::new());
    drop(there);
    let there = uses(&new);
    for _ in 0..2 {
        assert_eq!(codes(&here, &there.vm.migrate_uri()), Vec::<String>::new());
    }
    drop(new);
    assert_eq!(codes(&here, &there.vm.migrate_uri()), ["tap-missing"]);
    // And back again, it is taken.
    let _new = Tap::up("ask1");
    here.migrate_to(&there, true);
    here.nothing_is_left();
}
