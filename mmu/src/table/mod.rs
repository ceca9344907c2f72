//! Table memory: where tables live, who may touch them, and when their frames are given back.
//!
//! All `unsafe` code of the crate is in this directory. What it offers to the rest is safe by construction:
//!
//! - a [`Node`](node::Node) is reached only from the root or from an entry of another node, under a
//!   [`Guard`](node::Guard);
//! - only a table that was allocated here and never linked can be linked ([`node::Unlinked`]), and only by an entry
//!   one level up;
//! - overwriting an entry that points to a table yields that table ([`node::Detached`]), the one ticket for giving its
//!   frames back;
//! - frames go back to the host when no guard is left that is older than the unlinking.

pub(crate) mod arena;
pub(crate) mod memory;
pub(crate) mod node;
pub(crate) mod readers;
