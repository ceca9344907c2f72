//! How a journal reaches the disk: a port, so that a test can let a write or a sync fail.

use std::{
    fmt::Debug,
    fs::File,
    io::{self, Write as _},
    path::Path,
};

/// Writes of a journal. Each returns once its bytes are durable.
pub trait Disk: Debug + Send + Sync {
    /// Appends to an open file.
    ///
    /// # Errors
    /// When the write or the sync fails. The bytes may be durable all the same.
    fn append(&self, file: &mut File, bytes: &[u8]) -> io::Result<()>;

    /// Puts a new file with these contents in the place of `path`.
    ///
    /// # Errors
    /// When a step fails. `path` then holds the old contents or the new, whole.
    fn replace(&self, path: &Path, bytes: &[u8]) -> io::Result<()>;

    /// Cuts the file in `path` to `len` bytes.
    ///
    /// # Errors
    /// When the kernel refuses.
    fn truncate(&self, path: &Path, len: u64) -> io::Result<()>;
}

/// The file system.
#[derive(Clone, Copy, Debug, Default)]
pub struct RealDisk;

impl Disk for RealDisk {
    fn append(&self, file: &mut File, bytes: &[u8]) -> io::Result<()> {
        file.write_all(bytes)?;
        file.sync_data()
    }

    fn replace(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        let aside = path.with_extension("new");
        let mut file = File::create(&aside)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        std::fs::rename(&aside, path)?;
        sync_parent(path)
    }

    fn truncate(&self, path: &Path, len: u64) -> io::Result<()> {
        let file = File::options().write(true).open(path)?;
        file.set_len(len)?;
        file.sync_all()?;
        // The file may have taken the place of another, and its name not be durable yet.
        sync_parent(path)
    }
}

/// Makes the name of a file durable.
pub(super) fn sync_parent(path: &Path) -> io::Result<()> {
    match path.parent() {
        Some(parent) => File::open(parent)?.sync_all(),
        None => Ok(()),
    }
}
