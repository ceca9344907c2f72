//! What the store does not have yet. Plain data: keys only, so that a save always takes the newest.

use std::collections::BTreeSet;

/// See the module. `generation` grows by one with each change.
#[derive(Debug, Default)]
pub(super) struct Unsaved {
    /// (host, uid) of records that were made, changed or removed.
    pub(super) vms: BTreeSet<(String, String)>,
    pub(super) hosts: BTreeSet<String>,
    /// uids whose epochs were raised or dropped.
    pub(super) epochs: BTreeSet<String>,
    generation: u64,
}

impl Unsaved {
    pub(super) fn vm(&mut self, host: &str, uid: String) {
        self.vms.insert((host.to_owned(), uid));
        self.generation += 1;
    }

    pub(super) fn host(&mut self, host: &str) {
        self.hosts.insert(host.to_owned());
        self.generation += 1;
    }

    pub(super) fn epoch(&mut self, uid: &str) {
        self.epochs.insert(uid.to_owned());
        self.generation += 1;
    }

    pub(super) fn generation(&self) -> u64 {
        self.generation
    }

    pub(super) fn is_empty(&self) -> bool {
        self.vms.is_empty() && self.hosts.is_empty() && self.epochs.is_empty()
    }

    /// Everything, to be saved now; nothing is unsaved afterwards.
    pub(super) fn take(&mut self) -> Self {
        let generation = self.generation;
        std::mem::replace(
            self,
            Self {
                generation,
                ..Default::default()
            },
        )
    }

    /// Gives back what could not be saved.
    pub(super) fn put_back(&mut self, failed: Self) {
        self.vms.extend(failed.vms);
        self.hosts.extend(failed.hosts);
        self.epochs.extend(failed.epochs);
    }
}
