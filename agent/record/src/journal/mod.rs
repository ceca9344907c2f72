//! The durable record of who may run a VM: one append-only file in the VM's directory.
//!
//! # Format, version 2
//! One line for each entry: the CRC-32 of the text after it (8 hexadecimal digits), a space, JSON.
//! The first line is the header, `{"journal":"slat","version":2}`. Every entry carries the VM's
//! uid. Version 1 had neither; it is still read, for processes of an older binary that live on.
//! PREPARED and RELINQUISHED say by which of the server's grants they were written; where an older
//! binary wrote them they do not, and are read as well.
//!
//! # What is dropped and what is refused
//! [`Journal::append`] returns after the sync, so what it returned from survives a crash. A last
//! line whose checksum is wrong is a write that a crash cut off: it never returned, and is dropped.
//! The same anywhere else is corruption. **A line whose checksum is right is never dropped:** when
//! its contents are not understood, or the version is a later one, the journal is refused and the
//! file left as it is. It was written by a newer program, and may say that the VM was given away. A
//! binary from before grants refuses a journal with one in the same way.
//!
//! # Order of syncs in a handover (epoch e)
//! 1. destination appends `Prepared(e+1)`, then says READY;
//! 2. source appends `Relinquished(e)` — **the point of no return** — then says COMMIT;
//! 3. destination appends `Owned(e+1)`, then runs its vCPUs.
//!
//! Reading the source's journal therefore decides every handover whose messages were lost.
//!
//! # Taken back by an operator
//! `Adopted(n)`, n > e+1, may follow `Relinquished(e)`: whoever ordered it asserts that no other
//! process runs the VM. From then on the source answers that it kept the VM, so a destination that
//! is still in doubt gives up. A program that does not know the entry refuses the journal.
//!
//! `entry` holds the entries, `state` what they add up to (pure, explored by the model checker),
//! `decode` the one decoder, `file` the open journal, `disk` the port through which it writes.

mod decode;
mod disk;
mod entry;
mod error;
mod file;
mod state;
#[cfg(test)]
mod tests;

pub use disk::{Disk, RealDisk};
pub use entry::{Entry, GrantMark};
pub use error::JournalError;
pub use file::{Contents, Journal, contents, settled_contents};
pub use state::{JournalState, Ownership};
