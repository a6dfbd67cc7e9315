//! One case from its beginning to its end. The operator is in `operator`, the verdict in `judge`.

use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::json;

use super::case::{Action, Case, Map, Side, Variant};
use super::process::{State, command, state};
use super::relay::{Fault, Pids, Relay};
use super::witness::Witness;
use crate::guest::Guest;
use crate::image::Disk;
use crate::qmp::Qmp;

const MEMORY: &str = "32M";
/// `x-stall-timeout` on both sides.
pub const STALL: Duration = Duration::from_millis(2500);
/// In how many such times a side must have noticed that the other one says nothing, and how much longer
/// a machine may take that does much else.
const STALLS: u32 = 3;
const SLACK: Duration = Duration::from_secs(10);
/// How often a process is asked how it is.
pub(super) const STEP: Duration = Duration::from_millis(15);

/// Where the guest was in the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum End {
    /// It has moved.
    Moved,
    /// It has stayed.
    Stayed,
    /// The source was in doubt, and the operator has let it go on there.
    DoubtResumed,
    /// The source was in doubt, and the operator has found it running at the destination.
    DoubtMoved,
    /// It has died with the process that was killed, and nothing else has run it.
    Died,
}

/// What came of a case in which all was as it must be.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// Where the guest was.
    pub end: End,
    /// The piece at which the fault was done; none if its place never came.
    pub at: Option<String>,
    /// From the fault to the source's knowing how it ended, if it lived.
    pub told: Option<Duration>,
    /// Records in the guest's log.
    pub records: u64,
    /// All in all.
    pub took: Duration,
}

/// Runs a case.
///
/// # Errors
/// What was not as it must be, with what both sides have said.
pub fn run(case: &Case) -> Result<Outcome, String> {
    let fault = Fault { direction: case.direction, place: case.place.clone(), action: case.action };
    let mut trial = Trial::new(case.variant, case.action, Some(fault));
    let outcome = trial.run(case);
    outcome.map_err(|why| trial.with_logs(&why))
}

/// What a migration without any fault consists of.
///
/// # Errors
/// It failed.
pub fn survey() -> Result<Map, String> {
    let variant = Variant {
        smp: 2,
        rate: 4000,
        bandwidth: 0,
        downtime_ms: 300,
        stops_before: false,
        verify: true,
        again: false,
    };
    let mut trial = Trial::new(variant, Action::Delay(0), None);
    let seen = (|| {
        trial.begin()?;
        trial.settle()?;
        trial.judge()?;
        Ok(trial.relay.map())
    })();
    seen.map_err(|why: String| trial.with_logs(&why))
}

/// The two processes and what is between and beside them.
pub(super) struct Trial {
    pub(super) variant: Variant,
    pub(super) action: Action,
    pub(super) here: Guest,
    pub(super) there: Guest,
    pub(super) relay: Relay,
    pub(super) pids: Pids,
    pub(super) image: Disk,
    pub(super) witness: Option<Witness>,
    pub(super) began: Instant,
    /// What was found out last.
    pub(super) doubted: bool,
    pub(super) thawed: bool,
    pub(super) told: Option<Duration>,
    /// How the source said that the migration ended, and why.
    pub(super) source: String,
    pub(super) why: String,
    /// The operator was told that the guest has run and died at the destination.
    pub(super) outlived: bool,
    pub(super) dir: tempfile::TempDir,
}

impl Trial {
    fn new(variant: Variant, action: Action, fault: Option<Fault>) -> Self {
        let began = Instant::now();
        let dir = tempfile::TempDir::with_prefix("mini-vmm-fault-").expect("a directory");
        let image = Disk::inside(dir.path(), 4 << 20);
        let witness = Witness::new(&image.path);
        let disk = image.argument();
        let Variant { smp, rate, .. } = variant;
        let params = format!("fill=8M,set=2M,rate={rate},verify=4000,every=100,disk=100");
        let mut here = Guest::boot_with(MEMORY, smp, &params, &disk);
        let there = Guest::incoming_with(MEMORY, smp, &disk);
        let pids = Pids { source: here.vm.pid(), destination: there.vm.pid() };
        // One that is to wait must not give up by itself.
        let late = if action == Action::Late { 60_000 } else { STALL.as_millis() as u64 };
        let stall = json!({ "x-stall-timeout": late });
        there.vm.qmp().execute("migrate-set-parameters", stall).expect("parameters");
        here.wait_ready();
        // There is a log before there is a migration.
        witness.wait_for_more_than(0);
        let relay = Relay::new(&there.vm.migrate_uri(), fault, pids);
        Self {
            variant,
            action,
            here,
            there,
            relay,
            pids,
            image,
            witness: Some(witness),
            began,
            doubted: false,
            thawed: false,
            told: None,
            source: String::new(),
            why: String::new(),
            outlived: false,
            dir,
        }
    }

    fn with_logs(&self, why: &str) -> String {
        format!(
            "{why}\nseen: {:?}\n--- source:\n{}--- destination:\n{}",
            self.relay.seen(),
            self.here.vm.stderr(),
            self.there.vm.stderr()
        )
    }

    fn run(&mut self, case: &Case) -> Result<Outcome, String> {
        self.begin()?;
        self.settle()?;
        let end = self.judge()?;
        let seen = self.relay.seen();
        self.expect(case, end, seen.fired.is_some(), &seen.at)?;
        if end == End::Stayed && self.variant.again {
            self.moves_after_all()?;
        }
        let records = self.clear(end)?;
        Ok(Outcome {
            end,
            at: seen.fired.map(|_| seen.at),
            told: self.told,
            records,
            took: self.began.elapsed(),
        })
    }

    fn begin(&mut self) -> Result<(), String> {
        let mut qmp = self.here.vm.qmp();
        let said = |e: crate::qmp::QmpError| e.to_string();
        let Variant { bandwidth, downtime_ms, stops_before, verify, .. } = self.variant;
        let parameters = json!({
            "x-stall-timeout": STALL.as_millis() as u64,
            "max-bandwidth": bandwidth,
            "downtime-limit": downtime_ms,
            "x-timeout": 2000,
            "x-on-timeout": "force",
            "x-verify": verify,
            // The case plays the operator; `native_settle` lets the source ask by itself.
            "x-settle": false,
        });
        qmp.execute("migrate-set-parameters", parameters).map_err(said)?;
        let capability = json!({ "capability": "pause-before-switchover", "state": stops_before });
        qmp.execute("migrate-set-capabilities", json!({ "capabilities": [capability] }))
            .map_err(said)?;
        // It may be killed or frozen before it has answered.
        let uri = json!({ "uri": self.relay.uri() });
        if let Ok(mut qmp) = Qmp::attempt(&self.here.vm.qmp_path(), Duration::from_secs(2)) {
            let _ = qmp.try_execute("migrate", uri);
        }
        Ok(())
    }

    /// How long a side may take to notice something.
    pub(super) fn limit() -> Duration {
        STALL * STALLS + SLACK
    }

    /// Until the source knows how it ended, with the operator's help, and the destination as well.
    fn settle(&mut self) -> Result<(), String> {
        let start = Instant::now();
        let source = loop {
            self.thaw_in_time(Side::Source);
            if self.is_frozen(Side::Source) {
                // Even a connect would wait, once enough of them have not been taken.
                thread::sleep(STEP);
                continue;
            }
            // Before it is asked: an answer may take as long as a process is frozen, and is old then.
            let late = self.relay.seen().fired.unwrap_or(start).elapsed() > Self::limit();
            let now = state(&mut self.here.vm);
            if let State::Alive { migration, .. } = &now {
                match migration.as_str() {
                    "pre-switchover" => {
                        let go_on = json!({ "state": "pre-switchover" });
                        let _ = command(&self.here.vm, "migrate-continue", go_on);
                    }
                    "completed" | "failed" | "cancelled" => break now,
                    _ => {}
                }
            }
            if matches!(now, State::Ended(_)) {
                break now;
            }
            if late {
                return Err(format!("the source does not notice: {now:?}"));
            }
            thread::sleep(STEP);
        };
        if let State::Alive { migration, why, doubt, .. } = &source {
            self.told = self.relay.seen().fired.map(|at| at.elapsed());
            self.source = migration.clone();
            self.why = why.clone();
            if migration != "completed" && why.is_empty() {
                return Err(format!("the source does not say why: {source:?}"));
            }
            self.doubted = *doubt || (migration == "failed" && !self.settles_here()?);
        }
        if self.doubted {
            self.operator()?;
        }
        self.thaw(Side::Destination);
        self.relay.release();
        self.settle_destination()?;
        self.wait_for_death()
    }

    /// A process that is to be killed some ms later may be needed until then.
    fn wait_for_death(&mut self) -> Result<(), String> {
        let Action::Kill(side, _) = self.action else { return Ok(()) };
        let Some(fired) = self.relay.seen().fired else { return Ok(()) };
        let vm = match side {
            Side::Source => &mut self.here.vm,
            Side::Destination => &mut self.there.vm,
        };
        while !vm.has_ended() {
            if fired.elapsed() > Self::limit() {
                return Err("a process that was killed is still there".into());
            }
            thread::sleep(STEP);
        }
        Ok(())
    }

    /// A source that has failed runs the guest on, or is in doubt: which of them may show a moment
    /// later.
    fn settles_here(&mut self) -> Result<bool, String> {
        let start = Instant::now();
        loop {
            match state(&mut self.here.vm) {
                State::Alive { doubt: true, .. } => return Ok(false),
                now if now.runs() => return Ok(true),
                // Killed later than at once.
                State::Ended(_) => return Ok(true),
                now if start.elapsed() > SLACK => {
                    return Err(format!(
                        "the source has failed, and neither runs nor doubts: {now:?}"
                    ));
                }
                _ => thread::sleep(STEP),
            }
        }
    }

    pub(super) fn is_frozen(&self, side: Side) -> bool {
        let fired = || self.relay.seen().fired.is_some();
        self.action == Action::Freeze(side) && !self.thawed && fired()
    }

    pub(super) fn thaw(&mut self, side: Side) {
        if self.is_frozen(side) {
            self.thawed = true;
            self.pids.signal(side, Signal::SIGCONT);
        }
    }

    /// Lets a frozen source go on when the destination has noticed, or must have.
    fn thaw_in_time(&mut self, side: Side) {
        if self.action != Action::Freeze(side) || self.thawed {
            return;
        }
        let Some(fired) = self.relay.seen().fired else { return };
        let there = state(&mut self.there.vm);
        let noticed = matches!(there, State::Ended(_)) || there.runs();
        if noticed || fired.elapsed() > STALL * STALLS {
            self.thaw(side);
        }
    }

    /// Until the destination has ended, runs the guest, or waits for another one.
    fn settle_destination(&mut self) -> Result<(), String> {
        let start = Instant::now();
        loop {
            let late = start.elapsed() > Self::limit();
            let now = state(&mut self.there.vm);
            match &now {
                State::Ended(_) => return Ok(()),
                _ if now.runs() => return Ok(()),
                // Nothing has come to it that it would have to throw away.
                State::Alive { status, migration, .. }
                    if status == "inmigrate"
                        && matches!(migration.as_str(), "" | "none" | "setup" | "failed") =>
                {
                    self.there.vm.signal(Signal::SIGTERM);
                    self.there.vm.wait_exit(20);
                    return Ok(());
                }
                _ => {}
            }
            if late {
                return Err(format!("the destination does not notice: {now:?}"));
            }
            thread::sleep(STEP);
        }
    }

    fn moves_after_all(&mut self) -> Result<(), String> {
        let disk = self.image.argument();
        let mut there = Guest::incoming_with(MEMORY, self.variant.smp, &disk);
        let parameters = json!({ "x-stall-timeout": 30_000, "max-bandwidth": 0, "x-verify": true });
        command(&self.here.vm, "migrate-set-parameters", parameters)?;
        let off = json!({ "capability": "pause-before-switchover", "state": false });
        command(&self.here.vm, "migrate-set-capabilities", json!({ "capabilities": [off] }))?;
        let (uri, from) = (there.vm.migrate_uri(), &mut self.here);
        command(&from.vm, "migrate", json!({ "uri": uri }))?;
        let info = from.vm.qmp().wait_migrated(60);
        if info["status"] != "completed" {
            return Err(format!("it does not move after all: {info}"));
        }
        let _ = command(&from.vm, "quit", json!({}));
        from.vm.wait_exit(20);
        there.is_whole();
        // The rest of the case is about where the guest is.
        std::mem::swap(&mut self.here, &mut there);
        self.pids.source = self.here.vm.pid();
        there.nothing_is_left();
        Ok(())
    }
}
