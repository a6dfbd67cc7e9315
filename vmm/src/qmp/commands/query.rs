//! Commands that ask.

use serde_json::{Value, json};

use super::super::session;
use super::{Args, Outcome, Shared};
use crate::control::{CpuInfo, VmControl};

/// Who we are. The numbers are those of the QEMU whose behaviour is meant.
///
/// ```text
/// -> {"execute": "query-version"}
/// <- {"return": {"qemu": {"major": 7, "minor": 2, "micro": 0}, "package": "mini-vmm VERSION"}}
/// ```
pub(super) fn version(_: &Shared, args: Args) -> Outcome {
    args.finish()?;
    Ok(session::version())
}

/// What the machine is doing. While nobody here knows whether a destination runs the guest, there is
/// a member `x-in-doubt`, which is what `x-recover` answers.
///
/// ```text
/// -> {"execute": "query-status"}
/// <- {"return": {"status": "running", "running": true, "singlestep": false}}
/// ```
pub(super) fn status(shared: &Shared, args: Args) -> Outcome {
    args.finish()?;
    let status = shared.vm.status();
    let mut answer =
        json!({ "status": status, "running": status.is_running(), "singlestep": false });
    // QEMU has no word for it.
    if let (Some(doubt), Some(members)) = (shared.vm.doubt(), answer.as_object_mut()) {
        members.insert("x-in-doubt".to_string(), json!(doubt));
    }
    Ok(answer)
}

/// The VM's name.
///
/// ```text
/// -> {"execute": "query-name"}
/// <- {"return": {"name": "fake"}}
/// ```
pub(super) fn name(shared: &Shared, args: Args) -> Outcome {
    args.finish()?;
    Ok(json!({ "name": shared.vm.name() }))
}

/// The VM's UUID.
///
/// ```text
/// -> {"execute": "query-uuid"}
/// <- {"return": {"UUID": "00000000-0000-0000-0000-000000000000"}}
/// ```
pub(super) fn uuid(shared: &Shared, args: Args) -> Outcome {
    args.finish()?;
    Ok(json!({ "UUID": shared.vm.uuid() }))
}

/// The vCPUs and their threads. Every vCPU is a core of one socket, as in QEMU since 6.2.
///
/// ```text
/// -> {"execute": "query-cpus-fast"}
/// <- {"return": [{"cpu-index": 0, "thread-id": 100, "target": "x86_64",
///                 "qom-path": "/machine/unattached/device[0]",
///                 "props": {"socket-id": 0, "die-id": 0, "core-id": 0, "thread-id": 0}}]}
/// ```
pub(super) fn cpus_fast(shared: &Shared, args: Args) -> Outcome {
    args.finish()?;
    let one = |cpu: CpuInfo| {
        json!({
            "cpu-index": cpu.index,
            "thread-id": cpu.thread_id,
            "target": "x86_64",
            "qom-path": format!("/machine/unattached/device[{}]", cpu.index),
            "props": { "socket-id": 0, "die-id": 0, "core-id": cpu.index, "thread-id": 0 },
        })
    };
    Ok(shared.vm.cpus().into_iter().map(one).collect())
}

/// How many bytes of memory the guest has, by its own account.
///
/// ```text
/// -> {"execute": "query-balloon"}
/// <- {"return": {"actual": 268435456}}
/// ```
pub(super) fn balloon(shared: &Shared, args: Args) -> Outcome {
    args.finish()?;
    Ok(json!({ "actual": shared.vm.balloon()? }))
}

/// Everything at once, for `mini-vmm status`: the effective configuration, what only the process
/// knows, and the last migration with the parts of its downtime (times in milliseconds).
pub(super) fn full_status(shared: &Shared, args: Args) -> Outcome {
    args.finish()?;
    let vm = &shared.vm;
    let status = vm.status();
    Ok(json!({
        "name": vm.name(),
        "status": status,
        "running": status.is_running(),
        "in-doubt": vm.doubt(),
        "pid": std::process::id(),
        "version": env!("CARGO_PKG_VERSION"),
        "config": vm.config(),
        "runtime": vm.runtime(),
        "migration": vm.query_migrate(),
        "report": report(vm.as_ref()),
    }))
}

/// The last migration's report.
fn report(vm: &dyn VmControl) -> Option<Value> {
    let report = vm.migrate_report()?;
    let ms = |time: std::time::Duration| time.as_secs_f64() * 1e3;
    let steps =
        report.steps.iter().map(|(step, time)| json!({ "step": step.name(), "ms": ms(*time) }));
    Some(json!({
        "status": report.status,
        "error": report.error,
        "total-ms": ms(report.total),
        "setup-ms": ms(report.setup),
        "downtime-ms": report.downtime.map(ms),
        "downtime-steps": steps.collect::<Vec<_>>(),
        "expected-downtime-ms": report.expected_downtime.map(ms),
        "first-forecast": report.first_forecast.map(|expected| {
            json!({ "total-ms": ms(expected.total), "downtime-ms": ms(expected.downtime) })
        }),
        "passes": report.passes,
        "ram-bytes": report.ram_bytes,
        "transferred-bytes": report.transferred_bytes,
        "normal-pages": report.normal_pages,
        "zero-pages": report.zero_pages,
        "bytes-per-second": report.bytes_per_s,
        "dirty-pages-per-second": report.dirty_pages_per_s,
        "throttle-percent": report.throttle_percent,
        "verified-ram-bytes": report.verified_ram_bytes,
        "verified-sections": report.verified_sections,
    }))
}
