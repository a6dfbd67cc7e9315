//! Migrations that are attacked, by the hundreds, each of them reproducible from a seed and a number.
//!
//! A [`case::Case`] says what is done at which place of the stream. [`run::run`] lets a guest that
//! checks itself migrate through a [`relay::Relay`] that does it, plays the operator where the source
//! is in doubt, and then judges: by what the guest says, by what a [`witness::Witness`] has seen on
//! its disk and on its serial lines, and by what both processes have said and left behind.
//! `docs/faults.md` says what is injected, and what must be true afterwards.

pub mod campaign;
pub mod case;
mod judge;
pub mod locks;
mod operator;
mod process;
pub mod relay;
pub mod run;
pub mod table;
pub mod units;
pub mod witness;
