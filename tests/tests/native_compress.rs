//! When compression pays: a guest with real programs in its memory moves over a link that is shaped
//! (`tc`'s token bucket on loopback, in a network of its own), plain and compressed. `--nocapture` shows the
//! figures, which `docs/performance.md` quotes.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde_json::Value;
use system_tests::guest::Guest;
use system_tests::network;
use system_tests::vm::{Vm, mini_vmm};

const MIB: usize = 1 << 20;
const MEMORY: usize = 256 * MIB;
/// Where the programs lie in memory: the guest leaves that alone.
const AT: u64 = 64 << 20;

/// The first so many bytes of programs and libraries, which are about as compressible as other memory.
fn programs(len: usize) -> Vec<u8> {
    let mut files = vec![mini_vmm()];
    for dir in ["/usr/bin", "/usr/lib/x86_64-linux-gnu"] {
        let entries = fs::read_dir(dir).into_iter().flatten();
        let mut found: Vec<_> = entries.filter_map(|e| Some(e.ok()?.path())).collect();
        found.sort();
        files.extend(found);
    }
    let mut bytes = Vec::new();
    for path in files.iter().filter(|path| path.is_file()) {
        let mut file = File::open(path).expect("a file that anybody may read").take(8 << 20);
        file.read_to_end(&mut bytes).expect("its bytes");
        if bytes.len() >= len {
            bytes.truncate(len);
            return bytes;
        }
    }
    panic!("{} bytes of programs are here, and {len} are needed", bytes.len());
}

/// The guest's memory as its process has it, and where its address 0 is.
fn memory(vm: &Vm) -> (File, u64) {
    let process = Path::new("/proc").join(vm.pid().to_string());
    let maps = fs::read_to_string(process.join("maps")).expect("its mappings");
    let mapping = maps.lines().find_map(|line| {
        let (from, to) = line.split_whitespace().next()?.split_once('-')?;
        let (from, to) = (u64::from_str_radix(from, 16).ok()?, u64::from_str_radix(to, 16).ok()?);
        (to - from == MEMORY as u64).then_some(from)
    });
    let from = mapping.unwrap_or_else(|| panic!("no mapping of the memory's size:\n{maps}"));
    let file = File::options().read(true).write(true).open(process.join("mem"));
    (file.expect("its memory, which root may write to"), from)
}

/// Moves a guest with these bytes in its memory; gives the report.
fn move_with(content: &[u8], how: &[&str]) -> Value {
    let mut here = Guest::ready("256M", 1, "fill=8M,set=4M,rate=500");
    let (file, base) = memory(&here.vm);
    file.write_all_at(content, base + AT).expect("memory takes the bytes");
    let mut there = Guest::incoming("256M", 1);
    let mut command = here.vm.migrate_command(&there.vm.migrate_uri());
    let out = command.arg("--json").args(how).output().expect("mini-vmm migrate starts");
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    assert_eq!(here.vm.wait_exit(20), 0, "{}", here.vm.stderr());
    there.is_whole();
    let (file, base) = memory(&there.vm);
    let mut arrived = vec![0; content.len()];
    file.read_exact_at(&mut arrived, base + AT).expect("memory");
    assert!(arrived == content, "other bytes have arrived");
    let said: Value = serde_json::from_slice(&out.stdout).expect("JSON");
    said["report"].clone()
}

#[test]
fn a_slow_link_is_where_compression_pays() {
    network::isolate();
    println!("link       pages                 total s   MiB sent   ratio  downtime ms");
    // More memory where it would be over too soon to be measured.
    for (rate, len) in [("100mbit", 64 * MIB), ("1gbit", 128 * MIB), ("100gbit", 128 * MIB)] {
        network::shape(rate);
        let content = programs(len);
        let mut totals = Vec::new();
        let plain: &[&str] = &[];
        let one: &[&str] = &["--compress", "zstd"];
        let two: &[&str] = &["--compress", "zstd", "--channels", "2"];
        for how in [plain, one, two, &["--compress", "zstd:3"]] {
            let report = move_with(&content, how);
            let n = |key: &str| report[key].as_f64().expect("a number");
            let (total, sent) = (n("total-ms") / 1e3, n("transferred-bytes"));
            let ratio = n("normal-pages") * 4096.0 / sent;
            let (name, sent) = (how.join(" "), sent / MIB as f64);
            let downtime = n("downtime-ms");
            println!("{rate:9}  {name:26}{total:9.2}{sent:11.1}{ratio:8.2}{downtime:12.1}");
            totals.push((total, ratio));
        }
        if rate == "100mbit" {
            let ((plain, _), (compressed, ratio)) = (totals[0], totals[1]);
            assert!(ratio > 1.2, "programs can be compressed");
            // The link decides, and has less to do.
            assert!(compressed < plain / ratio.min(2.0) * 1.3, "{totals:?}");
        }
    }
}
