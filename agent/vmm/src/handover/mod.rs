//! How a VM changes its owner: the protocol of both sides, and what they say to each other about
//! it.
//!
//! | module | what |
//! |---|---|
//! | [`protocol`] | both sides as pure machines: what comes after what |
//! | `side_protocol` | what the two machines have in common |
//! | `side` | one side in this process: machine, queue, published state, record |
//! | `leave` | the server's leave for a step |
//! | `preamble` | what must fit before anything is reserved |
//! | `state` | the VM's state in sections |
//! | `payload` | what the control frames carry |
//!
//! Who owns the VM is decided by [`slat_record::journal`] alone.

pub(crate) mod leave;
pub(crate) mod payload;
pub mod preamble;
pub mod protocol;
pub(crate) mod side;
pub(crate) mod side_protocol;
pub(crate) mod state;

#[cfg(feature = "fuzz")]
pub(crate) use self::state::fuzzed::{MONITOR as FUZZED_MONITOR, STATE as FUZZED_STATE};
