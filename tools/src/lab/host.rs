//! One lab host: its QEMU process, from start to end.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use super::emulator::Emulator;
use super::streams::{Event, Output, Port, Streams};
use super::{ADDRESS_A, ADDRESS_B, HostOptions, LabCommand, image};
use crate::error::{Doing, Error, Result};
use crate::kernel::Kernel;
use crate::process;

/// The processor of every lab host, before `--cpu` changes it: all that TCG has, and SVM. Without the flags for
/// fast string instructions kernels and libraries copy by loops, which TCG translates well; it does REP MOVSB byte by
/// byte, and a busy guest's migration takes four times as long.
const CPU: &str = "max,+svm,+npt,-erms,-fsrm";

/// A panic reboots at once, which with `-no-reboot` ends QEMU. Mitigations only slow TCG down.
///
/// TCG's TSC is the real one, the same for all processors, but it has no CPUID bit that says so:
/// left alone, the kernel distrusts it, and KVM gives its guests a second-rate clock.
const KERNEL_ARGUMENTS: &str =
    "console=ttyS0 loglevel=5 panic=-1 mitigations=off tsc=reliable clocksource=tsc";

/// How long QEMU may take to be ready for the other host's connection.
const LINK_WAIT: Duration = Duration::from_secs(20);

/// A host that lives says so every five seconds; one that boots takes less than twenty.
const SILENCE: Duration = Duration::from_secs(60);

/// Everything that makes a host.
pub(super) struct Plan {
    /// `a` or `b`.
    pub(super) letter: char,
    /// What was asked for.
    pub(super) options: HostOptions,
    /// What emulates it.
    pub(super) emulator: Emulator,
    /// The kernel asked for.
    pub(super) kernel: Kernel,
    /// What it runs.
    pub(super) command: LabCommand,
    /// Where its output goes.
    pub(super) output: Output,
    /// The socket that joins it to the other host: A listens there, B connects.
    pub(super) link: Option<PathBuf>,
}

/// A running lab host. Dropping it ends its QEMU.
pub(super) struct Host {
    letter: char,
    child: Child,
    streams: Streams,
    output: Output,
    console: PathBuf,
    qemu_log: PathBuf,
    status: Option<u8>,
    /// When its first process last said something.
    heard: Instant,
}

impl Host {
    /// Boots a host. `scratch` is for files that nobody wants to see, `results` is shared with it.
    pub(super) fn start(
        plan: Plan,
        results: &Path,
        scratch: &Path,
        events: Sender<Event>,
    ) -> Result<Host> {
        let letter = plan.letter;
        let initrd = scratch.join(format!("initrd-{letter}"));
        let image = image::build(&plan, results)?;
        fs::write(&initrd, image).doing(|| format!("write {}", initrd.display()))?;
        let console = results.join(format!("console-{letter}.log"));
        let qemu_log = results.join(format!("qemu-{letter}.log"));
        let log = File::create(&qemu_log).doing(|| format!("create {}", qemu_log.display()))?;
        let err = log.try_clone().doing(|| format!("share {}", qemu_log.display()))?;

        let streams = Streams::listen(letter, plan.link.is_some(), scratch, events, &plan.output)?;
        let mut command = qemu(&plan, &initrd, &console, results, &streams);
        command.stdin(Stdio::null()).stdout(log).stderr(err);
        let child = command.spawn().map_err(|source| process::start_error(&command, source))?;
        let mut host = Host {
            letter,
            child,
            streams,
            output: plan.output,
            console,
            qemu_log,
            status: None,
            heard: Instant::now(),
        };
        if let (Some(link), 'a') = (&plan.link, letter) {
            host.wait_for_link(link)?;
        }
        Ok(host)
    }

    /// `a` or `b`.
    pub(super) fn letter(&self) -> char {
        self.letter
    }

    /// The exit status of its command, once that has ended.
    pub(super) fn status(&self) -> Option<u8> {
        self.status
    }

    /// Takes a line that the host's first process sent.
    pub(super) fn note(&mut self, line: &str, start: Instant) {
        self.heard = Instant::now();
        if line == "up" {
            self.output.say(format_args!(
                "lab host {} is up after {:.1} s",
                self.letter,
                start.elapsed().as_secs_f32()
            ));
        } else if let Some(status) =
            line.strip_prefix("exit ").and_then(|number| number.parse().ok())
        {
            self.status = Some(status);
        }
    }

    /// Whether QEMU has ended and all that the host's first process said has been taken.
    pub(super) fn is_gone(&mut self) -> Result<bool> {
        let ended = self.child.try_wait().doing(|| "wait for QEMU".to_owned())?.is_some();
        Ok(ended && self.streams.at_end())
    }

    /// Whether it has stopped saying that it lives, or has never begun to.
    pub(super) fn is_silent(&self) -> bool {
        self.heard.elapsed() > SILENCE
    }

    /// The error for a host that [is silent](Self::is_silent).
    pub(super) fn silent(&self) -> Error {
        let (host, console) = (self.letter, self.console.clone());
        Error::LabHostSilent { host, silence: SILENCE, console, tail: self.tail() }
    }

    /// The error for a host that is gone before its command's end.
    pub(super) fn died(&self) -> Error {
        let (host, console) = (self.letter, self.console.clone());
        Error::LabHostDied { host, console, tail: self.tail() }
    }

    /// The error for a command that takes too long.
    pub(super) fn timed_out(&self, limit: Duration) -> Error {
        let (host, console) = (self.letter, self.console.clone());
        Error::LabTimeout { host, limit, console, tail: self.tail() }
    }

    /// Waits until the host has shut itself down and all output is out.
    pub(super) fn finish(mut self, deadline: Instant) -> Result<()> {
        while Instant::now() < deadline {
            if self.child.try_wait().doing(|| "wait for QEMU".to_owned())?.is_some() {
                return self.streams.join();
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        self.output
            .say(format_args!("lab host {} does not shut down; its QEMU is killed", self.letter));
        Ok(())
    }

    fn wait_for_link(&mut self, link: &Path) -> Result<()> {
        let deadline = Instant::now() + LINK_WAIT;
        while !link.exists() {
            if self.is_gone()? {
                return Err(self.died());
            }
            if Instant::now() > deadline {
                return Err(self.timed_out(LINK_WAIT));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    fn tail(&self) -> String {
        let read =
            |path: &Path| String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned();
        process::tail(&(read(&self.console) + &read(&self.qemu_log)))
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // It may have ended already, and then there is nothing to kill.
        let _ = self.child.kill();
        let _ = self.child.wait();
        // What it had said is wanted most when it has failed; that it can't be passed on has no ear here.
        let _ = self.streams.join();
    }
}

fn qemu(plan: &Plan, initrd: &Path, console: &Path, results: &Path, streams: &Streams) -> Command {
    let options = &plan.options;
    let cpu = match &options.cpu {
        Some(features) => format!("{CPU},{features}"),
        None => CPU.to_owned(),
    };
    // However this process ends, its virtual machines end with it; in a process group of their own
    // they don't see the terminal's Ctrl-C, which is handled here.
    let mut command = Command::new("setpriv");
    std::os::unix::process::CommandExt::process_group(&mut command, 0);
    command.args(["--pdeathsig", "KILL"]);
    plan.emulator.add_to(&mut command);
    command
        .args(["-name", &format!("lab-{}", plan.letter)])
        .args(["-accel", "tcg,thread=multi", "-M", "q35", "-cpu", &cpu])
        .args(["-smp", &options.smp.to_string(), "-m", &options.memory_mib.to_string()])
        .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
        .args(["-serial", &format!("file:{}", console.display())])
        .arg("-kernel")
        .arg(&plan.kernel.bzimage)
        .arg("-initrd")
        .arg(initrd)
        .args(["-append", KERNEL_ARGUMENTS])
        .args(["-device", "virtio-rng-pci"])
        .args(["-fsdev", "local,id=root,path=/,security_model=none,readonly=on,multidevs=remap"])
        .args(["-device", "virtio-9p-pci,fsdev=root,mount_tag=root"])
        .args([
            "-fsdev",
            &format!("local,id=results,path={},security_model=none", escaped(results)),
        ])
        .args(["-device", "virtio-9p-pci,fsdev=results,mount_tag=results"])
        .args(["-device", "virtio-serial-pci"]);
    for (port, socket) in [(Port::Output, "out"), (Port::Errors, "err"), (Port::Control, "ctl")] {
        let path = escaped(streams.socket(port));
        command
            .args(["-chardev", &format!("socket,id={socket},path={path},server=off")])
            .args(["-device", &format!("virtserialport,chardev={socket},name=lab.{socket}")]);
    }
    if let Some(link) = &plan.link {
        let server = if plan.letter == 'a' { "on" } else { "off" };
        let path = escaped(link);
        command
            .args([
                "-netdev",
                &format!("stream,id=link,server={server},addr.type=unix,addr.path={path}"),
            ])
            .args([
                "-device",
                &format!("virtio-net-pci,netdev=link,romfile=,mac=52:54:00:77:00:0{}", plan.letter),
            ]);
    }
    command
}

/// The address of a host on the link.
pub(super) fn address(plan: &Plan) -> &'static str {
    match (&plan.link, plan.letter) {
        (None, _) => "",
        (Some(_), 'a') => ADDRESS_A,
        (Some(_), _) => ADDRESS_B,
    }
}

/// A path inside a QEMU option, where a comma must be doubled.
fn escaped(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}
