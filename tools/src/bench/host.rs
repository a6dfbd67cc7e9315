//! The machine: what it is, what its loopback can do, and its memory made warm.

use std::fs;
use std::hint::black_box;
use std::net::{Ipv4Addr, TcpListener};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::{Doing, Error, Result};
use crate::process;

/// How long the server of `iperf3` may take to listen.
const PATIENCE: Duration = Duration::from_secs(10);

/// What figures depend on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// The processor's name for itself.
    pub cpu: String,
    /// Logical processors.
    pub cpus: usize,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// The kernel's release.
    pub kernel: String,
}

impl Machine {
    /// This one.
    pub fn this() -> Result<Machine> {
        let read = |path: &str| fs::read_to_string(path).doing(|| format!("read {path}"));
        let field = |text: &str, key: &str| {
            let line = text.lines().find(|line| line.starts_with(key));
            line.and_then(|l| l.split_once(':')).map(|(_, value)| value.trim().to_owned())
        };
        let memory = field(&read("/proc/meminfo")?, "MemTotal");
        let kib = memory.and_then(|m| m.split_whitespace().next()?.parse::<u64>().ok());
        Ok(Machine {
            cpu: field(&read("/proc/cpuinfo")?, "model name").unwrap_or_default(),
            cpus: thread::available_parallelism().map_or(1, usize::from),
            memory_mib: kib.unwrap_or(0) >> 10,
            kernel: read("/proc/sys/kernel/osrelease")?.trim().to_owned(),
        })
    }
}

/// Writes to `mib` of memory and gives it back: the first touch of memory that a virtual host has
/// not given this machine yet is many times slower than the second.
pub fn warm_memory(mib: u64) {
    let bytes = usize::try_from(mib << 20).unwrap_or(0);
    black_box(vec![1u8; bytes]);
}

/// Memory in MiB that can be had without taking it from anyone.
pub fn available_mib() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
    kib.unwrap_or(0) >> 10
}

/// A TCP port of loopback that nobody listens at just now.
pub fn free_port() -> Result<u16> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0));
    let address = listener.and_then(|listener| listener.local_addr());
    Ok(address.doing(|| "find a free port".to_owned())?.port())
}

/// A process that is ended when this is dropped.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What one stream over loopback reached in a round, in MiB/s.
#[derive(Debug, Clone, Copy)]
pub struct Stream {
    /// `iperf3` as it is.
    pub plain: f64,
    /// `iperf3 -C reno`: as mini-vmm inside a host, not paced, as a host's own congestion control may be.
    pub unpaced: f64,
}

impl Stream {
    /// Both, for `seconds` each.
    pub fn measured(seconds: u32) -> Result<Self> {
        let plain = iperf3(seconds, &[])? / super::MIB;
        Ok(Self { plain, unpaced: iperf3(seconds, &["-C", "reno"])? / super::MIB })
    }
}

/// Bytes per second of one `iperf3` stream over loopback in `seconds`.
fn iperf3(seconds: u32, more: &[&str]) -> Result<f64> {
    let port = free_port()?.to_string();
    let mut server = Command::new("iperf3");
    server.args(["--server", "--one-off", "--bind", "127.0.0.1", "--port", &port]);
    server.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let _server = Ended(server.spawn().map_err(|e| process::start_error(&server, e))?);
    let begin = Instant::now();
    loop {
        let mut client = Command::new("iperf3");
        client.args(["--client", "127.0.0.1", "--port", &port, "--json"]);
        client.args(["--time", &seconds.to_string()]).args(more);
        let said = match process::output(&mut client) {
            Ok(said) => said,
            Err(Error::Failed { output, .. }) => output,
            Err(error) => return Err(error),
        };
        if let Some(rate) = received(&said) {
            return Ok(rate);
        }
        // The server may not listen yet.
        if begin.elapsed() > PATIENCE {
            return Err(Error::Bench {
                what: "iperf3 does not say what it received".to_owned(),
                found: process::tail(&said),
            });
        }
        thread::sleep(Duration::from_millis(50));
    }
}

fn received(report: &str) -> Option<f64> {
    let report: Value = serde_json::from_str(report).ok()?;
    Some(report.pointer("/end/sum_received/bits_per_second")?.as_f64()? / 8.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_iperf3_received_is_found_in_its_report() {
        let report = r#"{"end":{"sum_received":{"bits_per_second":16e9}}}"#;
        assert_eq!(received(report), Some(2e9));
        assert_eq!(received("{}"), None);
    }

    #[test]
    fn this_machine_has_a_kernel_processors_and_memory() {
        let machine = Machine::this().unwrap();
        assert!(machine.cpus > 0 && machine.memory_mib > 0 && !machine.kernel.is_empty());
    }
}
