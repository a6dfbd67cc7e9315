//! Whole-system tests: real guests, real processes, real sockets, faults.
//!
//! This library is what the tests in `tests/` are written with: a [`vm::Vm`] is a `mini-vmm run`
//! process in a runtime directory of its own, [`qmp::Qmp`] its control socket, and
//! [`wait::until`] the only way to wait: for a condition, with a deadline.

pub mod bootdisk;
pub mod broken_disk;
pub mod faults;
pub mod guest;
pub mod image;
pub mod linux;
pub mod network;
pub mod pair;
pub mod peer;
pub mod proxy;
pub mod qemu;
pub mod qmp;
pub mod serial;
pub mod vm;
pub mod wait;
pub mod work;
