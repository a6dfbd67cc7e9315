//! Sockets, clients, start and stop.

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener as StdListener;
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind as nix_bind, listen, socket,
};
use nix::sys::stat::{Mode, fchmod};
use thiserror::Error;
use tokio::net::UnixListener;
use tokio::runtime::{Builder, Runtime};
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::passing::Passing;
use super::session::{Shared, asked_to_stop, serve};
use crate::control::VmControl;

/// Most clients at once. One more is let in when another has left.
const MAX_CLIENTS: usize = 32;

/// Threads for commands that run at the same time.
const COMMAND_THREADS: usize = 8;

/// How long clients get, when the VM ends, to take their last events.
const FAREWELL: Duration = Duration::from_secs(1);

/// Why the control socket can't be served.
#[derive(Debug, Error)]
pub enum ServerError {
    /// The socket's address can't be taken.
    #[error("the control socket '{path}' can't be opened{}", hint(.source))]
    Bind {
        /// The path.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// No thread, or no event queue, to be had from the host.
    #[error("the control socket's thread can't be started")]
    Thread(#[source] io::Error),
}

fn hint(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::AddrInUse => {
            ": another process listens there (choose another path, or end that process)"
        }
        _ => "",
    }
}

/// Opens a socket that only this user can connect to. A socket file that nobody listens on any
/// more is replaced.
///
/// # Errors
/// If somebody listens there, something else than a socket is there, or the path can't be used.
pub fn bind(path: &Path) -> Result<StdListener, ServerError> {
    let error = |source: io::Error| ServerError::Bind { path: path.display().to_string(), source };
    match std::os::unix::net::UnixStream::connect(path) {
        Ok(_) => return Err(error(io::ErrorKind::AddrInUse.into())),
        // Refused: a socket whose process has gone. Anything that isn't a socket gives this, too,
        // and is not ours to remove.
        Err(e) if e.kind() == io::ErrorKind::ConnectionRefused && is_socket(path) => {
            std::fs::remove_file(path).map_err(error)?;
        }
        Err(_) => {}
    }
    let open = || -> nix::Result<StdListener> {
        let fd = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
        // The file that `bind` makes takes the socket's mode: there is no moment when others could
        // connect.
        fchmod(&fd, Mode::S_IRUSR | Mode::S_IWUSR)?;
        nix_bind(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
        listen(&fd, Backlog::new(16)?)?;
        Ok(StdListener::from(fd))
    };
    open().map_err(|e| error(e.into()))
}

fn is_socket(path: &Path) -> bool {
    use std::os::unix::fs::FileTypeExt;
    std::fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_socket())
}

/// A control socket that can be connected to, and whose clients wait: there is no VM yet.
#[derive(Debug)]
pub struct PreparedServer {
    runtime: Runtime,
    listeners: Vec<UnixListener>,
}

impl PreparedServer {
    /// Gets everything ready that needs no VM.
    ///
    /// # Errors
    /// If the host has no event queue left.
    pub fn new(listeners: Vec<StdListener>) -> Result<Self, ServerError> {
        let runtime = Builder::new_current_thread()
            .enable_all()
            .max_blocking_threads(COMMAND_THREADS)
            .thread_name("qmp-command")
            .build()
            .map_err(ServerError::Thread)?;
        let listeners = {
            let _inside = runtime.enter();
            let open = |listener: StdListener| {
                listener.set_nonblocking(true)?;
                UnixListener::from_std(listener)
            };
            listeners
                .into_iter()
                .map(open)
                .collect::<io::Result<Vec<_>>>()
                .map_err(ServerError::Thread)?
        };
        Ok(Self { runtime, listeners })
    }

    /// Serves `vm`.
    ///
    /// # Errors
    /// If the host has no thread left.
    pub fn serve(self, vm: Arc<dyn VmControl>) -> Result<QmpServer, ServerError> {
        let Self { runtime, listeners } = self;
        let (stopping, stop) = watch::channel(false);
        let shared = Arc::new(Shared::new(vm));
        let run = move || {
            runtime.block_on(accept_all(listeners, shared, stop));
            // A command that still runs then (none should) is not waited for any longer.
            runtime.shutdown_timeout(FAREWELL);
        };
        let thread = std::thread::Builder::new()
            .name("qmp".into())
            .spawn(run)
            .map_err(ServerError::Thread)?;
        Ok(QmpServer { stopping, thread: Some(thread) })
    }
}

/// The control socket at work. Stopped by [`QmpServer::stop`], or when dropped.
#[derive(Debug)]
pub struct QmpServer {
    stopping: watch::Sender<bool>,
    thread: Option<JoinHandle<()>>,
}

impl QmpServer {
    /// Sends what has happened up to now to all clients, says farewell, and waits for the thread.
    /// To be called last, after the final event: clients want to see it. Not from one of the
    /// server's own threads, that is, not inside a call of [`VmControl`].
    pub fn stop(mut self) {
        self.end();
    }

    fn end(&mut self) {
        self.stopping.send_replace(true);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the control socket's thread has panicked");
        }
    }
}

impl Drop for QmpServer {
    fn drop(&mut self) {
        self.end();
    }
}

async fn accept_all(
    listeners: Vec<UnixListener>,
    shared: Arc<Shared>,
    mut stop: watch::Receiver<bool>,
) {
    let mut clients = JoinSet::new();
    loop {
        tokio::select! {
            () = asked_to_stop(&mut stop) => break,
            Some(_) = clients.join_next(), if !clients.is_empty() => {}
            stream = accept_any(&listeners), if clients.len() < MAX_CLIENTS => match stream {
                Ok(stream) => {
                    let stream = Passing::new(stream);
                    let passed = stream.passed();
                    let session = serve(stream, Arc::clone(&shared), passed, stop.clone());
                    clients.spawn(async move {
                        if let Err(error) = session.await {
                            tracing::debug!(%error, "a control client was lost");
                        }
                    });
                }
                Err(error) => {
                    // Out of file descriptors, most likely: trying again at once would only spin.
                    tracing::warn!(%error, "a control client could not be accepted");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            },
        }
    }
    drop(listeners);
    let farewell = async { while clients.join_next().await.is_some() {} };
    if tokio::time::timeout(FAREWELL, farewell).await.is_err() {
        tracing::debug!("a control client did not take its last events");
    }
}

/// The next client of any of the sockets.
async fn accept_any(listeners: &[UnixListener]) -> io::Result<tokio::net::UnixStream> {
    std::future::poll_fn(|context| {
        for listener in listeners {
            if let std::task::Poll::Ready(accepted) = listener.poll_accept(context) {
                return std::task::Poll::Ready(accepted.map(|(stream, _)| stream));
            }
        }
        std::task::Poll::Pending
    })
    .await
}
