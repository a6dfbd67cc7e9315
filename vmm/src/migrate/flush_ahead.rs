//! Brings to the disks, while the guest runs, what it has written: the pause would have to wait for it.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::vm::Vm;

/// How long the guest writes in between: what it writes in so long is brought to a disk quickly.
const EVERY: Duration = Duration::from_secs(1);

/// Does so by a thread of its own until it is dropped, which waits for what is under way.
pub(super) struct FlushAhead {
    /// Its end is the word to stop.
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl FlushAhead {
    /// Begins.
    pub(super) fn start(vm: Arc<Vm>) -> io::Result<Self> {
        let (stop, stopped) = mpsc::channel();
        let work = move || {
            loop {
                flush(&vm);
                if stopped.recv_timeout(EVERY) != Err(RecvTimeoutError::Timeout) {
                    return;
                }
            }
        };
        let thread = thread::Builder::new().name("flush-ahead".into()).spawn(work)?;
        Ok(Self { stop: Some(stop), thread: Some(thread) })
    }
}

/// Whatever fails here fails again, and is said, when it counts.
fn flush(vm: &Vm) {
    match vm.machine.board.flushers() {
        Ok(all) => all.iter().for_each(|flusher| flusher.flush_ahead()),
        Err(error) => tracing::debug!("the disks can't be flushed ahead of time: {error}"),
    }
}

impl Drop for FlushAhead {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that flushes disks ahead of time panicked");
        }
    }
}
