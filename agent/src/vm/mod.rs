//! The inside of one VM process (`slat vm`).
//!
//! [`memory`] holds guest memory, [`journal`] the durable ownership record, [`dir`] the files shared with the agent.

pub mod dir;
pub mod journal;
pub mod memory;
pub mod migration;
