//! Which VMs are held on this host, and the memory that they have reserved.
//!
//! A VM is held under its uid. Its name is a label: a second VM of a name that is shown here is
//! refused, but what only remains of another one (a source that gave its VM away, ended sides)
//! stands in nobody's way.
//!
//! # Locking
//! One mutex over one map; held for look-ups and changes only, never across an `.await`. Under it
//! only the leaf mutexes of a [`LiveVm`] are taken. Uid, name and memory are checked and taken
//! under the same lock, so two requests cannot both win.
//!
//! # Life of a holding
//! ```text
//! (free) --claim--> Busy --fill--> Live --death--> Busy
//!                   Busy --fill--> Dead --claim--> Busy --drop--> (free)
//! ```
//! A [`Claim`] is the only way through Busy: dropping it unfilled frees uid, name and memory,
//! however the work ended. Memory is counted from what is in the map, so there is no sum that could
//! drift: a dead process holds none.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use slat_proto::model::{MigrationName, VmName};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{dead::DeadVm, living::LiveVm};
use slat_record::uid::VmUid;

/// What a Busy holding is busy with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Work {
    /// A new VM.
    Creating,
    /// The destination side of a migration.
    Preparing(MigrationName),
    /// A process died, or its directory is being removed.
    Clearing,
}

/// What a uid stands for.
#[derive(Clone, Debug)]
pub(super) enum Held {
    Busy { work: Work, done: CancellationToken },
    Live(Arc<LiveVm>),
    Dead(Arc<DeadVm>),
}

impl Held {
    /// Whether it shows a VM of its name: no other may be made here meanwhile. What is being
    /// cleared may turn out to be a lost VM.
    fn shows_its_name(&self) -> bool {
        match self {
            Self::Busy { .. } => true,
            Self::Live(live) => !live.gave_away(),
            Self::Dead(dead) => dead.lost().is_some(),
        }
    }
}

/// Why a VM could not be claimed.
#[derive(Debug)]
pub(super) enum Refusal {
    /// It is here.
    Held(Held),
    /// Another one of its name is shown here.
    Name(VmUid, Held),
    NoMemory {
        needed: u64,
        free: u64,
    },
}

#[derive(Debug)]
struct Holding {
    name: VmName,
    held: Held,
    memory: u64,
}

/// The VMs of this host.
#[derive(Debug)]
pub(super) struct Registry {
    vms: Mutex<BTreeMap<VmUid, Holding>>,
    total: u64,
    changed: watch::Sender<u64>,
}

impl Registry {
    pub(super) fn new(total: u64) -> Arc<Self> {
        Arc::new(Self {
            vms: Mutex::default(),
            total,
            changed: watch::Sender::new(0),
        })
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<VmUid, Holding>> {
        // Each change is one map operation: a panic elsewhere leaves the map whole.
        self.vms.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes VMs may use, and bytes they have reserved.
    pub(super) fn memory(&self) -> (u64, u64) {
        (self.total, used(&self.lock()))
    }

    /// Says that something worth reporting at once happened.
    pub(super) fn note_change(&self) {
        self.changed
            .send_modify(|count| *count = count.wrapping_add(1));
    }

    /// Wakes at each [`Registry::note_change`].
    pub(super) fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    pub(super) fn get(&self, uid: &VmUid) -> Option<Held> {
        self.lock().get(uid).map(|holding| holding.held.clone())
    }

    /// The name of a VM, and bytes it has reserved.
    pub(super) fn label(&self, uid: &VmUid) -> Option<(VmName, u64)> {
        let vms = self.lock();
        vms.get(uid)
            .map(|holding| (holding.name.clone(), holding.memory))
    }

    /// Everything held, by name, then uid.
    pub(super) fn all(&self) -> Vec<(VmName, VmUid, Held)> {
        let mut all: Vec<_> = self
            .lock()
            .iter()
            .map(|(uid, holding)| (holding.name.clone(), uid.clone(), holding.held.clone()))
            .collect();
        all.sort_by(|a, b| (&a.0, &a.1).cmp(&(&b.0, &b.1)));
        all
    }

    /// Everything held under a name, by uid.
    pub(super) fn named(&self, name: &VmName) -> Vec<(VmUid, Held)> {
        let vms = self.lock();
        vms.iter()
            .filter(|(_, holding)| holding.name == *name)
            .map(|(uid, holding)| (uid.clone(), holding.held.clone()))
            .collect()
    }

    /// Whether a VM of that name and `memory` more bytes could be made here.
    ///
    /// # Errors
    /// `Name`, `NoMemory`.
    pub(super) fn fits(&self, name: &VmName, memory: u64) -> Result<(), Refusal> {
        let vms = self.lock();
        name_is_free(&vms, name)?;
        fits(&vms, self.total, memory)
    }

    /// Takes a uid that is not here, a free name and memory.
    ///
    /// # Errors
    /// `Held` when the VM is here, `Name` when another one of its name is, `NoMemory`.
    pub(super) fn claim(
        self: &Arc<Self>,
        uid: &VmUid,
        name: &VmName,
        memory: u64,
        work: Work,
    ) -> Result<Claim, Refusal> {
        let mut vms = self.lock();
        if let Some(holding) = vms.get(uid) {
            return Err(Refusal::Held(holding.held.clone()));
        }
        name_is_free(&vms, name)?;
        fits(&vms, self.total, memory)?;
        Ok(self.insert_busy(&mut vms, uid, name, memory, work))
    }

    /// Takes a uid without asking for name and memory: a process that is there already, or a
    /// directory.
    pub(super) fn claim_found(self: &Arc<Self>, uid: &VmUid, name: &VmName) -> Option<Claim> {
        let mut vms = self.lock();
        (!vms.contains_key(uid)).then(|| self.insert_busy(&mut vms, uid, name, 0, Work::Clearing))
    }

    /// Takes the uid over from a process that died. `None` when it is no longer that one's.
    pub(super) fn claim_from_live(self: &Arc<Self>, vm: &Arc<LiveVm>) -> Option<Claim> {
        let mut vms = self.lock();
        match vms.get(vm.uid()) {
            Some(Holding {
                held: Held::Live(current),
                ..
            }) if Arc::ptr_eq(current, vm) => {
                Some(self.insert_busy(&mut vms, vm.uid(), vm.name(), 0, Work::Clearing))
            }
            _ => None,
        }
    }

    /// Takes the uid over from a dead process. `None` when it is no longer that one's.
    pub(super) fn claim_from_dead(self: &Arc<Self>, vm: &Arc<DeadVm>) -> Option<Claim> {
        let mut vms = self.lock();
        match vms.get(vm.uid()) {
            Some(Holding {
                held: Held::Dead(current),
                ..
            }) if Arc::ptr_eq(current, vm) => {
                Some(self.insert_busy(&mut vms, vm.uid(), vm.name(), 0, Work::Clearing))
            }
            _ => None,
        }
    }

    fn insert_busy(
        self: &Arc<Self>,
        vms: &mut BTreeMap<VmUid, Holding>,
        uid: &VmUid,
        name: &VmName,
        memory: u64,
        work: Work,
    ) -> Claim {
        let done = CancellationToken::new();
        let held = Held::Busy {
            work,
            done: done.clone(),
        };
        let name = name.clone();
        let holding = Holding { name, held, memory };
        let name = holding.name.clone();
        vms.insert(uid.clone(), holding);
        Claim {
            registry: Arc::clone(self),
            uid: uid.clone(),
            name,
            done,
            filled: false,
        }
    }

    /// Reserves `more` bytes for a living VM.
    ///
    /// # Errors
    /// `NoMemory`.
    pub(super) fn grow(&self, vm: &Arc<LiveVm>, more: u64) -> Result<(), Refusal> {
        let mut vms = self.lock();
        fits(&vms, self.total, more)?;
        if let Some(holding) = live_holding(&mut vms, vm) {
            holding.memory = holding.memory.saturating_add(more);
        }
        Ok(())
    }

    /// Gives `less` bytes of a living VM back.
    pub(super) fn shrink(&self, vm: &Arc<LiveVm>, less: u64) {
        if let Some(holding) = live_holding(&mut self.lock(), vm) {
            holding.memory = holding.memory.saturating_sub(less);
        }
    }

    /// Sets what a living VM has reserved, as found.
    pub(super) fn set_memory(&self, vm: &Arc<LiveVm>, memory: u64) {
        if let Some(holding) = live_holding(&mut self.lock(), vm) {
            holding.memory = memory;
        }
    }
}

fn live_holding<'a>(
    vms: &'a mut BTreeMap<VmUid, Holding>,
    vm: &Arc<LiveVm>,
) -> Option<&'a mut Holding> {
    vms.get_mut(vm.uid())
        .filter(|holding| matches!(&holding.held, Held::Live(current) if Arc::ptr_eq(current, vm)))
}

fn name_is_free(vms: &BTreeMap<VmUid, Holding>, name: &VmName) -> Result<(), Refusal> {
    let shown = vms
        .iter()
        .find(|(_, holding)| holding.name == *name && holding.held.shows_its_name());
    shown.map_or(Ok(()), |(uid, holding)| {
        Err(Refusal::Name(uid.clone(), holding.held.clone()))
    })
}

fn used(vms: &BTreeMap<VmUid, Holding>) -> u64 {
    vms.values()
        .fold(0, |sum, holding| sum.saturating_add(holding.memory))
}

fn fits(vms: &BTreeMap<VmUid, Holding>, total: u64, needed: u64) -> Result<(), Refusal> {
    let free = total.saturating_sub(used(vms));
    if needed > free {
        return Err(Refusal::NoMemory { needed, free });
    }
    Ok(())
}

/// A VM being worked on. Dropped unfilled it frees uid, name and memory.
#[derive(Debug)]
pub(super) struct Claim {
    registry: Arc<Registry>,
    uid: VmUid,
    name: VmName,
    done: CancellationToken,
    filled: bool,
}

impl Claim {
    pub(super) fn uid(&self) -> &VmUid {
        &self.uid
    }

    pub(super) fn fill_live(self, vm: &Arc<LiveVm>, memory: u64) {
        self.fill(Held::Live(Arc::clone(vm)), memory);
    }

    pub(super) fn fill_dead(self, vm: Arc<DeadVm>) {
        self.fill(Held::Dead(vm), 0);
    }

    fn fill(mut self, held: Held, memory: u64) {
        self.filled = true;
        let name = match &held {
            Held::Live(live) => live.name().clone(),
            Held::Dead(dead) => dead.name().clone(),
            Held::Busy { .. } => self.name.clone(),
        };
        let holding = Holding { name, held, memory };
        self.registry.lock().insert(self.uid.clone(), holding);
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if !self.filled {
            self.registry.lock().remove(&self.uid);
        }
        self.done.cancel();
        self.registry.note_change();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> VmName {
        VmName::parse(text).unwrap()
    }

    fn uid(text: &str) -> VmUid {
        VmUid::parse(text).unwrap()
    }

    #[test]
    fn a_dropped_claim_gives_uid_name_and_memory_back() {
        let registry = Registry::new(100);
        let claim = |of: &str, called: &str, memory| {
            registry.claim(&uid(of), &name(called), memory, Work::Creating)
        };
        let first = claim("1", "a", 60).unwrap();
        assert_eq!(registry.memory(), (100, 60));
        assert!(matches!(
            claim("1", "b", 1),
            Err(Refusal::Held(Held::Busy {
                work: Work::Creating,
                ..
            }))
        ));
        assert!(
            matches!(claim("2", "a", 1), Err(Refusal::Name(of, _)) if of == uid("1")),
            "a second VM of a name that is shown"
        );
        assert!(matches!(
            claim("2", "b", 41),
            Err(Refusal::NoMemory {
                needed: 41,
                free: 40
            })
        ));
        drop(first);
        assert_eq!(registry.memory(), (100, 0));
        drop(claim("2", "a", 100).unwrap());
    }

    #[test]
    fn waiters_are_told_when_the_work_is_done() {
        let registry = Registry::new(100);
        let changes = registry.changes();
        let claim = registry
            .claim(&uid("1"), &name("a"), 60, Work::Clearing)
            .unwrap();
        let Some(Held::Busy { done, .. }) = registry.get(&uid("1")) else {
            panic!("not busy");
        };
        assert!(!done.is_cancelled());
        drop(claim);
        assert!(done.is_cancelled());
        assert!(changes.has_changed().unwrap());
    }
}
