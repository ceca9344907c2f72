//! Snapshots that were announced: those that have begun and those that are going to.
//!
//! *Locking*: behind one lock ([`crate::shared`]). What guards a memory now is in its place in the
//! layout; here is what it is taken from.

use std::{
    collections::BTreeMap,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    sync::Arc,
};

use crate::guard::Guard;

/// Snapshots at a time.
const MOST: usize = 16;

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Snapshots(BTreeMap<u64, Snapshot>);

/// See the module.
#[derive(Debug)]
pub(crate) struct Snapshot {
    /// The read end: when the last writer goes, nobody reads the snapshot any more.
    lease: OwnedFd,
    pub(crate) active: bool,
    pub(crate) guards: Vec<(u32, Arc<Guard>)>,
}

impl Snapshots {
    /// Whether there was room.
    pub(crate) fn add(&mut self, snapshot: u64, lease: OwnedFd, active: bool) -> bool {
        if self.0.len() >= MOST || self.0.contains_key(&snapshot) {
            return false;
        }
        let guards = Vec::new();
        let made = Snapshot {
            lease,
            active,
            guards,
        };
        self.0.insert(snapshot, made);
        true
    }

    pub(crate) fn get_mut(&mut self, snapshot: u64) -> Option<&mut Snapshot> {
        self.0.get_mut(&snapshot)
    }

    pub(crate) fn remove(&mut self, snapshot: u64) -> bool {
        self.0.remove(&snapshot).is_some()
    }

    /// The leases, by snapshot.
    pub(crate) fn leases(&self) -> Vec<(u64, std::io::Result<OwnedFd>)> {
        let fd = |fd: BorrowedFd<'_>| fd.try_clone_to_owned();
        let all = self.0.iter();
        all.map(|(number, snapshot)| (*number, fd(snapshot.lease.as_fd())))
            .collect()
    }
}
