//! The highest epoch seen of each uid. It only grows: an old record, of a host that was silent or
//! of a store, does not come back to life when the newer one is gone. Plain data.
//!
//! An epoch is kept as long as any record or leftover has its uid. Of those that none has, the last
//! [`FORGOTTEN`] are kept still: a host that was away may bring one back.

use std::collections::{HashMap, HashSet, VecDeque};

use slat_proto::v1;

use super::rank::may_run;

/// Epochs kept of uids that nobody has.
const FORGOTTEN: usize = 4096;

#[derive(Debug, Default)]
pub(super) struct Epochs {
    seen: HashMap<String, u64>,
    /// Of these, uids that nobody has, oldest first.
    forgotten: VecDeque<String>,
}

impl Epochs {
    /// A uid's epoch is at least this. Whether that is news.
    pub(super) fn raise(&mut self, uid: &str, epoch: u64) -> bool {
        match self.seen.get_mut(uid) {
            Some(known) if *known >= epoch => false,
            Some(known) => {
                *known = epoch;
                true
            }
            None => {
                self.seen.insert(uid.to_owned(), epoch);
                true
            }
        }
    }

    /// The highest seen, 0 for a uid never seen.
    pub(super) fn of(&self, uid: &str) -> u64 {
        self.seen.get(uid).copied().unwrap_or(0)
    }

    /// Whether a record that claims the VM is older than what was seen of it.
    pub(super) fn undercut(&self, vm: &v1::Vm) -> bool {
        may_run(vm) && vm.epoch < self.of(&vm.uid)
    }

    /// Drops what nobody has and what is too much. Answers with the uids that were dropped.
    pub(super) fn prune(&mut self, alive: &HashSet<&str>) -> Vec<String> {
        self.forgotten.retain(|uid| !alive.contains(uid.as_str()));
        let known: HashSet<&str> = self.forgotten.iter().map(String::as_str).collect();
        let mut dropped = Vec::new();
        let mut fresh = Vec::new();
        for (uid, epoch) in &self.seen {
            if alive.contains(uid.as_str()) || known.contains(uid.as_str()) {
                continue;
            }
            // Nothing is below the first epoch.
            if *epoch <= 1 {
                dropped.push(uid.clone());
            } else {
                fresh.push(uid.clone());
            }
        }
        fresh.sort_unstable();
        self.forgotten.extend(fresh);
        while self.forgotten.len() > FORGOTTEN {
            dropped.extend(self.forgotten.pop_front());
        }
        for uid in &dropped {
            self.seen.remove(uid);
        }
        dropped
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_nobody_has_is_kept_for_a_while_and_not_for_ever() {
        let mut epochs = Epochs::default();
        for index in 0..FORGOTTEN + 2 {
            assert!(epochs.raise(&format!("u{index:05}"), 2));
        }
        assert!(!epochs.raise("u00000", 1));
        assert!(epochs.raise("first", 1));
        let alive = HashSet::from(["u00001"]);
        let mut dropped = epochs.prune(&alive);
        dropped.sort_unstable();
        assert_eq!(dropped, ["first", "u00000"]);
        assert_eq!(epochs.of("u00001"), 2);
        assert_eq!(epochs.of("u04000"), 2);
        assert!(epochs.prune(&alive).is_empty());
    }
}
