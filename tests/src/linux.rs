//! A Linux guest with the project's test image: what the tests say to it, and what it must never
//! say. The image's own rules are in `resources/linux-guest/init`.

use std::ops::{Deref, DerefMut};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::serial::SerialLine;
use crate::vm::{Vm, VmArgs};

/// What the guest prints of work that went wrong, and what a kernel prints of itself.
const MUST_NOT_SAY: [&str; 7] = [
    "WRONG",
    "GUEST FAILED",
    "Kernel panic",
    "soft lockup",
    "rcu: INFO: rcu_",
    "I/O error",
    "BUG:",
];

/// What its kernel may complain of: the lab's processors are emulated. A timer interrupt may take tens of
/// milliseconds there, and a pause in which all memory is compared some seconds; that the guest's clocks
/// agree about it is what the second message says.
const EXCUSED: [&str; 2] = ["hrtimer: interrupt took", "clocksource: Long readout interval"];

/// What every guest's kernel is told. It says what it warns of, and not the 20 KiB of its boot: a byte on the serial
/// port is an exit or two, and slow on an emulated processor. It does not test its ciphers there either.
pub const COMMAND_LINE: &str = "console=ttyS0 loglevel=5 panic=-1 cryptomgr.notests";

/// A file that the lab's run made.
pub fn file(variable: &str) -> PathBuf {
    std::env::var_os(variable)
        .unwrap_or_else(|| panic!("{variable} is not set: run the lab tests by `cargo xtask test`"))
        .into()
}

/// The terminal of such a guest, whoever runs it.
pub struct Terminal {
    serial: SerialLine,
}

/// A mini-vmm with that guest, here or on its way here.
pub struct Linux {
    /// The process.
    pub vm: Vm,
    terminal: Terminal,
}

impl Deref for Linux {
    type Target = Terminal;
    fn deref(&self) -> &Terminal {
        &self.terminal
    }
}

impl DerefMut for Linux {
    fn deref_mut(&mut self) -> &mut Terminal {
        &mut self.terminal
    }
}

/// What a guest of mini-vmm's is started by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// The kernel as Debian ships it, which unpacks itself, slowly on an emulated processor.
    BzImage,
    /// The same kernel unpacked, by its PVH entry.
    Vmlinux,
    /// What it brings along: a firmware, or its first disk.
    Itself,
}

/// What every VM of a test is started with, so that they fit together.
pub struct Machine {
    /// Flags of memory, vCPUs and devices.
    pub args: String,
    /// What is added to the kernel's command line.
    pub append: String,
    /// What mini-vmm is given to start.
    pub start: Start,
}

impl Machine {
    fn vm(&self, directory: &Path, name: &str) -> (VmArgs, PathBuf) {
        let socket = directory.join(format!("{name}.serial"));
        let args = self.flags().into_iter().fold(VmArgs::default(), VmArgs::arg);
        (args.serial_socket(&socket), socket)
    }

    /// The flags of `mini-vmm run` that make it, but for name, serial port and migration.
    pub fn flags(&self) -> Vec<String> {
        let mut flags: Vec<String> = self.args.split_whitespace().map(str::to_string).collect();
        let kernel = match self.start {
            Start::BzImage => "MINI_VMM_GUEST_KERNEL",
            Start::Vmlinux => "MINI_VMM_GUEST_VMLINUX",
            Start::Itself => return flags,
        };
        flags.extend([
            "--kernel".to_string(),
            file(kernel).display().to_string(),
            "--initrd".to_string(),
            file("MINI_VMM_GUEST_INITRD").display().to_string(),
            "--append".to_string(),
            self.command_line(),
        ]);
        flags
    }

    /// The kernel's command line.
    pub fn command_line(&self) -> String {
        format!("{COMMAND_LINE} {}", self.append)
    }

    /// Boots one, and returns when its userspace is up.
    pub fn boot(&self, directory: &Path, name: &str) -> Linux {
        let (args, socket) = self.vm(directory, name);
        // Not before the socket is listened at, so that no line is lost.
        let vm = args.arg("--paused").start();
        let terminal = Terminal::attach(&socket);
        vm.qmp().ask("cont");
        terminal.wait_ready();
        Linux { vm, terminal }
    }

    /// One that waits for a guest at a free port of `host`.
    pub fn incoming(&self, directory: &Path, name: &str, host: &str) -> Linux {
        self.restoring(directory, name, &format!("tcp:{host}:0"))
    }

    /// One that gets its guest from this address.
    pub fn restoring(&self, directory: &Path, name: &str, uri: &str) -> Linux {
        let (args, socket) = self.vm(directory, name);
        let vm = args.arg("--migrate-listen").arg(uri).start();
        Linux { vm, terminal: Terminal::attach(&socket) }
    }

    /// One that waits on loopback and is like the QEMU of this command line.
    pub fn like(line: &str, directory: &Path, name: &str) -> Linux {
        let socket = directory.join(format!("{name}.serial"));
        let args = VmArgs::default().serial_socket(&socket).arg("--like").arg(line);
        let vm = args.args("--migrate-listen tcp:127.0.0.1:0").start();
        Linux { vm, terminal: Terminal::attach(&socket) }
    }
}

impl Terminal {
    /// Attaches to a serial port's socket as soon as that answers.
    pub fn attach(socket: &Path) -> Self {
        Self { serial: SerialLine::attach(socket) }
    }

    /// Waits until userspace is up.
    pub fn wait_ready(&self) {
        self.serial.wait_for("GUEST READY", 30);
    }

    /// Waits until the guest has said this, since it was attached to.
    pub fn wait_for(&self, needle: &str, seconds: u32) -> String {
        self.serial.wait_for(needle, seconds)
    }

    /// All that has come over the serial line of this process.
    pub fn text(&self) -> String {
        self.serial.text()
    }

    /// Runs a shell command in the guest and gives what it printed. Lines of the work in the
    /// background stand between.
    pub fn shell(&mut self, command: &str) -> String {
        let from = self.serial.received();
        self.serial.send(format!("{command}\n").as_bytes());
        let status = self.serial.wait_line_from(from, "the end of a command", 30, |line| {
            line.strip_prefix("GUEST DONE ").map(str::to_string)
        });
        let text = self.serial.text();
        let said = text.get(from..).unwrap_or_default().to_string();
        assert_eq!(status, "0", "`{command}` in the guest failed:\n{said}");
        said
    }

    /// Says something to the guest's shell and waits for nothing.
    pub fn tell(&mut self, command: &str) {
        self.serial.send(format!("{command}\n").as_bytes());
    }

    /// Waits for a new line that contains `needle`.
    pub fn wait_new(&self, needle: &str, seconds: u32) -> String {
        let from = self.serial.received();
        self.serial.wait_line_from(from, needle, seconds, |line| {
            line.contains(needle).then(|| line.to_string())
        })
    }

    /// The first number behind `prefix` in a line that is printed from now on.
    pub fn next_number(&self, prefix: &str) -> u64 {
        let line = self.wait_new(prefix, 30);
        let rest = line.split(prefix).nth(1).unwrap_or_default().trim_start();
        let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
        digits.parse().unwrap_or_else(|_| panic!("no number behind '{prefix}' in '{line}'"))
    }

    /// Fails if guest or kernel have complained.
    pub fn assert_content(&mut self) {
        let complaints = self.shell("complaints");
        assert!(complaints.contains("complaints: "), "the guest's kernel was asked:\n{complaints}");
        let excused = |line: &&str| EXCUSED.iter().any(|words| line.contains(words));
        // Raw kernel messages begin with their level, as in <4>.
        let real = complaints.lines().filter(|line| line.trim_start().starts_with('<'));
        let real: Vec<_> = real.filter(|line| !excused(line)).collect();
        assert!(real.is_empty(), "the guest's kernel complains:\n{complaints}");
        self.assert_calm();
    }

    /// Fails if the guest has said on its own that something is wrong.
    pub fn assert_calm(&self) {
        let text = self.text();
        for words in MUST_NOT_SAY {
            assert!(!text.contains(words), "the guest says '{words}':\n{text}");
        }
    }
}

impl Linux {
    /// Migrates the guest to `destination` by the command line, and ends with the source's process.
    pub fn migrate_to(self, destination: Linux) -> Linux {
        let report = self.leave_for(&destination.vm.migrate_uri());
        println!("{report}");
        destination
    }

    /// Migrates the guest to whatever listens at `uri`, ends with this process, and gives what the
    /// command said.
    pub fn leave_for(self, uri: &str) -> String {
        let command = self.migrate_command(uri);
        self.leave_by(command)
    }

    /// The command that migrates it to `uri`. An emulated processor may need more than the usual 300 ms for the last
    /// pass's fixed costs alone, and then it never comes.
    pub fn migrate_command(&self, uri: &str) -> Command {
        let mut command = self.vm.migrate_command(uri);
        command.args(["--downtime", "3s"]);
        command
    }

    /// The same by this command.
    pub fn leave_by(mut self, mut command: Command) -> String {
        let out = command.output().expect("mini-vmm migrate starts");
        assert!(
            out.status.success(),
            "mini-vmm migrate: {}\nsource: {}",
            String::from_utf8_lossy(&out.stderr),
            self.vm.stderr(),
        );
        assert_eq!(self.vm.wait_exit(20), 0, "the source ends well:\n{}", self.vm.stderr());
        self.assert_calm();
        String::from_utf8_lossy(&out.stdout).into_owned()
    }
}
