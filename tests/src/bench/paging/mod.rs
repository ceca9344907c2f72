//! `cargo xtask bench paging`: what it costs a guest that its faults are resolved in user space.
//!
//! * [`faults`]: a fault resolved by Slat's pager, beside one by a loop that does nothing else.
//! * [`copies`]: saves, restores and forks of real VMs, beside reading and writing files.
//! * [`children`]: a VM that is forked into many at once.
//! * [`deaths`]: pagers that are killed while their guest writes.

pub mod bare;
pub mod children;
pub mod copies;
pub mod deaths;
pub mod faults;
pub mod touch;
pub mod vm;
