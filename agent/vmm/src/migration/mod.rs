//! The two sides of a migration inside VM processes.
//!
//! `source` sends (precopy, switchover, handover), `destination` receives. `wire` is the framed
//! protocol between them; `sender`, `receiver`, `socket` and `listener` move pages, `data_port`
//! chooses where they arrive, `breaker` ends what blocks;
//! `estimate` predicts the downtime and `convergence` decides, both as pure arithmetic. The
//! transfer service starts the two sides.

mod breaker;
mod convergence;
pub(crate) mod data_port;
pub(crate) mod destination;
mod estimate;
pub(crate) mod filter;
pub(crate) mod listener;
mod receiver;
mod sender;
mod socket;
pub(crate) mod source;
pub(crate) mod wire;

#[cfg(feature = "fuzz")]
pub(crate) use self::wire::fuzzed::{FRAMES as FUZZED_FRAMES, HARVEST as FUZZED_HARVEST};
