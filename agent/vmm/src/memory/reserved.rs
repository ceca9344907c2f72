//! Pages set aside for a test, and given back after it.
//!
//! Tests of several processes want them: each holds a lock of the kernel's file while it has some.

use std::{
    fs::File,
    io::Write as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use rustix::fs::{FlockOperation, flock};

const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";
/// Another test may have them for so long.
const PATIENCE: Duration = Duration::from_secs(120);

/// See the module.
pub(crate) struct Reserved {
    file: PathBuf,
    before: u64,
    _lock: File,
}

impl Reserved {
    /// So many pages of 2 MiB that nobody has; why not, where there are none.
    pub(crate) fn take(pages: u64) -> Result<Self, String> {
        let file = Path::new(POOL).join("nr_hugepages");
        let why = |error: std::io::Error| format!("{}: {error}", file.display());
        let lock = File::open(&file).map_err(why)?;
        let begun = Instant::now();
        while flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
            if begun.elapsed() > PATIENCE {
                return Err("another test has the pages".to_owned());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let before = figure("nr_hugepages");
        let reserved = Self {
            file: file.clone(),
            before,
            _lock: lock,
        };
        let missing = pages.saturating_sub(free());
        if missing > 0 {
            set(&file, before + missing).map_err(why)?;
        }
        match free() {
            free if free < pages => Err(format!("the kernel set {free} pages aside, not {pages}")),
            _ => Ok(reserved),
        }
    }

    /// Pages that nobody has or has reserved.
    pub(crate) fn free(&self) -> u64 {
        free()
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        if let Err(error) = set(&self.file, self.before) {
            eprintln!("{}: {error}", self.file.display());
        }
    }
}

/// Pages that nobody has or has reserved.
pub(super) fn free() -> u64 {
    figure("free_hugepages").saturating_sub(figure("resv_hugepages"))
}

fn figure(name: &str) -> u64 {
    let text = std::fs::read_to_string(Path::new(POOL).join(name)).unwrap_or_default();
    text.trim().parse().unwrap_or(0)
}

fn set(file: &Path, pages: u64) -> std::io::Result<()> {
    let mut file = File::options().write(true).open(file)?;
    write!(file, "{pages}")
}
