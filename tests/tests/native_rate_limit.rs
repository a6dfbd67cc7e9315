//! A limit on the bytes per second holds within 2 %, and can be changed while it is at work.

use std::time::Instant;

use serde_json::json;
use system_tests::guest::Guest;
use system_tests::qmp::Qmp;
use system_tests::wait;

const MIB: u64 = 1 << 20;
/// How far off it may be.
const TOLERANCE: f64 = 0.02;
/// A host that is busy with other things may let the sender sleep for too long to catch up.
const TRIES: usize = 3;

/// When at least `least` bytes have just been sent, between which two moments that was seen, and how many
/// they are. Looked at often, since what is sent grows in steps.
fn moment(qmp: &mut Qmp, least: u64) -> (Instant, Instant, u64) {
    let mut before = None;
    let look = || {
        let asked = Instant::now();
        let status = qmp.ask("query-migrate");
        let sent = status["ram"]["transferred"].as_u64()?;
        assert_ne!(status["status"], "completed", "it was over too soon: {status}");
        let stepped = before.replace(sent).is_some_and(|before| before < sent);
        (sent >= least && stepped).then(|| (asked, Instant::now(), sent))
    };
    wait::until(&format!("{least} bytes to be sent"), 120, look, || "")
}

/// Bytes per second while the next `amount` bytes are sent; rather too few, if this process has to wait for
/// a processor.
fn rate(qmp: &mut Qmp, amount: u64) -> f64 {
    let (.., sent) = moment(qmp, 0);
    // Behind what was sent by another limit.
    let (begin, _, from) = moment(qmp, sent + MIB);
    let (_, end, to) = moment(qmp, from + amount);
    (to - from) as f64 / (end - begin).as_secs_f64()
}

#[test]
fn a_limit_holds_within_two_percent_and_can_be_changed() {
    let mut here = Guest::ready("256M", 1, "set=0,verify=0");
    let limits = [(25 * MIB, 50 * MIB), (80 * MIB, 120 * MIB)];
    let mut seen = Vec::new();
    for _ in 0..TRIES {
        let there = Guest::incoming("256M", 1);
        let first = json!({ "max-bandwidth": limits[0].0 });
        let mut qmp = here.begin(&there.vm.migrate_uri(), &first);
        let mut holds = true;
        for (limit, amount) in limits {
            let parameters = json!({ "max-bandwidth": limit });
            qmp.execute("migrate-set-parameters", parameters).expect("a limit");
            let of = rate(&mut qmp, amount) / limit as f64;
            assert!(of < 1.0 + TOLERANCE, "{of} of {limit} bytes per second");
            holds &= of > 1.0 - TOLERANCE;
            seen.push(of);
        }
        qmp.ask("migrate_cancel");
        assert_eq!(qmp.wait_migrated(60)["status"], "cancelled");
        if holds {
            here.is_whole();
            return;
        }
    }
    panic!("in {TRIES} tries there was always one that was slower: {seen:?}");
}
