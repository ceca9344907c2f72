//! A temporary directory for a test that its own threads may outlive: a side of a migration writes
//! its last record, an agent's probe of its disk is under way, while the test that made the
//! directory is over.
//!
//! `tempfile` removes its directory once and keeps quiet about a failure. A file that is made
//! between the look and the removal then leaves the directory behind. Here the removal is made
//! again until nothing is there, which it comes to: below a directory that is gone nothing can be
//! made. So no test takes one of `tempfile`'s (`clippy.toml` says so too).
#![forbid(unsafe_code)]

use std::{
    io,
    path::Path,
    time::{Duration, Instant},
};

/// A thread writes at most a few records after its test.
const PATIENCE: Duration = Duration::from_secs(10);

/// A directory of its own below the temporary directory (`TMPDIR`); gone when it is dropped.
#[derive(Debug)]
pub struct TestDir(tempfile::TempDir);

impl TestDir {
    /// Makes one with a random name.
    ///
    /// # Panics
    /// When it cannot be made: a test has nothing to go on with.
    #[must_use]
    #[expect(clippy::new_without_default, reason = "it makes a directory")]
    pub fn new() -> Self {
        match Self::with_prefix(".tmp") {
            Ok(dir) => dir,
            Err(error) => panic!("a temporary directory: {error}"),
        }
    }

    /// Makes one whose name is `prefix` and three more: short, because the path of a Unix socket
    /// below it has at most 107 bytes.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn with_prefix(prefix: &str) -> io::Result<Self> {
        tempfile::Builder::new()
            .prefix(prefix)
            .rand_bytes(3)
            .tempdir()
            .map(Self)
    }

    /// Makes one in `parent`.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn within(parent: &Path) -> io::Result<Self> {
        tempfile::Builder::new().tempdir_in(parent).map(Self)
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.0.path()
    }
}

impl AsRef<Path> for TestDir {
    fn as_ref(&self) -> &Path {
        self.path()
    }
}

impl Drop for TestDir {
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
            let dir = TestDir::new();
            let path = dir.path().to_owned();
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
                drop(dir);
                over.store(true, Ordering::Relaxed);
            });
            assert!(!path.exists());
        }
    }
}
