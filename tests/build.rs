//! Builds the boot sector of the tests' disks from `resources/boot-disk` with the system's C compiler.

use std::path::Path;
use std::process::Command;
use std::{env, fs};

fn main() {
    let source = Path::new(&env::var("CARGO_MANIFEST_DIR").expect("cargo sets it"))
        .join("../resources/boot-disk/boot.S");
    let out = Path::new(&env::var("OUT_DIR").expect("cargo sets it")).join("boot.bin");
    println!("cargo:rerun-if-env-changed=CC");
    println!("cargo:rerun-if-changed={}", source.display());
    let compiler = env::var("CC").unwrap_or_else(|_| "cc".into());
    let flags = ["-m32", "-nostdlib", "-static", "-no-pie", "-Wl,--build-id=none"];
    let output = Command::new(&compiler)
        .args(flags)
        // A flat file, as the BIOS loads it.
        .args(["-Wl,-Ttext=0x7c00", "-Wl,--oformat=binary", "-o"])
        .arg(&out)
        .arg(&source)
        .output()
        .unwrap_or_else(|e| panic!("cannot run the C compiler `{compiler}`: {e}"));
    assert!(
        output.status.success(),
        "the C compiler `{compiler}` could not build {}:\n{}",
        source.display(),
        String::from_utf8_lossy(&output.stderr)
    );
    let len = fs::metadata(&out).expect("what the compiler made").len();
    assert_eq!(len, 2048, "the boot code fills its four sectors");
}
