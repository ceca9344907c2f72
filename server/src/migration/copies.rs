//! The frozen copies that ended migrations keep: the last that is left of their VMs. Who asks such
//! a VM for anything is told what it is; deleting the VM ends the copy, through its migration's
//! task.

use slat_proto::{ApiError, v1};
use tokio::sync::oneshot;

use super::{errors::frozen_copy, key::VmKey, migrations::Migrations, replies::Command};

/// Where a copy is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Copy {
    /// `hosts/{host}`.
    pub(crate) host: String,
    /// The VM's.
    pub(crate) uid: String,
}

impl Migrations {
    /// The copies that are kept now.
    pub(crate) fn copies(&self) -> Vec<Copy> {
        let active = self.active();
        let keeping = active.values().filter(|active| active.keeps_source());
        keeping
            .map(|active| {
                let migration = active.shown.borrow();
                Copy {
                    host: migration.source.clone(),
                    uid: migration.vm_uid.clone(),
                }
            })
            .collect()
    }

    /// Ends the copy of a VM that a failed migration keeps at its source: nothing else is left of
    /// that VM. Answers with the source's host, or `None` when no migration keeps one.
    ///
    /// # Errors
    /// HOST_UNREACHABLE when the source's agent has not released it.
    pub(crate) async fn delete_kept(
        &self,
        vm: impl Into<VmKey>,
    ) -> Result<Option<String>, ApiError> {
        let vm = vm.into();
        let kept = self.active().values().find_map(|active| {
            active.keeps(&vm).then(|| {
                (
                    active.shown.borrow().source.clone(),
                    active.commands.clone(),
                )
            })
        });
        let Some((host, commands)) = kept else {
            return Ok(None);
        };
        let (reply, answer) = oneshot::channel();
        if commands.send(Command::DeleteKept(reply)).await.is_ok()
            && let Ok(answer) = answer.await
        {
            return answer.map(|()| Some(host));
        }
        // Its task ended meanwhile: it was released.
        Ok(Some(host))
    }

    /// Refuses what only a VM can do when all that is left of it is a frozen copy.
    pub(crate) fn refuse_frozen_copy(&self, vm: &v1::Vm, host: &str) -> Result<(), ApiError> {
        if vm.state() != v1::vm::State::Relinquished {
            return Ok(());
        }
        match self.keeper(&VmKey::from(vm)) {
            Some(keeper) => Err(frozen_copy(vm, &keeper, host)),
            None => Ok(()),
        }
    }
}
