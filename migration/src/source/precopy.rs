//! RAM travels, pass after pass, while the guest runs.
//!
//! ```text
//! start the log → pass 1: every page
//!                 wait until the destination has taken it in
//!                 fetch the log → few enough, and no fewer after another pass? ──yes──→ switch-over
//!                   ↑               │no
//!                   └── pass n: ←───┘
//!                       for each 2 MiB, or what was never used in leaps: clear the log's bits, then read and
//!                       send the pages (pass.rs)
//! ```

use std::time::{Duration, Instant};

use super::{Migration, SourceError};
use crate::converge::{Decision, Progress, Rate, decide};
use crate::dirty::DirtyBitmap;
use crate::estimate::{HandOver, left_for_pages};
use crate::forecast::Measured;
use crate::guest::{PAGE_SIZE, RamBlock};
use crate::pace::Pace;
use crate::params::{OnTimeout, Parameters};
use crate::phase::Phase;
use crate::throttle::{Pass, Rest};
use crate::vmstate::SectionId;
use crate::wire::command::Command;
use crate::wire::ram;
use crate::wire::return_path::Message;
use crate::wire::section::{self, PartType, SectionHeader};

use super::out::RAM_SECTION_ID;
use super::pass::PassEnd;

/// The value of the ping that follows each pass; any will do but the one that asks who is there.
const SETTLE_PING: u32 = 1;
/// What a connection is taken to carry before anything is known of it, in bytes per second.
const UNKNOWN_RATE: u64 = 1 << 20;
/// Passes of which is kept what the guest wrote.
const POINTS: usize = 8;
/// How often the rate is measured within a pass.
pub(super) const SAMPLE: Duration = Duration::from_millis(100);

/// What is left of RAM, and how fast it goes.
pub(super) struct Passes {
    pub(super) blocks: Vec<RamBlock>,
    pub(super) dirty: DirtyBitmap,
    /// No page has been sent before.
    pub(super) first: bool,
    rate: Rate,
    started: Instant,
    sample_since: Instant,
    sample_sent: u64,
    sample_pages: u64,
    pub(super) pages: u64,
    pace: Pace,
    /// Bytes per second that are allowed; 0 is no limit.
    pub(super) limit: u64,
    /// What was left after the last pass fitted the downtime limit.
    fits: bool,
    /// That was so once, and after another pass it was not.
    missed: bool,
    /// Pages that each vCPU had written when the last pass ended.
    by_vcpu: Vec<u64>,
    /// What the guest will wait for beside pages.
    hand_over: HandOver,
    /// How long passes took, ascending, and how many bytes' worth of different pages the guest wrote meanwhile.
    written: Vec<(Duration, u64)>,
}

impl Passes {
    pub(super) fn new(blocks: Vec<RamBlock>, bandwidth: u64) -> Self {
        let mut dirty = DirtyBitmap::new(&blocks);
        dirty.set_all();
        let now = Instant::now();
        Self {
            blocks,
            dirty,
            first: true,
            rate: Rate::default(),
            started: now,
            sample_since: now,
            sample_sent: 0,
            sample_pages: 0,
            pages: 0,
            pace: Pace::new(now, 0),
            limit: bandwidth,
            fits: false,
            missed: false,
            by_vcpu: Vec::new(),
            hand_over: HandOver::default(),
            written: Vec::new(),
        }
    }

    /// Notes what the guest wrote in a pass.
    fn note(&mut self, time: Duration, bytes: u64) {
        if self.written.len() >= POINTS {
            // The oldest was the longest, as a rule.
            self.written.pop();
        }
        let at = self.written.partition_point(|(other, _)| *other < time);
        self.written.insert(at, (time, bytes));
    }

    fn remaining(&self) -> u64 {
        self.dirty.count() * PAGE_SIZE
    }

    /// Bytes of pages that a connection is given at once: where little is allowed or little gets through,
    /// little, so that all of them end a section within a few seconds.
    pub(super) fn piece(&self) -> u64 {
        let rate = self.rate.bytes_per_s().map_or(UNKNOWN_RATE, |rate| rate as u64);
        let rate = if self.limit > 0 { rate.min(self.limit) } else { rate };
        rate / 10
    }
}

impl Migration<'_> {
    /// Moves RAM as far as that can be done while the guest runs, one way or the other.
    pub(super) fn send_ram(&mut self) -> Result<Passes, SourceError> {
        if self.parameters.local { self.hand_memory() } else { self.precopy() }
    }

    /// Sends RAM until what is left fits the downtime limit. Leaves the rest marked in the passes
    /// that it returns.
    fn precopy(&mut self) -> Result<Passes, SourceError> {
        let mut passes = Passes::new(self.vm.ram().blocks(), self.control.max_bandwidth());
        passes.hand_over = HandOver::of(&self.vm.sections(), self.audience, self.round_trip);
        let mut tracker =
            self.vm.dirty_tracker().map_err(SourceError::vm("making the dirty log"))?;
        tracker.start().map_err(SourceError::vm("starting the dirty log"))?;
        self.tracker = Some(tracker);

        self.announce_blocks(&passes)?;

        loop {
            if self.control.pass() == 1 {
                self.control.enter(Phase::Active);
            }
            let (begin, sent) = (Instant::now(), self.sent());
            let (before, rate_before) = (passes.remaining(), passes.rate.clone());
            self.vm.flush_ahead();
            let end = self.send_pass(&mut passes, PartType::Part)?;
            passes.first = false;
            if end == PassEnd::Whole {
                let (sending, bytes) = (begin.elapsed(), self.sent().saturating_sub(sent));
                self.settle()?;
                let settling =
                    begin.elapsed().saturating_sub(sending.saturating_add(self.round_trip));
                passes.rate.of_pass(rate_before, sending, settling, bytes);
                // What comes next is not measured from the middle of this one.
                (passes.sample_since, passes.sample_sent) = (Instant::now(), self.sent());
            }
            let left = passes.dirty.count();
            self.fetch(&mut passes)?;
            let dirtied = passes.dirty.count().saturating_sub(left);
            let time = begin.elapsed();
            let per_s = |pages: u64| pages as f64 / time.as_secs_f64().max(1e-6);
            let rate = per_s(dirtied);
            self.control.stats().dirty_rate(rate as u64);
            let by_vcpu = self.by_vcpu(&mut passes);
            self.control.stats().vcpus(by_vcpu.iter().map(|pages| per_s(*pages) as u64));

            let parameters = self.control.parameters();
            let remaining = passes.remaining();
            let forecast = passes.rate.time_for(self.on_the_wire(remaining));
            let hand_over = passes.hand_over.at(passes.rate.bytes_per_s());
            self.control.stats().remaining(remaining);
            self.control
                .stats()
                .expected_downtime(forecast.map(|pages| pages.saturating_add(hand_over)));
            if end == PassEnd::Whole {
                passes.note(time, self.on_the_wire(dirtied * PAGE_SIZE));
                let course = self.course(&passes, before, parameters.downtime_limit);
                self.control.stats().expected_course(course);
            }
            tracing::debug!(remaining, ?forecast, dirty_pages_per_s = rate, "pass sent");
            if end == PassEnd::TimeOver && self.control.timeout().1 == OnTimeout::Force {
                return Ok(passes);
            }
            let decision = decide(&Progress {
                forecast,
                hand_over,
                remaining,
                before,
                downtime_limit: parameters.downtime_limit,
                elapsed: passes.started.elapsed(),
                timeout: parameters.timeout,
                on_timeout: parameters.on_timeout,
                missed: passes.missed,
            });
            passes.missed |= passes.fits && decision == Decision::GoOn;
            passes.fits = decision == Decision::Shorten;
            match decision {
                Decision::Shorten => self.check()?,
                Decision::GoOn => {
                    self.check()?;
                    let pass = Pass {
                        time,
                        sent: self.sent().saturating_sub(sent),
                        dirtied: self.on_the_wire(dirtied * PAGE_SIZE),
                        forecast,
                        downtime_limit: left_for_pages(parameters.downtime_limit, hand_over),
                        by_vcpu,
                    };
                    if self.slow_down(&pass, &parameters)? {
                        // It writes less from now on.
                        passes.written.clear();
                    }
                }
                Decision::Switch | Decision::Force => return Ok(passes),
                Decision::GiveUp => return Err(self.not_converged(&passes)),
            }
        }
    }

    /// The memory of the first block need not travel; sends the others, which no guest writes to.
    pub(super) fn send_other_blocks(&mut self) -> Result<Passes, SourceError> {
        let mut passes = Passes::new(self.vm.ram().blocks(), 0);
        let pages = passes.dirty.pages(0);
        passes.dirty.take(0, 0..pages);
        self.announce_blocks(&passes)?;
        self.control.pass();
        self.control.enter(Phase::Active);
        self.vm.flush_ahead();
        self.send_pass(&mut passes, PartType::Part)?;
        passes.first = false;
        self.control.stats().remaining(0);
        self.settle()?;
        self.check()?;
        Ok(passes)
    }

    /// Begins the section of RAM.
    fn announce_blocks(&mut self, passes: &Passes) -> Result<(), SourceError> {
        let header = SectionHeader {
            id: RAM_SECTION_ID,
            key: SectionId::new(ram::SECTION, 0),
            version: ram::VERSION,
        };
        self.out.put(|out| {
            section::write_header(out, PartType::Start, &header);
            ram::write_blocks(out, &passes.blocks);
        });
        self.end_ram()?;
        self.send("the list of RAM blocks")
    }

    /// How it would go from here, after a pass that had `before` bytes to send: how much longer until the
    /// guest runs there, and how much of that it stands still. `None` if it would not come to an end.
    fn course(
        &self,
        passes: &Passes,
        before: u64,
        limit: Duration,
    ) -> Option<(Duration, Duration)> {
        let ram_bytes = passes.blocks.iter().map(|block| block.len).sum();
        let measured = Measured {
            ram_bytes: self.on_the_wire(ram_bytes),
            data_bytes: self.on_the_wire(passes.remaining()),
            bandwidth: passes.rate.bytes_per_s()? as u64,
            round_trip: self.round_trip,
            hand_over: passes.hand_over,
            dirtied: passes.written.clone(),
        };
        measured.from_here(self.on_the_wire(before), limit)
    }

    /// Makes the vCPUs rest more, if the user allows it and it is needed. Gives whether they do.
    fn slow_down(&mut self, pass: &Pass, parameters: &Parameters) -> Result<bool, SourceError> {
        if !parameters.auto_converge {
            return Ok(false);
        }
        let Some(rest) = self.throttle.after(pass, &parameters.throttle) else { return Ok(false) };
        match &rest {
            Rest::All(percent) => {
                tracing::info!(percent, "the guest writes faster than can be sent: its vCPUs rest");
            }
            Rest::Each(percent) => tracing::info!(
                ?percent,
                "the guest writes faster than can be sent: the vCPUs that write most rest"
            ),
        }
        self.control.stats().throttle(&rest);
        self.vm.throttle(&rest).map_err(SourceError::vm("making the vCPUs rest"))?;
        Ok(true)
    }

    /// Pages that each vCPU has written since this was asked last; none where that is not known.
    fn by_vcpu(&self, passes: &mut Passes) -> Vec<u64> {
        let now = self.tracker.as_ref().and_then(|tracker| tracker.by_vcpu()).unwrap_or_default();
        let before = std::mem::replace(&mut passes.by_vcpu, now);
        let before = before.into_iter().chain(std::iter::repeat(0));
        passes.by_vcpu.iter().zip(before).map(|(now, before)| now.saturating_sub(before)).collect()
    }

    /// Waits until the destination has taken in what was sent. The sockets hold megabytes, and a
    /// destination that is behind by them would make the guest stand still until it has read them:
    /// better it does so while the guest runs.
    fn settle(&mut self) -> Result<(), SourceError> {
        if self.out.is_one_way() {
            return Ok(());
        }
        let begin = Instant::now();
        self.out.command(&Command::Ping(SETTLE_PING));
        self.send("a ping after RAM")?;
        match self.await_message("it was taking in RAM", false)? {
            Message::Pong(_) => {
                // The first answer of all also took what it takes to accept a connection.
                self.round_trip = self.round_trip.min(begin.elapsed());
                Ok(())
            }
            other => Err(SourceError::Unexpected { found: other.name(), expected: "pong" }),
        }
    }

    /// Sends what has become dirty since the last pass, with the guest stopped.
    pub(super) fn send_last_pages(&mut self, passes: &mut Passes) -> Result<(), SourceError> {
        self.fetch(passes)?;
        self.control.stats().remaining(passes.remaining());
        self.control.pass();
        self.send_pass(passes, PartType::End)?;
        Ok(())
    }

    fn fetch(&mut self, passes: &mut Passes) -> Result<(), SourceError> {
        match &mut self.tracker {
            Some(tracker) => {
                tracker.fetch(&mut passes.dirty).map_err(SourceError::vm("reading the dirty log"))
            }
            None => Ok(()),
        }
    }

    /// Bytes that have gone out, on whichever connection, or are about to.
    pub(super) fn sent(&self) -> u64 {
        self.out.sent + self.channels.as_ref().map_or(0, |channels| channels.sent())
    }

    /// Bytes that pages become on their way.
    fn on_the_wire(&self, bytes: u64) -> u64 {
        let ratio = self.channels.as_ref().map_or(1.0, |channels| channels.ratio());
        (bytes as f64 * ratio) as u64
    }

    /// Measures the rate, if `least` has passed since it was last measured.
    pub(super) fn sample(&self, passes: &mut Passes, least: Duration) {
        let elapsed = passes.sample_since.elapsed();
        if elapsed < least || elapsed.is_zero() {
            return;
        }
        let sent = self.sent().saturating_sub(passes.sample_sent);
        if sent == 0 {
            return;
        }
        passes.rate.add(elapsed, sent);
        let pages = (passes.pages - passes.sample_pages) as f64 / elapsed.as_secs_f64();
        self.control.stats().rates(passes.rate.bytes_per_s().unwrap_or_default(), pages);
        passes.sample_since = Instant::now();
        passes.sample_sent = self.sent();
        passes.sample_pages = passes.pages;
    }

    /// Waits as long as the bandwidth limit asks for. The limit may change meanwhile.
    pub(super) fn pace(&self, passes: &mut Passes) {
        loop {
            passes.limit = self.control.max_bandwidth();
            let ahead = passes.pace.ahead(Instant::now(), self.sent(), passes.limit);
            if ahead.is_zero() || self.check().is_err() {
                return;
            }
            if self.time_is_over(passes).is_ok_and(|over| !over) {
                self.control.rest(ahead.min(SAMPLE));
            } else {
                return;
            }
        }
    }

    /// Whether the time is over and the switch-over is to be forced.
    pub(super) fn time_is_over(&self, passes: &Passes) -> Result<bool, SourceError> {
        let (timeout, on_timeout) = self.control.timeout();
        let Some(timeout) = timeout else { return Ok(false) };
        if passes.started.elapsed() < timeout {
            return Ok(false);
        }
        match on_timeout {
            OnTimeout::Force => Ok(true),
            // This pass is one more than needed.
            OnTimeout::Cancel if passes.fits => Ok(true),
            OnTimeout::Cancel => Err(self.not_converged(passes)),
        }
    }

    fn not_converged(&self, passes: &Passes) -> SourceError {
        SourceError::NotConverged {
            timeout: self.control.timeout().0.unwrap_or_default(),
            remaining: passes.remaining(),
            dirty_pages_per_s: self.control.report().dirty_pages_per_s,
        }
    }
}
