//! Which sides of migrations a VM's directory names, read from its journal and records.

use slat_proto::{ApiError, Reason, model::MigrationName, v1};
use slat_record::{
    dir::VmDir,
    journal::{Journal, Ownership},
};

use crate::side::{SideKey, is_terminal};

/// Sides that a found VM's directory names, with how they ended where a record says so. It names
/// every side its process has: a source's record is written before its process is asked to begin
/// ([`announce_side`](crate::announce::announce_side)), and a destination's process writes its
/// journal first.
///
/// # Errors
/// JOURNAL when journal or records cannot be read.
pub(super) fn found_sides(dir: &VmDir) -> Result<Vec<(SideKey, Option<v1::Transfer>)>, ApiError> {
    let unreadable = |error: ApiError| {
        tracing::warn!(dir = %dir.path().display(), %error, "a VM's sides cannot be read");
        error
    };
    let journal = Journal::read(&dir.journal()).map_err(|error| unreadable(error.into()))?;
    let records = dir
        .transfers()
        .map_err(|error| unreadable(ApiError::from_io(Reason::Journal, dir.path(), &error)))?;
    let named = journal.as_ref().and_then(|state| match &state.ownership {
        Ownership::Relinquished { migration, .. } => {
            MigrationName::parse(migration).map(SideKey::source).ok()
        }
        Ownership::Incoming { migration, .. }
        | Ownership::Prepared { migration, .. }
        | Ownership::Aborted { migration } => MigrationName::parse(migration)
            .map(SideKey::destination)
            .ok(),
        Ownership::Owner { .. } => {
            let arrived = state.arrived_by.as_deref()?;
            MigrationName::parse(arrived).map(SideKey::destination).ok()
        }
        Ownership::Ended => None,
    });
    let recorded = records.into_iter().filter_map(|record| {
        let key = SideKey::of(&record)?;
        Some((key, is_terminal(record.phase()).then_some(record)))
    });
    Ok(recorded.chain(named.map(|key| (key, None))).collect())
}
