//! The I/O thread's part: accepting, reading, and sending what was held up.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::{Arc, Mutex, PoisonError};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::CharFrontend;
use super::backend::{Chardev, lock};

/// Bytes read at a time: as many as a 16550A's receiver holds.
const CHUNK: usize = 16;

/// Whether a read would give something at once, be it the end.
fn has_input(line: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::new(line, PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
}

/// Serves one line.
pub struct CharService {
    dev: Chardev,
    frontend: Arc<Mutex<dyn CharFrontend>>,
    /// Rung by the device when its receiver has room again, and by the machine when it resumes.
    room: Arc<EventFd>,
    /// Read from the line, not yet taken by the device.
    waiting: Vec<u8>,
    /// Descriptors that the event loop watches now: the input, the output.
    reading: Option<RawFd>,
    writing: Option<RawFd>,
}

impl CharService {
    /// A service that connects `dev` and `frontend`. The eventfd is to be rung when the device
    /// wants input again.
    pub fn new(
        dev: Chardev,
        frontend: Arc<Mutex<dyn CharFrontend>>,
    ) -> std::io::Result<(Self, Arc<EventFd>)> {
        let room = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?);
        let service = Self {
            dev,
            frontend,
            room: room.clone(),
            waiting: Vec::new(),
            reading: None,
            writing: None,
        };
        Ok((service, room))
    }

    fn frontend<R>(&self, f: impl FnOnce(&mut dyn CharFrontend) -> R) -> R {
        f(&mut *self.frontend.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn accept(&mut self) {
        let Some(Ok((stream, _))) = self.dev.listener.as_ref().map(|l| l.accept()) else { return };
        let mut line = lock(&self.dev.line);
        if line.output.is_some() {
            tracing::info!("a second client of a serial line was turned away");
            return;
        }
        match (stream.set_nonblocking(true), stream.try_clone()) {
            (Ok(()), Ok(second)) => {
                line.output = Some(stream.into());
                line.input = Some(second.into());
            }
            (Err(e), _) | (_, Err(e)) => tracing::warn!("cannot serve a serial line's client: {e}"),
        }
    }

    /// Gives what has been read to the device, then reads more while the device wants it.
    fn pump_input(&mut self, ops: &mut EventOps<'_>) {
        loop {
            if !self.waiting.is_empty() {
                let taken = self.frontend(|f| f.receive(&self.waiting));
                self.waiting.drain(..taken.min(self.waiting.len()));
            }
            if !self.waiting.is_empty() || !self.frontend(|f| f.wants_input()) {
                // Not watched until there is room: level-triggered events would spin.
                return self.watch_input(ops, false);
            }
            let mut chunk = [0; CHUNK];
            let line = lock(&self.dev.line);
            let Some(input) = &line.input else { return };
            // A terminal or pipe may be shared and blocking: it is read only when that won't wait.
            if !has_input(input.as_fd()) {
                break;
            }
            match nix::unistd::read(input, &mut chunk) {
                Ok(0) => {
                    drop(line);
                    return self.hang_up(ops);
                }
                Ok(n) => {
                    drop(line);
                    self.waiting.extend(chunk.iter().take(n));
                }
                Err(Errno::EAGAIN) => break,
                Err(Errno::EINTR) => {}
                Err(_) => {
                    drop(line);
                    return self.hang_up(ops);
                }
            }
        }
        self.watch_input(ops, true);
    }

    fn hang_up(&mut self, ops: &mut EventOps<'_>) {
        self.watch_input(ops, false);
        self.watch_output(ops, false);
        let mut line = lock(&self.dev.line);
        line.input = None;
        if self.dev.listener.is_some() {
            line.output = None;
        }
    }

    fn watch_input(&mut self, ops: &mut EventOps<'_>, on: bool) {
        let fd = lock(&self.dev.line).input.as_ref().map(AsRawFd::as_raw_fd);
        match (self.reading, fd) {
            (None, Some(fd))
                if on
                // A regular file or /dev/null cannot be watched; such an input gives nothing.
                && ops.add(Events::new_raw(fd, EventSet::IN | EventSet::HANG_UP)).is_ok() =>
            {
                self.reading = Some(fd);
            }
            (Some(fd), _) if !on => {
                let _ = ops.remove(Events::new_raw(fd, EventSet::IN));
                self.reading = None;
            }
            _ => {}
        }
    }

    fn watch_output(&mut self, ops: &mut EventOps<'_>, on: bool) {
        // Watched through the input's twin would clash where both are one file, hence the
        // output's own descriptor.
        let fd = lock(&self.dev.line).output.as_ref().map(AsRawFd::as_raw_fd);
        match (self.writing, fd) {
            (None, Some(fd)) if on && ops.add(Events::new_raw(fd, EventSet::OUT)).is_ok() => {
                self.writing = Some(fd);
            }
            (Some(fd), _) if !on => {
                let _ = ops.remove(Events::new_raw(fd, EventSet::OUT));
                self.writing = None;
            }
            _ => {}
        }
    }
}

impl MutEventSubscriber for CharService {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        let fds = [self.room.as_raw_fd(), self.dev.stuck.as_raw_fd()];
        let listener = self.dev.listener.as_ref().map(AsRawFd::as_raw_fd);
        for fd in fds.into_iter().chain(listener) {
            if let Err(e) = ops.add(Events::new_raw(fd, EventSet::IN)) {
                tracing::error!("cannot watch a serial line: {e}");
            }
        }
        self.watch_input(ops, true);
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        let fd = events.fd();
        if fd == self.room.as_raw_fd() {
            let _ = self.room.read();
            self.pump_waiting(ops);
        } else if fd == self.dev.stuck.as_raw_fd() {
            let _ = self.dev.stuck.read();
            self.watch_output(ops, true);
        } else if Some(fd) == self.dev.listener.as_ref().map(AsRawFd::as_raw_fd) {
            self.accept();
            self.watch_input(ops, true);
        } else if Some(fd) == self.reading {
            self.pump_input(ops);
        } else if Some(fd) == self.writing {
            self.watch_output(ops, false);
            self.frontend(|f| f.flush_output());
            if self.frontend(|f| f.has_pending_output()) {
                self.watch_output(ops, true);
            }
        }
    }
}

impl CharService {
    /// The device has room again: what waits goes first, then the line is watched.
    fn pump_waiting(&mut self, ops: &mut EventOps<'_>) {
        if !self.waiting.is_empty() {
            let taken = self.frontend(|f| f.receive(&self.waiting));
            self.waiting.drain(..taken.min(self.waiting.len()));
        }
        if self.waiting.is_empty() && self.frontend(|f| f.wants_input()) {
            self.watch_input(ops, true);
        }
    }
}
