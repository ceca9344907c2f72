//! What a host's daemon and a VM's process both read on disk, and all that they share.
//!
//! * [`dir`] names the files in a VM's directory: the lock, the socket, the records of transfers.
//! * [`journal`] is the durable record of who may run the VM.
//!
//! Locking is by `flock` on files and belongs to the processes; nothing here holds state between calls but an open journal.

pub mod dir;
pub mod journal;
