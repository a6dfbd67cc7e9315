//! What the destination has said, as it comes.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::SourceError;
use crate::control::Control;
use crate::manifest::Running;
use crate::panics::guarded;
use crate::transport::{Connection, StreamReader, is_stall};
use crate::wire::WireError;
use crate::wire::return_path::Message;

/// How often the reading thread looks up from its socket.
const TICK: Duration = Duration::from_millis(100);
/// How long a cancel may take to be noticed by the writing thread before the connection is broken.
const CANCEL_GRACE: Duration = Duration::from_secs(1);
/// Messages that may lie unread; a destination sends a handful.
const MAX_UNREAD: usize = 64;

/// Messages of the destination, and how they ended.
#[derive(Debug, Default)]
pub(super) struct Inbox {
    state: Mutex<State>,
    news: Condvar,
    /// Set with `State::end`, to be looked at without the lock.
    ended: AtomicBool,
    finished: AtomicBool,
    mini_vmm: AtomicBool,
    committed: AtomicBool,
}

#[derive(Debug, Default)]
struct State {
    messages: VecDeque<Message>,
    /// Since when the guest runs there, if it has said so.
    runs: Option<Instant>,
    end: Option<End>,
}

/// Why no more messages come.
#[derive(Debug)]
enum End {
    /// `shut(0)`.
    Success,
    /// The destination gave up, with or without words.
    GaveUp(Option<String>, u32),
    /// The connection ended.
    Closed,
    /// The kernel gave the connection up, because the destination took nothing for so long.
    Stalled(Duration),
    /// Something that can't be read came.
    Bad(Option<WireError>),
}

/// Why a wait for a message ended without one.
#[derive(Debug)]
pub(super) enum NoMessage {
    /// The destination has said its last word, or closed the connection.
    Ended,
    /// Nothing came in time.
    Timeout,
    /// A cancel came.
    Cancelled,
}

impl Inbox {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the next message. Silence for `timeout` ends the wait; a pong counts as a sign of
    /// life and is skipped when `skip_pongs` is set.
    pub(super) fn next(
        &self,
        timeout: Duration,
        skip_pongs: bool,
        control: Option<&Control>,
    ) -> Result<Message, NoMessage> {
        let mut deadline = Instant::now() + timeout;
        let mut state = self.lock();
        loop {
            while let Some(message) = state.messages.pop_front() {
                if !(skip_pongs && matches!(message, Message::Pong(_))) {
                    return Ok(message);
                }
                deadline = Instant::now() + timeout;
            }
            if state.end.is_some() {
                return Err(NoMessage::Ended);
            }
            if control.is_some_and(|c| c.cancelled().is_some()) {
                return Err(NoMessage::Cancelled);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(NoMessage::Timeout);
            }
            (state, _) = self
                .news
                .wait_timeout(state, left.min(TICK))
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Whether the destination has said `shut(0)`.
    pub(super) fn succeeded(&self) -> bool {
        matches!(self.lock().end, Some(End::Success))
    }

    /// How long the destination took nothing, if the kernel gave the connection up for that.
    pub(super) fn stalled(&self) -> Option<Duration> {
        match self.lock().end {
            Some(End::Stalled(timeout)) => Some(timeout),
            _ => None,
        }
    }

    /// The destination's refusal, if it gave up in so many words.
    pub(super) fn refusal(&self) -> Option<SourceError> {
        match &self.lock().end {
            Some(End::GaveUp(Some(reason), _)) => {
                Some(SourceError::Destination { reason: reason.clone() })
            }
            Some(End::GaveUp(None, status)) => {
                Some(SourceError::DestinationStatus { status: *status })
            }
            _ => None,
        }
    }

    /// Why the migration can't go on, when the destination has ended it. A `shut(0)` before its
    /// time is a failure too.
    pub(super) fn failure(&self) -> Option<SourceError> {
        if !self.ended.load(Ordering::Acquire) {
            return None;
        }
        if let Some(refusal) = self.refusal() {
            return Some(refusal);
        }
        let mut state = self.lock();
        match state.end.as_mut()? {
            End::Bad(error) => Some(match error.take() {
                Some(source) => SourceError::BadAnswer { source },
                None => SourceError::Closed { during: "something else was to come" },
            }),
            End::Success => Some(SourceError::Unexpected {
                found: "shut",
                expected: "the rest of the migration",
            }),
            End::Stalled(timeout) => Some(SourceError::Stalled {
                during: "the migration was under way",
                timeout: *timeout,
            }),
            _ => Some(SourceError::Closed { during: "the migration was under way" }),
        }
    }

    /// After a failed write: gives the destination's reason a moment to arrive.
    pub(super) fn last_words(&self) -> Option<SourceError> {
        let deadline = Instant::now() + CANCEL_GRACE;
        let mut state = self.lock();
        while state.end.is_none() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            (state, _) =
                self.news.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner);
        }
        drop(state);
        self.failure()
    }

    /// Whether the destination has said hello.
    pub(super) fn is_mini_vmm(&self) -> bool {
        self.mini_vmm.load(Ordering::Relaxed)
    }

    /// COMMIT goes out: nothing but a last word will be written, which must still reach a destination
    /// that gives up.
    pub(super) fn committed(&self) {
        self.committed.store(true, Ordering::Release);
    }

    /// Since when the guest runs there, if the destination has said so.
    pub(super) fn runs(&self) -> Option<Instant> {
        self.lock().runs
    }

    /// No more messages are wanted.
    pub(super) fn finish(&self) {
        self.finished.store(true, Ordering::Release);
    }

    fn push(&self, message: Message) {
        if matches!(message, Message::Hello(_)) {
            self.mini_vmm.store(true, Ordering::Relaxed);
        }
        let mut state = self.lock();
        // Pongs to pings that nobody waits for must not push a message out.
        let repeated = matches!(message, Message::Pong(_))
            && matches!(state.messages.back(), Some(Message::Pong(_)));
        if state.messages.len() < MAX_UNREAD && !repeated {
            state.messages.push_back(message);
        }
        self.news.notify_all();
    }

    fn end(&self, end: End) {
        let mut state = self.lock();
        if state.end.is_none() {
            state.end = Some(end);
        }
        self.ended.store(true, Ordering::Release);
        self.news.notify_all();
    }
}

/// The return path's thread: reads until the destination has said its last word.
pub(super) fn read_messages(connection: &Connection, inbox: &Inbox, control: &Control) {
    if guarded(|| read_until_last(connection, inbox, control)).is_err() {
        // Whoever waits for an answer must not wait for one that nobody reads.
        inbox.end(End::Closed);
        connection.shutdown(std::net::Shutdown::Both);
    }
}

fn read_until_last(connection: &Connection, inbox: &Inbox, control: &Control) {
    let mut reader = StreamReader::new(connection.clone());
    loop {
        // Since when the message that comes next has been here.
        let mut came = None;
        if !reader.has_buffered() {
            if !wait_readable(connection, inbox, control) {
                return;
            }
            // This thread may have to wait for the guest, if that runs on the same host.
            match connection.waited() {
                Ok(waited) => came = Instant::now().checked_sub(waited.unwrap_or_default()),
                Err(error) => {
                    inbox.end(end_of(&error, control));
                    break;
                }
            }
        }
        match Message::read(&mut reader) {
            Ok(Message::Running(Running { since_us }))
                if inbox.committed.load(Ordering::Acquire) =>
            {
                let since = Duration::from_micros(since_us);
                let runs = came.unwrap_or_else(Instant::now).checked_sub(since);
                inbox.lock().runs = runs;
            }
            Ok(Message::Shut(0)) => {
                inbox.end(End::Success);
                return;
            }
            Ok(Message::Shut(status)) => {
                inbox.end(End::GaveUp(None, status));
                break;
            }
            Ok(Message::Failed(failed)) => {
                inbox.end(End::GaveUp(Some(failed.reason), 1));
                break;
            }
            Ok(message) => inbox.push(message),
            Err(error) => {
                inbox.end(match error.io() {
                    Some(io) => end_of(io, control),
                    None => End::Bad(Some(error)),
                });
                break;
            }
        }
    }
    // The writing thread may be blocked in a write that nobody will read.
    if !(inbox.committed.load(Ordering::Acquire) && inbox.refusal().is_some()) {
        connection.shutdown(std::net::Shutdown::Both);
    }
}

/// Why no more messages come, when the connection can't be read any more.
fn end_of(error: &io::Error, control: &Control) -> End {
    tracing::debug!(%error, "the return path ended");
    // TCP_USER_TIMEOUT ends both directions, and this one may be the first to hear it.
    if is_stall(error) { End::Stalled(control.parameters().stall_timeout) } else { End::Closed }
}

/// Waits until something can be read; `false` when nothing more is wanted.
fn wait_readable(connection: &Connection, inbox: &Inbox, control: &Control) -> bool {
    let tick = PollTimeout::try_from(TICK).unwrap_or(PollTimeout::MAX);
    loop {
        let mut fds = [PollFd::new(connection.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, tick) {
            Ok(n) if n > 0 => return true,
            _ if inbox.finished.load(Ordering::Acquire) => return false,
            _ => {}
        }
        if control.cancelled().is_some_and(|since| since.elapsed() > CANCEL_GRACE) {
            connection.shutdown(std::net::Shutdown::Both);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::control::NoEvents;
    use crate::params::Parameters;
    use crate::transport::arrival::tests::noting;

    /// What is noted when the destination has said that its guest has been running for 20 ms, and that was read 60 ms
    /// later.
    fn since_when_it_runs(committed: bool) -> (Inbox, Option<Duration>) {
        let (here, mut there) = noting();
        let mut said = Vec::new();
        Message::Running(Running { since_us: 20_000 }).write(&mut said);
        Message::Shut(0).write(&mut said);
        there.write_all(&said).unwrap();
        std::thread::sleep(Duration::from_millis(60));
        let inbox = Inbox::default();
        if committed {
            inbox.committed();
        }
        let control = Control::new(Parameters::default(), Box::new(NoEvents));
        read_messages(&here, &inbox, &control);
        let runs = inbox.runs().map(|since| since.elapsed());
        (inbox, runs)
    }

    #[test]
    fn the_guest_runs_since_the_message_came_and_not_since_it_was_read() {
        let (inbox, runs) = since_when_it_runs(true);
        assert!(runs.unwrap() >= Duration::from_millis(79), "{runs:?}");
        assert!(inbox.succeeded());
        assert!(matches!(inbox.next(Duration::from_secs(9), false, None), Err(NoMessage::Ended)));
    }

    #[test]
    fn before_it_may_it_is_a_message_that_nobody_expects() {
        let (inbox, runs) = since_when_it_runs(false);
        assert_eq!(runs, None);
        let message = inbox.next(Duration::from_secs(9), false, None).unwrap();
        assert_eq!(message.name(), "running");
    }
}
