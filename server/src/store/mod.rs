//! What the control plane must not forget, and nothing else.
//!
//! **Durable**: migrations (the record and which sides were released), and the fleet as it was last
//! seen: hosts, which VMs are on them, the highest epoch of each. Agents are the truth about their
//! VMs; this is the memory of what they said, for as long as they are silent. **Not durable**:
//! statistics; agents report them again within one interval.
//!
//! A write that returned is on disk (redb's immediate durability: fsync before the commit returns).
//! A reconciler relies on it: a state is stored before an action that assumes it is begun. Calls
//! block; users of [`Store`] on the runtime go through [`BlockingStore`], which moves them to the
//! blocking pool.

mod blocking;
mod contract;
mod error;
mod record;
mod redb;
mod redb_seen;
mod seen;

pub use self::error::StoreError;
pub(crate) use self::{
    blocking::BlockingStore,
    contract::ListQuery,
    record::{SourceStart, StoredMigration},
    redb::RedbStore,
    seen::{SeenChanges, SeenFleet},
};
#[cfg(test)]
pub(crate) use self::{contract::Store, seen::FleetStore};
