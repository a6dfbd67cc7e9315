//! A stock kernel from exec to userspace, in mini-vmm and in QEMU by turns, both without a firmware of their
//! operator's choosing (`-kernel`): the one that boots guests faster than QEMU is to stay that.

use std::io::Read;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use system_tests::linux::{Machine, Start, file};
use system_tests::qemu::QemuArgs;
use system_tests::vm::mini_vmm;

/// What a kernel says first, and what the guest's init says when it is done.
const MARKS: [&str; 2] = ["Linux version", "GUEST READY"];
const ROUNDS: usize = 3;
/// The first of the marks is a notice.
const NOTICES: &str = "loglevel=6";
/// Both boot the same kernel in the same host: once it runs, it takes as long as it takes, and so much more or
/// less from one time to the next.
const NOISE: f64 = 1.15;

/// How long after the start of this process its guest has said each of the marks.
fn boot(mut command: Command) -> [Duration; 2] {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let begin = Instant::now();
    let mut child = command.spawn().expect("the program starts");
    let mut output = child.stdout.take().expect("it is piped");
    let (mut text, mut times, mut buf) = (String::new(), Vec::new(), [0; 4096]);
    while times.len() < MARKS.len() {
        let len = output.read(&mut buf).expect("its output");
        let now = begin.elapsed();
        assert!(len > 0, "it ended before the guest was up:\n{text}");
        text.push_str(&String::from_utf8_lossy(&buf[..len]));
        while MARKS.get(times.len()).is_some_and(|mark| text.contains(mark)) {
            times.push(now);
        }
    }
    child.kill().expect("it is there");
    child.wait().expect("it has ended");
    [times[0], times[1]]
}

fn median(mut times: Vec<Duration>) -> f64 {
    times.sort();
    times[times.len() / 2].as_secs_f64()
}

#[test]
fn a_stock_kernel_is_in_userspace_no_later_than_in_qemu() {
    let machine = Machine {
        args: "--memory 256M --smp 1".into(),
        append: NOTICES.into(),
        start: Start::BzImage,
    };
    let ours = || {
        let mut command = Command::new(mini_vmm());
        command.arg("run").args(machine.flags()).args(["--name", "boot", "--serial", "stdio"]);
        command
    };
    let qemu = QemuArgs::new("-accel kvm -cpu host -m 256 -smp 1 -serial stdio")
        .arg("-kernel")
        .arg(file("MINI_VMM_GUEST_KERNEL").display().to_string())
        .arg("-initrd")
        .arg(file("MINI_VMM_GUEST_INITRD").display().to_string())
        .arg("-append")
        .arg(machine.command_line());
    let (mut mine, mut theirs) = (Vec::new(), Vec::new());
    for round in 1..=ROUNDS {
        mine.push(boot(ours()));
        theirs.push(boot(qemu.command()));
        println!("round {round}: mini-vmm {:.2?}, QEMU {:.2?}", mine.last(), theirs.last());
    }
    let of = |all: &[[Duration; 2]], what: fn(&[Duration; 2]) -> Duration| {
        median(all.iter().map(what).collect())
    };
    for (what, measure, most) in [
        ("exec to the kernel's first word", (|t| t[0]) as fn(&[Duration; 2]) -> Duration, 1.0),
        ("exec to userspace", |t| t[1], 1.0),
        ("the kernel's first word to userspace", |t| t[1] - t[0], NOISE),
    ] {
        let (ours, theirs) = (of(&mine, measure), of(&theirs, measure));
        println!("{what}: {ours:.2} s, QEMU {theirs:.2} s");
        assert!(ours <= theirs * most, "{what}: {ours} s, and QEMU {theirs} s");
    }
}
