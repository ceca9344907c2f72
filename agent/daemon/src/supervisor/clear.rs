//! VMs deleted, sides released, directories removed.

use std::{io, sync::Arc, time::Duration};

use slat_proto::{ApiError, Reason, model::VmName, v1};

use super::{Place, Supervisor, owns};
use slat_record::{dir::VmDir, journal::Ownership};

use crate::{
    dead::DeadVm,
    living::{HEAVY, forget_record},
    process::{self, DirLock, Found},
    registry::{Held, Work},
    side::{Role, SideKey},
    sighting,
};

impl Supervisor {
    /// Clears a dead directory that only holds ended sides, so that its name is free.
    ///
    /// # Errors
    /// As [`Supervisor::clear`].
    pub(super) async fn clear_told(&self, vm: &VmName) -> Result<(), ApiError> {
        match self.settled(vm).await {
            Some(Held::Dead(dead)) if dead.replaceable() => self.clear(&dead).await,
            _ => Ok(()),
        }
    }

    /// Removes a dead process's directory; its unreleased sides are kept elsewhere first.
    ///
    /// # Errors
    /// STORE when they cannot be: then all stays as it was.
    pub(super) async fn clear(&self, dead: &Arc<DeadVm>) -> Result<(), ApiError> {
        let Some(claim) = self.registry.claim_from_dead(dead) else {
            // Another task clears it already: its result is this one's.
            self.settled(dead.name()).await;
            return Ok(());
        };
        let failed = |error: io::Error| {
            ApiError::from_io(Reason::Store, dead.dir().path(), &error).with("vm", dead.name())
        };
        let (ended, sides) = (Arc::clone(&self.ended), dead.sides());
        let kept = tokio::task::spawn_blocking(move || ended.keep(&sides)).await;
        let lock = match kept {
            Ok(Ok(())) => process::find(dead.dir()).await,
            Ok(Err(error)) => Err(error),
            Err(error) => Err(io::Error::other(error)),
        };
        match lock {
            Ok(Found::Dead(lock)) => {
                remove(dead.dir(), lock);
                drop(claim);
                Ok(())
            }
            // Removed by hand: nothing is left to remove.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                drop(claim);
                Ok(())
            }
            Ok(Found::Living(process)) => {
                claim.fill_dead(Arc::clone(dead));
                Err(failed(io::Error::other(format!(
                    "process {} has begun in it",
                    process.pid()
                ))))
            }
            Err(error) => {
                claim.fill_dead(Arc::clone(dead));
                Err(failed(error))
            }
        }
    }

    /// Deletes a VM: returns when its process is gone and its directory removed.
    pub(crate) async fn delete(self: Arc<Self>, vm: VmName) -> Result<(), ApiError> {
        match self.settled(&vm).await {
            Some(Held::Live(live)) => {
                let mut vms = live.vms();
                let request = v1::DeleteVmRequest {
                    name: vm.to_string(),
                    ..Default::default()
                };
                if let Err(error) = live.answer(HEAVY, vms.delete_vm(request)).await {
                    // A process that ended instead of answering has deleted its VM or lost it: the
                    // directory shows which.
                    let gone = error.reason == Reason::VmUnreachable
                        && tokio::time::timeout(Duration::from_secs(1), live.gone().cancelled())
                            .await
                            .is_ok();
                    if !gone {
                        return Err(error);
                    }
                } else if !self
                    .see_off(&live, |ownership| matches!(ownership, Ownership::Ended))
                    .await
                {
                    return Err(live.unreachable("has deleted its VM and does not end".to_owned()));
                }
                match self.settled(&vm).await {
                    Some(Held::Dead(dead)) => self.clear(&dead).await,
                    _ => Ok(()),
                }
            }
            Some(Held::Dead(dead)) if dead.lost().is_some() => self.clear(&dead).await,
            Some(Held::Busy {
                work: Work::Preparing(migration),
                ..
            }) => Err(ApiError::new(
                Reason::MigrationInProgress,
                format!("{vm} is being received by {migration}"),
            )
            .with("vm", &vm)
            .with("migration", migration)
            .with("advice", "cancel the migration first")),
            Some(Held::Busy { .. } | Held::Dead(_)) | None => Err(ApiError::no_such_vm(&vm)),
        }
    }

    /// Releases a side wherever it is kept. Returns when a process and a directory that existed
    /// only for it are gone.
    pub(crate) async fn release(self: Arc<Self>, key: SideKey) -> Result<(), ApiError> {
        match self.locate(&key).await? {
            Some(Place::Live(live)) => {
                let mut transfers = live.transfers();
                let request = v1::ReleaseTransferRequest {
                    migration: key.migration.to_string(),
                    role: key.role.to_message().into(),
                };
                match live
                    .answer(HEAVY, transfers.release_transfer(request))
                    .await
                {
                    Ok(_) => {}
                    Err(error) if error.reason == Reason::NoSuchMigration => {}
                    Err(error)
                        if error.reason == Reason::VmUnreachable
                            && tokio::time::timeout(
                                Duration::from_secs(1),
                                live.gone().cancelled(),
                            )
                            .await
                            .is_ok() => {}
                    Err(error) => return Err(error),
                }
                live.forget_side(&key);
                live.forget_sighting(&key);
                // The process removes its own record. One that it replaced by a later side's, or
                // never wrote, is removed here.
                forget_record(&live, &key);
                self.registry.note_change();
                // A source that gave its VM away, and a destination that gave up, existed only for
                // this migration.
                let idle = |ownership: &Ownership| match ownership {
                    Ownership::Relinquished { migration, .. } => {
                        key.role == Role::Source && key.is_of(migration)
                    }
                    Ownership::Aborted { migration } => {
                        key.role == Role::Destination && key.is_of(migration)
                    }
                    Ownership::Ended => true,
                    _ => false,
                };
                if owns(&live).is_some_and(|ownership| idle(&ownership)) {
                    self.see_off(&live, idle).await;
                }
                if let Some(Held::Dead(dead)) = self.settled(live.name()).await {
                    self.release_dead(&dead, &key).await?;
                }
            }
            Some(Place::Dead(dead, _)) => self.release_dead(&dead, &key).await?,
            Some(Place::Ended(_)) | None => {}
        }
        self.ended
            .forget(&key)
            .map_err(|error| ApiError::new(Reason::Store, error.to_string()).because_of(&error))?;
        self.registry.note_change();
        Ok(())
    }

    async fn release_dead(&self, dead: &Arc<DeadVm>, key: &SideKey) -> Result<(), ApiError> {
        dead.dir()
            .remove_transfer(&key.migration, key.role.to_message())
            .and_then(|()| sighting::forget(dead.dir(), key))
            .map_err(|error| {
                ApiError::from_io(Reason::Store, dead.dir().path(), &error).with("vm", dead.name())
            })?;
        dead.forget(key);
        if dead.is_told() {
            self.clear(dead).await?;
        }
        Ok(())
    }
}

/// Removes a directory without a process. The lock goes with it.
pub(super) fn remove(dir: &VmDir, lock: DirLock) {
    if let Err(error) = std::fs::remove_dir_all(dir.path()) {
        tracing::error!(dir = %dir.path().display(), %error, "cannot remove a VM's directory");
    }
    drop(lock);
}
