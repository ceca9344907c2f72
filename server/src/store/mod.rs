//! What the control plane must not forget, and nothing else.
//!
//! **Durable**: migrations (the record and which sides were released) and the last address of each
//! host. Migrations that ended long ago are forgotten. **Not durable**: VMs and host figures;
//! agents report them again within one interval, and they are the truth about them.
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

#[cfg(test)]
pub(crate) use self::contract::Store;
pub use self::error::StoreError;
pub(crate) use self::{
    blocking::BlockingStore,
    contract::{ListQuery, Place, Prune},
    record::{SourceStart, StoredMigration},
    redb::RedbStore,
};
