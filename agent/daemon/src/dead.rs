//! A VM whose process is dead and whose directory is still needed: for a lost VM until it is
//! deleted, for migration sides until they are released.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use slat_proto::{
    ApiError,
    model::{HostName, VmName},
    v1,
};

use super::{
    remains::{self, Remains},
    side::SideKey,
};
use slat_record::dir::VmDir;

/// A dead process's directory.
#[derive(Debug)]
pub(super) struct DeadVm {
    name: VmName,
    dir: VmDir,
    /// The lost VM; `None` when it owned none.
    lost: Option<v1::Vm>,
    told: Mutex<Told>,
}

/// The sides' answers, fixed when the directory was read, so that each question gets the same.
#[derive(Debug)]
struct Told {
    remains: Result<Remains, ApiError>,
    sides: BTreeMap<SideKey, v1::Transfer>,
}

impl DeadVm {
    /// From what the directory says. `seen`: the VM as last known.
    pub(super) fn new(
        name: VmName,
        dir: VmDir,
        host: &HostName,
        remains: Result<Remains, ApiError>,
        seen: Option<&v1::Vm>,
    ) -> Self {
        let (lost, sides) = match &remains {
            Ok(remains) => (remains.lost_vm(seen, host), remains.sides()),
            // It may have owned the VM: it is shown as lost, with the reason, until somebody looks
            // and deletes it.
            Err(error) => {
                let (uid, epoch) = seen.map_or((String::new(), 0), |vm| (vm.uid.clone(), vm.epoch));
                let message = format!("its process died and its directory cannot be read: {error}");
                (
                    Some(remains::lost(&name, host, seen, &uid, epoch, message)),
                    Vec::new(),
                )
            }
        };
        let sides = sides
            .into_iter()
            .filter_map(|side| Some((SideKey::of(&side)?, side)))
            .collect();
        Self {
            name,
            dir,
            lost,
            told: Mutex::new(Told { remains, sides }),
        }
    }

    pub(super) fn name(&self) -> &VmName {
        &self.name
    }

    pub(super) fn dir(&self) -> &VmDir {
        &self.dir
    }

    /// The VM that died with the process.
    pub(super) fn lost(&self) -> Option<&v1::Vm> {
        self.lost.as_ref()
    }

    fn told(&self) -> MutexGuard<'_, Told> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sides to report.
    pub(super) fn sides(&self) -> Vec<v1::Transfer> {
        self.told().sides.values().cloned().collect()
    }

    /// How a side stands; `None` when nothing here knows it.
    ///
    /// # Errors
    /// JOURNAL when the directory cannot be read: it may hold the answer.
    pub(super) fn side(&self, key: &SideKey) -> Result<Option<v1::Transfer>, ApiError> {
        let told = self.told();
        if let Some(side) = told.sides.get(key) {
            return Ok(Some(side.clone()));
        }
        match &told.remains {
            Ok(remains) => Ok(remains.verdict(key)),
            Err(error) => Err(error.clone()),
        }
    }

    /// Forgets a released side.
    pub(super) fn forget(&self, key: &SideKey) {
        let mut told = self.told();
        told.sides.remove(key);
        if let Ok(remains) = &mut told.remains {
            remains.forget(key);
        }
    }

    /// Whether the directory may be replaced by a new VM of this name.
    pub(super) fn replaceable(&self) -> bool {
        self.lost.is_none() && self.told().remains.as_ref().is_ok_and(Remains::replaceable)
    }

    /// Whether nothing is left to tell.
    pub(super) fn is_told(&self) -> bool {
        self.lost.is_none() && self.told().sides.is_empty()
    }
}
