//! Benchmarks beside something plain in the same run, as ratios. Nothing here asserts a speed.
//!
//! * [`affinity`] keeps what is compared on one processor.
//! * [`bare`] moves bytes over loopback TCP with nothing but write and read, or with rustls.
//! * [`figures`] takes medians, and puts tables into `docs/benchmarks.md`.
//! * [`image`] compares a saved VM's file with plain writes and reads.
//! * [`interrupt`] ends the VMs of one that is interrupted.
//! * [`kvm`] compares calls of the API with the kernel calls below them.
//! * [`mapping`] is memory as a program gets it without Slat.
//! * [`paging`] compares the pager with a bare handler of faults, and copies of VMs with files.
//! * [`picture`] draws one migration from its figures, for the README.
//! * [`qemu`] has QEMU migrate a guest.
//! * [`readers`] lets readers of dirty pages stand beside a writing guest.
//! * [`report`] is the table of migrations and its JSON.
//! * [`rows`] does so for comparisons with a peer and a goal.

pub mod affinity;
pub mod bare;
pub mod figures;
pub mod image;
pub mod interrupt;
pub mod kvm;
pub mod mapping;
pub mod paging;
pub mod picture;
pub mod qemu;
pub mod readers;
pub mod report;
pub mod rows;
