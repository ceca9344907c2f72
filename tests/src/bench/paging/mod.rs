//! `cargo xtask bench paging`: what it costs a guest that its faults are resolved in user space.
//!
//! * [`faults`]: a fault resolved by Slat's pager, beside one by a loop that does nothing else.
//! * [`copies`]: saves, restores and forks of real VMs, beside reading and writing files.

pub mod bare;
pub mod copies;
pub mod faults;
pub mod touch;
pub mod vm;
