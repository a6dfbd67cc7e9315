//! `mini-vmm` on the other lab host of a pair (see `cargo xtask lab pair --help`).

use std::io::Read;
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use crate::linux::Machine;
use crate::{vm, wait};

/// A variable that the lab sets.
fn lab(variable: &str) -> String {
    std::env::var(variable)
        .unwrap_or_else(|_| panic!("{variable} is not set: run this by `cargo xtask test`"))
}

/// This host's address on the link between the two.
pub fn own_address() -> String {
    lab("MINI_VMM_LAB_ADDRESS")
}

/// A directory that both hosts and the machine outside see.
pub fn shared_directory() -> String {
    lab("MINI_VMM_LAB_RESULTS")
}

/// A command that runs on the other host: its output and status are that one's, and killing it here
/// kills it there.
pub fn command(program: &str) -> Command {
    let mut command = Command::new(lab("MINI_VMM_LAB_XTASK"));
    command.args(["lab", "on-peer", "--", program]).env("XDG_RUNTIME_DIR", "/run");
    command.stdin(Stdio::null());
    command
}

/// A `mini-vmm` command on the other host.
pub fn mini_vmm(args: &[&str]) -> Output {
    command(&vm::mini_vmm().display().to_string()).args(args).output().expect("xtask starts")
}

/// A VM on the other host that waits for a guest. Dropping it kills it.
pub struct PeerVm {
    name: &'static str,
    uri: String,
    child: Child,
    said: Arc<Mutex<String>>,
}

impl PeerVm {
    /// Starts one of this form, and returns when it listens.
    pub fn incoming(machine: &Machine, name: &'static str, port: u16) -> PeerVm {
        let uri = format!("tcp:{}:{port}", lab("MINI_VMM_LAB_PEER"));
        let mut child = command(&vm::mini_vmm().display().to_string())
            .args(["run", "--name", name, "--serial", "stdio", "--migrate-listen", &uri])
            .args(machine.flags())
            .stdout(Stdio::piped())
            .spawn()
            .expect("xtask starts");
        let said = Arc::new(Mutex::new(String::new()));
        let (mut pipe, kept) = (child.stdout.take().expect("it is piped"), said.clone());
        // Ends when the command does.
        thread::spawn(move || {
            let mut buf = [0; 4096];
            while let Ok(n @ 1..) = pipe.read(&mut buf) {
                let mut text = kept.lock().unwrap_or_else(PoisonError::into_inner);
                text.push_str(&String::from_utf8_lossy(&buf[..n]));
            }
        });
        let vm = PeerVm { name, uri, child, said };
        wait::until(
            "the other host's VM",
            20,
            || mini_vmm(&["status", "--vm", name]).status.success().then_some(()),
            || vm.text(),
        );
        vm
    }

    /// Where it listens.
    pub fn uri(&self) -> &str {
        &self.uri
    }

    /// All that its guest has said there.
    pub fn text(&self) -> String {
        self.said.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits until its guest has said this.
    pub fn wait_for(&self, needle: &str, seconds: u32) {
        wait::until(needle, seconds, || self.text().contains(needle).then_some(()), || self.text());
    }

    /// Sends its guest away, and waits for its own end.
    pub fn migrate_to(mut self, uri: &str) -> String {
        let out = mini_vmm(&["migrate", "--vm", self.name, uri]);
        let words = format!(
            "{}{}",
            String::from_utf8_lossy(&out.stdout),
            String::from_utf8_lossy(&out.stderr)
        );
        assert!(out.status.success(), "mini-vmm migrate on the other host:\n{words}");
        let ended = wait::until(
            "the end of the other host's VM",
            20,
            || self.child.try_wait().expect("waiting for our own child"),
            || words.clone(),
        );
        assert!(ended.success(), "the other host's VM ends well:\n{words}");
        words
    }
}

impl Drop for PeerVm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
