//! Records as they are on disk.

use slat_proto::v1;

use crate::phase::has_ended;

/// A migration as stored.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct StoredMigration {
    /// The resource.
    #[prost(message, optional, tag = "1")]
    pub(crate) migration: Option<v1::Migration>,
    /// The source's side was released: its agent may have forgotten it.
    #[prost(bool, tag = "2")]
    pub(crate) source_released: bool,
    /// The destination's side was released, or there is none.
    #[prost(bool, tag = "3")]
    pub(crate) destination_released: bool,
    /// Whether StartOutgoing may have been called.
    #[prost(enumeration = "SourceStart", tag = "4")]
    pub(crate) source_start: i32,
    /// The source's host was fenced while it had its side.
    #[prost(bool, tag = "5")]
    pub(crate) source_fenced: bool,
    /// The destination's host was fenced while it had its side.
    #[prost(bool, tag = "6")]
    pub(crate) destination_fenced: bool,
    /// The last fence of the source's host, by its id, when this began; empty: none. A later one
    /// counts.
    #[prost(string, tag = "7")]
    pub(crate) source_fence_before: String,
    /// The same of the destination's host.
    #[prost(string, tag = "8")]
    pub(crate) destination_fence_before: String,
}

/// Calls of StartOutgoing that were made, or were about to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub(crate) enum SourceStart {
    /// A version wrote this that did not say.
    Unknown = 0,
    /// None.
    Never = 1,
    /// One.
    Once = 2,
    /// More than one.
    Again = 3,
}

impl StoredMigration {
    /// Whether the reconciler still has work with it.
    pub(crate) fn is_open(&self) -> bool {
        let phase = self
            .migration
            .as_ref()
            .map_or(v1::MigrationPhase::Unspecified, v1::Migration::phase);
        !has_ended(phase) || !self.source_released || !self.destination_released
    }
}
