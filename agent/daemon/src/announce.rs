//! A source side's record on disk before its process is asked to begin, so that the disk names
//! every side a process may have. The process itself writes the record again when the side ends.

use slat_proto::v1;

use super::{living::LiveVm, side::SideKey};

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
