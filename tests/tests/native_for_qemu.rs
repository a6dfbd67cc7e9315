//! State that a QEMU has no place for: the guest is not given to one, and goes on. The QEMU is a real one; it
//! emulates, which is enough for what comes before the vCPUs' state.

use std::time::Duration;

use serde_json::{Value, json};
use system_tests::guest::Guest;
use system_tests::qemu::{Qemu, QemuArgs};
use system_tests::vm::Vm;
use system_tests::wait;

/// With a register that any guest may set, and that QEMU 7.2 has no field for: MISC_FEATURES_ENABLES
/// (0x140), of which bit 0 lets CPUID fault outside the kernel.
const PARAMS: &str = "set=4M,rate=1000,verify=20000,msr=320,msr_value=1";

fn qemu() -> Qemu {
    QemuArgs::new("-accel tcg -cpu qemu64 -m 64 -smp 1 -incoming tcp:127.0.0.1:0").start()
}

/// The answer of `mini-vmm preflight --qemu`, which must end with this status.
fn preflight(here: &Guest, status: i32) -> Value {
    let out = here.vm.cli(&["preflight", "--vm", &here.vm.name, "--qemu", "--json"]);
    assert_eq!(out.status.code(), Some(status), "{}", String::from_utf8_lossy(&out.stderr));
    serde_json::from_slice(&out.stdout).expect("JSON")
}

/// Why the migration failed, which must have ended by now or soon.
fn failure(here: &Guest) -> String {
    let info = here.vm.qmp().wait_migrated(60);
    assert_eq!(info["status"], "failed", "{info}");
    info["error-desc"].as_str().unwrap_or_default().to_string()
}

#[test]
fn a_register_that_qemu_would_lose_keeps_the_guest_from_it_and_not_from_a_mini_vmm() {
    let mut here = Guest::ready("64M", 1, PARAMS);
    let answer = preflight(&here, 0);
    assert_eq!(answer["problems"], json!([]), "{answer:#}");
    here.ask(b"m", "ok m", 20);

    let answer = preflight(&here, 1);
    let problem = &answer["problems"][0];
    assert_eq!(problem["code"], "qemu-register", "{answer:#}");
    assert_eq!((&problem["field"], &problem["vcpu"]), (&json!("MSR 0x140"), &json!(0)));
    assert_eq!((&problem["found"], &answer["would-move"]), (&json!("0x1"), &json!(false)));

    let qemu = qemu();
    here.begin(&qemu.migrate_uri(), &json!({}));
    let why = failure(&here);
    assert!(why.contains("MSR 0x140") && why.contains("no place"), "{why}");
    let info = here.vm.qmp().ask("query-migrate");
    assert_eq!(info["ram"]["normal"], 0, "pages were sent: {info}");
    assert_eq!(info["ram"]["duplicate"], 0, "pages were sent: {info}");
    here.is_whole();

    // A mini-vmm keeps it, and knows as well that no QEMU would.
    let mut there = Guest::start(Vm::incoming("64M", 1));
    here.migrate_to(&there, true);
    there.is_whole();
    assert_eq!(preflight(&there, 1)["problems"][0]["field"], "MSR 0x140");
}

#[test]
fn a_register_that_is_set_while_memory_moves_is_found_at_the_end() {
    let mut here = Guest::ready("64M", 1, PARAMS);
    let qemu = qemu();
    let mut control = here.begin(&qemu.migrate_uri(), &json!({ "max-bandwidth": 2 << 20 }));
    let moving = || {
        let info = here.vm.qmp().ask("query-migrate");
        (info["ram"]["transferred"].as_u64() > Some(1 << 20)).then_some(())
    };
    wait::until("memory to move", 60, moving, || here.vm.stderr());
    here.ask(b"m", "ok m", 20);
    let faster = json!({ "max-bandwidth": 1u64 << 40, "downtime-limit": 2000 });
    control.execute("migrate-set-parameters", faster).expect("parameters");
    drop(control);
    let why = failure(&here);
    assert!(why.contains("MSR 0x140") && why.contains("no place"), "{why}");
    wait::until(
        "the guest to go on",
        20,
        || (here.vm.qmp().status() == "running").then_some(()),
        || here.vm.stderr(),
    );
    std::thread::sleep(Duration::from_millis(100));
    here.is_whole();
}
