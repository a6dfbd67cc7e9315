//! The guest's work that leaves a trace outside of it: records on a disk, bytes on a connection. Both
//! are checked here, from the host's side, by the same tool that runs in the guest.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::linux::file;

/// An empty disk image in `dir`.
pub fn disk(dir: &Path) -> PathBuf {
    let path = dir.join("disk.img");
    File::create(&path).and_then(|file| file.set_len(64 << 20)).expect("a disk image");
    path
}

fn tool() -> Command {
    Command::new(file("MINI_VMM_GUEST_TOOL"))
}

/// Every record that the guest called durable, up to number `last`, is on the image.
pub fn check_disk(image: &Path, last: u64) {
    let out = tool().arg("disk-check").arg(image).arg(last.to_string()).output();
    let out = out.expect("the guest's tool runs here too");
    let said = String::from_utf8_lossy(&out.stdout);
    assert!(out.status.success(), "records are lost:\n{said}");
    println!("{said}");
}

/// One TCP session to the guest, every byte of which is checked.
pub struct Session(Child);

impl Session {
    /// Connects to the guest's server.
    pub fn start(address: &str) -> Self {
        let child = tool()
            .args(["tcp-client", address, "7000", "100000", "20000"])
            .stdout(Stdio::piped())
            .spawn();
        Self(child.expect("the guest's tool runs here too"))
    }

    /// Fails if the session has ended.
    pub fn assert_alive(&mut self) {
        let Some(status) = self.0.try_wait().expect("our own child") else { return };
        let mut said = String::new();
        if let Some(out) = &mut self.0.stdout {
            out.read_to_string(&mut said).expect("what it said");
        }
        panic!("the TCP session has ended, {status}: {said}");
    }

    /// Ends it; fails if a byte was lost or wrong.
    pub fn finish(mut self) {
        kill(Pid::from_raw(self.0.id() as i32), Signal::SIGINT).expect("our own child");
        let mut said = String::new();
        let out = self.0.stdout.as_mut().expect("it has one");
        out.read_to_string(&mut said).expect("what it said");
        println!("{}", said.lines().last().unwrap_or_default());
        assert!(!said.contains("WRONG") && said.contains("tcp-client:"), "{said}");
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // One that has ended can't be killed.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
