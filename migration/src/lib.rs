//! The ground floor of mini-vmm: how a VM is written down, and how it travels.
//!
//! This crate knows QEMU's migration stream and the hand-over of a VM between two hosts. It knows
//! no device and no KVM: it sees the VM through the traits of [`guest`], which the `vmm` crate
//! implements.
//!
//! Start with [`vmstate`]: every device's state is a plain struct that passes through it. Then, in
//! the order in which a migration uses them:
//!
//! | module | what it is |
//! |---|---|
//! | [`guest`] | what a migration needs from a VM |
//! | [`transport`] | connections: TCP and Unix sockets |
//! | [`wire`] | the bytes that travel, without any I/O |
//! | [`manifest`] | what two mini-vmms tell each other before a page moves |
//! | [`problem`] | what can stand between a VM and its destination: the table of codes |
//! | [`forecast`] | how a migration would go, from what was measured before it |
//! | [`source`] | gives a VM away: passes, switch-over, hand-over |
//! | [`destination`] | takes a VM: reads, checks, loads, starts |
//! | [`fate`] | what a source in doubt asks, and what it is answered |
//! | [`handover`] | who runs the VM, as two state machines without I/O |
//! | [`inspect`] | what a stream contains, for people |
//! | [`converge`], [`throttle`], [`shares`] | when to stop the guest, and how much to slow it until then |
//! | [`control`], [`params`], [`phase`], [`stats`] | steering and watching one migration |
//! | [`panics`] | a panic is a failure of a step, not the end of a thread |
#![forbid(unsafe_code)]

pub mod control;
pub mod converge;
pub mod destination;
pub mod dirty;
pub mod estimate;
pub mod fate;
pub mod forecast;
pub mod guest;
pub mod handover;
pub mod inspect;
pub mod manifest;
pub(crate) mod pace;
pub mod panics;
pub mod params;
pub mod phase;
pub mod problem;
pub mod shares;
pub mod source;
pub mod stats;
pub(crate) mod supplement;
pub mod throttle;
pub mod transport;
pub mod verify;
pub mod vmstate;
pub mod wire;
