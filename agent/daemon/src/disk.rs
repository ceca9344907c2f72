//! Whether the state directory can be written, found out before somebody needs it.
//!
//! 64 KiB are written to a file of their own and synced every [`PROBE`]; after a failure again
//! after a pause that doubles from [`FIRST_PAUSE`] to [`LONGEST_PAUSE`], until they are on disk. A
//! probe that has no answer within [`PATIENCE`] is a failure too; no second one is begun beside it.
//! The endpoint's health, the host's message and `slat_agent_disk_up` follow.
//!
//! VMs that run need no disk to go on. A new VM does, and so do both sides of a migration: their
//! journals are there.

use std::{
    io::{self, Write as _},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use slat_proto::{ApiError, Reason, transport::Health};
use tokio::time::{sleep, timeout};

/// Between probes while all is well.
const PROBE: Duration = Duration::from_secs(5);
/// How long a probe may take.
const PATIENCE: Duration = Duration::from_secs(10);
const FIRST_PAUSE: Duration = Duration::from_millis(250);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// In the state directory.
const FILE: &str = "probe";
const NEXT: &str = "probe.next";
/// A file system that has less than this left has no room for a VM's journal and records.
const BYTES: usize = 64 << 10;

/// What is known of the disk. Clones know the same. A leaf mutex, held for one look.
#[derive(Clone, Debug, Default)]
pub(super) struct Disk(Arc<Mutex<Option<ApiError>>>);

impl Disk {
    /// What is wrong with it, if anything.
    pub(super) fn trouble(&self) -> Option<ApiError> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Takes a probe's result; whether that is news.
    fn found(&self, trouble: Option<ApiError>) -> bool {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let same = |a: &ApiError, b: &ApiError| a.reason == b.reason && a.message == b.message;
        let news = match (&*known, &trouble) {
            (None, None) => false,
            (Some(a), Some(b)) => !same(a, b),
            _ => true,
        };
        *known = trouble;
        news
    }

    /// Probes for ever; its owner ends it.
    pub(super) async fn keep(self, state_dir: PathBuf, health: Health) {
        let mut pause = FIRST_PAUSE;
        loop {
            let dir = state_dir.clone();
            let mut probing = tokio::task::spawn_blocking(move || probe(&dir));
            let trouble = loop {
                match timeout(PATIENCE, &mut probing).await {
                    Ok(Ok(Ok(()))) => break None,
                    Ok(Ok(Err(error))) => {
                        let trouble = unwritable(&state_dir).with("cause", &error);
                        break Some(trouble.because_of(&error));
                    }
                    Ok(Err(panicked)) => {
                        break Some(unwritable(&state_dir).with("cause", panicked));
                    }
                    Err(_) => {
                        let hangs = unwritable(&state_dir).with(
                            "cause",
                            format_args!("no answer in {} s", PATIENCE.as_secs()),
                        );
                        self.tell(Some(hangs), &health).await;
                    }
                }
            };
            let works = trouble.is_none();
            self.tell(trouble, &health).await;
            if works {
                pause = FIRST_PAUSE;
                sleep(PROBE).await;
            } else {
                sleep(pause).await;
                pause = (pause * 2).min(LONGEST_PAUSE);
            }
        }
    }

    async fn tell(&self, trouble: Option<ApiError>, health: &Health) {
        if !self.found(trouble.clone()) {
            return;
        }
        match trouble {
            None => {
                tracing::info!("the state directory can be written again");
                health.serving().await;
            }
            Some(error) => {
                tracing::error!(%error, reason = %error.reason, "the state directory cannot be written");
                health.not_serving(error).await;
            }
        }
    }
}

fn unwritable(state_dir: &Path) -> ApiError {
    let message = format!("{} cannot be written", state_dir.display());
    ApiError::new(Reason::Journal, message)
}

/// Writes a new file beside the last one, waits until it is on disk and lets it take its place. The
/// last one keeps its blocks until then: what a full disk has left are not just those.
fn probe(state_dir: &Path) -> io::Result<()> {
    let (next, last) = (state_dir.join(NEXT), state_dir.join(FILE));
    let written = std::fs::File::create(&next).and_then(|mut file| {
        file.write_all(&[0x5a; BYTES])?;
        file.sync_data()?;
        std::fs::rename(&next, last)
    });
    if written.is_err() {
        // Whatever it holds is room for somebody else.
        drop(std::fs::remove_file(&next));
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_that_can_be_written_passes_again_and_again() {
        let dir = slat_test_dir::TestDir::new();
        for _ in 0..2 {
            probe(dir.path()).unwrap();
        }
        assert_eq!(
            std::fs::metadata(dir.path().join(FILE)).unwrap().len(),
            BYTES as u64
        );
        assert!(!dir.path().join(NEXT).exists());
        assert!(probe(&dir.path().join("gone")).is_err());
    }

    #[test]
    fn the_same_trouble_is_news_once() {
        let disk = Disk::default();
        let full = || {
            let error = io::Error::from_raw_os_error(28);
            Some(unwritable(Path::new("/state")).because_of(&error))
        };
        assert!(!disk.found(None));
        assert!(disk.found(full()));
        assert!(!disk.found(full()));
        assert_eq!(disk.trouble().unwrap().reason, Reason::DiskFull);
        assert!(disk.found(None));
        assert!(disk.trouble().is_none());
    }
}
