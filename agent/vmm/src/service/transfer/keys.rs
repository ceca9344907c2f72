//! The keys that this process made for page streams, one for each migration that asked.
//!
//! A source is asked to describe its VM before it is known whether it will be moved: a key that
//! nobody comes back for is dropped when others need the place, or when its time is over.

use std::{
    collections::VecDeque,
    sync::Arc,
    time::{Duration, SystemTime},
};

use slat_proto::{ApiError, Reason, model::MigrationName};
use slat_trust::channel::ChannelKey;

/// Keys that are kept.
const MOST: usize = 4;
/// How long a key is good: until its grant ends counts the grant, so this is longer than most of
/// them.
const LASTS: Duration = Duration::from_secs(24 * 3600);

/// A new key.
///
/// # Errors
/// INTERNAL when none can be made.
pub(super) fn make(vm_uid: &str, migration: &MigrationName) -> Result<Arc<ChannelKey>, ApiError> {
    ChannelKey::generate(vm_uid, migration.id(), LASTS)
        .map(Arc::new)
        .map_err(|error| ApiError::new(Reason::Internal, format!("page streams: {error}")))
}

/// See the module. The last used is at the back.
#[derive(Debug, Default)]
pub(super) struct Keys(VecDeque<(MigrationName, Arc<ChannelKey>)>);

impl Keys {
    /// The key of a migration, if it is still good.
    pub(super) fn of(&mut self, migration: &MigrationName) -> Option<Arc<ChannelKey>> {
        let now = SystemTime::now();
        self.0.retain(|(_, key)| key.not_after() > now);
        let at = self.0.iter().position(|(of, _)| of == migration)?;
        let entry = self.0.remove(at)?;
        let key = Arc::clone(&entry.1);
        self.0.push_back(entry);
        Some(key)
    }

    /// Keeps a migration's key.
    pub(super) fn keep(&mut self, migration: &MigrationName, key: Arc<ChannelKey>) {
        self.forget(migration);
        if self.0.len() == MOST {
            self.0.pop_front();
        }
        self.0.push_back((migration.clone(), key));
    }

    /// Drops it.
    pub(super) fn forget(&mut self, migration: &MigrationName) {
        self.0.retain(|(of, _)| of != migration);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(id: &str) -> MigrationName {
        MigrationName::parse(id).unwrap()
    }

    #[test]
    fn the_key_that_was_not_asked_for_longest_goes_first() {
        let mut keys = Keys::default();
        for id in ["m1", "m2", "m3", "m4"] {
            keys.keep(&name(id), make("u", &name(id)).unwrap());
        }
        let first = keys.of(&name("m1")).unwrap();
        keys.keep(&name("m5"), make("u", &name("m5")).unwrap());
        assert!(keys.of(&name("m2")).is_none());
        let again = keys.of(&name("m1")).unwrap();
        assert_eq!(first.fingerprint(), again.fingerprint());
        keys.forget(&name("m1"));
        assert!(keys.of(&name("m1")).is_none());
    }
}
