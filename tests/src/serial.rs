//! A guest's serial line over a unix socket: what it says, and what is said to it.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use crate::wait;

/// How long a reader waits after each read: a guest's serial port gives single bytes, and on an emulated processor
/// it costs the guest more to wake a reader for each of them than to make them.
fn rest() -> Duration {
    Duration::from_millis(5) * wait::slowness().saturating_sub(1)
}

fn locked(text: &Mutex<String>) -> MutexGuard<'_, String> {
    text.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An attached line. Everything that comes is kept.
pub struct SerialLine {
    stream: UnixStream,
    text: Arc<Mutex<String>>,
    /// The other end is gone, with the VM's process.
    closed: Arc<AtomicBool>,
}

impl SerialLine {
    /// Attaches as soon as the socket answers.
    pub fn attach(path: &Path) -> Self {
        let stream = wait::until(
            "the serial line's socket",
            20,
            || UnixStream::connect(path).ok(),
            || path.display().to_string(),
        );
        let text = Arc::new(Mutex::new(String::new()));
        let closed = Arc::new(AtomicBool::new(false));
        let (mut reader, kept) = (stream.try_clone().expect("a second handle"), text.clone());
        let ended = closed.clone();
        // Ends when the VM's process does, or with this process.
        thread::spawn(move || {
            let (mut buf, rest) = ([0; 4096], rest());
            while let Ok(n @ 1..) = reader.read(&mut buf) {
                locked(&kept).push_str(&String::from_utf8_lossy(&buf[..n]));
                thread::sleep(rest);
            }
            ended.store(true, Ordering::Release);
        });
        Self { stream, text, closed }
    }

    /// All that has come so far.
    pub fn text(&self) -> String {
        locked(&self.text).clone()
    }

    /// How many bytes have come so far.
    pub fn received(&self) -> usize {
        locked(&self.text).len()
    }

    /// Sends bytes to the guest.
    pub fn send(&self, bytes: &[u8]) {
        (&self.stream).write_all(bytes).expect("the guest's serial line takes input");
    }

    /// Waits for a whole line behind byte `from` of the text that `found` likes. A line that is
    /// closed before is waited for no longer.
    pub fn wait_line_from<T>(
        &self,
        from: usize,
        what: &str,
        seconds: u32,
        mut found: impl FnMut(&str) -> Option<T>,
    ) -> T {
        wait::until(what, seconds, || self.line_from(from, what, &mut found), || self.tail())
    }

    /// The first whole line behind byte `from` that `found` likes, if it has come. A line that is closed
    /// before is a failure of the test, which waits for `what`.
    pub fn line_from<T>(
        &self,
        from: usize,
        what: &str,
        found: impl FnMut(&str) -> Option<T>,
    ) -> Option<T> {
        // Asked first: what came before the end is read below.
        let closed = self.closed.load(Ordering::Acquire);
        // Looked at where it is: it is long in the end, and this is asked every few milliseconds.
        let line = {
            let text = locked(&self.text);
            let new = text.get(from..).unwrap_or_default();
            let whole = new.rfind('\n').map_or("", |end| &new[..end]);
            whole.lines().map(str::trim_end).find_map(found)
        };
        assert!(
            line.is_some() || !closed,
            "the guest's line was closed while {what} was waited for\n{}",
            self.tail()
        );
        line
    }

    /// The last lines, for an error.
    pub fn tail(&self) -> String {
        let text = self.text();
        let tail: Vec<_> = text.lines().rev().take(40).collect();
        tail.into_iter().rev().collect::<Vec<_>>().join("\n")
    }

    /// Waits for a line that contains `needle`, from the beginning on.
    pub fn wait_for(&self, needle: &str, seconds: u32) -> String {
        let find = |line: &str| line.contains(needle).then(|| line.to_string());
        self.wait_line_from(0, needle, seconds, find)
    }
}
