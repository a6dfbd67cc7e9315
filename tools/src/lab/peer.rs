//! Commands that lab host A runs on lab host B.
//!
//! On B, `xtask lab serve` waits for connections. On A, `xtask lab on-peer -- COMMAND` makes one per
//! command, and behaves like the command itself: its output, its exit status, and when it is killed,
//! so is the command. So a test on A handles a process on B as it does one of its own.
//!
//! A connection carries one JSON line with the command, then, back, frames of a kind (one byte: 1
//! output, 2 errors, 0 exit status), a length (4 bytes, big-endian) and as many bytes.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use super::LabCommand;
use crate::error::{Doing, Error, Result};

/// The port on host B.
const PORT: u16 = 7700;

/// How long A waits for B to be up: another host's whole boot under TCG, on a busy machine.
const CONNECT_WAIT: Duration = Duration::from_secs(120);

/// The largest piece of output in one frame.
const PIECE: usize = 16 * 1024;

/// Kinds of frames.
const STATUS: u8 = 0;
const OUTPUT: u8 = 1;
const ERRORS: u8 = 2;

#[derive(Serialize, Deserialize)]
struct Request {
    argv: Vec<String>,
    cwd: PathBuf,
    env: Vec<(String, String)>,
}

/// What host B runs when it has no command of its own.
pub(super) fn server_command() -> Result<LabCommand> {
    let program = std::env::current_exe().doing(|| "find this program's own file".to_owned())?;
    Ok(LabCommand {
        argv: vec![program.display().to_string(), "lab".to_owned(), "serve".to_owned()],
        env: Vec::new(),
        cwd: PathBuf::from("/"),
    })
}

/// Runs commands for the other host, for ever.
pub fn serve() -> Result<u8> {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT))
        .doing(|| format!("listen on port {PORT}"))?;
    for stream in listener.incoming() {
        let stream = stream.doing(|| "accept a connection".to_owned())?;
        thread::Builder::new()
            .name("peer-command".to_owned())
            .spawn(move || {
                if let Err(error) = serve_one(stream) {
                    eprintln!("lab serve: {error}");
                }
            })
            .doing(|| "start a thread".to_owned())?;
    }
    Ok(0)
}

fn serve_one(stream: TcpStream) -> io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let request: Request = serde_json::from_str(&line)?;
    let frames = Mutex::new(stream.try_clone()?);
    let [program, args @ ..] = &request.argv[..] else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let spawned = Command::new(program)
        .args(args)
        .current_dir(&request.cwd)
        .envs(request.env)
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let mut child = match spawned {
        Ok(child) => child,
        Err(error) => {
            send(&frames, ERRORS, format!("can't start {program}: {error}\n").as_bytes())?;
            return send(&frames, STATUS, &[127]);
        }
    };
    let group = Pid::from_raw(child.id().cast_signed());
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let status = thread::scope(|scope| {
        // The client's end of the connection closes when the client is killed.
        scope.spawn(|| {
            let _ = io::copy(&mut reader, &mut io::sink());
            let _ = killpg(group, Signal::SIGKILL);
        });
        let streams = [
            scope.spawn(|| stdout.map(|pipe| forward(pipe, &frames, OUTPUT))),
            scope.spawn(|| stderr.map(|pipe| forward(pipe, &frames, ERRORS))),
        ];
        let status = child.wait();
        for stream in streams {
            let _ = stream.join();
        }
        if let Ok(status) = &status {
            let code = status.code().or(status.signal().map(|signal| 128 + signal)).unwrap_or(1);
            let _ = send(&frames, STATUS, &[u8::try_from(code).unwrap_or(1)]);
        }
        let _ = stream.shutdown(Shutdown::Both);
        status
    });
    status.map(drop)
}

fn forward(mut pipe: impl Read, frames: &Mutex<TcpStream>, kind: u8) -> io::Result<()> {
    let mut buffer = [0; PIECE];
    loop {
        match pipe.read(&mut buffer)? {
            0 => return Ok(()),
            count => send(frames, kind, &buffer[..count])?,
        }
    }
}

fn send(frames: &Mutex<TcpStream>, kind: u8, data: &[u8]) -> io::Result<()> {
    let length = u32::try_from(data.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let mut frame = vec![kind];
    frame.extend_from_slice(&length.to_be_bytes());
    frame.extend_from_slice(data);
    frames.lock().map_err(|_| io::Error::other("a sender panicked"))?.write_all(&frame)
}

/// Runs a command on the other host of a pair and returns its exit status.
///
/// # Errors
/// When this is not a lab host of a pair, the other does not come up, or the connection breaks.
pub fn run_on_peer(argv: Vec<String>) -> Result<u8> {
    let peer = std::env::var("MINI_VMM_LAB_PEER").map_err(|_| Error::Io {
        doing: "find the other lab host (this works inside `cargo xtask lab pair`)".to_owned(),
        source: io::ErrorKind::NotFound.into(),
    })?;
    let cwd = std::env::current_dir().doing(|| "find the current directory".to_owned())?;
    let env = std::env::vars().filter(|(name, _)| !name.starts_with("MINI_VMM_LAB_")).collect();
    let stream = connect(&peer)?;
    exchange(stream, &Request { argv, cwd, env })
        .doing(|| format!("run a command on the lab host {peer}"))
}

fn connect(peer: &str) -> Result<TcpStream> {
    let deadline = Instant::now() + CONNECT_WAIT;
    loop {
        match TcpStream::connect((peer, PORT)) {
            Ok(stream) => return Ok(stream),
            Err(error) if Instant::now() > deadline => {
                return Err(error).doing(|| format!("reach the lab host {peer}"));
            }
            // It is still booting.
            Err(_) => thread::sleep(Duration::from_millis(100)),
        }
    }
}

fn exchange(mut stream: TcpStream, request: &Request) -> io::Result<u8> {
    let mut line = serde_json::to_vec(request)?;
    line.push(b'\n');
    stream.write_all(&line)?;
    let mut stream = BufReader::new(stream);
    loop {
        let mut head = [0; 5];
        stream.read_exact(&mut head)?;
        let [kind, length @ ..] = head;
        let length = u32::from_be_bytes(length) as usize;
        if length > PIECE {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let mut data = vec![0; length];
        stream.read_exact(&mut data)?;
        match (kind, &data[..]) {
            (STATUS, [status]) => return Ok(*status),
            (OUTPUT, data) => io::stdout().write_all(data).and_then(|()| io::stdout().flush())?,
            (ERRORS, data) => io::stderr().write_all(data)?,
            _ => return Err(io::ErrorKind::InvalidData.into()),
        }
    }
}
