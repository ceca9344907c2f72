//! The inside of one VM process (`slat vm`).
//!
//! [`process`] is `slat vm` itself and [`door`] what it serves; [`machine`] is the VM: its life, its slots, its ownership;
//! [`memory`] holds guest memory and the dirty log, [`journal`] the durable ownership record, [`dir`] the files shared with
//! the agent, [`migration`] the two halves of a migration.

pub mod dir;
pub mod door;
pub mod journal;
pub mod machine;
pub mod memory;
pub mod migration;
pub mod process;

#[cfg(test)]
pub(crate) mod fake;
