//! The server's public keys as this host knows them, in `grant-keys.json`: grants are checked after
//! a restart without a server, too.
//!
//! What the server announces is all that is in force. A key that it announces no more is over here
//! at once, and remembered for [`REMEMBERED`] after its end: a destination in doubt may show a
//! grant as late.

use std::{
    io,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use serde_json::{Value, json};
use slat_proto::{
    model::{key_from_message, key_message},
    v1,
};
use slat_trust::grant::{GrantKey, KeyRing};

use super::file;

/// How long a key is remembered after its end.
const REMEMBERED: Duration = Duration::from_secs(30 * 24 * 3600);
/// Keys of one announcement that are looked at.
const ANNOUNCED: usize = 8;
/// In the state directory.
pub(super) const FILE: &str = "grant-keys.json";

/// The ring and its file.
#[derive(Debug)]
pub(super) struct Keys {
    path: PathBuf,
    ring: KeyRing,
    /// The ring is not on disk.
    unsaved: bool,
}

fn written(key: &GrantKey) -> Value {
    json!({
        "public_key": file::hex(&key.public_key),
        "not_before_ms": file::millis(key.not_before),
        "not_after_ms": file::millis(key.not_after),
    })
}

fn read(value: &Value) -> Option<GrantKey> {
    let time = |field| file::time(value.get(field)?.as_u64()?);
    Some(GrantKey {
        public_key: file::unhex(value.get("public_key")?.as_str()?)?,
        not_before: time("not_before_ms")?,
        not_after: time("not_after_ms")?,
    })
}

fn in_force(key: &GrantKey, now: SystemTime) -> bool {
    key.not_before <= now && now < key.not_after
}

impl Keys {
    /// Blocks on the disk.
    ///
    /// # Errors
    /// When the file cannot be read; one that makes no sense is begun anew.
    pub(super) fn open(state_dir: &Path) -> io::Result<Self> {
        let path = state_dir.join(FILE);
        let mut ring = KeyRing::default();
        if let Some(value) = file::read(&path)? {
            let listed = value.get("keys").and_then(Value::as_array);
            let listed = listed.map(Vec::as_slice).unwrap_or_default();
            let keys: Vec<GrantKey> = listed.iter().filter_map(read).collect();
            if keys.len() != listed.len() || listed.is_empty() {
                tracing::error!(path = %path.display(), "not every key in it can be read");
            }
            ring.learn(keys);
        }
        Ok(Self {
            path,
            ring,
            unsaved: false,
        })
    }

    pub(super) fn ring(&self) -> &KeyRing {
        &self.ring
    }

    /// Those in force, for a VM's process.
    pub(super) fn in_force(&self, now: SystemTime) -> Vec<v1::GrantKey> {
        let keys = self.ring.keys().iter();
        keys.filter(|key| in_force(key, now))
            .map(key_message)
            .collect()
    }

    /// What the ring is after an announcement; `None`: as before.
    pub(super) fn after(&self, announced: &[v1::GrantKey], now: SystemTime) -> Option<KeyRing> {
        let mut told = Vec::new();
        for message in announced.iter().take(ANNOUNCED) {
            match key_from_message(message) {
                Ok(key) => told.push(key),
                Err(error) => tracing::warn!(%error, "the server announces what is no key"),
            }
        }
        // An older server announces none.
        if told.is_empty() {
            return None;
        }
        let mut ring = self.ring.clone();
        let dropped = self.ring.keys().iter().filter(|key| {
            now < key.not_after && !told.iter().any(|told| told.public_key == key.public_key)
        });
        let dropped: Vec<GrantKey> = dropped
            .map(|key| GrantKey {
                not_after: now,
                ..key.clone()
            })
            .collect();
        ring.learn(dropped);
        ring.learn(told);
        ring.forget_before(now.checked_sub(REMEMBERED).unwrap_or(now));
        (ring != self.ring).then_some(ring)
    }

    pub(super) fn set(&mut self, ring: KeyRing) {
        self.ring = ring;
        self.unsaved = true;
    }

    pub(super) fn is_unsaved(&self) -> bool {
        self.unsaved
    }

    /// Where and what to write, and of which ring.
    pub(super) fn to_write(&self) -> (PathBuf, Value, KeyRing) {
        let keys: Vec<Value> = self.ring.keys().iter().map(written).collect();
        (
            self.path.clone(),
            json!({ "keys": keys }),
            self.ring.clone(),
        )
    }

    /// That ring is on disk.
    pub(super) fn saved(&mut self, ring: &KeyRing) {
        self.unsaved &= *ring != self.ring;
    }
}
