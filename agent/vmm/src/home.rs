//! A directory for a test whose threads may outlive it: a side of a migration may be writing its
//! last record while the test that made it is over.
//!
//! `tempfile` removes its directory once and keeps quiet about a failure. A file that is made
//! between the look and the removal then leaves the directory behind. Here the removal is made
//! again until nothing is there, which it comes to: below a directory that is gone nothing can be
//! made.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use tempfile::TempDir;

/// A thread writes at most a few records.
const PATIENCE: Duration = Duration::from_secs(10);

/// As [`TempDir`]; gone when it is dropped, whoever still writes.
#[derive(Debug)]
pub(crate) struct Home(TempDir);

impl Home {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        let begun = Instant::now();
        while let Err(error) = std::fs::remove_dir_all(self.path())
            && self.path().exists()
        {
            if begun.elapsed() > PATIENCE {
                // The look for what tests leave behind finds it.
                eprintln!("{} stays: {error}", self.path().display());
                return;
            }
            std::thread::yield_now();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    #[test]
    fn somebody_who_still_writes_keeps_no_directory() {
        for _ in 0..50 {
            let home = Home::new();
            let path = home.path().to_owned();
            let (begun, over) = (AtomicBool::new(false), AtomicBool::new(false));
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    // Until the directory is gone, or should be.
                    while !over.load(Ordering::Relaxed)
                        && std::fs::write(path.join("record.new"), "").is_ok()
                    {
                        begun.store(true, Ordering::Relaxed);
                        let _ = std::fs::rename(path.join("record.new"), path.join("record"));
                    }
                });
                while !begun.load(Ordering::Relaxed) {
                    std::thread::yield_now();
                }
                drop(home);
                over.store(true, Ordering::Relaxed);
            });
            assert!(!path.exists());
        }
    }
}
