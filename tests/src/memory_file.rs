//! Guest memory as the VM's process has it: the memory file of a slot, opened by way of `/proc`.
//! What a test is told through the API is held against it.

use std::{
    fs::{self, File},
    hash::{DefaultHasher, Hash as _, Hasher as _},
    os::unix::fs::FileExt as _,
};

/// The memory of one slot.
#[derive(Debug)]
pub struct MemoryFile(File);

impl MemoryFile {
    /// Of a slot of the VM whose process has that id.
    ///
    /// # Errors
    /// When it has no such slot.
    pub fn of(pid: u32, slot: u32) -> anyhow::Result<Self> {
        let name = format!("/memfd:slat-slot{slot} (deleted)");
        for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
            let path = entry?.path();
            if fs::read_link(&path).is_ok_and(|target| target.to_string_lossy() == name) {
                return Ok(Self(File::open(path)?));
            }
        }
        anyhow::bail!("process {pid} has no memory file of slot {slot}")
    }

    /// The little-endian word at a byte of the slot.
    ///
    /// # Errors
    /// When the slot ends before it.
    pub fn word(&self, at: u64) -> anyhow::Result<u64> {
        let mut word = [0; 8];
        self.0.read_exact_at(&mut word, at)?;
        Ok(u64::from_le_bytes(word))
    }

    /// The bytes from one of the slot on.
    ///
    /// # Errors
    /// When the slot ends before the last.
    pub fn read(&self, at: u64, into: &mut [u8]) -> anyhow::Result<()> {
        Ok(self.0.read_exact_at(into, at)?)
    }

    /// A hash of each page.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn hashes(&self) -> anyhow::Result<Vec<u64>> {
        let pages = self.0.metadata()?.len() / 4096;
        let mut page = [0; 4096];
        (0..pages)
            .map(|number| {
                self.0.read_exact_at(&mut page, number * 4096)?;
                let mut hasher = DefaultHasher::new();
                page.hash(&mut hasher);
                Ok(hasher.finish())
            })
            .collect()
    }
}
