//! `cargo xtask`: set-up, demo, test, the nested-KVM lab, benchmarks.
fn main() {}
