//! What a migration has done so far, for the progress bar, `query-migrate` and the report.
//!
//! One [`MigrationStats`] belongs to one migration on one side. It is updated once for every
//! write of some hundred pages; the lock is held for a few additions.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::guest::PAGE_SIZE;
use crate::phase::Phase;
use crate::throttle::Rest;

/// The parts of the downtime, with the same names on both hosts.
///
/// | step | source | destination |
/// |---|---|---|
/// | pause | the vCPUs stop | |
/// | drain | devices finish, disks are flushed | |
/// | vcpu-state | vCPUs and what else the hypervisor holds are read; for a QEMU, sections are written too | |
/// | last-pages | the last dirty pages are sent | and received |
/// | devices | sections are written and sent | received and decoded |
/// | prepared | the destination's word is awaited | everything is applied and checked |
/// | commit | disks are released | COMMIT is awaited, disks are taken |
/// | running | COMMIT is sent, and the guest runs over there | the vCPUs start |
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs)]
pub enum Step {
    Pause,
    Drain,
    VcpuState,
    LastPages,
    Devices,
    Prepared,
    Commit,
    Running,
}

impl Step {
    /// The step's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Pause => "pause",
            Self::Drain => "drain",
            Self::VcpuState => "vcpu-state",
            Self::LastPages => "last-pages",
            Self::Devices => "devices",
            Self::Prepared => "prepared",
            Self::Commit => "commit",
            Self::Running => "running",
        }
    }
}

/// Live numbers of one migration.
#[derive(Debug, Default)]
pub struct MigrationStats {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default, Clone)]
struct Inner {
    phase: Phase,
    started: Option<Instant>,
    setup: Option<Duration>,
    ended: Option<Duration>,
    stopped: Option<Instant>,
    downtime: Option<Duration>,
    error: Option<String>,
    total: u64,
    remaining: u64,
    transferred: u64,
    transferred_stopped: u64,
    beside: u64,
    normal_pages: u64,
    zero_pages: u64,
    passes: u64,
    dirty_pages_per_s: u64,
    bytes_per_s: f64,
    pages_per_s: f64,
    expected_downtime: Option<Duration>,
    /// From the start to the end, as it looks now.
    expected_total: Option<Duration>,
    first_forecast: Option<Expected>,
    rest: Rest,
    throttle_max: u8,
    /// Pages that each vCPU writes in a second; empty where that is not known.
    vcpu_rates: Vec<u64>,
    verified_ram: u64,
    verified_sections: u64,
    steps: Vec<(Step, Duration)>,
    step: Option<(Step, Instant)>,
}

/// What one write, or one stretch of reading, has moved.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Moved {
    /// Bytes of the stream.
    pub bytes: u64,
    /// Raw pages.
    pub normal_pages: u64,
    /// Pages that were described by one byte.
    pub zero_pages: u64,
}

impl MigrationStats {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        // The numbers stay good when a thread that held them has panicked.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The phase now.
    pub fn phase(&self) -> Phase {
        self.lock().phase
    }

    /// A migration of `total` bytes of RAM begins. `false` when it had begun already.
    pub(crate) fn begin(&self, total: u64) -> bool {
        let mut s = self.lock();
        let news = s.phase == Phase::None;
        if news {
            *s = Inner {
                phase: Phase::Setup,
                started: Some(Instant::now()),
                total,
                remaining: total,
                ..Inner::default()
            };
        }
        news
    }

    /// Goes to `next` if the table allows it; says whether it did.
    pub(crate) fn become_phase(&self, next: Phase) -> bool {
        let mut s = self.lock();
        if !s.phase.may_become(next) {
            return false;
        }
        let elapsed = s.started.map(|t| t.elapsed());
        match next {
            Phase::Active => s.setup = elapsed,
            Phase::Completed | Phase::Failed | Phase::Cancelled => {
                s.ended = elapsed;
                s.finish_step();
            }
            _ => {}
        }
        s.phase = next;
        true
    }

    pub(crate) fn fail(&self, error: &str) {
        self.lock().error = Some(error.to_owned());
    }

    /// What was not known when it failed is known now.
    pub(crate) fn settled(&self, how: &str) {
        let mut s = self.lock();
        let before = s.error.take().unwrap_or_default();
        s.error = Some(format!("{before}; this has settled: {how}"));
    }

    /// The same over connections beside the first.
    pub(crate) fn moved_beside(&self, moved: Moved) {
        self.lock().beside += moved.bytes;
        self.moved(moved);
    }

    pub(crate) fn moved(&self, moved: Moved) {
        let mut s = self.lock();
        s.transferred += moved.bytes;
        if s.stopped.is_some() {
            s.transferred_stopped += moved.bytes;
        }
        s.normal_pages += moved.normal_pages;
        s.zero_pages += moved.zero_pages;
        let pages = (moved.normal_pages + moved.zero_pages) * PAGE_SIZE;
        s.remaining = s.remaining.saturating_sub(pages);
    }

    /// Counts a pass, and gives its number from 1 on.
    pub(crate) fn pass(&self) -> u64 {
        let mut s = self.lock();
        s.passes += 1;
        s.passes
    }

    pub(crate) fn remaining(&self, bytes: u64) {
        self.lock().remaining = bytes;
    }

    pub(crate) fn rates(&self, bytes_per_s: f64, pages_per_s: f64) {
        let mut s = self.lock();
        (s.bytes_per_s, s.pages_per_s) = (bytes_per_s, pages_per_s);
    }

    pub(crate) fn dirty_rate(&self, pages_per_s: u64) {
        self.lock().dirty_pages_per_s = pages_per_s;
    }

    pub(crate) fn expected_downtime(&self, expected: Option<Duration>) {
        self.lock().expected_downtime = expected;
    }

    /// After a whole pass: how much longer it will take, and how much of that the guest will stand still.
    /// `None` if it does not look as if it would end.
    pub(crate) fn expected_course(&self, course: Option<(Duration, Duration)>) {
        let mut s = self.lock();
        let elapsed = s.started.map(|t| t.elapsed()).unwrap_or_default();
        let expected = course
            .map(|(left, downtime)| Expected { total: elapsed.saturating_add(left), downtime });
        s.expected_total = expected.map(|expected| expected.total);
        if s.passes == 1 {
            s.first_forecast = expected;
        }
    }

    /// The vCPUs rest for so much of the time from now on.
    pub(crate) fn throttle(&self, rest: &Rest) {
        let mut s = self.lock();
        s.throttle_max = s.throttle_max.max(rest.most());
        s.rest = rest.clone();
    }

    /// Pages that each vCPU has lately written in a second, by its index.
    pub(crate) fn vcpus(&self, pages_per_s: impl Iterator<Item = u64>) {
        let mut s = self.lock();
        s.vcpu_rates.clear();
        s.vcpu_rates.extend(pages_per_s);
    }

    pub(crate) fn verified(&self, ram_bytes: u64, sections: u64) {
        let mut s = self.lock();
        (s.verified_ram, s.verified_sections) = (ram_bytes, sections);
    }

    /// The guest stands still from now on.
    pub(crate) fn stopped(&self) {
        self.lock().stopped = Some(Instant::now());
    }

    /// The guest runs again, here or there, and has for so long; that is no longer than the last step has taken.
    pub(crate) fn running(&self, since: Duration) {
        let mut s = self.lock();
        let since = s.step.map_or(Duration::ZERO, |(_, began)| since.min(began.elapsed()));
        s.finish_step();
        if let Some((_, took)) = s.steps.last_mut() {
            *took = took.saturating_sub(since);
        }
        s.downtime = s.stopped.map(|t| t.elapsed().saturating_sub(since));
    }

    /// A step of the downtime begins; the one before ends.
    pub(crate) fn step(&self, step: Step) {
        let mut s = self.lock();
        s.finish_step();
        s.step = Some((step, Instant::now()));
    }

    /// The step of the downtime that is under way.
    pub fn current_step(&self) -> Option<Step> {
        self.lock().step.map(|(step, _)| step)
    }

    /// What `query-migrate` answers.
    pub fn info(&self) -> MigrationInfo {
        let s = self.lock().clone();
        if s.phase == Phase::None {
            return MigrationInfo::default();
        }
        let ms = |d: Duration| d.as_millis() as u64;
        let elapsed = s.ended.or_else(|| s.started.map(|t| t.elapsed()));
        let busy = s.phase.is_busy();
        MigrationInfo {
            status: Some(s.phase),
            ram: (s.phase != Phase::Setup).then(|| s.ram()),
            total_time: elapsed.map(ms),
            setup_time: s.setup.map(ms),
            expected_downtime: if busy { s.expected_downtime.map(ms) } else { None },
            expected_total: if busy { s.expected_total.map(ms) } else { None },
            downtime: if s.phase == Phase::Completed { s.downtime.map(ms) } else { None },
            cpu_throttle_percentage: Some(s.rest.most()).filter(|percent| *percent > 0),
            vcpus: if busy { s.vcpus() } else { Vec::new() },
            error_desc: if matches!(s.phase, Phase::Failed | Phase::Cancelled) {
                s.error
            } else {
                None
            },
        }
    }

    /// The report at the end (or so far).
    pub fn report(&self) -> Report {
        let s = self.lock().clone();
        Report {
            status: s.phase,
            error: s.error.clone(),
            total: s.ended.or_else(|| s.started.map(|t| t.elapsed())).unwrap_or_default(),
            setup: s.setup.unwrap_or_default(),
            downtime: s.downtime,
            steps: s.steps.clone(),
            first_forecast: s.first_forecast,
            expected_downtime: s.expected_downtime,
            passes: s.passes,
            ram_bytes: s.total,
            transferred_bytes: s.transferred,
            normal_pages: s.normal_pages,
            zero_pages: s.zero_pages,
            bytes_per_s: s.bytes_per_s,
            dirty_pages_per_s: s.dirty_pages_per_s,
            throttle_percent: s.throttle_max,
            verified_ram_bytes: s.verified_ram,
            verified_sections: s.verified_sections,
        }
    }
}

impl Inner {
    fn finish_step(&mut self) {
        if let Some((step, since)) = self.step.take() {
            self.steps.push((step, since.elapsed()));
        }
    }

    fn vcpus(&self) -> Vec<VcpuInfo> {
        let one = |(cpu_index, rate): (usize, &u64)| VcpuInfo {
            cpu_index,
            dirty_pages_rate: *rate,
            cpu_throttle_percentage: self.rest.of(cpu_index),
        };
        self.vcpu_rates.iter().enumerate().map(one).collect()
    }

    fn ram(&self) -> RamInfo {
        RamInfo {
            transferred: self.transferred,
            remaining: self.remaining,
            total: self.total,
            duplicate: self.zero_pages,
            skipped: 0,
            normal: self.normal_pages,
            normal_bytes: self.normal_pages * PAGE_SIZE,
            dirty_pages_rate: self.dirty_pages_per_s,
            mbps: self.bytes_per_s * 8.0 / 1e6,
            dirty_sync_count: self.passes,
            postcopy_requests: 0,
            page_size: PAGE_SIZE,
            multifd_bytes: self.beside,
            pages_per_second: self.pages_per_s as u64,
            precopy_bytes: self.transferred - self.transferred_stopped,
            downtime_bytes: self.transferred_stopped,
            postcopy_bytes: 0,
            dirty_sync_missed_zero_copy: 0,
        }
    }
}

/// The answer to `query-migrate`, with QEMU's names.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct MigrationInfo {
    /// Absent when there has been no migration.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub status: Option<Phase>,
    /// Absent before RAM moves.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ram: Option<RamInfo>,
    /// Since the start, in ms.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub total_time: Option<u64>,
    /// Until RAM began to move, in ms.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub setup_time: Option<u64>,
    /// What the downtime would be now, in ms; only while it runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expected_downtime: Option<u64>,
    /// What [`total_time`](Self::total_time) will be at the end, in ms, by the passes so far; only while it
    /// runs, and where an end is in sight. QEMU has no such member.
    #[serde(rename = "x-expected-total-time", skip_serializing_if = "Option::is_none")]
    pub expected_total: Option<u64>,
    /// What it was, in ms; only when completed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub downtime: Option<u64>,
    /// How much of the time the vCPUs rest, percent; only while they do. Where not all rest alike, the one
    /// that rests most.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_throttle_percentage: Option<u8>,
    /// What each vCPU writes, and how much of the time it rests; only while it runs, and where it is known
    /// who writes what. QEMU has no such member.
    #[serde(rename = "x-vcpus", skip_serializing_if = "Vec::is_empty")]
    pub vcpus: Vec<VcpuInfo>,
    /// Why it failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error_desc: Option<String>,
}

/// One vCPU, in `x-vcpus` of `query-migrate`.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct VcpuInfo {
    /// Its index.
    pub cpu_index: usize,
    /// Pages that it has written in a second, in the last pass.
    pub dirty_pages_rate: u64,
    /// How much of the time it rests, percent.
    pub cpu_throttle_percentage: u8,
}

/// The `ram` member of `query-migrate`. Every field is mandatory in QMP.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct RamInfo {
    /// Bytes sent (on a destination: received).
    pub transferred: u64,
    /// Bytes of RAM still to be sent.
    pub remaining: u64,
    /// Bytes of RAM in all.
    pub total: u64,
    /// Pages of one repeated byte.
    pub duplicate: u64,
    /// Always 0.
    pub skipped: u64,
    /// Raw pages.
    pub normal: u64,
    /// Bytes in them.
    pub normal_bytes: u64,
    /// Pages dirtied per second.
    pub dirty_pages_rate: u64,
    /// Megabits per second.
    pub mbps: f64,
    /// Passes over RAM, from 1 on.
    pub dirty_sync_count: u64,
    /// Always 0.
    pub postcopy_requests: u64,
    /// 4096.
    pub page_size: u64,
    /// Bytes over further channels.
    pub multifd_bytes: u64,
    /// Pages sent per second.
    pub pages_per_second: u64,
    /// Bytes sent while the guest ran.
    pub precopy_bytes: u64,
    /// Bytes sent while it stood still.
    pub downtime_bytes: u64,
    /// Always 0.
    pub postcopy_bytes: u64,
    /// Always 0.
    pub dirty_sync_missed_zero_copy: u64,
}

/// How a migration was expected to go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Expected {
    /// From start to end.
    pub total: Duration,
    /// How long the guest stands still.
    pub downtime: Duration,
}

/// What there is to say at the end.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// The last phase.
    pub status: Phase,
    /// Why it failed.
    pub error: Option<String>,
    /// From start to end.
    pub total: Duration,
    /// Until RAM began to move.
    pub setup: Duration,
    /// How long the guest stood still, as seen from this side: on the source from the order to
    /// pause until it runs over there, as far as the destination says when that was, else until
    /// `shut(0)`; on the destination from the first of the last pages until it runs.
    pub downtime: Option<Duration>,
    /// The parts of the downtime, in order.
    pub steps: Vec<(Step, Duration)>,
    /// What was expected after the first pass, if it looked as if it would end.
    pub first_forecast: Option<Expected>,
    /// What the downtime was expected to be when the guest was stopped.
    pub expected_downtime: Option<Duration>,
    /// Passes over RAM.
    pub passes: u64,
    /// Bytes of RAM that the VM has.
    pub ram_bytes: u64,
    /// Bytes of the stream.
    pub transferred_bytes: u64,
    /// Raw pages.
    pub normal_pages: u64,
    /// Pages that were all zero.
    pub zero_pages: u64,
    /// The last rate that was measured.
    pub bytes_per_s: f64,
    /// The last dirty rate that was measured.
    pub dirty_pages_per_s: u64,
    /// How much of the time the vCPUs rested at last, percent.
    pub throttle_percent: u8,
    /// Bytes of RAM that were compared.
    pub verified_ram_bytes: u64,
    /// Sections that were compared.
    pub verified_sections: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_migration_that_never_was_answers_nothing() {
        let json = serde_json::to_value(MigrationStats::default().info()).unwrap();
        assert_eq!(json, serde_json::json!({}));
    }

    #[test]
    fn the_fields_come_when_qemus_do() {
        let stats = MigrationStats::default();
        stats.begin(64 * PAGE_SIZE);
        assert!(!stats.become_phase(Phase::Completed));
        let json = serde_json::to_value(stats.info()).unwrap();
        assert_eq!(json["status"], "setup");
        assert!(json.get("ram").is_none());

        assert!(stats.become_phase(Phase::Active));
        stats.pass();
        stats.moved(Moved { bytes: 4200, normal_pages: 1, zero_pages: 3 });
        stats.expected_downtime(Some(Duration::from_millis(20)));
        let json = serde_json::to_value(stats.info()).unwrap();
        assert!(json.get("cpu-throttle-percentage").is_none());
        stats.throttle(&Rest::All(20));
        let json = serde_json::to_value(stats.info()).unwrap();
        assert_eq!(json["cpu-throttle-percentage"], 20);
        assert!(json.get("x-vcpus").is_none());
        stats.vcpus([900, 7].into_iter());
        stats.throttle(&Rest::Each(vec![15, 0]));
        let json = serde_json::to_value(stats.info()).unwrap();
        assert_eq!(json["cpu-throttle-percentage"], 15);
        let vcpu = |index, rate, rests| {
            serde_json::json!({
                "cpu-index": index, "dirty-pages-rate": rate, "cpu-throttle-percentage": rests
            })
        };
        assert_eq!(json["x-vcpus"], serde_json::json!([vcpu(0, 900, 15), vcpu(1, 7, 0)]));
        stats.throttle(&Rest::NONE);
        assert_eq!(
            (stats.info().cpu_throttle_percentage, stats.report().throttle_percent),
            (None, 20)
        );
        let json = serde_json::to_value(stats.info()).unwrap();
        assert_eq!(json["ram"]["remaining"], 60 * PAGE_SIZE);
        assert_eq!(json["ram"].as_object().unwrap().len(), 18);
        assert_eq!(json["expected-downtime"], 20);
        assert!(json.get("downtime").is_none());

        stats.become_phase(Phase::Device);
        stats.stopped();
        stats.step(Step::Pause);
        stats.step(Step::LastPages);
        stats.moved(Moved { bytes: 1000, ..Moved::default() });
        stats.running(Duration::ZERO);
        stats.become_phase(Phase::Completed);
        let json = serde_json::to_value(stats.info()).unwrap();
        assert_eq!(json["ram"]["precopy-bytes"], 4200);
        assert_eq!(json["ram"]["downtime-bytes"], 1000);
        assert!(json.get("downtime").is_some() && json.get("expected-downtime").is_none());
        assert!(json.get("x-vcpus").is_none());
        let steps: Vec<_> = stats.report().steps.into_iter().map(|(step, _)| step).collect();
        assert_eq!(steps, [Step::Pause, Step::LastPages]);
    }
}
