//! Which names are held on this host, and the memory that VMs have reserved.
//!
//! # Locking
//! One mutex over one map; held for look-ups and changes only, never across an `.await` and never
//! while another lock is taken. Name and memory are checked and taken under the same lock, so two
//! requests cannot both win.
//!
//! # Life of a name
//! ```text
//! (free) --claim--> Busy --fill--> Live --death--> Busy
//!                   Busy --fill--> Dead --claim--> Busy --drop--> (free)
//! ```
//! A [`Claim`] is the only way through Busy: dropping it unfilled frees name and memory, however
//! the work ended. Memory is counted from what is in the map, so there is no sum that could drift:
//! a dead process holds none.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use slat_proto::model::{MigrationName, VmName};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{dead::DeadVm, living::LiveVm};

/// What a Busy name is busy with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Work {
    /// A new VM.
    Creating,
    /// The destination side of a migration.
    Preparing(MigrationName),
    /// A process died, or its directory is being removed.
    Clearing,
}

/// What a name stands for.
#[derive(Clone, Debug)]
pub(super) enum Held {
    Busy { work: Work, done: CancellationToken },
    Live(Arc<LiveVm>),
    Dead(Arc<DeadVm>),
}

/// Why a name could not be claimed.
#[derive(Debug)]
pub(super) enum Refusal {
    Held(Held),
    NoMemory { needed: u64, free: u64 },
}

#[derive(Debug)]
struct Holding {
    held: Held,
    memory: u64,
}

/// The names of this host.
#[derive(Debug)]
pub(super) struct Registry {
    names: Mutex<BTreeMap<VmName, Holding>>,
    total: u64,
    changed: watch::Sender<u64>,
}

impl Registry {
    pub(super) fn new(total: u64) -> Arc<Self> {
        Arc::new(Self {
            names: Mutex::default(),
            total,
            changed: watch::Sender::new(0),
        })
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<VmName, Holding>> {
        // Each change is one map operation: a panic elsewhere leaves the map whole.
        self.names.lock().unwrap_or_else(PoisonError::into_inner)
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

    pub(super) fn get(&self, name: &VmName) -> Option<Held> {
        self.lock().get(name).map(|holding| holding.held.clone())
    }

    /// Everything held, by name.
    pub(super) fn all(&self) -> Vec<(VmName, Held)> {
        let names = self.lock();
        names
            .iter()
            .map(|(name, holding)| (name.clone(), holding.held.clone()))
            .collect()
    }

    /// Whether `memory` more bytes fit.
    ///
    /// # Errors
    /// `NoMemory`.
    pub(super) fn fits(&self, memory: u64) -> Result<(), Refusal> {
        fits(&self.lock(), self.total, memory)
    }

    /// Takes a free name and memory for it.
    ///
    /// # Errors
    /// `Held` when the name is taken, `NoMemory`.
    pub(super) fn claim(
        self: &Arc<Self>,
        name: &VmName,
        memory: u64,
        work: Work,
    ) -> Result<Claim, Refusal> {
        let mut names = self.lock();
        if let Some(holding) = names.get(name) {
            return Err(Refusal::Held(holding.held.clone()));
        }
        fits(&names, self.total, memory)?;
        Ok(self.insert_busy(&mut names, name, memory, work))
    }

    /// Takes a name without asking whether its memory fits: a process that is there already, or a
    /// directory.
    pub(super) fn claim_found(self: &Arc<Self>, name: &VmName) -> Option<Claim> {
        let mut names = self.lock();
        (!names.contains_key(name)).then(|| self.insert_busy(&mut names, name, 0, Work::Clearing))
    }

    /// Takes the name over from a process that died. `None` when it is no longer that one's.
    pub(super) fn claim_from_live(self: &Arc<Self>, vm: &Arc<LiveVm>) -> Option<Claim> {
        let mut names = self.lock();
        match names.get(vm.name()) {
            Some(Holding {
                held: Held::Live(current),
                ..
            }) if Arc::ptr_eq(current, vm) => {
                Some(self.insert_busy(&mut names, vm.name(), 0, Work::Clearing))
            }
            _ => None,
        }
    }

    /// Takes the name over from a dead process. `None` when it is no longer that one's.
    pub(super) fn claim_from_dead(self: &Arc<Self>, vm: &Arc<DeadVm>) -> Option<Claim> {
        let mut names = self.lock();
        match names.get(vm.name()) {
            Some(Holding {
                held: Held::Dead(current),
                ..
            }) if Arc::ptr_eq(current, vm) => {
                Some(self.insert_busy(&mut names, vm.name(), 0, Work::Clearing))
            }
            _ => None,
        }
    }

    fn insert_busy(
        self: &Arc<Self>,
        names: &mut BTreeMap<VmName, Holding>,
        name: &VmName,
        memory: u64,
        work: Work,
    ) -> Claim {
        let done = CancellationToken::new();
        let held = Held::Busy {
            work,
            done: done.clone(),
        };
        names.insert(name.clone(), Holding { held, memory });
        Claim {
            registry: Arc::clone(self),
            name: name.clone(),
            done,
            filled: false,
        }
    }

    /// Reserves `more` bytes for a living VM.
    ///
    /// # Errors
    /// `NoMemory`.
    pub(super) fn grow(&self, vm: &Arc<LiveVm>, more: u64) -> Result<(), Refusal> {
        let mut names = self.lock();
        fits(&names, self.total, more)?;
        if let Some(holding) = live_holding(&mut names, vm) {
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
    names: &'a mut BTreeMap<VmName, Holding>,
    vm: &Arc<LiveVm>,
) -> Option<&'a mut Holding> {
    names
        .get_mut(vm.name())
        .filter(|holding| matches!(&holding.held, Held::Live(current) if Arc::ptr_eq(current, vm)))
}

fn used(names: &BTreeMap<VmName, Holding>) -> u64 {
    names
        .values()
        .fold(0, |sum, holding| sum.saturating_add(holding.memory))
}

fn fits(names: &BTreeMap<VmName, Holding>, total: u64, needed: u64) -> Result<(), Refusal> {
    let free = total.saturating_sub(used(names));
    if needed > free {
        return Err(Refusal::NoMemory { needed, free });
    }
    Ok(())
}

/// A name being worked on. Dropped unfilled it frees name and memory.
#[derive(Debug)]
pub(super) struct Claim {
    registry: Arc<Registry>,
    name: VmName,
    done: CancellationToken,
    filled: bool,
}

impl Claim {
    pub(super) fn fill_live(self, vm: &Arc<LiveVm>, memory: u64) {
        self.fill(Held::Live(Arc::clone(vm)), memory);
    }

    pub(super) fn fill_dead(self, vm: Arc<DeadVm>) {
        self.fill(Held::Dead(vm), 0);
    }

    fn fill(mut self, held: Held, memory: u64) {
        self.filled = true;
        self.registry
            .lock()
            .insert(self.name.clone(), Holding { held, memory });
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if !self.filled {
            self.registry.lock().remove(&self.name);
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

    #[test]
    fn a_dropped_claim_gives_name_and_memory_back() {
        let registry = Registry::new(100);
        let claim = registry.claim(&name("a"), 60, Work::Creating).unwrap();
        assert_eq!(registry.memory(), (100, 60));
        assert!(matches!(
            registry.claim(&name("a"), 1, Work::Creating),
            Err(Refusal::Held(Held::Busy {
                work: Work::Creating,
                ..
            }))
        ));
        assert!(matches!(
            registry.claim(&name("b"), 41, Work::Creating),
            Err(Refusal::NoMemory {
                needed: 41,
                free: 40
            })
        ));
        drop(claim);
        assert_eq!(registry.memory(), (100, 0));
        drop(registry.claim(&name("b"), 100, Work::Creating).unwrap());
    }

    #[test]
    fn waiters_are_told_when_the_work_is_done() {
        let registry = Registry::new(100);
        let changes = registry.changes();
        let claim = registry.claim(&name("a"), 60, Work::Clearing).unwrap();
        let Some(Held::Busy { done, .. }) = registry.get(&name("a")) else {
            panic!("not busy");
        };
        assert!(!done.is_cancelled());
        drop(claim);
        assert!(done.is_cancelled());
        assert!(changes.has_changed().unwrap());
    }
}
