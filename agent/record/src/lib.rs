//! What a host's daemon and a VM's process both read on disk, and all that they share.
//!
//! * [`dir`] names the files in a VM's directory: the lock, the socket, the records of transfers.
//! * [`journal`] is the durable record of who may run the VM.
//! * [`uid`] is a VM's identity, which names its directory.
//! * [`standing`] says how a migration's side stands once its process is dead, from what that left.
//!
//! Locking is by `flock` on files and belongs to the processes; nothing here holds state between
//! calls but an open journal.

pub mod dir;
pub mod journal;
pub mod standing;
pub mod uid;
