//! Builds the self-checking guest from `resources/selfcheck` with the system's C compiler.

use std::path::Path;
use std::process::Command;
use std::{env, fs};

/// Freestanding 64-bit code at a fixed address that touches no vector or floating-point register.
const FLAGS: &[&str] = &[
    "-std=gnu11",
    "-O2",
    "-Wall",
    "-Wextra",
    "-m64",
    "-ffreestanding",
    "-fno-pic",
    "-no-pie",
    "-static",
    "-nostdlib",
    "-mgeneral-regs-only",
    "-mno-red-zone",
    "-fno-stack-protector",
    "-fno-asynchronous-unwind-tables",
    "-fcf-protection=none",
    "-Wl,--build-id=none",
    "-Wl,-z,noexecstack",
    "-Wl,-z,max-page-size=4096",
    "-s",
];

fn main() {
    let source = Path::new(&env::var("CARGO_MANIFEST_DIR").expect("cargo sets it"))
        .join("../resources/selfcheck");
    let out = Path::new(&env::var("OUT_DIR").expect("cargo sets it")).join("selfcheck.elf");
    println!("cargo:rerun-if-env-changed=CC");
    println!("cargo:rerun-if-changed={}", source.display());

    let mut files: Vec<_> = fs::read_dir(&source)
        .unwrap_or_else(|error| panic!("cannot read {}: {error}", source.display()))
        .map(|entry| entry.expect("a directory entry").path())
        .filter(|path| path.extension().is_some_and(|kind| kind == "c" || kind == "S"))
        .collect();
    files.sort();
    let compiler = env::var("CC").unwrap_or_else(|_| "cc".into());
    let result = Command::new(&compiler)
        .args(FLAGS)
        .arg("-T")
        .arg(source.join("link.ld"))
        .arg("-o")
        .arg(&out)
        .args(&files)
        .output();
    let output = result.unwrap_or_else(|error| {
        panic!(
            "cannot run the C compiler `{compiler}` ({error}): the self-checking guest needs one; \
             install gcc and binutils (`apt install gcc`), or set CC"
        )
    });
    assert!(
        output.status.success(),
        "the C compiler `{compiler}` could not build the self-checking guest:\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
}
