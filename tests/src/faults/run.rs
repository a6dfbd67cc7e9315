//! One case from its beginning to the verdict.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use serde_json::{Value, json};

use super::case::{Action, Case, Map, Side, Variant};
use super::relay::{Fault, Pids, Relay};
use super::witness::{Witness, told_ticks};
use crate::guest::Guest;
use crate::qmp::Qmp;
use crate::vm::Vm;

const MEMORY: &str = "32M";
/// `x-stall-timeout` on both sides.
pub const STALL: Duration = Duration::from_millis(2500);
/// In how many such times a side must have noticed that the other one says nothing, and how much longer
/// a machine may take that does much else.
const STALLS: u32 = 3;
const SLACK: Duration = Duration::from_secs(10);
/// How often a process is asked how it is.
const STEP: Duration = Duration::from_millis(15);
/// How long a process that stands still is waited for.
const PATIENCE: Duration = Duration::from_millis(400);

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

/// How a process is.
#[derive(Debug, Clone, PartialEq, Eq)]
enum State {
    Ended(i32),
    /// It does not answer at the moment.
    Mute,
    Alive {
        status: String,
        migration: String,
        why: String,
        doubt: bool,
    },
}

impl State {
    fn runs(&self) -> bool {
        matches!(self, Self::Alive { status, .. } if status == "running")
    }
}

fn state(vm: &mut Vm) -> State {
    if vm.has_ended() {
        return State::Ended(vm.wait_exit(1));
    }
    let ask = || -> std::io::Result<State> {
        let mut qmp = Qmp::attempt(&vm.qmp_path(), PATIENCE)?;
        let mut ask = |command: &str| -> std::io::Result<Value> {
            qmp.try_execute(command, json!({}))?.map_err(std::io::Error::other)
        };
        let migrate = ask("query-migrate")?;
        let status = ask("query-status")?;
        let text = |value: &Value, key: &str| value[key].as_str().unwrap_or_default().to_string();
        Ok(State::Alive {
            status: text(&status, "status"),
            migration: text(&migrate, "status"),
            why: text(&migrate, "error-desc"),
            doubt: status["x-in-doubt"].is_object(),
        })
    };
    ask().unwrap_or(State::Mute)
}

/// A command for a process that may have ended.
fn command(vm: &Vm, command: &str, arguments: Value) -> Result<Value, String> {
    let mut qmp =
        Qmp::attempt(&vm.qmp_path(), Duration::from_secs(20)).map_err(|e| e.to_string())?;
    let answer = qmp.try_execute(command, arguments).map_err(|e| e.to_string())?;
    answer.map_err(|e| e.to_string())
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
struct Trial {
    variant: Variant,
    action: Action,
    here: Guest,
    there: Guest,
    relay: Relay,
    pids: Pids,
    image: PathBuf,
    witness: Option<Witness>,
    began: Instant,
    /// What was found out last.
    doubted: bool,
    thawed: bool,
    told: Option<Duration>,
    /// How the source said that the migration ended, and why.
    source: String,
    why: String,
    /// The operator was told that the guest has run and died at the destination.
    outlived: bool,
    dir: tempfile::TempDir,
}

impl Trial {
    fn new(variant: Variant, action: Action, fault: Option<Fault>) -> Self {
        let began = Instant::now();
        let dir = tempfile::TempDir::with_prefix("mini-vmm-fault-").expect("a directory");
        let image = dir.path().join("log.img");
        File::create(&image).and_then(|file| file.set_len(4 << 20)).expect("an image");
        let witness = Some(Witness::new(&image));
        let disk = format!("--disk path={}", image.display());
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
        let relay = Relay::new(&there.vm.migrate_uri(), fault, pids);
        Self {
            variant,
            action,
            here,
            there,
            relay,
            pids,
            image,
            witness,
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
    fn limit() -> Duration {
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
            let since = self.relay.seen().fired.unwrap_or(start);
            if since.elapsed() > Self::limit() {
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

    fn is_frozen(&self, side: Side) -> bool {
        let fired = || self.relay.seen().fired.is_some();
        self.action == Action::Freeze(side) && !self.thawed && fired()
    }

    fn thaw(&mut self, side: Side) {
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

    /// What an operator does whose source is in doubt (docs/recover.md).
    fn operator(&mut self) -> Result<(), String> {
        let start = Instant::now();
        let resume = json!({ "action": "resume" });
        let discard = json!({ "action": "discard" });
        let waits = matches!(self.action, Action::Late | Action::Freeze(Side::Destination));
        let mut tried = false;
        let mut said = String::new();
        while start.elapsed() < Self::limit() {
            match state(&mut self.there.vm) {
                State::Ended(_) => match command(&self.here.vm, "x-recover", resume.clone()) {
                    Ok(_) => return Ok(()),
                    Err(why) if why.contains("written to since") => {
                        // It must not be let go on, and is of no use.
                        self.outlived = true;
                        if state(&mut self.here.vm).runs() {
                            return Err("it runs although that was refused".into());
                        }
                        return Ok(());
                    }
                    Err(why) => said = why,
                },
                now if now.runs() => {
                    // A copy that runs must be proof against this.
                    if !tried {
                        tried = true;
                        let forced = json!({
                            "action": "resume",
                            "destination-does-not-run": true,
                            "disks-may-have-changed": true,
                        });
                        if command(&self.here.vm, "x-recover", forced).is_ok() {
                            return Err("the source was resumed while the guest runs there".into());
                        }
                    }
                    match command(&self.here.vm, "x-recover", discard.clone()) {
                        Ok(_) => return Ok(()),
                        Err(why) => said = why,
                    }
                }
                _ if waits && !tried => {
                    // He does not wait: the locks must tell.
                    tried = true;
                    match command(&self.here.vm, "x-recover", resume.clone()) {
                        Ok(_) => return Ok(()),
                        Err(why) => said = why,
                    }
                    self.thaw(Side::Destination);
                    self.relay.release();
                }
                _ => {}
            }
            thread::sleep(STEP);
        }
        Err(format!("the doubt can't be settled: {said}"))
    }

    /// Until the destination has ended, runs the guest, or waits for another one.
    fn settle_destination(&mut self) -> Result<(), String> {
        let start = Instant::now();
        loop {
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
            if start.elapsed() > Self::limit() {
                return Err(format!("the destination does not notice: {now:?}"));
            }
            thread::sleep(STEP);
        }
    }

    /// Who runs the guest, and whether all is as it must be.
    fn judge(&mut self) -> Result<End, String> {
        if self.source == "completed" && !self.here.vm.has_ended() {
            // It would wait three seconds for someone who wants to know how it went.
            let _ = command(&self.here.vm, "quit", json!({}));
            self.here.vm.wait_exit(20);
        }
        let (mut here, there) = (state(&mut self.here.vm), state(&mut self.there.vm));
        if self.doubted && !self.outlived && there.runs() {
            let code = self.here.vm.wait_exit(20);
            here = State::Ended(code);
        }
        let (died_here, died_there) = (here == State::Ended(-1), there == State::Ended(-1));
        let end = match (here.runs(), there.runs()) {
            (true, true) => return Err("both sides run the guest".into()),
            (true, false) if self.doubted => End::DoubtResumed,
            (true, false) => End::Stayed,
            (false, true) if self.doubted => End::DoubtMoved,
            (false, true) => End::Moved,
            (false, false) if died_here || died_there || self.outlived => End::Died,
            (false, false) => return Err(format!("nobody runs the guest: {here:?}, {there:?}")),
        };
        let killed = |side| matches!(self.action, Action::Kill(of, _) if of == side);
        if (died_here && !killed(Side::Source)) || (died_there && !killed(Side::Destination)) {
            return Err(format!("a process died by itself: {here:?}, {there:?}"));
        }
        if end == End::Died {
            self.death_was_due(&here, died_here)?;
        }
        for (side, guest, state) in
            [("source", &self.here, &here), ("destination", &self.there, &there)]
        {
            let said = guest.vm.stderr();
            if said.contains("panicked") {
                return Err(format!("the {side} panicked"));
            }
            if matches!(state, State::Ended(1)) && said.trim().is_empty() {
                return Err(format!("the {side} ended without a word"));
            }
        }
        self.nobody_else_spoke(end)?;
        self.locks_are_right(end)?;
        match end {
            End::Moved | End::DoubtMoved => {
                if !matches!(here, State::Ended(0 | -1)) {
                    return Err(format!("the source is left over: {here:?}"));
                }
                self.there.is_whole();
            }
            End::Stayed | End::DoubtResumed => {
                if !matches!(there, State::Ended(_)) {
                    return Err(format!("the destination is left over: {there:?}"));
                }
                self.here.is_whole();
            }
            End::Died => {}
        }
        Ok(end)
    }

    /// The guest may die with the process that has it, and with no other.
    fn death_was_due(&mut self, here: &State, died_here: bool) -> Result<(), String> {
        // A source that was killed has the guest until it has given it up, and a destination that
        // refuses it after that would be a loss: it has no reason to.
        if died_here {
            let said = self.there.vm.stderr();
            let ended = self.there.vm.has_ended();
            return if ended && (said.contains("broke off") || !said.trim().is_empty()) {
                Ok(())
            } else {
                Err("the source was killed, and the destination does not say what became of it"
                    .into())
            };
        }
        let ran = self.source == "completed" || self.outlived;
        if ran {
            return Ok(());
        }
        Err(format!("the destination was killed, and the source does not run the guest: {here:?}"))
    }

    /// What the guest has said on the lines fits: it has never been on both at once.
    fn nobody_else_spoke(&self, end: End) -> Result<(), String> {
        let (here, there) = (self.here.line.text(), self.there.line.text());
        for text in [&here, &there] {
            if let Some(line) = text.lines().find(|line| line.contains("FAIL")) {
                return Err(format!("the guest found a difference: {line}"));
            }
        }
        // A destination that was killed before its guest wrote to the disk may have spoken: the source
        // goes on from a moment before, and nothing contradicts it but that (docs/recover.md).
        if end == End::DoubtResumed && matches!(self.action, Action::Kill(Side::Destination, _)) {
            return Ok(());
        }
        if matches!(end, End::Stayed | End::DoubtResumed) && !there.is_empty() {
            return Err(format!(
                "the guest ran at the destination as well, and said there: {there}"
            ));
        }
        if let (Some((_, last)), Some((first, _))) = (told_ticks(&here), told_ticks(&there))
            && first < last
        {
            return Err(format!("{last} ticks at the source, but {first} at the destination"));
        }
        Ok(())
    }

    /// Who runs the guest holds the lock on its disk, and nobody else does.
    fn locks_are_right(&self, end: End) -> Result<(), String> {
        let (here, there) = match end {
            End::Stayed | End::DoubtResumed => (true, false),
            End::Moved | End::DoubtMoved => (false, true),
            End::Died => (false, false),
        };
        for (side, pid, should) in
            [("source", self.pids.source, here), ("destination", self.pids.destination, there)]
        {
            if holds(pid, &self.image) != should {
                return Err(format!("the {side} holds the disk's lock: {}", !should));
            }
        }
        Ok(())
    }

    /// What is stricter for some cases.
    fn expect(&self, case: &Case, end: End, fired: bool, at: &str) -> Result<(), String> {
        let moved = end == End::Moved && self.source == "completed";
        // On a machine that does much else even an answer that nobody holds up may come too late.
        let slow = end == End::Stayed && self.why.contains("stands still");
        if !fired && !moved && !slow {
            return Err(format!("nothing was done, but the guest has not moved: {end:?}"));
        }
        if matches!(case.action, Action::Delay(_)) && !moved && !slow {
            return Err(format!("a delay is no reason to fail: {end:?}"));
        }
        let matters = at.starts_with("section")
            || matches!(at, "manifest" | "verify" | "configuration" | "ram blocks" | "ram start");
        let through = matches!(case.action, Action::Corrupt(_)) && matters && end == End::Moved;
        if fired && through && case.direction == super::case::Direction::There {
            return Err(format!("a changed byte in {at} went through unnoticed"));
        }
        Ok(())
    }

    fn moves_after_all(&mut self) -> Result<(), String> {
        let disk = format!("--disk path={}", self.image.display());
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

    /// Ends what is still there, and looks at what is left. Gives the number of records.
    fn clear(&mut self, end: End) -> Result<u64, String> {
        for guest in [&mut self.here, &mut self.there] {
            if !guest.vm.has_ended() {
                let _ = command(&guest.vm, "quit", json!({}));
                let code = guest.vm.wait_exit(20);
                if code != 0 {
                    return Err(format!("it ends with {code} when it is told to end"));
                }
            }
            // Whoever was killed could not tidy up.
            if guest.vm.wait_exit(1) != -1 {
                guest.nothing_is_left();
            }
        }
        if is_locked(&self.image) {
            return Err("the disk is still locked".into());
        }
        let left: Vec<_> = fs::read_dir(self.dir.path())
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.file_name())
            .filter(|name| name != "log.img")
            .collect();
        if !left.is_empty() {
            return Err(format!("files are left over: {left:?}"));
        }
        let witness = self.witness.take().ok_or("no witness")?;
        let records = witness.testify()?;
        if records == 0 && end != End::Died {
            return Err("the guest has written nothing".into());
        }
        Ok(records)
    }
}

/// Whether a process holds a lock on a file (proc(5), `/proc/PID/fdinfo`).
fn holds(pid: Pid, path: &Path) -> bool {
    let Ok(inode) = path.metadata().map(|meta| meta.ino()) else { return false };
    let infos = fs::read_dir(format!("/proc/{pid}/fdinfo")).into_iter().flatten().flatten();
    let inode = format!(":{inode} ");
    infos
        .filter_map(|entry| fs::read_to_string(entry.path()).ok())
        .any(|info| info.lines().any(|line| line.starts_with("lock:") && line.contains(&inode)))
}

/// Whether anyone holds a lock on a file.
fn is_locked(path: &Path) -> bool {
    let Ok(file) = File::open(path) else { return false };
    let mut lock = libc_lock();
    let asked = fcntl(&file, FcntlArg::F_OFD_GETLK(&mut lock));
    asked.is_ok() && i32::from(lock.l_type) != nix::libc::F_UNLCK
}

/// A lock on all of a file, to ask about.
fn libc_lock() -> nix::libc::flock {
    nix::libc::flock {
        l_type: nix::libc::F_WRLCK as i16,
        l_whence: nix::libc::SEEK_SET as i16,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    }
}

/// The stage of a migration to which a piece belongs.
pub fn stage(at: &str) -> &'static str {
    match at {
        "header" | "configuration" | "open return path" | "hello" | "manifest" | "verdict" => {
            "greeting"
        }
        "ping" | "pong" => "pings",
        "prepared" => "prepared",
        "commit" => "commit",
        "shut" | "settled" => "last word",
        _ if at.starts_with("ram") || at.ends_with("page") || at.ends_with("pages") => "memory",
        _ => "devices",
    }
}

/// The place of a case as its table has it.
pub fn stage_of(at: Option<&str>) -> &'static str {
    at.map_or("its place never came", stage)
}
