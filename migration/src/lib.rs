//! The ground floor of mini-vmm: how a VM is written down, and how it travels.
//!
//! This crate knows QEMU's migration stream and the hand-over of a VM between two hosts. It knows
//! no device and no KVM: it sees the VM through small traits that the `vmm` crate implements.
//!
//! Start with [`vmstate`]: every device's state is a plain struct that passes through it.
#![forbid(unsafe_code)]

pub mod vmstate;
