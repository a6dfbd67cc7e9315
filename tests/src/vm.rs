//! One `mini-vmm run` process.

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

use crate::qmp::Qmp;
use crate::wait;

/// The program under test: `$MINI_VMM`, else the one that cargo built beside this test.
pub fn mini_vmm() -> PathBuf {
    if let Some(path) = std::env::var_os("MINI_VMM") {
        return path.into();
    }
    let test = std::env::current_exe().expect("this test's own path");
    let path = test.ancestors().nth(2).expect("a target directory").join("mini-vmm");
    assert!(
        path.exists(),
        "{} is not there: build it first (cargo build -p vmm), or use `cargo xtask test`",
        path.display()
    );
    path
}

/// How many connections every migration shall have, if `$MINI_VMM_TEST_CHANNELS` says so: the tests of what
/// must hold over any number of them are run once more with several.
pub fn channels() -> Option<u8> {
    let said = std::env::var("MINI_VMM_TEST_CHANNELS").ok()?;
    Some(said.parse().expect("MINI_VMM_TEST_CHANNELS is a number"))
}

/// A `mini-vmm` command whose runtime files go to `runtime`.
pub fn command(runtime: &Path) -> Command {
    let mut command = Command::new(mini_vmm());
    command.env("XDG_RUNTIME_DIR", runtime).stdin(Stdio::null());
    command
}

/// A VM's process, its files, and what it has said so far. Dropping it kills the process.
pub struct Vm {
    /// The VM's name.
    pub name: String,
    dir: TempDir,
    child: Option<Child>,
    ended: Option<ExitStatus>,
}

/// What a VM is started with.
#[derive(Default)]
pub struct VmArgs {
    args: Vec<String>,
    env: Vec<(String, PathBuf)>,
    serial: Option<String>,
}

impl VmArgs {
    /// More arguments of `mini-vmm run`, separated by white space.
    pub fn args(mut self, args: &str) -> Self {
        self.args.extend(args.split_whitespace().map(str::to_string));
        self
    }

    /// One argument as it is.
    pub fn arg(mut self, arg: impl Into<String>) -> Self {
        self.args.push(arg.into());
        self
    }

    /// A variable for the process' environment.
    pub fn env(mut self, name: impl Into<String>, value: impl Into<PathBuf>) -> Self {
        self.env.push((name.into(), value.into()));
        self
    }

    /// The serial port goes to a unix socket, not to the file that [`Vm::serial`] reads.
    pub fn serial_socket(mut self, path: &Path) -> Self {
        self.serial = Some(format!("unix:{}", path.display()));
        self
    }

    /// Starts it, and returns when its control socket answers.
    pub fn start(self) -> Vm {
        let mut vm = self.spawn();
        let socket = vm.qmp_path();
        wait::until(
            "the control socket",
            30,
            || (socket.exists() || vm.has_ended()).then_some(()),
            || "",
        );
        assert!(!vm.has_ended(), "mini-vmm run ended:\n{}", vm.stderr());
        vm
    }

    /// Starts it, and returns at once.
    pub fn spawn(self) -> Vm {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("t{}", COUNT.fetch_add(1, Ordering::Relaxed));
        let dir = TempDir::with_prefix("mini-vmm-test-").expect("a temporary directory");
        let serial =
            self.serial.unwrap_or_else(|| format!("file:{}", dir.path().join("serial").display()));
        let stderr = fs::File::create(dir.path().join("stderr")).expect("a file");
        let child = command(dir.path())
            .args(["run", "--name", &name, "--serial", &serial])
            .args(&self.args)
            .envs(self.env)
            .stdout(stderr.try_clone().expect("a second handle"))
            .stderr(stderr)
            .spawn()
            .expect("mini-vmm starts");
        Vm { name, dir, child: Some(child), ended: None }
    }
}

impl Vm {
    /// A VM that runs the self-checking guest with these parameters.
    pub fn selfcheck(memory: &str, smp: u32, params: &str) -> VmArgs {
        VmArgs::default()
            .args(&format!("--memory {memory} --smp {smp}"))
            .arg(format!("--selfcheck={params}"))
    }

    /// A VM of that form that waits for a migration on a free port of loopback.
    pub fn incoming(memory: &str, smp: u32) -> VmArgs {
        VmArgs::default()
            .args(&format!("--memory {memory} --smp {smp} --migrate-listen tcp:127.0.0.1:0"))
    }

    /// The directory that holds its files.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Its control socket.
    pub fn qmp_path(&self) -> PathBuf {
        self.dir.path().join("mini-vmm").join(&self.name).join("qmp.sock")
    }

    /// A new connection to its control socket.
    pub fn qmp(&self) -> Qmp {
        Qmp::connect(&self.qmp_path())
    }

    /// All that the guest has written to its serial port.
    pub fn serial(&self) -> String {
        let bytes = fs::read(self.dir.path().join("serial")).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// All that the process has written to its standard outputs.
    pub fn stderr(&self) -> String {
        fs::read_to_string(self.dir.path().join("stderr")).unwrap_or_default()
    }

    /// Its process id.
    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.child.as_ref().expect("a started process").id() as i32)
    }

    /// Sends the process a signal.
    pub fn signal(&self, signal: Signal) {
        kill(self.pid(), signal).expect("a signal to our own child");
    }

    /// Whether the process has ended.
    pub fn has_ended(&mut self) -> bool {
        if self.ended.is_none() {
            self.ended =
                self.child.as_mut().and_then(|c| c.try_wait().expect("waiting for our own child"));
        }
        self.ended.is_some()
    }

    /// Waits for the process' end and gives its exit status; -1 for a signal.
    pub fn wait_exit(&mut self, seconds: u32) -> i32 {
        let stderr = self.dir.path().join("stderr");
        wait::until(
            "the process' end",
            seconds,
            || self.has_ended().then_some(()),
            || fs::read_to_string(stderr).unwrap_or_default(),
        );
        let status = self.ended.expect("it has ended");
        if status.signal().is_some() { -1 } else { status.code().unwrap_or(-1) }
    }

    /// The process has ended, and its runtime directory has no trace of it.
    pub fn nothing_is_left(&mut self) {
        assert!(self.has_ended(), "the process is still there");
        let left = fs::read_dir(self.dir.path().join("mini-vmm")).map_or(0, Iterator::count);
        assert_eq!(left, 0, "the VM's directory is left behind");
    }

    /// Waits until the guest has written a line that `found` likes, and gives what it makes of it.
    pub fn wait_serial<T>(
        &mut self,
        what: &str,
        seconds: u32,
        mut found: impl FnMut(&str) -> Option<T>,
    ) -> T {
        let file = self.dir.path().join("serial");
        let errors = self.dir.path().join("stderr");
        let read =
            |path: &Path| String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned();
        wait::until(
            what,
            seconds,
            || {
                let text = read(&file);
                // The last line may not be whole yet.
                let whole = text.rfind('\n').map_or("", |end| &text[..end]);
                whole.lines().rev().find_map(|line| found(line.trim_end()))
            },
            || {
                let text = read(&file);
                let tail: Vec<_> = text.lines().rev().take(30).collect();
                let tail: Vec<_> = tail.into_iter().rev().collect();
                format!("serial:\n{}\nstderr:\n{}", tail.join("\n"), read(&errors))
            },
        )
    }

    /// Where it listens for a migration, with the port it was given.
    pub fn migrate_uri(&self) -> String {
        let mut qmp = self.qmp();
        let status = qmp.ask("x-mini-vmm-status");
        status
            .pointer("/runtime/migrate-listen")
            .and_then(|v| v.as_str())
            .unwrap_or_else(|| panic!("it does not say where it listens: {status}"))
            .to_string()
    }

    /// Runs `mini-vmm COMMAND …` with this VM's runtime directory, and waits for its end.
    pub fn cli(&self, args: &[&str]) -> Output {
        command(self.dir.path()).args(args).output().expect("mini-vmm starts")
    }

    /// The processor time that the thread of this name has had.
    pub fn thread_time(&self, name: &str) -> Duration {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.pid())).expect("its threads");
        let mut tasks = tasks.flatten().map(|task| task.path());
        let is_it = |path: &PathBuf| {
            fs::read_to_string(path.join("comm")).is_ok_and(|comm| comm.trim_end() == name)
        };
        let path = tasks.find(is_it).unwrap_or_else(|| panic!("no thread is called {name}"));
        // Its first number: nanoseconds on a processor (Linux, sched-stats.rst).
        let times = fs::read_to_string(path.join("schedstat")).expect("its times");
        let ns = times.split_whitespace().next().and_then(|ns| ns.parse().ok());
        Duration::from_nanos(ns.expect("its time on a processor"))
    }

    /// The scheduling policy of each of its threads, with its name (proc(5), the 41st field of `stat`; 0 is the usual one
    /// and 3 SCHED_BATCH).
    pub fn policies(&self) -> Vec<(String, u32)> {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.pid())).expect("its threads");
        let one = |path: PathBuf| {
            // One that has just ended has none.
            let stat = fs::read_to_string(path.join("stat")).ok()?;
            let (name, rest) = stat.split_once('(')?.1.rsplit_once(')')?;
            Some((name.to_owned(), rest.split_whitespace().nth(41 - 3)?.parse().ok()?))
        };
        tasks.flatten().filter_map(|task| one(task.path())).collect()
    }

    /// A `mini-vmm migrate URI …` command for this VM.
    pub fn migrate_command(&self, uri: &str) -> Command {
        let mut c = command(self.dir.path());
        c.args(["migrate", "--vm", &self.name, uri]);
        if let Some(channels) = channels() {
            c.args(["--channels", &channels.to_string()]);
        }
        c
    }
}

/// What each thread of a process does at the moment, as the host's kernel sees it: for a test that
/// waited in vain.
fn threads(pid: u32) -> String {
    let read = |path: &Path, file: &str| fs::read_to_string(path.join(file)).unwrap_or_default();
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let mut text = String::new();
    for path in tasks.map(|task| task.path()) {
        let name = read(&path, "comm");
        let state = read(&path, "status");
        let state = state.lines().find(|line| line.starts_with("State:")).unwrap_or("State: ?");
        text += &format!("{} {state}\n{}", name.trim_end(), read(&path, "stack"));
    }
    text
}

impl Drop for Vm {
    fn drop(&mut self) {
        if let Some(child) = self.child.as_ref().filter(|_| std::thread::panicking()) {
            eprintln!("--- the threads of {}:\n{}", self.name, threads(child.id()));
        }
        if let Some(mut child) = self.child.take()
            && self.ended.is_none()
        {
            let _ = child.kill();
            let _ = child.wait();
        }
        if std::thread::panicking() {
            eprintln!("--- {} said:\n{}", self.name, self.stderr());
        }
    }
}
