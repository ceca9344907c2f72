//! What a store does, whatever it is kept in.

use slat_proto::v1;

use super::{error::StoreError, record::StoredMigration, seen::FleetStore};

/// Which migrations to list.
#[derive(Clone, Debug, Default)]
pub(crate) struct ListQuery {
    /// Only those of this VM (`vms/{vm}`).
    pub(crate) vm: Option<String>,
    /// Only those of this VM, by its uid.
    pub(crate) vm_uid: Option<String>,
    /// Only those that come after this place in the list.
    pub(crate) after: Option<Place>,
    /// At most this many.
    pub(crate) limit: usize,
}

/// A place in a list that is newest first: a migration that is there, or was before it was pruned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    /// When the migration was created: nanoseconds since 1970.
    pub(crate) created: u64,
    /// `migrations/{migration}`.
    pub(crate) name: String,
}

impl Place {
    /// Of a migration.
    pub(crate) fn of(migration: &v1::Migration) -> Self {
        let time = migration.create_time.unwrap_or_default();
        Self {
            created: nanos(&time),
            name: migration.name.clone(),
        }
    }

    /// As a page token.
    pub(crate) fn to_token(&self) -> String {
        format!("{}.{}", self.created, self.name)
    }

    /// From a page token.
    pub(crate) fn from_token(token: &str) -> Option<Self> {
        let (created, name) = token.split_once('.')?;
        Some(Self {
            created: created.parse().ok()?,
            name: name.to_owned(),
        })
    }
}

/// Nanoseconds since 1970; 0 for what was before.
pub(super) fn nanos(time: &prost_types::Timestamp) -> u64 {
    let seconds = u64::try_from(time.seconds).unwrap_or_default();
    let nanos = u64::try_from(time.nanos).unwrap_or_default();
    seconds.saturating_mul(1_000_000_000).saturating_add(nanos)
}

/// Which ended migrations may be forgotten.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Prune {
    /// As many of them, the newest, are kept ...
    pub(crate) keep: usize,
    /// ... if they ended after this time: nanoseconds since 1970.
    pub(crate) ended_after: u64,
    /// At most this many go in one transaction.
    pub(crate) at_most: usize,
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
    /// Forgets migrations with no work left, oldest first, in one transaction; how many went. Fewer
    /// than `at_most` means that nothing more is to be forgotten now.
    fn prune_migrations(&self, what: &Prune) -> Result<usize, StoreError>;
    /// Writes a host's address.
    fn put_host(&self, name: &str, address: &str) -> Result<(), StoreError>;
    /// Writes something that means nothing; durable when it returns.
    fn probe(&self) -> Result<(), StoreError>;
}
