//! Table memory: the tables, who may touch them, and when they are given back.
//!
//! | file | what |
//! |---|---|
//! | `memory` | the host's side: frames, and a header for each |
//! | `arena` | a block of ordinary memory that plays physical memory |
//! | `header` | what is known about a table, beside it |
//! | `node` | entries, and the tickets that say which tables are linked |
//! | `tables` | allocation, reclamation, roots |
//! | `hint` | the table that a vCPU's last fault ended in |

pub(crate) mod arena;
pub(crate) mod header;
pub(crate) mod hint;
pub(crate) mod memory;
pub(crate) mod node;
pub(crate) mod tables;
