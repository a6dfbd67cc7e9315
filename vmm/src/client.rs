//! A client of the control socket: what `mini-vmm migrate`, `status` and the others speak through.
//!
//! It blocks, and takes one command at a time. It also talks to a QEMU's control socket.

use std::collections::VecDeque;
use std::io::{self, BufRead, BufReader, IoSlice, Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde_json::{Value, json};
use thiserror::Error;

/// Longest message taken from a server, in bytes.
const MAX_MESSAGE: u64 = 16 << 20;

/// How long a server may take to answer. `stop` waits for devices, and those for disks.
const PATIENCE: Duration = Duration::from_secs(60);

/// What went wrong between us and a VM's control socket.
#[derive(Debug, Error)]
pub enum ClientError {
    /// Nobody there.
    #[error("no VM answers at the control socket '{path}'")]
    Connect {
        /// The socket.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Something else answers there.
    #[error("what answers at '{path}' does not speak QMP: it said {found}")]
    NotQmp {
        /// The socket.
        path: String,
        /// The beginning of what came.
        found: String,
    },
    /// The VM ended, or hung up.
    #[error("the VM closed its control socket")]
    Closed,
    /// No answer in time.
    #[error("the VM has not answered '{command}' for {} seconds", PATIENCE.as_secs())]
    Silent {
        /// What was asked.
        command: String,
    },
    /// The VM refused.
    #[error("{desc}")]
    Refused {
        /// QMP's class, for programs.
        class: String,
        /// The reason, for people.
        desc: String,
    },
    /// The connection broke.
    #[error("the connection to the VM's control socket broke")]
    Io(#[from] io::Error),
}

/// A connection past its negotiation.
#[derive(Debug)]
pub struct QmpClient {
    reader: BufReader<UnixStream>,
    /// What the server says it is: "mini-vmm 0.1.0".
    package: String,
    events: VecDeque<Value>,
    next_id: u64,
}

impl QmpClient {
    /// Connects and negotiates.
    ///
    /// # Errors
    /// [`ClientError::Connect`] if nobody listens, [`ClientError::NotQmp`] if something else does.
    pub fn connect(path: &Path) -> Result<Self, ClientError> {
        let shown = path.display().to_string();
        let open = || {
            let stream = UnixStream::connect(path)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            stream.set_write_timeout(Some(PATIENCE))?;
            Ok(stream)
        };
        let stream =
            open().map_err(|source| ClientError::Connect { path: shown.clone(), source })?;
        let mut client = Self {
            reader: BufReader::new(stream),
            package: String::new(),
            events: VecDeque::new(),
            next_id: 1,
        };
        let greeting = client.receive("the greeting")?;
        let Some(package) = greeting["QMP"]["version"]["package"].as_str() else {
            let found = greeting.to_string().chars().take(60).collect();
            return Err(ClientError::NotQmp { path: shown, found });
        };
        client.package = package.to_string();
        client.execute("qmp_capabilities", json!({}))?;
        Ok(client)
    }

    /// Whether the other side is a mini-vmm, not a QEMU.
    #[must_use]
    pub fn is_mini_vmm(&self) -> bool {
        self.package.starts_with("mini-vmm")
    }

    /// Runs a command, and keeps the events that come meanwhile.
    ///
    /// # Errors
    /// [`ClientError::Refused`] with the VM's reason; the others if there was no answer.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, ClientError> {
        let (id, request) = self.request(command, arguments);
        self.reader.get_mut().write_all(request.as_bytes()).map_err(broken)?;
        self.answer(command, id)
    }

    /// Hands an open descriptor to the VM, which keeps it under this name.
    ///
    /// # Errors
    /// As [`execute`](Self::execute).
    pub fn pass_descriptor(&mut self, name: &str, fd: BorrowedFd<'_>) -> Result<(), ClientError> {
        let (id, request) = self.request("getfd", json!({ "fdname": name }));
        let socket = self.reader.get_mut();
        let fds = [fd.as_raw_fd()];
        let control = [ControlMessage::ScmRights(&fds)];
        let parts = [IoSlice::new(request.as_bytes())];
        let flags = MsgFlags::MSG_NOSIGNAL;
        let sent = sendmsg::<()>(socket.as_raw_fd(), &parts, &control, flags, None)
            .map_err(|e| broken(e.into()))?;
        // The descriptor has gone with the first of them.
        let rest = request.as_bytes().get(sent..).unwrap_or_default();
        socket.write_all(rest).map_err(broken)?;
        self.answer("getfd", id).map(drop)
    }

    fn request(&mut self, command: &str, arguments: Value) -> (u64, String) {
        let id = self.next_id;
        self.next_id += 1;
        let request = json!({ "execute": command, "arguments": arguments, "id": id });
        (id, format!("{request}\r\n"))
    }

    fn answer(&mut self, command: &str, id: u64) -> Result<Value, ClientError> {
        loop {
            let mut message = self.receive(command)?;
            if message.get("event").is_some() {
                self.events.push_back(message);
                continue;
            }
            if message["id"] != id {
                continue;
            }
            if let Some(error) = message.get("error") {
                let text =
                    |key: &str| error[key].as_str().unwrap_or("an error without words").to_string();
                return Err(ClientError::Refused { class: text("class"), desc: text("desc") });
            }
            return Ok(message["return"].take());
        }
    }

    /// Events that came while commands were waited for, in their order.
    pub fn take_events(&mut self) -> impl Iterator<Item = Value> + '_ {
        self.events.drain(..)
    }

    /// Waits until the VM hangs up, as it does when it ends.
    ///
    /// # Errors
    /// [`ClientError::Silent`] if it doesn't.
    pub fn wait_for_end(&mut self) -> Result<(), ClientError> {
        loop {
            match self.receive("quit") {
                Ok(_) => {}
                Err(ClientError::Closed) => return Ok(()),
                Err(error) => return Err(error),
            }
        }
    }

    fn receive(&mut self, command: &str) -> Result<Value, ClientError> {
        let mut line = Vec::new();
        let mut limited = (&mut self.reader).take(MAX_MESSAGE);
        match limited.read_until(b'\n', &mut line) {
            Ok(0) => return Err(ClientError::Closed),
            Ok(_) => {}
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                return Err(ClientError::Silent { command: command.to_string() });
            }
            Err(e) => return Err(broken(e)),
        }
        // Not JSON: handed on as text, for the error that follows from it.
        Ok(serde_json::from_slice(&line)
            .unwrap_or_else(|_| Value::from(String::from_utf8_lossy(&line).into_owned())))
    }
}

fn broken(error: io::Error) -> ClientError {
    match error.kind() {
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => ClientError::Closed,
        _ => ClientError::Io(error),
    }
}
