//! The I/O thread: one `event-manager` for all devices' eventfds, taps and timers.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

use event_manager::{EventManager, MutEventSubscriber, RemoteEndpoint, SubscriberOps};

/// Something that the I/O thread serves.
pub type Subscriber = Arc<Mutex<dyn MutEventSubscriber + Send>>;

/// The I/O thread could not be started.
#[derive(Debug, thiserror::Error)]
pub enum EventLoopError {
    /// No epoll, no eventfd, or no thread.
    #[error("cannot start the I/O thread")]
    Start(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// What the I/O thread will serve. It is told before the thread starts: each word to a thread that has just
/// started would wait for its first turn.
pub struct EventLoop {
    manager: EventManager<Subscriber>,
}

impl EventLoop {
    /// Serves nobody yet.
    pub fn new() -> Result<Self, EventLoopError> {
        let manager = EventManager::new().map_err(|e| EventLoopError::Start(Box::new(e)))?;
        Ok(Self { manager })
    }

    /// Serves `subscriber` once the thread has started.
    pub fn add(&mut self, subscriber: Subscriber) {
        self.manager.add_subscriber(subscriber);
    }

    /// Starts the thread.
    pub fn start(self) -> Result<IoThread, EventLoopError> {
        let Self { mut manager } = self;
        let endpoint = manager.remote_endpoint();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = thread::Builder::new()
            .name("io".into())
            .spawn(move || {
                while !stopped.load(Ordering::Acquire) {
                    if let Err(e) = manager.run() {
                        tracing::error!("the I/O thread's event loop failed: {e}");
                    }
                }
            })
            .map_err(|e| EventLoopError::Start(Box::new(e)))?;
        Ok(IoThread { endpoint, stop, thread: Some(thread) })
    }
}

/// The running I/O thread. Dropping it ends the thread and joins it.
pub struct IoThread {
    endpoint: RemoteEndpoint<Subscriber>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for IoThread {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        // A kick alone would be enough, but it fails silently when the thread is behind.
        if let Err(e) = self.endpoint.fire(|_| {}) {
            tracing::warn!("cannot wake the I/O thread: {e}");
        }
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the I/O thread panicked");
        }
    }
}
