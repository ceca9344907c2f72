//! A VM whose process is dead and whose directory is still needed: for a lost VM until it is
//! deleted, for migration sides until they are released.
//!
//! # Unreadable
//! A directory that cannot be read answers nothing, and is read again ([`DeadVm::is_due`]) until it
//! can. It may have owned its VM, so a lost VM is shown in its place, unless the agent only ever
//! saw it receive: what never owned is never lost.
//!
//! # Locking
//! `told` is a leaf mutex: held for one read or write of memory, never over file work.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use slat_proto::{
    ApiError,
    model::{HostName, VmName},
    v1,
};

use super::{
    identity::{Who, load_seen},
    living::LiveVm,
    process::End,
    remains::{self, Remains},
    side::SideKey,
};
use slat_record::{dir::VmDir, uid::VmUid};

/// Between two attempts to read an unreadable directory.
const AGAIN: Duration = Duration::from_millis(500);

/// A dead process's directory.
#[derive(Debug)]
pub(super) struct DeadVm {
    who: Who,
    dir: VmDir,
    /// The lost VM; `None` when it owned none.
    lost: Option<v1::Vm>,
    /// It had given that VM away: it is shown until its side is released, which says either that
    /// another host has it or that somebody deleted it.
    frozen: bool,
    seen: LastSeen,
    told: Mutex<Told>,
}

/// The sides' answers, fixed when the directory was read, so that each question gets the same.
#[derive(Debug)]
struct Told {
    remains: Result<Remains, ApiError>,
    sides: BTreeMap<SideKey, v1::Transfer>,
    /// When the directory was last tried.
    tried: Instant,
}

/// What the agent saw of a VM while its process lived.
#[derive(Clone, Debug, Default)]
pub(super) struct LastSeen {
    /// As it last showed itself.
    pub(super) vm: Option<v1::Vm>,
    /// It was only ever seen to receive its VM.
    pub(super) never_owned: bool,
    /// Its sides, as they last showed themselves.
    pub(super) sides: Vec<v1::Transfer>,
    /// How its process ended, where that is known.
    pub(super) end: Option<End>,
}

impl LastSeen {
    /// Of a process that has just ended.
    pub(super) fn of(live: &LiveVm) -> Self {
        Self {
            vm: live.snapshot(),
            never_owned: live.never_owned(),
            sides: live.sides(),
            end: live.process().end(),
        }
    }

    /// What was kept beside the journal, where nothing better is known.
    pub(super) fn or_kept(mut self, dir: &VmDir) -> Self {
        if self.vm.is_none() {
            self.vm = load_seen(dir);
            let incoming = |vm: &v1::Vm| vm.state() == v1::vm::State::Incoming;
            self.never_owned = self.vm.as_ref().is_some_and(incoming);
        }
        self
    }
}

impl DeadVm {
    /// From what the directory says.
    pub(super) fn new(
        who: Who,
        dir: VmDir,
        host: &HostName,
        remains: Result<Remains, ApiError>,
        seen: LastSeen,
    ) -> Self {
        let frozen = remains.as_ref().is_ok_and(Remains::is_frozen);
        let (lost, sides) = match &remains {
            Ok(remains) => (
                remains.lost_vm(seen.vm.as_ref(), host, seen.end),
                remains.sides(),
            ),
            Err(_) if seen.never_owned => (None, Vec::new()),
            Err(error) => (Some(perhaps_lost(&who, host, error, &seen)), Vec::new()),
        };
        let sides = sides
            .into_iter()
            .filter_map(|side| Some((SideKey::of(&side)?, side)))
            .collect();
        let name = match &remains {
            Ok(remains) => remains.name().clone(),
            Err(_) => who.name.clone(),
        };
        Self {
            who: Who { name, ..who },
            dir,
            lost,
            frozen,
            seen,
            told: Mutex::new(Told {
                remains,
                sides,
                tried: Instant::now(),
            }),
        }
    }

    pub(super) fn uid(&self) -> &VmUid {
        &self.who.uid
    }

    pub(super) fn name(&self) -> &VmName {
        &self.who.name
    }

    pub(super) fn dir(&self) -> &VmDir {
        &self.dir
    }

    /// What was seen of it while its process lived.
    pub(super) fn last_seen(&self) -> &LastSeen {
        &self.seen
    }

    /// The VM that died with the process.
    pub(super) fn lost(&self) -> Option<&v1::Vm> {
        let over = self.frozen && !self.told().remains.as_ref().is_ok_and(Remains::is_frozen);
        self.lost.as_ref().filter(|_| !over)
    }

    fn told(&self) -> MutexGuard<'_, Told> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Why the directory cannot be read.
    pub(super) fn unreadable(&self) -> Option<ApiError> {
        self.told().remains.as_ref().err().cloned()
    }

    /// Whether it is unreadable and to be tried again now; whoever is told so does it.
    pub(super) fn is_due(&self) -> bool {
        let mut told = self.told();
        let due = told.remains.is_err() && told.tried.elapsed() >= AGAIN;
        if due {
            told.tried = Instant::now();
        }
        due
    }

    /// The last epoch that its journal names; 0 when it names none.
    pub(super) fn epoch(&self) -> u64 {
        self.told().remains.as_ref().map_or(0, Remains::epoch)
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

    /// Whether the directory may make way when this VM comes back.
    pub(super) fn replaceable(&self) -> bool {
        self.lost().is_none() && self.told().remains.as_ref().is_ok_and(Remains::replaceable)
    }

    /// Whether nothing is left to tell.
    pub(super) fn is_told(&self) -> bool {
        let lost = self.lost().is_some();
        let told = self.told();
        !lost && told.remains.is_ok() && told.sides.is_empty()
    }
}

/// What an unreadable directory may have owned, shown with the reason until somebody looks.
fn perhaps_lost(who: &Who, host: &HostName, error: &ApiError, seen: &LastSeen) -> v1::Vm {
    let (uid, epoch) = match &seen.vm {
        Some(vm) => (vm.uid.clone(), vm.epoch),
        None => (who.uid.to_string(), 0),
    };
    let how = seen
        .end
        .map_or_else(String::new, |end| format!(" (it {end})"));
    let message = format!("its process died{how} and its directory cannot be read: {error}");
    remains::lost(&who.name, host, seen.vm.as_ref(), &uid, epoch, message)
}
