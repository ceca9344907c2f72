//! Table memory: the tables, who may touch them, and when they are given back.
//!
//! | file | what |
//! |---|---|
//! | `header` | what is known about a table, beside it |
//! | `memory` | the host's side: frames, and a header for each |
//! | `arena` | a block of ordinary memory that plays physical memory |
//! | `ticket` | who owns a table, from its allocation to its end |
//! | `tables` | allocation, reclamation, roots |
//! | `fill` | memory becomes a table |
//! | `node` | entries, and how each may be changed |
//! | `guard` | the right to follow entries; walks |
//! | `hint` | the table that a vCPU's last fault ended in |
//!
//! A file uses only files above it.

pub(crate) mod arena;
mod fill;
pub(crate) mod guard;
pub(crate) mod header;
pub(crate) mod hint;
pub(crate) mod memory;
pub(crate) mod node;
pub(crate) mod tables;
pub(crate) mod ticket;
