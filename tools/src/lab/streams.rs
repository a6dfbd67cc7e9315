//! What comes out of a lab host: its command's two output streams, and word of how it goes.
//!
//! Each is a virtio-serial port whose other end is a Unix socket that this process listens on.

use std::fmt;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::error::{Doing, Error, Result};

/// Where everything goes that a run has to say.
#[derive(Debug, Clone)]
pub enum Output {
    /// To this process' own standard output and error.
    Own,
    /// Into a file, in the order in which it comes, so that several runs at a time stay apart.
    File(Arc<File>),
}

impl Output {
    fn stdout(&self) -> Box<dyn Write> {
        match self {
            Output::Own => Box::new(io::stdout()),
            Output::File(file) => Box::new(Arc::clone(file)),
        }
    }

    fn stderr(&self) -> Box<dyn Write> {
        match self {
            Output::Own => Box::new(io::stderr()),
            Output::File(file) => Box::new(Arc::clone(file)),
        }
    }

    /// A line of our own.
    pub fn say(&self, line: fmt::Arguments<'_>) {
        // In one piece, since others write there too. Who does not want to read it any more need not.
        let _ = self.stderr().write_all(format!("xtask: {line}\n").as_bytes());
    }
}

/// A line from a host's first process.
pub(super) struct Event {
    /// Which host.
    pub(super) host: char,
    /// The line, without its end.
    pub(super) line: String,
}

/// A host's ports.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Port {
    /// Standard output.
    Output,
    /// Standard error.
    Errors,
    /// The first process' own words.
    Control,
}

/// The threads that listen to a host.
pub(super) struct Streams {
    readers: Vec<Reader>,
}

struct Reader {
    port: Port,
    socket: PathBuf,
    thread: JoinHandle<io::Result<()>>,
}

impl Streams {
    /// Listens for a host that is about to start. With `label`, each line of output is preceded by
    /// the host's letter.
    pub(super) fn listen(
        host: char,
        label: bool,
        scratch: &Path,
        events: Sender<Event>,
        output: &Output,
    ) -> Result<Streams> {
        let prefix = if label { format!("{host}| ") } else { String::new() };
        let mut readers = Vec::new();
        for (port, name) in [(Port::Output, "out"), (Port::Errors, "err"), (Port::Control, "ctl")] {
            let socket = scratch.join(format!("{host}-{name}.sock"));
            let listener =
                UnixListener::bind(&socket).doing(|| format!("listen on {}", socket.display()))?;
            let (prefix, events, output) = (prefix.clone(), events.clone(), output.clone());
            let thread = thread::Builder::new()
                .name(format!("lab-{host}-{name}"))
                .spawn(move || {
                    let (stream, _) = listener.accept()?;
                    match port {
                        Port::Output => copy(stream, output.stdout(), &prefix),
                        Port::Errors => copy(stream, output.stderr(), &prefix),
                        Port::Control => notify(host, stream, &events),
                    }
                })
                .doing(|| "start a thread".to_owned())?;
            readers.push(Reader { port, socket, thread });
        }
        Ok(Streams { readers })
    }

    /// The socket of a port.
    pub(super) fn socket(&self, port: Port) -> &Path {
        let reader = self.readers.iter().find(|reader| reader.port == port);
        &reader.expect("listen() makes a reader for every port").socket
    }

    /// Whether the host's words have all been taken.
    pub(super) fn at_end(&self) -> bool {
        self.readers.iter().filter(|reader| reader.port == Port::Control).all(|reader| {
            // A QEMU that never connected leaves the reader waiting for it: let it see an end.
            drop(UnixStream::connect(&reader.socket));
            reader.thread.is_finished()
        })
    }

    /// Waits until all output is out. The host's QEMU must have ended.
    pub(super) fn join(&mut self) -> Result<()> {
        for reader in self.readers.drain(..) {
            // As in `at_end`.
            drop(UnixStream::connect(&reader.socket));
            let done = reader
                .thread
                .join()
                .unwrap_or_else(|_| Err(io::Error::other("the thread panicked")));
            match done {
                // Whoever read our output has had enough of it.
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
                other => other.map_err(|source| Error::Io {
                    doing: "pass on the lab's output".to_owned(),
                    source,
                })?,
            }
        }
        Ok(())
    }
}

fn copy(stream: UnixStream, mut to: impl Write, prefix: &str) -> io::Result<()> {
    if !prefix.is_empty() {
        let mut lines = BufReader::new(stream);
        let mut line = Vec::new();
        while lines.read_until(b'\n', &mut line)? > 0 {
            line.splice(..0, prefix.bytes());
            to.write_all(&line)?;
            to.flush()?;
            line.clear();
        }
        return Ok(());
    }
    let mut stream = stream;
    let mut buffer = [0; 16 * 1024];
    loop {
        match stream.read(&mut buffer)? {
            0 => return Ok(()),
            count => to.write_all(&buffer[..count])?,
        }
        to.flush()?;
    }
}

/// Interrupts the host four times a second, until it is gone.
///
/// The emulator loses an interrupt now and then, and with the timer's a processor stands still. What is lost
/// stays pending in the local APIC, which looks at everything anew when the next interrupt comes.
fn nudge(mut stream: UnixStream) {
    loop {
        match stream.write(b"\n") {
            // A host that does not read has had its interrupts.
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => return,
            _ => thread::sleep(Duration::from_millis(250)),
        }
    }
}

fn notify(host: char, stream: UnixStream, events: &Sender<Event>) -> io::Result<()> {
    let nudged = stream.try_clone()?;
    nudged.set_write_timeout(Some(Duration::from_millis(250)))?;
    // It ends with the connection.
    thread::Builder::new().name(format!("lab-{host}-nudge")).spawn(move || nudge(nudged))?;
    for line in BufReader::new(stream).lines() {
        // Nobody listens any more when the run is over.
        if events.send(Event { host, line: line? }).is_err() {
            break;
        }
    }
    Ok(())
}
