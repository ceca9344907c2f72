//! Whole-system tests: a server, two agents and VM processes, driven through the API and the
//! command line, with processes killed at the worst moments. Each runs on real KVM (SKIPPED where
//! it is missing) and on the software backend.
//!
//! One binary, so that it is linked once; `cargo test -p slat-tests kvm::` picks a backend,
//! `crash::` a module.

mod admission;
mod bad_input;
mod cancel;
mod cli;
mod clocks;
mod convergence;
mod crash;
mod data_port;
mod downtime;
mod happy;
mod identity;
mod leftovers;
mod memory;
mod moments;
mod watching;
