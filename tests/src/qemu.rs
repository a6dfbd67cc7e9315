//! Debian's QEMU with a guest of its own: the peer that others wrote.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::linux::Terminal;
use crate::qmp::Qmp;
use crate::wait;

/// The board that mini-vmm has, as QEMU is asked for it.
const BOARD: &str = "-machine pc-i440fx-7.2,usb=off,vmport=off,hpet=off,graphics=off -nodefaults -no-user-config \
     -display none";

/// One QEMU process. Dropping it kills it.
pub struct Qemu {
    child: Child,
    dir: TempDir,
}

/// What a QEMU is started with.
#[derive(Clone)]
pub struct QemuArgs {
    args: Vec<String>,
}

impl QemuArgs {
    /// The board with these options, separated by white space.
    pub fn new(options: &str) -> Self {
        let args = BOARD.split_whitespace().chain(options.split_whitespace());
        Self { args: args.map(str::to_string).collect() }
    }

    /// Those that `mini-vmm qemu-command --json` has printed, but for the serial port: it goes where
    /// [`Qemu::terminal`] finds it.
    pub fn printed(json: &str) -> Self {
        let words: Vec<String> = serde_json::from_str(json).expect("an array of words");
        let (program, words) = words.split_first().expect("a program");
        assert_eq!(program, "qemu-system-x86_64");
        let mut args = Vec::new();
        let mut words = words.iter();
        while let Some(word) = words.next() {
            let serial = |value: &&String| value.contains("serial0");
            if !["-chardev", "-serial"].contains(&word.as_str()) {
                args.push(word.clone());
            } else if let Some(value) = words.next().filter(|value| !serial(value)) {
                args.extend([word.clone(), value.clone()]);
            }
        }
        Self { args }
    }

    /// More options, separated by white space.
    pub fn args(mut self, options: &str) -> Self {
        self.args.extend(options.split_whitespace().map(str::to_string));
        self
    }

    /// One argument as it is.
    pub fn arg(mut self, arg: impl Into<String>) -> Self {
        self.args.push(arg.into());
        self
    }

    /// The command, for a test that looks after it itself.
    pub fn command(&self) -> Command {
        let mut command = Command::new("qemu-system-x86_64");
        command.args(&self.args);
        command
    }

    /// Starts it with its guest's serial port at a socket, and returns when its control socket
    /// answers.
    pub fn start(&self) -> Qemu {
        let dir = TempDir::with_prefix("mini-vmm-qemu-").expect("a temporary directory");
        let path = |name: &str| dir.path().join(name).display().to_string();
        let log = File::create(dir.path().join("log")).expect("a file");
        let child = self
            .command()
            .args(["-qmp", &format!("unix:{},server=on,wait=off", path("qmp"))])
            .args(["-serial", &format!("unix:{},server=on,wait=off", path("serial"))])
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a second handle"))
            .stderr(log)
            .spawn()
            .expect("qemu-system-x86_64 is installed");
        let mut qemu = Qemu { child, dir };
        let socket = qemu.path("qmp");
        wait::until(
            "QEMU's control socket",
            20,
            || (socket.exists() || qemu.has_ended()).then_some(()),
            || "",
        );
        assert!(!qemu.has_ended(), "QEMU ended:\n{}", qemu.log());
        qemu
    }
}

impl Qemu {
    /// A file of its directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// All that it has said.
    pub fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    /// A connection to its control socket. It serves one at a time.
    pub fn qmp(&self) -> Qmp {
        Qmp::connect(&self.path("qmp"))
    }

    /// Its guest's terminal.
    pub fn terminal(&self) -> Terminal {
        Terminal::attach(&self.path("serial"))
    }

    /// Whether the process has ended.
    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().expect("waiting for our own child").is_some()
    }

    /// Where it listens, when it was started with `-incoming tcp:127.0.0.1:0`.
    pub fn migrate_uri(&self) -> String {
        let info = self.qmp().ask("query-migrate");
        let address = info.pointer("/socket-address/0").unwrap_or(&Value::Null);
        match (address["host"].as_str(), address["port"].as_str()) {
            (Some(host), Some(port)) => format!("tcp:{host}:{port}"),
            _ => panic!("QEMU does not say where it listens: {info}"),
        }
    }

    /// Sends its guest to `uri`, with or without a return path, and gives `query-migrate` at the
    /// end.
    pub fn migrate(&self, uri: &str, return_path: bool) -> Value {
        let mut qmp = self.qmp();
        let mut set = |command: &str, arguments: Value| {
            qmp.execute(command, arguments).unwrap_or_else(|e| panic!("QEMU, {command}: {e}"));
        };
        let capabilities = [("return-path", return_path), ("events", true)];
        let capabilities = capabilities.map(|(c, on)| json!({ "capability": c, "state": on }));
        set("migrate-set-capabilities", json!({ "capabilities": capabilities }));
        set(
            "migrate-set-parameters",
            json!({ "max-bandwidth": 1u64 << 40, "downtime-limit": 3000 }),
        );
        set("migrate", json!({ "uri": uri }));
        qmp.wait_migrated(60)
    }

    /// Waits until the process has ended.
    pub fn wait_exit(&mut self, seconds: u32) -> i32 {
        let child = &mut self.child;
        let status = wait::until(
            "QEMU's end",
            seconds,
            || child.try_wait().expect("waiting for our own child"),
            || "",
        );
        status.code().unwrap_or(-1)
    }

    /// Stops the process as an operator does.
    pub fn terminate(mut self) {
        kill(Pid::from_raw(self.child.id() as i32), Signal::SIGTERM).expect("our own child");
        self.wait_exit(20);
    }

    /// Its directory.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("--- QEMU said:\n{}", self.log());
        }
    }
}
