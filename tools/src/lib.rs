//! The project's tools: set-up, the nested-KVM lab, guest images for the tests, the benchmark, and
//! running all tests.
//!
//! The command `cargo xtask` is a thin layer over this library (`cargo xtask --help` tells what it
//! can do); the system tests use the library directly, for guest images and the lab's addresses.
//! Nothing here is part of the VMM, and the VMM never depends on it.
//!
//! Start reading at [`lab`] for the lab, at [`images`] for guests.

pub mod apt;
pub mod bench;
pub mod cache;
pub mod error;
pub mod golden;
pub mod images;
pub mod initramfs;
pub mod kernel;
pub mod lab;
pub mod process;
pub mod setup;
pub mod suite;

pub use error::{Error, Result};
