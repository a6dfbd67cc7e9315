//! The `mini-vmm` command.
fn main() {}
