//! Ended migrations are forgotten, oldest first: beyond a number, and beyond an age. Those with
//! work left never are.
//!
//! One task of [`super::Migrations`] does it: at its start, when a migration has ended, and once a
//! minute for the sake of age. Each transaction takes a bounded batch, so that a migration that
//! waits for the disk waits for no more than one.

use std::time::Duration;

use slat_proto::model::now;
use tokio::{
    sync::Notify,
    time::{Instant, sleep_until},
};

use crate::store::{BlockingStore, Prune};

/// Between two looks when nothing ends.
const LOOK: Duration = Duration::from_secs(60);
/// Between two looks when much ends.
const REST: Duration = Duration::from_secs(1);
/// Records that one transaction takes away.
const BATCH: usize = 256;

/// What the store keeps of migrations that have ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retention {
    /// As many, the newest.
    pub keep: usize,
    /// If they ended no longer ago than this.
    pub keep_for: Duration,
}

impl Default for Retention {
    fn default() -> Self {
        Self {
            keep: 1000,
            keep_for: Duration::from_secs(30 * 24 * 3600),
        }
    }
}

impl Retention {
    /// What may go at `at`.
    fn prune(self, at: &prost_types::Timestamp) -> Prune {
        let at = Duration::try_from(prost_types::Duration {
            seconds: at.seconds,
            nanos: at.nanos,
        });
        let oldest = at.unwrap_or_default().saturating_sub(self.keep_for);
        Prune {
            keep: self.keep,
            ended_after: u64::try_from(oldest.as_nanos()).unwrap_or(u64::MAX),
            at_most: BATCH,
        }
    }

    /// Forgets for ever. `ended`: notified when a migration has no work left.
    pub(super) async fn keep_to(self, store: BlockingStore, ended: &Notify) {
        loop {
            let begun = Instant::now();
            self.sweep(&store).await;
            tokio::select! {
                () = ended.notified() => sleep_until(begun + REST).await,
                () = sleep_until(begun + LOOK) => {}
            }
        }
    }

    async fn sweep(self, store: &BlockingStore) {
        let what = self.prune(&now());
        let mut gone = 0;
        loop {
            match store.with(move |store| store.prune_migrations(&what)).await {
                Ok(some) => {
                    gone += some;
                    if some < BATCH {
                        break;
                    }
                }
                Err(error) => {
                    tracing::warn!(%error, "old migrations are not forgotten; tried again later");
                    break;
                }
            }
        }
        if gone > 0 {
            tracing::info!(gone, keep = self.keep, keep_for = ?self.keep_for, "ended migrations are forgotten");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_ended_before_the_time_kept_may_go_and_no_clock_makes_it_wrap() {
        let retention = Retention {
            keep: 7,
            keep_for: Duration::from_secs(100),
        };
        let at = |seconds| prost_types::Timestamp { seconds, nanos: 5 };
        let prune = retention.prune(&at(1000));
        assert_eq!(prune.ended_after, 900_000_000_005);
        assert_eq!((prune.keep, prune.at_most), (7, BATCH));
        assert_eq!(retention.prune(&at(3)).ended_after, 0);
        assert_eq!(retention.prune(&at(-3)).ended_after, 0);
        assert_eq!(retention.prune(&at(i64::MAX)).ended_after, u64::MAX);
    }
}
