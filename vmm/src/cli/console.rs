//! `mini-vmm console`: this terminal becomes the VM's serial terminal.

use std::fs::OpenOptions;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::Path;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde_json::json;

use super::terminal::Raw;
use super::{CliError, VmArg};

/// Ctrl-], as telnet has it.
const LEAVE: u8 = 0x1d;

pub(super) fn attach(vm: &VmArg) -> Result<(), CliError> {
    let status = vm.connect()?.execute("x-mini-vmm-status", json!({}))?;
    let path = ["/runtime/serial", "/runtime/console"]
        .iter()
        .find_map(|pointer| status.pointer(pointer)?.as_str())
        .ok_or_else(|| {
            CliError::Migration(
                "this VM has no console that can be attached to: run it with --serial pty or \
                 --serial unix:PATH"
                    .into(),
            )
        })?;
    let line = open(Path::new(path)).map_err(CliError::io(format!("cannot attach to {path}")))?;
    eprintln!("attached to {path}; leave with Ctrl-]");
    let raw = Raw::new();
    let result = copy(line);
    drop(raw);
    eprintln!();
    result.map_err(CliError::io(format!("the connection to {path} broke")))
}

fn open(path: &Path) -> io::Result<OwnedFd> {
    if std::fs::metadata(path)?.file_type().is_socket() {
        return Ok(UnixStream::connect(path)?.into());
    }
    Ok(OpenOptions::new().read(true).write(true).open(path)?.into())
}

fn copy(line: OwnedFd) -> io::Result<()> {
    let mut from_guest = std::fs::File::from(line.try_clone()?);
    let mut to_guest = std::fs::File::from(line);
    let (mut keys, mut screen) = (io::stdin(), io::stdout());
    let mut buf = [0; 4096];
    loop {
        let stdin = io::stdin();
        let mut fds = [
            PollFd::new(stdin.as_fd(), PollFlags::POLLIN),
            PollFd::new(from_guest.as_fd(), PollFlags::POLLIN),
        ];
        poll(&mut fds, PollTimeout::NONE)?;
        let [keyboard, guest] = fds.map(|fd| fd.any().unwrap_or(false));
        if guest {
            let n = from_guest.read(&mut buf)?;
            if n == 0 {
                return Ok(());
            }
            screen.write_all(buf.get(..n).unwrap_or_default())?;
            screen.flush()?;
        }
        if keyboard {
            let n = keys.read(&mut buf)?;
            let typed = buf.get(..n).unwrap_or_default();
            let end = typed.iter().position(|key| *key == LEAVE);
            to_guest.write_all(typed.get(..end.unwrap_or(n)).unwrap_or_default())?;
            if n == 0 || end.is_some() {
                return Ok(());
            }
        }
    }
}
