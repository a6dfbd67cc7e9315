//! The I/O thread: one `event-manager` for all devices' eventfds, taps and timers.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

use event_manager::{EventManager, MutEventSubscriber, RemoteEndpoint, SubscriberId};

/// Something that the I/O thread serves.
pub type Subscriber = Arc<Mutex<dyn MutEventSubscriber + Send>>;

/// The I/O thread could not be started or reached.
#[derive(Debug, thiserror::Error)]
pub enum EventLoopError {
    /// No epoll, no eventfd, or no thread.
    #[error("cannot start the I/O thread")]
    Start(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The thread does not answer.
    #[error("the I/O thread has ended")]
    Gone(#[source] event_manager::Error),
}

/// The running I/O thread. Dropping it ends the thread and joins it.
pub struct EventLoop {
    endpoint: RemoteEndpoint<Subscriber>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl EventLoop {
    /// Starts the thread, serving nobody yet.
    pub fn start() -> Result<Self, EventLoopError> {
        let mut manager =
            EventManager::<Subscriber>::new().map_err(|e| EventLoopError::Start(Box::new(e)))?;
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
        Ok(Self { endpoint, stop, thread: Some(thread) })
    }

    /// Serves `subscriber` from now on.
    pub fn add(&self, subscriber: Subscriber) -> Result<SubscriberId, EventLoopError> {
        self.endpoint
            .call_blocking(move |manager| Ok(manager.add_subscriber(subscriber)))
            .map_err(EventLoopError::Gone)
    }

    /// Serves it no longer.
    pub fn remove(&self, id: SubscriberId) -> Result<(), EventLoopError> {
        self.endpoint
            .call_blocking(move |manager| manager.remove_subscriber(id).map(drop))
            .map_err(EventLoopError::Gone)
    }
}

impl Drop for EventLoop {
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
