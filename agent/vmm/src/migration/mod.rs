//! The two sides of a migration inside VM processes.
//!
//! `source` sends (precopy, switchover, handover), `destination` receives. `wire` is the framed
//! protocol between them; `channel` opens connections, in the clear or by TLS, `stream` is one in
//! its two halves, encrypted by this process (`tls`) or by the kernel (`kernel`); `sender`,
//! `receiver`, `socket` and `listener` move pages, `data_port` chooses where they arrive, `breaker`
//! ends what blocks;
//! `estimate` predicts the downtime and `convergence` decides, both as pure arithmetic. The
//! transfer service starts the two sides.

mod breaker;
pub(crate) mod channel;
mod convergence;
pub(crate) mod data_port;
pub(crate) mod destination;
mod estimate;
pub(crate) mod filter;
mod kernel;
pub(crate) mod listener;
mod receiver;
mod sender;
mod socket;
pub(crate) mod source;
pub(crate) mod stream;
mod tls;
pub(crate) mod wire;

#[cfg(feature = "fuzz")]
pub(crate) use self::wire::fuzzed::{FRAMES as FUZZED_FRAMES, HARVEST as FUZZED_HARVEST};
