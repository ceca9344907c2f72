//! What a store does, whatever it is kept in.

use super::{error::StoreError, record::StoredMigration, seen::FleetStore};

/// Which migrations to list.
#[derive(Clone, Debug, Default)]
pub(crate) struct ListQuery {
    /// Only those of this VM (`vms/{vm}`).
    pub(crate) vm: Option<String>,
    /// Only those older than this one (`migrations/{migration}`).
    pub(crate) after: Option<String>,
    /// At most this many.
    pub(crate) limit: usize,
}

/// Durable records. Every method blocks on the disk.
pub(crate) trait Store: FleetStore + Send + Sync + 'static {
    /// Writes a migration; durable when it returns.
    fn put_migration(&self, record: &StoredMigration) -> Result<(), StoreError>;
    /// Reads one migration (`migrations/{migration}`).
    fn migration(&self, name: &str) -> Result<Option<StoredMigration>, StoreError>;
    /// Newest first.
    fn migrations(&self, query: &ListQuery) -> Result<Vec<StoredMigration>, StoreError>;
    /// Those with work left: see [`StoredMigration::is_open`].
    fn open_migrations(&self) -> Result<Vec<StoredMigration>, StoreError>;
    /// Writes a host's address.
    fn put_host(&self, name: &str, address: &str) -> Result<(), StoreError>;
    /// Writes something that means nothing; durable when it returns.
    fn probe(&self) -> Result<(), StoreError>;
}
