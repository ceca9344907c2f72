//! Halves that outlived their VM's directory: `<state>/transfers/`, one record each, until they are released.
//!
//! A directory goes when its VM is deleted or its name is taken again, while the server may not yet have stored how a half
//! in it ended. The answer is written here, synced, before the directory is removed.
//!
//! # Locking
//! The map's mutex is never held across file work; a record is written before it is in the map and removed after.

use std::{
    collections::BTreeMap,
    io,
    path::Path,
    sync::{Mutex, MutexGuard, PoisonError},
};

use slat_proto::v1;

use super::side::HalfKey;
use slat_record::dir::VmDir;

/// The records.
#[derive(Debug)]
pub(super) struct EndedHalves {
    dir: VmDir,
    halves: Mutex<BTreeMap<HalfKey, v1::Transfer>>,
}

impl EndedHalves {
    /// Opens the folder, making it when it is missing.
    ///
    /// # Errors
    /// When it cannot be read.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        std::fs::create_dir_all(path)?;
        let dir = VmDir::new(path);
        let halves = dir
            .transfers()?
            .into_iter()
            .filter_map(|half| Some((HalfKey::of(&half)?, half)))
            .collect();
        Ok(Self {
            dir,
            halves: Mutex::new(halves),
        })
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<HalfKey, v1::Transfer>> {
        self.halves.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps halves; returns when they are durable. Blocks on the disk.
    ///
    /// # Errors
    /// When a record cannot be written.
    pub(super) fn keep(&self, halves: &[v1::Transfer]) -> io::Result<()> {
        for half in halves {
            self.dir.save_transfer(half)?;
            if let Some(key) = HalfKey::of(half) {
                self.lock().insert(key, half.clone());
            }
        }
        Ok(())
    }

    pub(super) fn get(&self, key: &HalfKey) -> Option<v1::Transfer> {
        self.lock().get(key).cloned()
    }

    pub(super) fn all(&self) -> Vec<v1::Transfer> {
        self.lock().values().cloned().collect()
    }

    /// Forgets a half. No effect when there is none. Blocks on the disk.
    ///
    /// # Errors
    /// When the record cannot be removed; it is then still told.
    pub(super) fn forget(&self, key: &HalfKey) -> io::Result<()> {
        self.dir
            .remove_transfer(&key.migration, key.role.to_message())?;
        self.lock().remove(key);
        Ok(())
    }
}
