//! Whole-system tests: real guests, real processes, real sockets, faults.
