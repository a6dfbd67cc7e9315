//! The self-checking guest behind a serial line that it can be spoken to by
//! (`resources/selfcheck/README.md` has its commands and its lines).

use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::qmp::Qmp;
use crate::serial::SerialLine;
use crate::vm::{Vm, VmArgs, channels};
use crate::wait;

/// After how long a guest that does not answer is asked again for the first time.
const FIRST_WAIT: Duration = Duration::from_millis(20);

/// A VM with the self-checking guest, or one that waits for it, and its serial line.
pub struct Guest {
    /// The process.
    pub vm: Vm,
    /// The line to the guest in it.
    pub line: SerialLine,
    // Holds the line's socket; gone when the line is.
    _socket: tempfile::TempDir,
}

impl Guest {
    /// Starts a VM with its serial line at a socket.
    pub fn start(args: VmArgs) -> Self {
        let socket = tempfile::TempDir::with_prefix("mini-vmm-line-").expect("a directory");
        let path = socket.path().join("serial.sock");
        let vm = args.serial_socket(&path).start();
        let line = SerialLine::attach(&path);
        Self { vm, line, _socket: socket }
    }

    /// Boots the guest, and returns as soon as it runs.
    pub fn boot(memory: &str, smp: u32, params: &str) -> Self {
        Self::start(Vm::selfcheck(memory, smp, params))
    }

    /// The same, with more arguments of `mini-vmm run`.
    pub fn boot_with(memory: &str, smp: u32, params: &str, more: &str) -> Self {
        Self::start(Vm::selfcheck(memory, smp, params).args(more))
    }

    /// Boots the guest, and returns when it has filled its memory.
    pub fn ready(memory: &str, smp: u32, params: &str) -> Self {
        let mut guest = Self::boot(memory, smp, params);
        guest.wait_ready();
        guest
    }

    /// Waits for a guest of this form on a free port of loopback.
    pub fn incoming(memory: &str, smp: u32) -> Self {
        Self::start(Vm::incoming(memory, smp))
    }

    /// The same, with more arguments of `mini-vmm run`.
    pub fn incoming_with(memory: &str, smp: u32, more: &str) -> Self {
        Self::start(Vm::incoming(memory, smp).args(more))
    }

    /// Returns when the guest answers to commands, which it does once its memory is filled.
    pub fn wait_ready(&mut self) {
        // Its "ready" may have been said before anybody listened, so it is asked. A question that comes before
        // it has set its serial port up is lost, one that comes later waits there until it is ready: so it
        // is asked again, but not often, since each is answered.
        let (line, start) = (&self.line, Instant::now());
        let (from, mut next) = (line.text().len(), Duration::ZERO);
        wait::until(
            "the guest to be ready",
            120,
            || {
                if start.elapsed() >= next {
                    line.send(b"s");
                    next = 2 * next + FIRST_WAIT;
                }
                line.line_from(from, "its answer", |line| answers(line, "up_ms="))
            },
            || line.tail(),
        );
        // The answers to what it was asked too often are nobody's.
        for _ in 0..10 {
            let len = line.text().len();
            thread::sleep(FIRST_WAIT);
            if line.text().len() == len {
                break;
            }
        }
    }

    /// Sends a command, and gives the first line behind it that contains `answer`. Any `FAIL` of
    /// the guest is a failure of the test.
    pub fn ask(&mut self, command: &[u8], answer: &str, seconds: u32) -> String {
        let from = self.line.text().len();
        self.line.send(command);
        self.line.wait_line_from(from, answer, seconds, |line| answers(line, answer))
    }

    /// The guest verifies every page that it holds and its own program, its interrupts go on
    /// arriving, and its clock goes on: it lives, and is whole. Gives its uptime in ms.
    pub fn is_whole(&mut self) -> u64 {
        let before = self.ask(b"s", "up_ms=", 60);
        self.ask(b"v", "verified all pages=", 180);
        let after = self.ask(b"s", "up_ms=", 60);
        let both = |key| (number(&before, key), number(&after, key));
        let (ticks, ticks_now) = both("ticks");
        let (up_ms, up_ms_now) = both("up_ms");
        assert!(ticks_now > ticks, "no interrupts: {before}\n{after}");
        assert!(up_ms_now >= up_ms, "time went back: {before}\n{after}");
        up_ms_now
    }

    /// Pages that the guest rewrites in a second of its own clock, watched for a while.
    pub fn speed(&mut self) -> f64 {
        let before = self.ask(b"s", "up_ms=", 60);
        thread::sleep(Duration::from_millis(1500));
        let after = self.ask(b"s", "up_ms=", 60);
        let of = |key| (number(&after, key) - number(&before, key)) as f64;
        of("rewritten") / of("up_ms") * 1000.0
    }

    /// For what part of the time its first vCPU's thread has a processor, for a while. On a busy host that is less
    /// than it would take, and never more than it is let.
    pub fn busy(&self) -> f64 {
        let (before, start) = (self.vm.thread_time("vcpu0"), Instant::now());
        thread::sleep(Duration::from_millis(1500));
        (self.vm.thread_time("vcpu0") - before).as_secs_f64() / start.elapsed().as_secs_f64()
    }

    /// Moves the guest to `there` with the command, which must succeed and end this process well.
    pub fn migrate_to(&mut self, there: &Guest, verify: bool) {
        let mut command = self.vm.migrate_command(&there.vm.migrate_uri());
        if verify {
            command.arg("--verify");
        }
        let out = command.output().expect("mini-vmm migrate starts");
        assert!(
            out.status.success(),
            "{}\nsource: {}\ndestination: {}",
            String::from_utf8_lossy(&out.stderr),
            self.vm.stderr(),
            there.vm.stderr()
        );
        assert_eq!(self.vm.wait_exit(20), 0, "the source ends well:\n{}", self.vm.stderr());
    }

    /// Starts a migration with these parameters in QMP's words, and gives the control socket.
    pub fn begin(&self, uri: &str, parameters: &Value) -> Qmp {
        let mut qmp = self.vm.qmp();
        if let Some(channels) = channels() {
            let multifd = json!([{ "capability": "multifd", "state": channels > 1 }]);
            qmp.execute("migrate-set-capabilities", json!({ "capabilities": multifd }))
                .expect("a capability");
            qmp.execute("migrate-set-parameters", json!({ "multifd-channels": channels }))
                .expect("a number");
        }
        qmp.execute("migrate-set-parameters", parameters.clone()).expect("parameters");
        qmp.execute("migrate", json!({ "uri": uri })).expect("the migration starts");
        qmp
    }

    /// The VM has ended, and its runtime directory has no trace of it.
    pub fn nothing_is_left(&mut self) {
        self.vm.nothing_is_left();
    }

    /// The guest moves to a fresh process after all, is whole there, and leaves nothing behind.
    pub fn moves_after_all(mut self, memory: &str, smp: u32, more: &str) {
        let mut there = Guest::incoming_with(memory, smp, more);
        self.migrate_to(&there, true);
        self.nothing_is_left();
        there.is_whole();
        there.vm.qmp().ask("quit");
        assert_eq!(there.vm.wait_exit(20), 0, "{}", there.vm.stderr());
        there.nothing_is_left();
    }
}

/// The line, if it contains `answer`.
fn answers(line: &str, answer: &str) -> Option<String> {
    assert!(!line.contains("FAIL"), "the guest found a difference: {line}");
    line.contains(answer).then(|| line.to_owned())
}

/// The number behind `key=` in one of the guest's lines.
pub fn number(line: &str, key: &str) -> u64 {
    line.split_whitespace()
        .find_map(|word| word.strip_prefix(key)?.strip_prefix('=')?.parse().ok())
        .unwrap_or_else(|| panic!("no {key} in: {line}"))
}
