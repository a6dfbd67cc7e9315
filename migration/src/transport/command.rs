//! A shell command that a VM goes to or comes from. It never outlives whoever started it.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use super::StreamError;
use super::pipe::set_nonblocking;

/// How often a command that is to end is looked at.
const STEP: Duration = Duration::from_millis(10);
/// How long a command has to end by itself after a SIGTERM.
const GRACE: Duration = Duration::from_millis(500);
/// How long the reason is waited for, when a command has closed its pipe.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// A command and everything that it has started. Dropping it ends them.
#[derive(Debug)]
pub(super) struct Running {
    command: String,
    child: Child,
    ended: Option<ExitStatus>,
}

impl Running {
    /// Starts `sh -c command` with our end of a pipe at its standard input, or output.
    pub(super) fn start(command: &str, writes: bool) -> Result<(Self, File), StreamError> {
        let failed = |source| StreamError::Spawn { command: command.to_owned(), source };
        // What it says is shown. A console may be on standard output, so that is not its place.
        let said = io::stderr().as_fd().try_clone_to_owned().map_err(failed)?;
        let mut shell = Command::new("/bin/sh");
        shell.arg("-c").arg(command);
        // A group of its own: Ctrl-C in a terminal is for us, who tell it, and it can be ended with
        // all that it has started.
        shell.process_group(0);
        if writes {
            shell.stdin(Stdio::null()).stdout(Stdio::piped());
        } else {
            shell.stdin(Stdio::piped()).stdout(said);
        }
        let mut child = shell.spawn().map_err(failed)?;
        let ours: Option<OwnedFd> = if writes {
            child.stdout.take().map(Into::into)
        } else {
            child.stdin.take().map(Into::into)
        };
        let running = Self { command: command.to_owned(), child, ended: None };
        let pipe = ours.ok_or_else(|| failed(io::ErrorKind::BrokenPipe.into()))?;
        set_nonblocking(pipe.as_fd()).map_err(failed)?;
        Ok((running, pipe.into()))
    }

    fn look(&mut self) -> Option<ExitStatus> {
        if self.ended.is_none() {
            match self.child.try_wait() {
                Ok(status) => self.ended = status,
                Err(error) => tracing::warn!(%error, "a command can't be waited for"),
            }
        }
        self.ended
    }

    fn wait(&mut self, stop: impl Fn() -> bool) -> Option<ExitStatus> {
        loop {
            if let Some(status) = self.look() {
                return Some(status);
            }
            if stop() {
                return None;
            }
            thread::sleep(STEP);
        }
    }

    fn failed(&self, how: String) -> StreamError {
        StreamError::Command { command: self.command.clone(), how }
    }

    /// Waits until it has ended, for as long as that takes; anything but status 0 is a failure.
    pub(super) fn succeed(&mut self, given_up: &dyn Fn() -> bool) -> Result<(), StreamError> {
        match self.wait(given_up) {
            Some(status) if status.success() => Ok(()),
            Some(status) => Err(self.failed(how(status))),
            None => Err(StreamError::GivenUp),
        }
    }

    /// It has closed its end of the pipe too early: says how it ended.
    pub(super) fn last_words(&mut self) -> StreamError {
        let begin = Instant::now();
        let how = match self.wait(|| begin.elapsed() > LAST_WORDS) {
            Some(status) => how(status),
            None => "closed its end of the pipe".to_owned(),
        };
        self.failed(format!("{how}, before the whole VM had gone through it"))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.look().is_some() {
            return;
        }
        let group = Pid::from_raw(i32::try_from(self.child.id()).unwrap_or(i32::MAX));
        let begin = Instant::now();
        for signal in [Signal::SIGTERM, Signal::SIGKILL] {
            if let Err(error) = killpg(group, signal) {
                tracing::debug!(%error, "a command can't be told to end");
            }
            if signal == Signal::SIGTERM && self.wait(|| begin.elapsed() > GRACE).is_some() {
                return;
            }
        }
        if let Err(error) = self.child.wait() {
            tracing::warn!(%error, "a command can't be waited for");
        }
    }
}

fn how(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("ended with status {code}"),
        (None, Some(signal)) => format!("was ended by signal {signal}"),
        (None, None) => "ended in a way that the host does not tell".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    #[test]
    fn the_status_is_told() {
        let (mut ran, pipe) = Running::start("cat >/dev/null", false).expect("a shell");
        (&pipe).write_all(b"bytes").expect("room");
        drop(pipe);
        ran.succeed(&|| false).expect("it succeeds");
        let (mut ran, _pipe) = Running::start("exit 3", false).expect("a shell");
        let why = ran.succeed(&|| false).expect_err("it fails").to_string();
        assert_eq!(why, "the command 'exit 3' ended with status 3");
        assert!(ran.last_words().to_string().contains("status 3, before the whole VM"));
    }

    #[test]
    fn whoever_gives_up_leaves_nothing_behind() {
        let begin = Instant::now();
        let (mut ran, mut pipe) =
            Running::start("trap '' TERM; echo $$; while :; do sleep 1; done", true)
                .expect("a shell");
        let mut pid = String::new();
        while !pid.ends_with('\n') {
            let mut byte = [0];
            match pipe.read(&mut byte) {
                Ok(1) => pid.push(char::from(byte[0])),
                Ok(_) => panic!("it has ended"),
                Err(_) => thread::sleep(STEP),
            }
        }
        assert!(matches!(ran.succeed(&|| true), Err(StreamError::GivenUp)));
        drop(ran);
        assert!(!std::path::Path::new("/proc").join(pid.trim()).exists());
        assert!(begin.elapsed() < Duration::from_secs(20));
    }
}
