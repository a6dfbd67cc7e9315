//! Bytes of a hostile source, for every section of a whole machine: refused or taken, never a panic,
//! and what was taken can be written and is taken again.
//!
//! Runs for `MINI_VMM_FUZZ_SECONDS` (2 when not set), from `MINI_VMM_FUZZ_SEED` on (the time when not
//! set, which is printed). `cargo xtask fuzz` sets them.

mod common;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use migration::vmstate::{Audience, ByteSource, Section, SliceSource};
use vmm::control::RunState;
use vmm::grants::Grants;
use vmm::vm::Vm;

/// A generator of numbers that need not be good, only repeatable (xorshift64, Marsaglia 2003).
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }

    /// A number that a check is likely to have forgotten.
    fn edge(&mut self) -> u64 {
        const EDGES: [u64; 10] =
            [0, 1, 0x7f, 0x80, 0xff, 0x100, 0x7fff_ffff, 0x8000_0000, 0xffff_ffff, u64::MAX];
        EDGES[self.below(EDGES.len())]
    }
}

/// Changes a body a little, as an attacker or a bad cable would.
fn change(body: &mut Vec<u8>, numbers: &mut Numbers) {
    for _ in 0..=numbers.below(4) {
        let at = numbers.below(body.len().max(1));
        match numbers.below(7) {
            0 if !body.is_empty() => body[at] = numbers.next() as u8,
            1 if !body.is_empty() => body[at] ^= 1 << numbers.below(8),
            2 => body.truncate(at),
            3 => body.insert(at.min(body.len()), numbers.next() as u8),
            4 if !body.is_empty() => drop(body.remove(at)),
            // A field with a value at its edge.
            5 => {
                let size = 1 << numbers.below(4);
                let value = numbers.edge().to_be_bytes();
                for (to, from) in body.iter_mut().skip(at).take(size).zip(&value[8 - size..]) {
                    *to = *from;
                }
            }
            // A part of it once more, which moves what follows.
            _ => {
                let end = (at + numbers.below(64)).min(body.len());
                let part = body[at.min(end)..end].to_vec();
                body.splice(at.min(end)..at.min(end), part);
            }
        }
    }
}

fn vm(directory: &Path) -> Arc<Vm> {
    let disk = common::disk(directory, 1 << 20);
    let disks = format!(
        r#"{{ path = "{disk}" }},
           {{ path = "{disk}", id = "modern", virtio = "modern", readonly = true, queues = 3 }}"#
    );
    let net = format!(r#"{{ stream = "unix:{}" }}"#, directory.join("net.sock").display());
    let (machine, queue) = common::machine("64M", &disks, &net);
    Vm::new(machine, queue, Grants::default())
}

/// Gives a body to a section as a destination does, and says whether it was taken.
fn load(section: &mut dyn Section, body: &[u8]) -> bool {
    let mut source = SliceSource::new(body);
    let Ok(state) = section.decode(section.version(), &mut source) else { return false };
    // What a section leaves would be taken for its footer.
    if source.offset() != body.len() as u64 {
        return false;
    }
    section.apply(state).is_ok()
}

#[test]
fn no_bytes_in_a_section_do_harm() {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse().ok());
    let time = Duration::from_secs(number("MINI_VMM_FUZZ_SECONDS").unwrap_or(2));
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_nanos() as u64;
    let seed = number("MINI_VMM_FUZZ_SEED").unwrap_or(now);
    println!("MINI_VMM_FUZZ_SEED={seed}");
    let mut numbers = Numbers(seed | 1);

    let directory = tempfile::tempdir().expect("a directory");
    let vm = vm(directory.path());
    let mut sections = vm.sections(RunState::Paused);
    let mut good: Vec<(usize, Vec<u8>)> = Vec::new();
    for (which, section) in sections.iter().enumerate() {
        for audience in [Audience::MiniVmm, Audience::Qemu] {
            good.push((which, section.save(audience).expect("a state that can be written")));
        }
    }
    good.dedup();
    let (start, mut taken, mut refused) = (Instant::now(), 0_u64, 0_u64);
    while start.elapsed() < time {
        let (which, good) = &good[numbers.below(good.len())];
        let (section, mut body) = (&mut sections[*which], good.clone());
        change(&mut body, &mut numbers);
        let id = section.id();
        let done = catch_unwind(AssertUnwindSafe(|| {
            if !load(section.as_mut(), &body) {
                return false;
            }
            // It holds something now that it must be able to write, and to read from others.
            let again = section.save(Audience::MiniVmm).expect("what was taken can be written");
            assert!(load(section.as_mut(), &again), "what was written is taken");
            true
        }));
        match done {
            Ok(true) => taken += 1,
            Ok(false) => refused += 1,
            Err(_) => panic!("{id} did not survive {} bytes: {}", body.len(), hex(&body)),
        }
        assert!(load(section.as_mut(), good), "{id} takes its own state again");
    }
    println!("{} changed bodies: {taken} taken, {refused} refused", taken + refused);
    assert!(taken > 0 && refused > 0, "the changes are neither all harmless nor all deadly");
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
