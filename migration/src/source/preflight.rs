//! Asks a destination whether this VM could move there, and how it would go. Nothing changes, on
//! either side: the guest runs on, and the destination goes on waiting.
//!
//! ```text
//! header, ping              → ← hello: can it be asked?
//! manifest, "only asking"   → ← verdict: everything that stands against it
//! ping                      → ← pong                 how long an answer takes
//! probes, ping              → ← pong                 what the connection carries
//! (the dirty log is on for a while: how much the guest writes)
//! with a rehearsal: rehearse, device sections → ← prepared, or failed (rehearse.rs)
//! farewell                  →
//! ```

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::greet::First;
use super::rehearse::Rehearsal;
use super::{Channel, Migration, SourceError, with_return_path};
use crate::control::Control;
use crate::dirty::DirtyBitmap;
use crate::estimate::HandOver;
use crate::forecast::{Forecast, Measured};
use crate::guest::{DirtyTracker, GuestRam, PAGE_SIZE, SourceVm};
use crate::manifest::{PREFLIGHT, REHEARSE, SHORT, Verdict};
use crate::params::OnTimeout;
use crate::problem::{Problem, kind};
use crate::transport::Connection;
use crate::vmstate::Audience;
use crate::wire::command::Command;
use crate::wire::limits::MAX_PROBE;
use crate::wire::return_path::Message;

/// Pings of the measurement, told from the first one.
const PING_PROBE: u32 = 0x7072_6f62;
/// Round trips of which the shortest counts.
const PINGS: u32 = 4;
/// How much of the bandwidth's measurement is left out, for the connection to get up to speed.
const WARM_UP: Duration = Duration::from_millis(50);
/// A probe's size: small enough that a slow connection is not busy for long with one.
const PROBE: u32 = MAX_PROBE / 4;
/// Pages that are looked at to see how many are zero.
const SAMPLED_PAGES: u64 = 4096;
/// Points at which the pages written so far are counted, as parts of the sample's time.
const POINTS: [f64; 4] = [0.125, 0.25, 0.5, 1.0];

/// What is to be found out beside the verdict.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Questions {
    /// How long the guest's writes are watched; zero leaves the whole forecast out.
    pub sample: Duration,
    /// How long the bandwidth is measured.
    pub probe_time: Duration,
    /// How many bytes may be sent for that.
    pub probe_bytes: u64,
    /// Whether the devices' and vCPUs' state is loaded there for show, for which the guest stands still
    /// for a moment.
    pub rehearse: bool,
}

impl Default for Questions {
    fn default() -> Self {
        Self {
            sample: Duration::from_secs(1),
            probe_time: Duration::from_millis(500),
            probe_bytes: 64 << 20,
            rehearse: false,
        }
    }
}

/// The answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Preflight {
    /// Whether the VM could move.
    pub would_move: bool,
    /// Name and version of the destination's program.
    pub destination: String,
    /// Everything that stands against it, and after that the warnings.
    pub problems: Vec<Problem>,
    /// How many more problems the destination has found than it could list.
    pub left_out: u64,
    /// How it would go, if that was asked for and could be measured.
    pub forecast: Option<Forecast>,
    /// How a rehearsal went, if there was one. None where anything fatal was found before.
    #[serde(default)]
    pub rehearsal: Option<Rehearsal>,
}

/// Asks whether `vm` could move over `connection`. An error means that nobody there could be asked.
pub fn preflight(
    vm: &mut dyn SourceVm,
    connection: &Connection,
    control: &Control,
    questions: &Questions,
) -> Result<Preflight, SourceError> {
    let parameters = control.parameters();
    control.attach(connection.abort_handle());
    with_return_path(connection, control, |inbox| {
        let channel = Channel::Connection(connection);
        let mut migration = Migration::new(vm, channel, control, inbox, parameters);
        let result = migration.guarded("the destination was asked", |m| m.ask(questions));
        migration.farewell("the migration was only tried (preflight)");
        result
    })?
}

/// What stands against moving `vm` to any QEMU, as far as it is known without asking one: a QEMU that is
/// merely talked to ends.
pub fn preflight_for_qemu(vm: &dyn SourceVm) -> Result<Preflight, SourceError> {
    let mut problems: Vec<_> = vm.blockers().into_iter().map(blocked).collect();
    problems.extend(vm.against_qemu().map_err(SourceError::vm("looking at the VM"))?);
    problems.sort_by_key(|problem| !problem.fatal);
    Ok(Preflight {
        would_move: problems.iter().all(|problem| !problem.fatal),
        destination: "QEMU 7.2 (nobody was asked)".into(),
        problems,
        left_out: 0,
        forecast: None,
        rehearsal: None,
    })
}

impl Migration<'_> {
    fn ask(&mut self, questions: &Questions) -> Result<Preflight, SourceError> {
        let mut problems: Vec<_> = self.vm.blockers().into_iter().map(blocked).collect();
        let hello = match self.introduce()? {
            First::Hello(hello) => hello,
            First::Pong => return Err(SourceError::NotToBeAsked { program: None }),
            First::Nobody => return Err(SourceError::Closed { during: "a question was put" }),
        };
        if !hello.can(PREFLIGHT) {
            return Err(SourceError::NotToBeAsked { program: Some(hello.program) });
        }
        if questions.rehearse && !hello.can(REHEARSE) {
            return Err(SourceError::NoRehearsal { program: hello.program });
        }
        if hello.can(SHORT) {
            self.audience = Audience::MiniVmm;
        }
        let Verdict { problems: fatal, warnings, left_out, .. } = self.verdict(&hello, true)?;
        problems.extend(fatal);
        let mut forecast = None;
        if !questions.sample.is_zero() {
            match self.measure(questions)? {
                Ok(found) => {
                    problems.extend(self.not_converging(&found));
                    forecast = Some(found);
                }
                Err(problem) => problems.push(problem),
            }
        }
        let mut rehearsal = None;
        let fits =
            left_out == 0 && problems.iter().all(|problem| !problem.fatal || is_of_time(problem));
        if questions.rehearse && fits {
            let (how, problem) = self.rehearse()?;
            rehearsal = Some(how);
            problems.extend(problem);
        }
        problems.extend(warnings);
        // What is fatal comes first.
        problems.sort_by_key(|problem| !problem.fatal);
        let would_move = left_out == 0 && problems.iter().all(|problem| !problem.fatal);
        let destination = hello.program.chars().filter(|c| !c.is_control()).take(100).collect();
        Ok(Preflight { would_move, destination, problems, left_out, forecast, rehearsal })
    }

    /// The outer error is one of the connection, the inner one of the measurement alone.
    fn measure(&mut self, questions: &Questions) -> Result<Result<Forecast, Problem>, SourceError> {
        let mut round_trip = Duration::MAX;
        for _ in 0..PINGS {
            round_trip = round_trip.min(self.round_trip()?);
        }
        let bandwidth = self.probe(questions)?;
        let ram = self.vm.ram();
        let ram_bytes = ram.blocks().iter().map(|block| block.len).sum();
        let data_bytes = data_bytes(&*ram);
        let dirtied = match self.vm.dirty_tracker() {
            Ok(mut tracker) => self.watch(&mut *tracker, &*ram, questions.sample),
            Err(error) => Err(error),
        };
        self.check()?;
        let dirtied = match dirtied {
            Ok(dirtied) => dirtied,
            Err(error) => {
                let why = crate::wire::error_chain(&error);
                return Ok(Err(Problem::new(kind::NO_FORECAST, "the forecast", "-", why, "")));
            }
        };
        let hand_over = HandOver::of(&self.vm.sections(), self.audience, round_trip);
        let measured =
            Measured { ram_bytes, data_bytes, bandwidth, round_trip, hand_over, dirtied };
        let parameters = &self.parameters;
        Ok(Ok(measured.forecast(parameters.max_bandwidth, parameters.downtime_limit)))
    }

    fn round_trip(&mut self) -> Result<Duration, SourceError> {
        let begin = Instant::now();
        self.out.command(&Command::Ping(PING_PROBE));
        self.send("a ping")?;
        loop {
            match self.await_message("the connection was measured", false)? {
                Message::Pong(PING_PROBE) => return Ok(begin.elapsed()),
                // The answer to the first ping, or a sign of life.
                Message::Pong(_) => {}
                other => {
                    return Err(SourceError::Unexpected { found: other.name(), expected: "pong" });
                }
            }
        }
    }

    /// Sends bytes that mean nothing, and gives the bytes per second that arrived.
    fn probe(&mut self, questions: &Questions) -> Result<u64, SourceError> {
        let begin = Instant::now();
        let mut sent = 0u64;
        // What was sent, and when it had arrived.
        let mut warm = (0u64, Duration::ZERO);
        while sent < questions.probe_bytes && begin.elapsed() < questions.probe_time {
            self.out.command(&Command::Probe(PROBE));
            self.send("bytes that measure the connection")?;
            self.check()?;
            sent = sent.saturating_add(PROBE.into());
            if warm.0 == 0 && begin.elapsed() >= WARM_UP {
                self.round_trip()?;
                warm = (sent, begin.elapsed());
            }
        }
        self.round_trip()?;
        // Where all was sent before it was warm, all counts.
        if warm.0 == sent {
            warm = (0, Duration::ZERO);
        }
        let seconds = begin.elapsed().saturating_sub(warm.1).as_secs_f64().max(1e-6);
        Ok((sent.saturating_sub(warm.0) as f64 / seconds) as u64)
    }

    /// Which pages the guest writes in `time`. The log is off afterwards, as it was before.
    fn watch(
        &self,
        tracker: &mut dyn DirtyTracker,
        ram: &dyn GuestRam,
        time: Duration,
    ) -> Result<Vec<(Duration, u64)>, crate::guest::VmError> {
        tracker.start()?;
        let points = self.watch_started(tracker, ram, time);
        tracker.stop();
        points
    }

    fn watch_started(
        &self,
        tracker: &mut dyn DirtyTracker,
        ram: &dyn GuestRam,
        time: Duration,
    ) -> Result<Vec<(Duration, u64)>, crate::guest::VmError> {
        let blocks = ram.blocks();
        // The log may begin with every page in it.
        let mut bitmap = DirtyBitmap::new(&blocks);
        tracker.fetch(&mut bitmap)?;
        for (index, block) in blocks.iter().enumerate() {
            if let Some(bits) = bitmap.take(index, 0..block.len / PAGE_SIZE) {
                tracker.clear(index, 0, &bits)?;
            }
        }
        let begin = Instant::now();
        let mut points = Vec::new();
        for part in POINTS {
            let until = time.mul_f64(part);
            while begin.elapsed() < until && self.check().is_ok() {
                self.control.rest(until.saturating_sub(begin.elapsed()));
            }
            tracker.fetch(&mut bitmap)?;
            points.push((begin.elapsed(), bitmap.count().saturating_mul(PAGE_SIZE)));
        }
        Ok(points)
    }

    fn not_converging(&self, forecast: &Forecast) -> Option<Problem> {
        if forecast.converges {
            return None;
        }
        let mib = |bytes: u64| format!("{:.1} MiB/s", bytes as f64 / f64::from(1 << 20));
        let mut hint = forecast.needed_downtime_ms.map_or_else(String::new, |ms| {
            format!("allow a downtime of {ms} ms (--downtime {ms}ms)")
        });
        if let Some(bandwidth) = forecast.needed_bandwidth {
            hint = format!("{hint}, or give it {}", mib(bandwidth));
            if bandwidth <= forecast.bandwidth {
                hint.push_str(", which the connection has (--bandwidth)");
            }
        }
        let mut problem = Problem::new(
            kind::NOT_CONVERGING,
            "the guest's writes",
            format!("{} to take them with", mib(forecast.used_bandwidth)),
            format!(
                "{} of them, and {} ms of downtime allowed",
                mib(forecast.dirty_bytes_per_s),
                forecast.downtime_limit_ms
            ),
            hint,
        );
        // It moves after all, with a long downtime.
        let forced =
            self.parameters.timeout.is_some() && self.parameters.on_timeout == OnTimeout::Force;
        problem.fatal &= !forced;
        Some(problem.of("pc.ram", "dirty pages"))
    }
}

/// Whether it is about how long it would take, and not about what would be loaded.
fn is_of_time(problem: &Problem) -> bool {
    problem.code == kind::NOT_CONVERGING.code
}

fn blocked(reason: String) -> Problem {
    Problem::new(
        kind::BLOCKED,
        "the source's VM",
        "one that can be migrated",
        &reason,
        "start it without what the reason names",
    )
    .known_as(reason)
}

/// About how many bytes of RAM are not zero, by a sample of pages.
fn data_bytes(ram: &dyn GuestRam) -> u64 {
    let mut sum = 0u64;
    for (index, block) in ram.blocks().iter().enumerate() {
        let pages = block.len / PAGE_SIZE;
        // An odd step, lest it fall in with a pattern of the guest's.
        let step = (pages / SAMPLED_PAGES).max(1) | 1;
        let (mut seen, mut data) = (0u64, 0u64);
        let mut page = 0;
        while page < pages {
            seen = seen.saturating_add(1);
            if !ram.is_zero(index, page.saturating_mul(PAGE_SIZE)) {
                data = data.saturating_add(1);
            }
            page = page.saturating_add(step);
        }
        let share = data as f64 / seen.max(1) as f64;
        sum = sum.saturating_add((block.len as f64 * share) as u64);
    }
    sum
}
