//! VMs deleted, sides released, directories removed.

use std::{io, sync::Arc};

use slat_proto::{ApiError, Reason, v1};

use super::{LEAVE, Place, Supervisor, leftover::UNREADABLE_GIVES_UP, owns};
use slat_record::{
    dir::VmDir,
    journal::{Journal, Ownership},
    uid::VmUid,
};

use crate::{
    announce::forget_record,
    dead::DeadVm,
    doubt,
    living::LiveVm,
    process::{self, DirLock, Found},
    registry::{Held, Work},
    side::{Role, SideKey},
    sighting,
};

impl Supervisor {
    /// Removes a dead process's directory; its unreleased sides are kept elsewhere first.
    ///
    /// # Errors
    /// STORE when they cannot be; GIVE_UP_REQUIRED for a directory that cannot be read, whose sides
    /// nobody can keep. Then all stays as it was.
    pub(super) async fn clear(&self, dead: &Arc<DeadVm>) -> Result<(), ApiError> {
        match dead.unreadable() {
            Some(error) => Err(self.only_given_up(dead, &error)),
            None => self.remove_dead(dead).await,
        }
    }

    /// No order but the leftover's own ends what may say who owns a VM.
    fn only_given_up(&self, dead: &DeadVm, error: &ApiError) -> ApiError {
        ApiError::new(
            Reason::GiveUpRequired,
            format!("what its process left cannot be read: {error}"),
        )
        .with("vm", dead.name())
        .with("uid", dead.uid())
        .with("host", &self.host)
        .with("gives_up", UNREADABLE_GIVES_UP)
        .with(
            "advice",
            format_args!(
                "repair what it says; to give it up: slat delete leftover --uid {} --host {} --give-up",
                dead.uid(),
                self.host.id()
            ),
        )
    }

    /// As [`Supervisor::clear`], and a directory that cannot be read goes too: its caller has the
    /// order that gives it up.
    pub(super) async fn remove_dead(&self, dead: &Arc<DeadVm>) -> Result<(), ApiError> {
        let Some(claim) = self.registry.claim_from_dead(dead) else {
            // Another task clears it already: its result is this one's.
            self.settled(dead.uid()).await;
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

    /// Deletes a VM: returns when its process is gone and its directory removed. `force`: a process
    /// that answers nothing is killed.
    ///
    /// # Errors
    /// The process's own; VM_UNREACHABLE when it is silent and not forced; MIGRATION_IN_PROGRESS;
    /// GIVE_UP_REQUIRED for a dead VM's directory that cannot be read, JOURNAL for a living one's,
    /// forced or not; STORE.
    pub(crate) async fn delete(self: Arc<Self>, uid: VmUid, force: bool) -> Result<(), ApiError> {
        let unknown = || {
            ApiError::new(Reason::NoSuchVm, format!("no VM with uid {uid} here")).with("uid", &uid)
        };
        match self.settled(&uid).await {
            Some(Held::Live(live)) => {
                // What it leaves could not be read either.
                if let Err(error) = Journal::read(&live.dir().journal()) {
                    return Err(ApiError::from(error)
                        .with("vm", live.name())
                        .with("uid", &uid)
                        .with("pid", live.process().pid())
                        .with(
                            "advice",
                            "repair what it says; to give it up, end that process and delete the leftover",
                        ));
                }
                // An order that waits in the socket of a stopped process would be carried out when
                // that goes on, long after it was refused here.
                let mut vms = live.vms();
                let request = v1::DeleteVmRequest {
                    name: live.name().to_string(),
                    uid: live.own_uid(),
                    ..Default::default()
                };
                let answer = match live.awake().await {
                    Ok(()) => live.answer_long(vms.delete_vm(request)).await,
                    Err(silent) => Err(silent),
                };
                if let Err(error) = answer {
                    if error.reason != Reason::VmUnreachable {
                        return Err(error);
                    }
                    // A process that ended instead of answering has deleted its VM, lost it, or was
                    // a side that ended by itself: the directory shows which.
                    if !live.has_gone().await {
                        return self.delete_silent(&live, force, error).await;
                    }
                } else if !self
                    .see_off(&live, |ownership| matches!(ownership, Ownership::Ended))
                    .await
                {
                    return Err(live.unreachable("has deleted its VM and does not end".to_owned()));
                }
                match self.settled(&uid).await {
                    Some(Held::Dead(dead)) => self.clear(&dead).await,
                    _ => Ok(()),
                }
            }
            Some(Held::Dead(dead)) if dead.lost().is_some() || dead.unreadable().is_some() => {
                self.clear(&dead).await
            }
            Some(Held::Busy {
                work: Work::Preparing(migration),
                ..
            }) => Err(ApiError::new(
                Reason::MigrationInProgress,
                format!("the VM with uid {uid} is being received by {migration}"),
            )
            .with("uid", &uid)
            .with("migration", migration)
            .with("advice", "cancel the migration first")),
            Some(Held::Busy { .. } | Held::Dead(_)) | None => Err(unknown()),
        }
    }

    /// Deletes the VM of a process that answers nothing, when that is forced.
    async fn delete_silent(
        &self,
        live: &Arc<LiveVm>,
        force: bool,
        silent: ApiError,
    ) -> Result<(), ApiError> {
        if !force {
            return Err(silent);
        }
        may_be_killed(live)?;
        tracing::warn!(vm = %live.name(), uid = %live.uid(), pid = live.process().pid(), "ending a silent VM process on an operator's order");
        self.kill(live).await?;
        match self.settled(live.uid()).await {
            Some(Held::Dead(dead)) => self.clear(&dead).await,
            _ => Ok(()),
        }
    }

    /// Kills a process and waits until what it left is taken in.
    pub(super) async fn kill(&self, live: &Arc<LiveVm>) -> Result<(), ApiError> {
        live.process().put_down().await;
        tokio::time::timeout(LEAVE, live.gone().cancelled())
            .await
            .map_err(|_| live.unreachable("was killed and does not end".to_owned()))
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
                match live.answer_long(transfers.release_transfer(request)).await {
                    Ok(_) => {}
                    Err(error) if error.reason == Reason::NoSuchMigration => {}
                    Err(error)
                        if error.reason == Reason::VmUnreachable && live.has_gone().await => {}
                    Err(error) => return Err(error),
                }
                live.forget_side(&key);
                live.forget_sighting(&key);
                // The process removes its own record. One that it replaced by a later side's, or
                // never wrote, is removed here.
                forget_record(&live, &key);
                if key.role == Role::Destination {
                    doubt::forget(live.dir(), &key);
                }
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
                if let Some(Held::Dead(dead)) = self.settled(live.uid()).await {
                    self.release_dead(&dead, &key).await?;
                }
            }
            Some(Place::Dead(dead, _)) => self.release_dead(&dead, &key).await?,
            Some(Place::Ended(_)) | None => {}
        }
        self.ended
            .forget(&key)
            .map_err(|error| ApiError::new(Reason::Store, error.to_string()).because_of(&error))?;
        self.grants.released(&key).await;
        self.registry.note_change();
        Ok(())
    }

    pub(super) async fn release_dead(
        &self,
        dead: &Arc<DeadVm>,
        key: &SideKey,
    ) -> Result<(), ApiError> {
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

/// Whether killing a silent process takes away nothing but its own VM.
///
/// # Errors
/// MIGRATION_IN_PROGRESS while it may hold another answer or the last copy of what is handed over.
fn may_be_killed(live: &LiveVm) -> Result<(), ApiError> {
    let named = match owns(live) {
        Some(
            Ownership::Incoming { migration, .. }
            | Ownership::Prepared { migration, .. }
            | Ownership::Relinquished { migration, .. },
        ) => Some(format!("migrations/{migration}")),
        _ => live.unfinished().map(|side| side.migration),
    };
    let Some(migration) = named else {
        return Ok(());
    };
    Err(ApiError::new(
        Reason::MigrationInProgress,
        format!("{} is part of {migration}", live.name()),
    )
    .with("vm", live.name())
    .with("uid", live.uid())
    .with("migration", migration)
    .with(
        "advice",
        "cancel the migration, then repeat; where that is too late, it is a leftover of its host",
    ))
}

/// Removes a directory without a process. The lock goes with it.
pub(super) fn remove(dir: &VmDir, lock: DirLock) {
    if let Err(error) = std::fs::remove_dir_all(dir.path()) {
        tracing::error!(dir = %dir.path().display(), %error, "cannot remove a VM's directory");
    }
    drop(lock);
}
