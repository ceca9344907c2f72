//! Source sides that are just being begun: announced on disk, asked for at the process, and not
//! answered yet. Until then "no such side" from the process is no reason to forget one.
//!
//! # Locking
//! A leaf mutex, but for [`Beginning::unless`]: it is held over the removal of a side's record, so
//! that no record of a side that is begun meanwhile is removed. That is done on a blocking thread;
//! who begins a side waits for one unlink at most. Lock order: this one, then the map of sides.

use std::sync::{Mutex, MutexGuard, PoisonError};

use super::side::SideKey;

/// Those of one VM. A side that is asked for twice is in it twice.
#[derive(Debug, Default)]
pub(super) struct Beginning(Mutex<Vec<SideKey>>);

/// A side is being begun until this is dropped.
#[derive(Debug)]
pub(super) struct Begins<'a> {
    all: &'a Beginning,
    key: SideKey,
}

impl Beginning {
    fn keys(&self) -> MutexGuard<'_, Vec<SideKey>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `key` is being begun from here on.
    pub(super) fn begin(&self, key: &SideKey) -> Begins<'_> {
        self.keys().push(key.clone());
        Begins {
            all: self,
            key: key.clone(),
        }
    }

    /// Calls `forget` unless `key` is being begun; none is begun meanwhile.
    pub(super) fn unless(&self, key: &SideKey, forget: impl FnOnce() -> bool) -> bool {
        let keys = self.keys();
        !keys.contains(key) && forget()
    }
}

impl Drop for Begins<'_> {
    fn drop(&mut self) {
        let mut keys = self.all.keys();
        if let Some(at) = keys.iter().position(|key| *key == self.key) {
            keys.swap_remove(at);
        }
    }
}

#[cfg(test)]
mod tests {
    use slat_proto::model::MigrationName;

    use super::*;

    #[test]
    fn a_side_is_begun_as_long_as_somebody_begins_it() {
        let (all, key) = (
            Beginning::default(),
            SideKey::source(MigrationName::parse("m").unwrap()),
        );
        let first = all.begin(&key);
        let second = all.begin(&key);
        drop(first);
        assert!(!all.unless(&key, || true));
        drop(second);
        assert!(all.unless(&key, || true));
    }
}
