//! The pages that this host set aside, as last read: by one task, so that a report and a scrape
//! read nothing.
//!
//! # Locking
//! One leaf mutex over the last figures, held to replace or copy them.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use slat_proto::v1;
use tokio_util::sync::CancellationToken;

/// Between two looks: a report is not older than two of these.
const INTERVAL: Duration = Duration::from_secs(1);

/// The last figures; `None` before the first.
#[derive(Clone, Debug, Default)]
pub(super) struct Pools(Arc<Mutex<Option<v1::HugePages>>>);

impl Pools {
    /// As last read.
    pub(super) fn get(&self) -> Option<v1::HugePages> {
        // It is replaced whole.
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Reads them once. May block.
    pub(super) fn look(&self, read: fn() -> v1::HugePages) {
        let now = read();
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(now);
    }

    /// Reads them again and again, until `stop`.
    pub(super) async fn keep(self, read: fn() -> v1::HugePages, stop: CancellationToken) {
        let mut tick = tokio::time::interval(INTERVAL);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                _ = tick.tick() => {}
            }
            let own = self.clone();
            // Files of sysfs do not wait for a disk, but for the kernel's locks.
            if let Err(error) = tokio::task::spawn_blocking(move || own.look(read)).await {
                tracing::error!(%error, "the pages set aside could not be read");
            }
        }
    }
}
