//! Opening the host's end, and writing to it.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::termios::{LocalFlags, SetArg, Termios, tcgetattr, tcsetattr};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::config::CharBackend;

/// A serial line's end could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum CharError {
    /// The file, socket or pseudo-terminal.
    #[error("cannot open {what} for the serial line or console")]
    Open {
        /// What was to be opened.
        what: String,
        /// The reason.
        #[source]
        source: io::Error,
    },
    /// Somebody listens there.
    #[error("another process listens on the socket {0}: choose another path")]
    Taken(PathBuf),
}

/// What is connected at the moment.
pub(super) struct Line {
    /// Written to.
    pub(super) output: Option<OwnedFd>,
    /// Read from; for a socket or pseudo-terminal the same file as `output`.
    pub(super) input: Option<OwnedFd>,
    /// The other ends of a pseudo-terminal, kept open so that ours does not hang up.
    _slave: Option<OwnedFd>,
}

/// The host's end of one line.
pub struct Chardev {
    pub(super) line: Arc<Mutex<Line>>,
    pub(super) listener: Option<UnixListener>,
    /// Rung when the line did not take a byte.
    pub(super) stuck: Arc<EventFd>,
    path: Option<PathBuf>,
    socket: Option<PathBuf>,
    terminal: Option<Termios>,
}

fn open_error(what: impl Into<String>) -> impl FnOnce(io::Error) -> CharError {
    let what = what.into();
    move |source| CharError::Open { what, source }
}

impl Chardev {
    /// Opens it.
    pub fn open(backend: &CharBackend) -> Result<Self, CharError> {
        let stuck = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(open_error("an eventfd"))?;
        let mut line = Line { output: None, input: None, _slave: None };
        let mut dev = Self {
            line: Arc::new(Mutex::new(Line { output: None, input: None, _slave: None })),
            listener: None,
            stuck: Arc::new(stuck),
            path: None,
            socket: None,
            terminal: None,
        };
        match backend {
            CharBackend::Null => {}
            CharBackend::File(path) => {
                let file = File::create(path)
                    .map_err(open_error(format!("the file {}", path.display())))?;
                line.output = Some(file.into());
            }
            CharBackend::Unix(path) => {
                dev.listener = Some(listen(path)?);
                dev.path = Some(path.clone());
                dev.socket = Some(path.clone());
            }
            CharBackend::Pty => {
                let pty = nix::pty::openpty(None, None)
                    .map_err(|e| open_error("a pseudo-terminal")(e.into()))?;
                let name = nix::unistd::ttyname(&pty.slave)
                    .map_err(|e| open_error("a pseudo-terminal")(e.into()))?;
                let input = pty.master.try_clone().map_err(open_error("a pseudo-terminal"))?;
                raw_terminal(&pty.slave);
                dev.path = Some(name);
                line =
                    Line { output: Some(pty.master), input: Some(input), _slave: Some(pty.slave) };
            }
            CharBackend::Stdio => {
                let output = io::stdout().as_fd().try_clone_to_owned();
                let input = io::stdin().as_fd().try_clone_to_owned();
                dev.terminal = keys_one_by_one();
                line.output = Some(output.map_err(open_error("standard output"))?);
                line.input = Some(input.map_err(open_error("standard input"))?);
            }
        }
        *lock(&dev.line) = line;
        Ok(dev)
    }

    /// Where a terminal can attach: the socket, or the pseudo-terminal's device.
    pub fn path(&self) -> Option<PathBuf> {
        self.path.clone()
    }

    /// The end that a device writes to.
    pub fn writer(&self) -> Box<dyn Write + Send> {
        Box::new(LineWriter { line: self.line.clone(), stuck: self.stuck.clone() })
    }
}

impl Drop for Chardev {
    fn drop(&mut self) {
        if let Some(path) = &self.socket {
            let _ = fs::remove_file(path);
        }
        if let Some(terminal) = &self.terminal {
            let _ = tcsetattr(io::stdin(), SetArg::TCSANOW, terminal);
        }
    }
}

pub(super) fn lock(line: &Mutex<Line>) -> MutexGuard<'_, Line> {
    line.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Listens on a socket; one that was left behind by a dead process is replaced.
fn listen(path: &PathBuf) -> Result<UnixListener, CharError> {
    let error = || format!("the socket {}", path.display());
    let listener = match UnixListener::bind(path) {
        Err(e) if e.kind() == io::ErrorKind::AddrInUse => {
            if std::os::unix::net::UnixStream::connect(path).is_ok() {
                return Err(CharError::Taken(path.clone()));
            }
            fs::remove_file(path).map_err(open_error(error()))?;
            UnixListener::bind(path)
        }
        r => r,
    }
    .map_err(open_error(error()))?;
    listener.set_nonblocking(true).map_err(open_error(error()))?;
    Ok(listener)
}

fn raw_terminal(fd: &OwnedFd) {
    if let Ok(mut t) = tcgetattr(fd) {
        nix::sys::termios::cfmakeraw(&mut t);
        let _ = tcsetattr(fd, SetArg::TCSANOW, &t);
    }
}

/// Makes the terminal hand over every key at once, without echo; Ctrl-C still interrupts. Gives
/// what it was before.
fn keys_one_by_one() -> Option<Termios> {
    let before = tcgetattr(io::stdin()).ok()?;
    let mut t = before.clone();
    t.local_flags.remove(LocalFlags::ICANON | LocalFlags::ECHO);
    tcsetattr(io::stdin(), SetArg::TCSANOW, &t).ok()?;
    Some(before)
}

/// How the terminal on standard input behaved, for when nobody else can put that back.
pub struct TerminalMode(Option<Termios>);

impl TerminalMode {
    /// As it is now; nothing if it is no terminal.
    pub fn of_stdin() -> Self {
        Self(tcgetattr(io::stdin()).ok())
    }

    /// Puts it back, if it has been changed: a process in the background that sets it is stopped.
    pub fn restore(&self) {
        if let Some(before) = &self.0
            && tcgetattr(io::stdin()).is_ok_and(|now| now != *before)
        {
            let _ = tcsetattr(io::stdin(), SetArg::TCSANOW, before);
        }
    }
}

struct LineWriter {
    line: Arc<Mutex<Line>>,
    stuck: Arc<EventFd>,
}

impl Write for LineWriter {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let line = lock(&self.line);
        // Nobody listens: a cable that leads nowhere.
        let Some(output) = &line.output else { return Ok(buf.len()) };
        // A terminal is shared with other processes, so it must not be made non-blocking; asking
        // first does as well for single bytes.
        let mut fds = [PollFd::new(output.as_fd(), PollFlags::POLLOUT)];
        match poll(&mut fds, PollTimeout::ZERO) {
            Ok(0) => {
                let _ = self.stuck.write(1);
                return Err(io::ErrorKind::WouldBlock.into());
            }
            Ok(_) => {}
            Err(e) => return Err(e.into()),
        }
        nix::unistd::write(output, buf).map_err(io::Error::from)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
