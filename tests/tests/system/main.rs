//! Whole-system tests: a server, two agents and VM processes, driven through the API and the
//! command line, with processes killed at the worst moments. Each runs on real KVM (SKIPPED where
//! it is missing) and on the software backend.
//!
//! One binary, so that it is linked once; `cargo test -p slat-tests kvm::` picks a backend,
//! `crash::` a module.

mod access_tracking_perf_test;
mod admission;
mod backing;
mod bad_input;
mod cancel;
mod cli;
mod clocks;
mod confined;
mod convergence;
mod crash;
mod cursors;
mod data_port;
mod dirty_log_perf_test;
mod downtime;
mod fence;
mod full_disk;
mod happy;
mod host;
mod identity;
mod leftovers;
mod memory;
mod memslot_modification_stress_test;
mod memslot_perf_test;
mod mmu_stress_test;
mod moments;
mod numbers;
mod paging;
mod saves;
mod set_memory_region_test;
mod slot_protection;
mod trust;
mod watching;
