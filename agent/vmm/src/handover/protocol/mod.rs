//! The handover of one VM as a protocol: two state machines without I/O, threads, clocks or
//! sockets.
//!
//! [`source::Source`] is the side that gives the VM away, [`destination::Destination`] the side
//! that takes it. Each takes one input and answers with the actions that its driver has to carry
//! out, in order. What an action led to comes back as an input. The machines run in production (the
//! drivers are `migration::source` and `migration::destination`) and in the model checker, which
//! explores both of them together with the server's (`cargo xtask model`).
//!
//! # Order of the handover, for a VM of epoch e
//! 1. destination: journals PREPARED(e+1), then says READY;
//! 2. source: journals RELINQUISHED(e) — **the point of no return** — then says COMMIT;
//! 3. destination: journals OWNED(e+1), then runs the vCPUs and says RESUMED.
//!
//! # Invariants
//! * The source lets vCPUs run again only while no RELINQUISHED was begun, or when the journal was
//!   read again and settled that there is none.
//! * COMMIT is said only after RELINQUISHED is durable; OWNED is written only on COMMIT, or on the
//!   word of the source's journal; vCPUs run only after OWNED is durable.
//! * A cancel and the point of no return exclude each other: an accepted cancel is never followed
//!   by RELINQUISHED.
//! * After READY nothing but knowledge ends the destination. A clock only makes it ask again.
//!
//! # Contract of the drivers
//! Inputs of one machine are fed under one lock, and its actions are carried out in the order in
//! which they were answered. An input that comes twice, or too late to matter, changes nothing.

pub mod destination;
pub mod source;
#[cfg(test)]
mod tests;

/// Why a side ends without a handover.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Why {
    /// The user cancelled.
    Cancelled,
    /// Something failed at the other side or at the server, which said so.
    Elsewhere,
    /// Something failed here.
    Fault,
}

/// What became of an append to the journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Written {
    /// The entry is durable.
    Durable,
    /// Nothing was written: the append was refused before it began.
    Refused,
    /// The write or its sync failed: the entry may be durable or not.
    Unknown,
}

/// What a journal holds, read again after [`Written::Unknown`] and made durable as it was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Settled {
    /// The entry is there.
    Present,
    /// It is not, and never will be.
    Absent,
}
