//! How long an append to the VM's journal takes, measured without one: the same bytes on the same
//! disk, in a file without a name beside the journal.
//!
//! What a switchover costs is told before it begins, and nothing may be appended to a journal only
//! to see how long that takes.

use std::{
    fs::{File, OpenOptions},
    io,
    sync::Arc,
    time::{Duration, Instant},
};

use slat_record::journal::Disk;

use super::Machine;

/// About as long as an entry.
const ENTRY: [u8; 256] = [b' '; 256];
/// The file is cut when it has grown to this.
const MOST: u64 = 64 << 10;

/// See the module.
#[derive(Debug)]
pub(crate) struct SyncProbe {
    file: File,
    disk: Arc<dyn Disk>,
}

impl Machine {
    /// A probe in the VM's directory. Its file goes with it.
    ///
    /// # Errors
    /// The kernel's, when the file cannot be made.
    pub(crate) fn sync_probe(&self) -> io::Result<SyncProbe> {
        let path = self.dir.path().join("sync-probe");
        let file = OpenOptions::new().create(true).append(true).open(&path)?;
        std::fs::remove_file(&path)?;
        Ok(SyncProbe {
            file,
            disk: Arc::clone(&self.parts.disk),
        })
    }
}

impl SyncProbe {
    /// Appends and syncs once.
    ///
    /// # Errors
    /// The kernel's.
    pub(crate) fn measure(&mut self) -> io::Result<Duration> {
        let begun = Instant::now();
        self.disk.append(&mut self.file, &ENTRY)?;
        let took = begun.elapsed();
        if self.file.metadata()?.len() >= MOST {
            self.file.set_len(0)?;
        }
        Ok(took)
    }
}
