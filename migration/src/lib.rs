//! The ground floor of mini-vmm: how a VM is written down, and how it travels.
//!
//! This crate knows QEMU's migration stream and the hand-over of a VM between two hosts. It knows
//! no device and no KVM: it sees the VM through the traits of [`guest`], which the `vmm` crate
//! implements.
//!
//! Start with [`vmstate`]: every device's state is a plain struct that passes through it. Then
//! [`guest`], what a migration needs from a VM.
#![forbid(unsafe_code)]

pub mod dirty;
pub mod guest;
pub mod handover;
pub mod manifest;
pub mod vmstate;
pub mod wire;
