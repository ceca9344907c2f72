//! Sides that outlived their VM's directory: `<state>/transfers/`, one record each, until they are
//! released.
//!
//! A directory goes when its VM is deleted or its name is taken again, while the server may not yet
//! have stored how a side in it ended. The answer is written here, synced, before the directory is
//! removed.
//!
//! # Locking
//! The map's mutex is never held across file work; a record is written before it is in the map and
//! removed after.

use std::{
    collections::BTreeMap,
    io,
    path::Path,
    sync::{Mutex, MutexGuard, PoisonError},
};

use slat_proto::v1;

use super::side::SideKey;
use slat_record::dir::VmDir;

/// The records.
#[derive(Debug)]
pub(super) struct EndedSides {
    dir: VmDir,
    sides: Mutex<BTreeMap<SideKey, v1::Transfer>>,
}

impl EndedSides {
    /// Opens the folder, making it when it is missing.
    ///
    /// # Errors
    /// When it cannot be read.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        std::fs::create_dir_all(path)?;
        let dir = VmDir::new(path);
        let sides = dir
            .transfers()?
            .into_iter()
            .filter_map(|side| Some((SideKey::of(&side)?, side)))
            .collect();
        Ok(Self {
            dir,
            sides: Mutex::new(sides),
        })
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<SideKey, v1::Transfer>> {
        self.sides.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps sides; returns when they are durable. Blocks on the disk.
    ///
    /// # Errors
    /// When a record cannot be written.
    pub(super) fn keep(&self, sides: &[v1::Transfer]) -> io::Result<()> {
        for side in sides {
            self.dir.save_transfer(side)?;
            if let Some(key) = SideKey::of(side) {
                self.lock().insert(key, side.clone());
            }
        }
        Ok(())
    }

    pub(super) fn get(&self, key: &SideKey) -> Option<v1::Transfer> {
        self.lock().get(key).cloned()
    }

    pub(super) fn all(&self) -> Vec<v1::Transfer> {
        self.lock().values().cloned().collect()
    }

    /// Forgets a side. No effect when there is none. Blocks on the disk.
    ///
    /// # Errors
    /// When the record cannot be removed; the side is then still reported.
    pub(super) fn forget(&self, key: &SideKey) -> io::Result<()> {
        self.dir
            .remove_transfer(&key.migration, key.role.to_message())?;
        self.lock().remove(key);
        Ok(())
    }
}
