//! What the control plane must not forget, and nothing else.
//!
//! **Durable**: migrations (the record and which sides were released), and the fleet as it was last
//! seen: hosts, which VMs are on them, the highest epoch of each. Agents are the truth about their
//! VMs; this is the memory of what they said, for as long as they are silent. **Not durable**:
//! statistics, and migrations that ended long ago; agents report them again within one interval.
//!
//! A write that returned is on disk (redb's immediate durability: fsync before the commit returns).
//! A reconciler relies on it: a state is stored before an action that assumes it is begun. Calls
//! block; users of [`Store`] on the runtime go through [`BlockingStore`], which moves them to the
//! blocking pool.
//!
//! # Failures
//! A failure of the file closes the store, and it is opened again when it can be ([`keeper`]).
//! While it cannot be written the server is NOT_SERVING ([`guardian`]). What a call returns then is
//! DISK_FULL, DESCRIPTORS_EXHAUSTED or STORE, with the path; reconcilers write again after a pause
//! until it is done, and nothing is begun that was not stored.

mod blocking;
mod contract;
mod error;
mod guardian;
mod keeper;
mod record;
mod redb;
mod redb_seen;
mod seen;
#[cfg(test)]
pub(crate) mod tests;

pub use self::error::StoreError;
pub(crate) use self::{
    blocking::BlockingStore,
    contract::{ListQuery, Place, Prune},
    guardian::{probe, tell},
    record::{SourceStart, StoredMigration},
    seen::{SeenChanges, SeenFleet},
};
#[cfg(test)]
pub(crate) use self::{contract::Store, seen::FleetStore};
