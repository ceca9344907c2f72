//! A source side's record on disk before its process is asked to begin, so that the disk names
//! every side a process may have. The process itself writes the record again when the side ends.

use slat_proto::{ApiError, Reason, model::MigrationName, v1};
use slat_record::{
    dir::VmDir,
    journal::{Journal, Ownership},
};

use super::{
    living::LiveVm,
    side::{SideKey, is_terminal},
};

/// Makes a source side known on disk before its process is asked to begin: a process and an agent
/// that die together leave an answer then. The process itself writes its record when the side ends.
/// True when this made it.
pub(super) fn announce_side(vm: &LiveVm, key: &SideKey, epoch: u64) -> std::io::Result<bool> {
    let known = vm
        .dir()
        .transfers()?
        .iter()
        .any(|side| SideKey::of(side).as_ref() == Some(key));
    if known || vm.side(key).is_some() {
        return Ok(false);
    }
    vm.dir().save_transfer(&v1::Transfer {
        migration: key.migration.to_string(),
        vm: vm.name().to_string(),
        vm_uid: vm.uid().to_string(),
        role: key.role.to_message().into(),
        phase: v1::TransferPhase::Preparing.into(),
        epoch,
        ..Default::default()
    })?;
    Ok(true)
}

/// Removes a side's record; best effort, for one that its process does not know.
pub(super) fn forget_record(vm: &LiveVm, key: &SideKey) {
    if let Err(error) = vm
        .dir()
        .remove_transfer(&key.migration, key.role.to_message())
    {
        tracing::warn!(vm = %vm.name(), migration = %key.migration, %error, "cannot remove a transfer's record");
    }
}

/// Sides that a found VM's directory names, with how they ended where a record says so. It names
/// every side its process has: a source's record is written before its process is asked to begin
/// ([`announce_side`](announce_side)), and a destination's process writes its
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
