//! Source sides that this agent has seen RELINQUISHED or COMPLETED: `<vm>/sighted/`, one record
//! each.
//!
//! A process that could not append RELINQUISHED is fenced all the same: it never runs the VM again
//! and lets the destination have it. Its journal then says "owner" when it dies, so what the agent
//! saw must outlive process and agent: the record is durable before the sighting is passed on, to a
//! server or to a destination that commits on it.
//!
//! They have a folder of their own: the records of [`VmDir`] are written by the VM process at the
//! same time.

use std::io;

use slat_proto::v1;

use super::side::{Role, SideKey};
use slat_record::dir::VmDir;

/// Whether a side in this phase gave its VM away for good.
pub(super) fn gave_away(key: &SideKey, phase: v1::TransferPhase) -> bool {
    key.role == Role::Source
        && matches!(
            phase,
            v1::TransferPhase::Relinquished | v1::TransferPhase::Completed
        )
}

fn folder(dir: &VmDir) -> VmDir {
    VmDir::new(dir.path().join("sighted"))
}

/// Keeps a sighting; returns when it is durable. Blocks on the disk.
///
/// # Errors
/// When it cannot be written.
pub(super) fn save(dir: &VmDir, side: &v1::Transfer) -> io::Result<()> {
    let folder = folder(dir);
    match std::fs::create_dir(folder.path()) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(error),
    }
    folder.save_transfer(side)?;
    std::fs::File::open(dir.path())?.sync_all()
}

/// All sightings.
///
/// # Errors
/// When one cannot be read.
pub(super) fn load(dir: &VmDir) -> io::Result<Vec<v1::Transfer>> {
    match folder(dir).transfers() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        found => found,
    }
}

/// Forgets one. No effect when there is none.
///
/// # Errors
/// When it cannot be removed.
pub(super) fn forget(dir: &VmDir, key: &SideKey) -> io::Result<()> {
    folder(dir).remove_transfer(&key.migration, key.role.to_message())
}
