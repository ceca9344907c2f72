//! Pages that the host sets aside (hugetlbfs) for a test, and gives back after it.
//!
//! Tests of several processes want them: each holds a lock of the kernel's file while it has some.
//!
//! Larger pages than 2 MiB are taken where they are free and never made: to make one the kernel
//! moves so much memory that everything on the machine stands still for a moment, and tests of
//! others fail.

use std::{
    fs::File,
    io::Write as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use rustix::fs::{FlockOperation, flock};

/// Other tests may have them for so long.
const PATIENCE: Duration = Duration::from_secs(400);
/// Pages that are made for a test have so many KiB at most.
const LARGEST_MADE: u64 = 2048;

/// Pages of one size. Dropped, the host has as many as before.
#[derive(Debug)]
pub struct Reserved {
    pool: PathBuf,
    before: u64,
    _lock: File,
}

impl Reserved {
    /// Has exactly so many pages free, of `kib` KiB each.
    ///
    /// # Errors
    /// When this machine has none to give, or does not let us.
    pub fn take(kib: u64, pages: u64) -> anyhow::Result<Self> {
        let pool = PathBuf::from(format!("/sys/kernel/mm/hugepages/hugepages-{kib}kB"));
        let file = pool.join("nr_hugepages");
        let lock = File::open(&file).with_context(|| format!("{}", file.display()))?;
        let begun = Instant::now();
        while flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
            ensure!(begun.elapsed() < PATIENCE, "another test has the pages");
            std::thread::sleep(Duration::from_millis(20));
        }
        let before = figure(&pool, "nr_hugepages");
        let reserved = Self {
            pool,
            before,
            _lock: lock,
        };
        let free = reserved.free();
        if kib > LARGEST_MADE {
            ensure!(
                free == pages,
                "{free} pages of {kib} KiB are free, not {pages}"
            );
            return Ok(reserved);
        }
        reserved
            .set((before + pages).saturating_sub(free))
            .with_context(|| format!("{}", file.display()))?;
        match reserved.free() {
            got if got == pages => Ok(reserved),
            got => bail!("{got} pages of {kib} KiB are free, not {pages}: the kernel has no more"),
        }
    }

    /// Pages that nobody has or has reserved.
    #[must_use]
    pub fn free(&self) -> u64 {
        let figure = |name| figure(&self.pool, name);
        figure("free_hugepages").saturating_sub(figure("resv_hugepages"))
    }

    fn set(&self, pages: u64) -> std::io::Result<()> {
        let path = self.pool.join("nr_hugepages");
        write!(File::options().write(true).open(path)?, "{pages}")
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        if figure(&self.pool, "nr_hugepages") == self.before {
            return;
        }
        if let Err(error) = self.set(self.before) {
            eprintln!("{}: {error}", self.pool.display());
        }
    }
}

fn figure(pool: &Path, name: &str) -> u64 {
    let text = std::fs::read_to_string(pool.join(name)).unwrap_or_default();
    text.trim().parse().unwrap_or(0)
}
