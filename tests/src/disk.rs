//! Small disks that can be filled: a tmpfs where a state directory is to be. Only root may mount
//! one.

use std::{
    fs,
    io::Write as _,
    path::{Path, PathBuf},
};

use anyhow::Context as _;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

/// Holds journals and logs of a few VMs, and is filled in no time.
const OPTIONS: &std::ffi::CStr = c"size=64m,mode=0700";
const FILLER: &str = "filler";

/// A mounted tmpfs; unmounted when dropped.
#[derive(Debug)]
pub struct SmallDisk(PathBuf);

impl SmallDisk {
    /// Mounts one at `path`, which is made.
    ///
    /// # Errors
    /// When this process may not.
    pub fn mount(path: &Path) -> anyhow::Result<Self> {
        fs::create_dir(path)?;
        mount("tmpfs", path, "tmpfs", MountFlags::empty(), OPTIONS)
            .with_context(|| format!("mounting a tmpfs at {}", path.display()))?;
        Ok(Self(path.to_owned()))
    }

    /// Leaves no byte.
    ///
    /// # Errors
    /// When the file that does it cannot be made.
    pub fn fill(&self) -> anyhow::Result<()> {
        let mut file = fs::File::create(self.0.join(FILLER))?;
        let block = [0u8; 1 << 16];
        for size in [block.len(), 1] {
            while file.write_all(&block[..size]).is_ok() {}
        }
        Ok(())
    }

    /// Makes room again.
    ///
    /// # Errors
    /// When the file cannot be removed.
    pub fn free(&self) -> anyhow::Result<()> {
        Ok(fs::remove_file(self.0.join(FILLER))?)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Detached: whoever still has a file open there keeps it until it ends.
        if let Err(error) = unmount(&self.0, UnmountFlags::DETACH) {
            eprintln!("unmounting {}: {error}", self.0.display());
        }
    }
}
