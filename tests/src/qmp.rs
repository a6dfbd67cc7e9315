//! A small blocking QMP client.

use std::collections::VecDeque;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use crate::wait;

/// A connection to a control socket, past its greeting.
pub struct Qmp {
    reader: BufReader<UnixStream>,
    writer: UnixStream,
    events: VecDeque<Value>,
}

/// What the other side answered instead of a result.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{class}: {desc}")]
pub struct QmpError {
    /// `GenericError`, `CommandNotFound`, …
    pub class: String,
    /// For people.
    pub desc: String,
}

impl Qmp {
    /// Connects as soon as the socket answers.
    pub fn connect(path: &Path) -> Self {
        let stream = wait::until(
            "the control socket",
            20,
            || UnixStream::connect(path).ok(),
            || path.display().to_string(),
        );
        let patience = Duration::from_secs(u64::from(60 * wait::slowness()));
        stream.set_read_timeout(Some(patience)).expect("a read timeout");
        let writer = stream.try_clone().expect("a second handle");
        let mut qmp = Self { reader: BufReader::new(stream), writer, events: VecDeque::new() };
        let greeting = qmp.read();
        assert!(greeting.get("QMP").is_some(), "no greeting: {greeting}");
        qmp.execute("qmp_capabilities", json!({})).expect("negotiation");
        qmp
    }

    /// Connects to a process that may end or stand still meanwhile, and waits `patience` for each
    /// answer. After an error the connection is of no use any more.
    ///
    /// # Errors
    /// Nobody answers.
    pub fn attempt(path: &Path, patience: Duration) -> io::Result<Self> {
        let stream = UnixStream::connect(path)?;
        stream.set_read_timeout(Some(patience))?;
        stream.set_write_timeout(Some(patience))?;
        let writer = stream.try_clone()?;
        let mut qmp = Self { reader: BufReader::new(stream), writer, events: VecDeque::new() };
        qmp.try_read()?;
        qmp.try_execute("qmp_capabilities", json!({}))?.map_err(io::Error::other)?;
        Ok(qmp)
    }

    fn try_read(&mut self) -> io::Result<Value> {
        let mut line = String::new();
        if self.reader.read_line(&mut line)? == 0 {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "the control socket was closed",
            ));
        }
        serde_json::from_str(&line).map_err(|e| io::Error::other(format!("not JSON ({e}): {line}")))
    }

    fn read(&mut self) -> Value {
        self.try_read().unwrap_or_else(|e| panic!("no line from the control socket: {e}"))
    }

    /// Sends a command and gives its answer; events that come first are kept.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        let answered = self.try_execute(command, arguments);
        answered.unwrap_or_else(|e| panic!("{command}: no answer from the control socket: {e}"))
    }

    /// The same, of a process that may end meanwhile.
    ///
    /// # Errors
    /// No answer came.
    pub fn try_execute(
        &mut self,
        command: &str,
        arguments: Value,
    ) -> io::Result<Result<Value, QmpError>> {
        let request = json!({ "execute": command, "arguments": arguments });
        // In one piece: a `quit` is obeyed as soon as its last bracket is there.
        self.writer.write_all(format!("{request}\n").as_bytes())?;
        loop {
            let mut answer = self.try_read()?;
            if answer.get("event").is_some() {
                self.events.push_back(answer);
            } else if let Some(error) = answer.get("error") {
                let text = |key: &str| error[key].as_str().unwrap_or_default().to_string();
                return Ok(Err(QmpError { class: text("class"), desc: text("desc") }));
            } else {
                return Ok(Ok(answer["return"].take()));
            }
        }
    }

    /// A command without arguments that must succeed.
    pub fn ask(&mut self, command: &str) -> Value {
        self.execute(command, json!({})).unwrap_or_else(|e| panic!("{command}: {e}"))
    }

    /// The status word of `query-status`.
    pub fn status(&mut self) -> String {
        self.ask("query-status")["status"].as_str().unwrap_or_default().to_string()
    }

    /// Waits for an event of this name and gives it; others before it are dropped.
    pub fn event(&mut self, name: &str) -> Value {
        loop {
            let event = match self.events.pop_front() {
                Some(event) => event,
                None => self.read(),
            };
            if event["event"] == name {
                return event;
            }
        }
    }

    /// The names of all events that have come since the last look, `MIGRATION` with its status.
    pub fn drain_event_names(&mut self) -> Vec<String> {
        // Any answer comes behind the events that happened before it.
        self.ask("query-status");
        self.events
            .drain(..)
            .map(|e| match (e["event"].as_str(), e["data"]["status"].as_str()) {
                (Some(name), Some(status)) => format!("{name} {status}"),
                (name, _) => name.unwrap_or_default().to_string(),
            })
            .collect()
    }

    /// Polls `query-migrate` until its status is final, and gives the answer.
    pub fn wait_migrated(&mut self, seconds: u32) -> Value {
        let mut last = Value::Null;
        let shown = std::cell::RefCell::new(Value::Null);
        wait::until(
            "the migration's end",
            seconds,
            || {
                last = self.ask("query-migrate");
                shown.replace(last.clone());
                let status = last["status"].as_str().unwrap_or_default();
                matches!(status, "completed" | "failed" | "cancelled").then(|| last.clone())
            },
            || shown.borrow().to_string(),
        )
    }
}
