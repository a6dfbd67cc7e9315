//! One client, from greeting to farewell.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use migration::params::Parameters;

use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::broadcast::error::{RecvError, TryRecvError};
use tokio::sync::{broadcast, watch};
use tokio::task::JoinHandle;

use super::args::Args;
use super::commands;
use super::framer::{Frame, Framer};
use super::passing::Passed;
use super::request::{self, Request};
use super::{QmpError, event};
use crate::control::{TimedEvent, VmControl};

/// What all clients share.
pub(super) struct Shared {
    pub(super) vm: Arc<dyn VmControl>,
    /// Held while parameters are read, changed and written, so that of two clients none is lost.
    changing: Mutex<()>,
}

impl Shared {
    pub(super) fn new(vm: Arc<dyn VmControl>) -> Self {
        Self { vm, changing: Mutex::new(()) }
    }

    /// Reads the migration's parameters, lets `change` change them, and sets them: all or nothing.
    pub(super) fn change_parameters(
        &self,
        change: impl FnOnce(&mut Parameters) -> Result<(), QmpError>,
    ) -> Result<(), QmpError> {
        // It guards no data that a panic could leave half-done.
        let _guard = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut parameters = self.vm.migrate_parameters();
        change(&mut parameters)?;
        Ok(self.vm.set_migrate_parameters(parameters)?)
    }
}

/// What a client is told of us; QEMU's version, because clients decide by it what they may use.
pub(super) fn version() -> Value {
    json!({
        "qemu": { "major": 7, "minor": 2, "micro": 0 },
        "package": concat!("mini-vmm ", env!("CARGO_PKG_VERSION")),
    })
}

type Running = JoinHandle<Result<Value, QmpError>>;

struct Session<W> {
    shared: Arc<Shared>,
    /// Descriptors that come with the commands.
    passed: Passed,
    writer: W,
    negotiated: bool,
}

/// Serves one client until it leaves, breaks the rules, or `stopping` becomes true.
///
/// # Errors
/// What the socket says; of interest to a log only.
pub(super) async fn serve<S>(
    stream: S,
    shared: Arc<Shared>,
    passed: Passed,
    mut stopping: watch::Receiver<bool>,
) -> io::Result<()>
where
    S: AsyncRead + AsyncWrite,
{
    // Before the greeting, so that nothing that happens after it is missed.
    let mut events = shared.vm.events();
    let (mut reader, writer) = tokio::io::split(stream);
    let mut session = Session { shared, passed, writer, negotiated: false };
    session.write(&json!({ "QMP": { "version": version(), "capabilities": [] } })).await?;

    let mut framer = Framer::default();
    let mut waiting = std::collections::VecDeque::new();
    let mut running: Option<(Option<Value>, Running)> = None;
    let mut buffer = vec![0; 4096];
    loop {
        if running.is_none() {
            match waiting.pop_front() {
                Some(Frame::TooLong) => return session.reply(None, Err(too_long())).await,
                Some(frame) => running = session.begin(frame).await?,
                None => {}
            }
        }
        let idle = running.is_none() && waiting.is_empty();
        tokio::select! {
            // Events first: one that a command caused goes out before the command's reply.
            biased;
            received = events.recv() => match received {
                Ok(event) => session.tell(&event).await?,
                // This client has not read for a thousand events: it must not believe it knows.
                Err(RecvError::Lagged(_)) => return Ok(()),
                Err(RecvError::Closed) => return Ok(()),
            },
            outcome = finished(&mut running) => {
                let id = running.take().and_then(|(id, _)| id);
                session.drain(&mut events).await?;
                session.reply(id, outcome).await?;
            }
            () = asked_to_stop(&mut stopping), if running.is_none() => {
                session.drain(&mut events).await?;
                return session.writer.shutdown().await;
            }
            read = reader.read(&mut buffer), if idle => match read? {
                0 => return Ok(()),
                n => framer.push(buffer.get(..n).unwrap_or_default(), |frame| waiting.push_back(frame)),
            },
            () = std::future::ready(()), if running.is_none() && !waiting.is_empty() => {}
        }
    }
}

/// Returns when the server stops, or is gone.
pub(super) async fn asked_to_stop(stopping: &mut watch::Receiver<bool>) {
    let _ = stopping.wait_for(|stop| *stop).await;
}

fn too_long() -> QmpError {
    QmpError::Syntax(format!("a request is longer than {} bytes", super::framer::MAX_LENGTH))
}

/// The outcome of the running command; never, if none runs.
async fn finished(running: &mut Option<(Option<Value>, Running)>) -> Result<Value, QmpError> {
    match running {
        Some((_, task)) => task.await.unwrap_or(Err(QmpError::Lost)),
        None => std::future::pending().await,
    }
}

impl<W: AsyncWrite + Unpin> Session<W> {
    /// Starts what a frame asks for, or answers it at once.
    async fn begin(&mut self, frame: Frame) -> io::Result<Option<(Option<Value>, Running)>> {
        let (id, request) = match frame {
            Frame::Text(text) => request::parse(&text),
            Frame::Garbage(why) => (None, Err(QmpError::Syntax(why.to_string()))),
            Frame::TooLong => (None, Err(too_long())),
        };
        match request.and_then(|request| self.prepare(request)) {
            Ok(Some(task)) => Ok(Some((id, task))),
            Ok(None) => self.reply(id, Ok(json!({}))).await.map(|()| None),
            Err(error) => self.reply(id, Err(error)).await.map(|()| None),
        }
    }

    /// A command on its thread; nothing for the negotiation, which is done right here.
    fn prepare(&mut self, request: Request) -> Result<Option<Running>, QmpError> {
        if request.command == "qmp_capabilities" {
            self.negotiate(request)?;
            return Ok(None);
        }
        if !self.negotiated {
            return Err(QmpError::NotNegotiated);
        }
        let command =
            commands::find(&request.command).ok_or(QmpError::CommandNotFound(request.command))?;
        let shared = Arc::clone(&self.shared);
        let args = Args::new(request.arguments);
        let passed = self.passed.clone();
        Ok(Some(tokio::task::spawn_blocking(move || command.run(&shared, args, &passed))))
    }

    fn negotiate(&mut self, request: Request) -> Result<(), QmpError> {
        if self.negotiated {
            return Err(QmpError::AlreadyNegotiated);
        }
        let mut args = Args::new(request.arguments);
        let wanted = args.optional_strings("enable")?;
        args.finish()?;
        // We offer none (QEMU's only one is "oob"), so none can be enabled.
        if let Some(name) = wanted.into_iter().next() {
            return Err(QmpError::Value("enable".to_string(), name));
        }
        self.negotiated = true;
        Ok(())
    }

    async fn tell(&mut self, event: &TimedEvent) -> io::Result<()> {
        if !self.negotiated {
            return Ok(());
        }
        self.write(&event::to_json(event)).await
    }

    /// Sends the events that have happened up to now.
    async fn drain(&mut self, events: &mut broadcast::Receiver<TimedEvent>) -> io::Result<()> {
        loop {
            match events.try_recv() {
                Ok(event) => self.tell(&event).await?,
                Err(TryRecvError::Empty | TryRecvError::Closed) => return Ok(()),
                Err(TryRecvError::Lagged(_)) => return Err(io::ErrorKind::TimedOut.into()),
            }
        }
    }

    async fn reply(
        &mut self,
        id: Option<Value>,
        outcome: Result<Value, QmpError>,
    ) -> io::Result<()> {
        let mut reply = match outcome {
            Ok(value) => json!({ "return": value }),
            Err(error) => json!({ "error": error.to_json() }),
        };
        if let (Some(id), Some(members)) = (id, reply.as_object_mut()) {
            members.insert("id".to_string(), id);
        }
        self.write(&reply).await
    }

    async fn write(&mut self, message: &Value) -> io::Result<()> {
        let mut line = message.to_string();
        line.push_str("\r\n");
        self.writer.write_all(line.as_bytes()).await
    }
}
