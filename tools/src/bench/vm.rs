//! One VM's process: its guest's serial port and its control socket.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use serde_json::{Value, json};

use super::memory::{BesideRam, beside_ram};
use crate::error::{Doing, Error, Result};
use crate::process;

/// How long any one step may take. Filling and verifying RAM takes 10 s per GiB on a host whose KVM
/// interprets.
const PATIENCE: Duration = Duration::from_secs(300);
/// How often a condition is looked at.
const STEP: Duration = Duration::from_millis(5);
/// How often a source is asked how far it is. Each answer takes processor time from who is measured.
const STEP_MOVING: Duration = Duration::from_millis(50);
/// How the guest's own lines begin. A firmware's lines before it do not.
const WORD: &str = "selfcheck:";

/// How the line of a mini-vmm's log ends that says that its guest runs.
const GUEST_RUNS: &str = "the guest runs";
/// A day, in ns.
const DAY: u128 = 86_400_000_000_000;

/// The time of day at a log line's beginning, `2026-01-31T23:59:59.999999Z`.
fn time_of_day(line: &str) -> Option<Duration> {
    let (_, time) = line.split_once('T')?;
    let (time, _) = time.split_once('Z')?;
    let mut parts = time.splitn(3, ':');
    let mut whole = || parts.next()?.parse::<u64>().ok();
    let (hours, minutes) = (whole()?, whole()?);
    let seconds: f64 = parts.next()?.parse().ok()?;
    Some(
        Duration::from_secs(hours * 3600 + minutes * 60)
            + Duration::try_from_secs_f64(seconds).ok()?,
    )
}

/// What the guest has said.
#[derive(Default)]
struct Heard {
    text: String,
    first_word: Option<Instant>,
}

/// A running VM. Dropping it ends the process.
pub struct Vm {
    title: String,
    child: Child,
    started: Instant,
    /// The same by the wall clock, which the VM's log has.
    began: SystemTime,
    input: ChildStdin,
    heard: Arc<Mutex<Heard>>,
    errors: PathBuf,
    qmp_path: PathBuf,
    qmp: Option<(BufReader<UnixStream>, UnixStream)>,
    /// When it last said that its vCPUs stopped, in µs since 1970.
    stopped: Option<u64>,
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Vm {
    /// Starts a command that has its serial port at its standard streams and its control socket at
    /// `qmp`. `title` names it in errors; its files go to `dir`.
    pub fn start(title: String, mut command: Command, qmp: &Path, dir: &Path) -> Result<Vm> {
        let errors = qmp.with_extension("stderr");
        let file = File::create(&errors).doing(|| format!("create {}", errors.display()))?;
        command.env("XDG_RUNTIME_DIR", dir);
        command.env("MINI_VMM_LOG", "info");
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(file);
        let (started, began) = (Instant::now(), SystemTime::now());
        let mut child = command.spawn().map_err(|e| process::start_error(&command, e))?;
        let (Some(input), Some(mut output)) = (child.stdin.take(), child.stdout.take()) else {
            unreachable!("both are piped")
        };
        let heard = Arc::new(Mutex::new(Heard::default()));
        let kept = heard.clone();
        // Ends when the process closes its output.
        thread::spawn(move || {
            let mut buf = [0; 4096];
            while let Ok(n @ 1..) = output.read(&mut buf) {
                let now = Instant::now();
                let mut heard = kept.lock().unwrap_or_else(PoisonError::into_inner);
                heard.text.push_str(&String::from_utf8_lossy(&buf[..n]));
                if heard.first_word.is_none() && heard.text.contains(WORD) {
                    heard.first_word = Some(now);
                }
            }
        });
        let qmp_path = qmp.to_owned();
        Ok(Vm {
            title,
            child,
            started,
            began,
            input,
            heard,
            errors,
            qmp_path,
            qmp: None,
            stopped: None,
        })
    }

    /// An error of this VM, with what it has said.
    fn trouble(&self, what: &str) -> Error {
        let heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        let said = fs::read_to_string(&self.errors).unwrap_or_default();
        Error::Bench {
            what: format!("{}: {what}", self.title),
            found: format!("{}\n{}", process::tail(&heard.text), process::tail(&said)),
        }
    }

    /// Waits until `condition` gives something.
    fn until<T>(
        &mut self,
        what: &str,
        condition: impl FnMut(&mut Vm) -> Result<Option<T>>,
    ) -> Result<T> {
        self.until_each(STEP, what, condition)
    }

    /// The same, looked at so often.
    fn until_each<T>(
        &mut self,
        step: Duration,
        what: &str,
        mut condition: impl FnMut(&mut Vm) -> Result<Option<T>>,
    ) -> Result<T> {
        let start = Instant::now();
        loop {
            if let Some(found) = condition(self)? {
                return Ok(found);
            }
            let ended = self.child.try_wait().doing(|| "wait for a VM".to_owned())?;
            if let Some(status) = ended {
                return Err(self.trouble(&format!("it ended ({status}) before {what}")));
            }
            if start.elapsed() > PATIENCE {
                let seconds = PATIENCE.as_secs();
                return Err(self.trouble(&format!("waited {seconds} s for {what}, in vain")));
            }
            thread::sleep(step);
        }
    }

    /// Waits for a whole line behind byte `from` that contains `needle`, and gives it. A guest that
    /// finds something wrong with itself is an error.
    pub fn line(&mut self, from: usize, needle: &str) -> Result<String> {
        self.until(&format!("the guest to say `{needle}`"), |vm| {
            let heard = vm.heard.lock().unwrap_or_else(PoisonError::into_inner);
            let new = heard.text.get(from..).unwrap_or_default();
            let whole = new.rfind('\n').map_or("", |end| &new[..end]);
            let find =
                |word: &str| whole.lines().find(|line| line.contains(word)).map(str::to_owned);
            let (failed, found) = (find("FAIL"), find(needle));
            drop(heard);
            match failed {
                Some(line) => Err(vm.trouble(&format!("the guest is not what it was: {line}"))),
                None => Ok(found),
            }
        })
    }

    /// Sends the guest one letter; gives where its answer begins.
    pub fn say(&mut self, letter: u8) -> Result<usize> {
        let from = self.heard();
        let sent = self.input.write_all(&[letter]).and_then(|()| self.input.flush());
        sent.doing(|| format!("talk to the guest of {}", self.title))?;
        Ok(from)
    }

    /// Sends the guest one letter that it answers with `ok`; gives what it says up to that.
    pub fn told(&mut self, letter: u8) -> Result<String> {
        let from = self.say(letter)?;
        self.line(from, &format!("ok {}", char::from(letter)))?;
        Ok(self.said(from))
    }

    /// How many bytes the guest has said so far.
    pub fn heard(&self) -> usize {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner).text.len()
    }

    /// What it has said behind the first `from` bytes.
    pub fn said(&self, from: usize) -> String {
        let heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        heard.text.get(from..).unwrap_or_default().to_owned()
    }

    /// From the start of the process to the guest's first word, if it has said one.
    pub fn first_word(&self) -> Option<Duration> {
        let heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        Some(heard.first_word?.duration_since(self.started))
    }

    /// From the start of the process to the moment when its vCPUs are let go, if its log says when that was;
    /// only a mini-vmm's does.
    pub fn first_instruction(&self) -> Option<Duration> {
        let log = fs::read_to_string(&self.errors).ok()?;
        let line = log.lines().find(|line| line.ends_with(GUEST_RUNS))?;
        let of_day = time_of_day(line)?;
        let began = self.began.duration_since(SystemTime::UNIX_EPOCH).ok()?.as_nanos() % DAY;
        let since = (of_day.as_nanos() + DAY - began) % DAY;
        u64::try_from(since).ok().map(Duration::from_nanos)
    }

    /// Waits until the control socket answers.
    pub fn connect(&mut self) -> Result<()> {
        let stream =
            self.until("its control socket", |vm| Ok(UnixStream::connect(&vm.qmp_path).ok()))?;
        let reader = stream
            .set_read_timeout(Some(PATIENCE))
            .and_then(|()| stream.try_clone())
            .doing(|| format!("talk to the control socket of {}", self.title))?;
        self.qmp = Some((BufReader::new(reader), stream));
        self.message()?;
        self.ask("qmp_capabilities", json!({})).map(drop)
    }

    fn message(&mut self) -> Result<Value> {
        let mut line = String::new();
        let read = self.qmp.as_mut().map(|(reader, _)| reader.read_line(&mut line));
        match read {
            Some(Ok(1..)) => serde_json::from_str(&line)
                .map_err(|_| self.trouble(&format!("its control socket says no JSON: {line}"))),
            Some(Err(error)) => Err(self.trouble(&format!("its control socket: {error}"))),
            _ => Err(self.trouble("its control socket is closed")),
        }
    }

    /// When its vCPUs last stopped, in µs since 1970, as its control socket has said.
    pub fn stopped(&self) -> Option<u64> {
        self.stopped
    }

    /// Runs a QMP command; of the events only that its vCPUs stopped is noted.
    pub fn ask(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let request = json!({ "execute": command, "arguments": arguments });
        let sent = self.qmp.as_mut().map(|(_, writer)| writeln!(writer, "{request}"));
        if !matches!(sent, Some(Ok(()))) {
            return Err(self.trouble("its control socket takes no command"));
        }
        loop {
            let mut answer = self.message()?;
            if let Some(error) = answer.get("error") {
                return Err(self.trouble(&format!("it refuses {command}: {}", error["desc"])));
            }
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
            if answer["event"] == "STOP" {
                let of = |unit| answer["timestamp"][unit].as_u64();
                let time = of("seconds").zip(of("microseconds"));
                self.stopped = time.map(|(seconds, micros)| seconds * 1_000_000 + micros);
            }
        }
    }

    /// Waits until the migration is over, and gives the last answer of `query-migrate`. `look` gets each.
    ///
    /// A QEMU first says that it has completed, and then counts how long that took: who asks between the two
    /// hears of no time at all.
    pub fn migrated(&mut self, look: &mut dyn FnMut(&Vm, &Value) -> Result<()>) -> Result<Value> {
        self.until_each(STEP_MOVING, "the migration's end", |vm| {
            let info = vm.ask("query-migrate", json!({}))?;
            look(vm, &info)?;
            match info["status"].as_str() {
                Some("completed") if info["total-time"].as_u64() > Some(0) => Ok(Some(())),
                Some("failed" | "cancelled") => Err(vm.trouble(&format!("no migration: {info}"))),
                _ => Ok(None),
            }
        })?;
        self.ask("query-migrate", json!({}))
    }

    /// What it uses beside the guest's RAM of `ram` bytes.
    pub fn memory(&self, ram: u64) -> Result<BesideRam> {
        let path = format!("/proc/{}/smaps", self.child.id());
        let smaps = fs::read_to_string(&path).doing(|| format!("read {path}"))?;
        beside_ram(&smaps, ram)
            .ok_or_else(|| self.trouble("its guest's RAM is not among its mappings"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_lines_time_is_read() {
        let of = |line| time_of_day(line).map(|time| time.as_secs_f64());
        let line = "2026-01-31T23:59:59.250000Z  INFO the guest runs";
        assert_eq!(of(line), Some(86_399.25));
        assert_eq!(of("the guest runs"), None);
        assert_eq!(of("2026-01-31T23:59Z"), None);
    }
}
