//! The two halves of a migration inside VM processes.
//!
//! [`TransferDoor`] serves TransferService and starts the halves: `source` sends (precopy, switchover, handover), `destination`
//! receives. `wire` is the framed protocol between them and `handover` its control payloads; `sender`, `receiver`, `socket`
//! and `listener` move pages, `populate` makes room for them; `convergence` decides, as pure arithmetic; `half` is what both sides publish, and the gate that
//! makes cancel and commit exclude each other.
//!
//! Who owns the VM is decided by [`super::journal`] alone; the order of its entries is described there.

mod convergence;
mod destination;
mod half;
mod handover;
mod listener;
mod populate;
mod receiver;
mod sender;
mod service;
mod socket;
mod source;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_software;
mod wire;

pub use service::TransferDoor;
