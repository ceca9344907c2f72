//! Finds out whether the store can be written, and turns the endpoint's health by it.
//!
//! A probe is written every [`PROBE`], so that a full disk is known before somebody needs it; after
//! a failure of any call at once, then after a pause that doubles from [`FIRST_PAUSE`] to
//! [`LONGEST_PAUSE`], until one is on disk. A probe that has no answer within [`PATIENCE`] is a
//! failure too; no second one is begun beside it.

use std::time::Duration;

use metrics::gauge;
use slat_proto::{ApiError, transport::Health};
use tokio::{
    sync::watch,
    time::{sleep, timeout},
};

use super::{blocking::BlockingStore, error::StoreError};

/// Between probes while all is well.
const PROBE: Duration = Duration::from_secs(10);
/// How long a probe may take.
const PATIENCE: Duration = Duration::from_secs(10);
const FIRST_PAUSE: Duration = Duration::from_millis(250);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// Probes for ever; its owner ends it.
pub(crate) async fn probe(store: BlockingStore) {
    let mut trouble = store.trouble();
    let mut pause = FIRST_PAUSE;
    loop {
        let probing = store.with(|store| store.probe());
        tokio::pin!(probing);
        let answer = loop {
            match timeout(PATIENCE, &mut probing).await {
                Ok(answer) => break answer,
                Err(_) => store.keeper().hangs(PATIENCE),
            }
        };
        match answer {
            Ok(()) => {
                store.keeper().works();
                pause = FIRST_PAUSE;
                // In good time, or as soon as a call fails.
                drop(timeout(PROBE, failed(&mut trouble)).await);
            }
            Err(error) => {
                // A failure of the file has been told already.
                if !error.closes() && !matches!(error, StoreError::Closed(_)) {
                    store.keeper().fails(error.to_api());
                }
                sleep(pause).await;
                pause = (pause * 2).min(LONGEST_PAUSE);
            }
        }
    }
}

/// Returns when there is trouble.
async fn failed(trouble: &mut watch::Receiver<Option<ApiError>>) {
    // The sender lives as long as the store.
    drop(trouble.wait_for(Option::is_some).await);
}

/// Says at the endpoint, for ever, whether the store can be written.
pub(crate) async fn tell(store: BlockingStore, health: Health) {
    let mut trouble = store.trouble();
    loop {
        let now = trouble.borrow_and_update().clone();
        gauge!("slat_store_up").set(if now.is_none() { 1.0 } else { 0.0 });
        match now {
            None => health.serving().await,
            Some(error) => health.not_serving(error).await,
        }
        if trouble.changed().await.is_err() {
            return;
        }
    }
}
