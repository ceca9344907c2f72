//! The two sides of a migration inside VM processes.
//!
//! `source` sends (precopy, switchover, handover), `destination` receives. `wire` is the framed
//! protocol between them; `sender`, `receiver`, `socket` and `listener` move pages, `populate`
//! allocates memory for them, `breaker` ends what blocks; `estimate` predicts the downtime and
//! `convergence` decides, both as pure arithmetic. The transfer service starts the two sides.

mod breaker;
mod convergence;
mod cpu_time;
pub(crate) mod destination;
mod estimate;
pub(crate) mod filter;
pub(crate) mod listener;
mod populate;
mod receiver;
mod sender;
mod socket;
pub(crate) mod source;
pub(crate) mod wire;
