//! Bounded waiting.

use std::{future::Future, time::Duration};

use anyhow::bail;
use tokio::time::{Instant, sleep, timeout_at};

/// How long anything may take that is bound to happen. Generous: the machine may be busy; a test
/// that passes does not wait.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Between two looks at something that has no events (a file, `/proc`).
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// Waits until `look` finds something. For what has no stream to watch.
///
/// # Errors
/// After [`PATIENCE`], with the last thing `look` complained about.
pub async fn eventually<T, F>(what: &str, mut look: impl FnMut() -> F) -> anyhow::Result<T>
where
    F: Future<Output = anyhow::Result<T>>,
{
    let deadline = Instant::now() + PATIENCE;
    let mut complaint = None;
    loop {
        match timeout_at(deadline, look()).await {
            Ok(Ok(found)) => return Ok(found),
            Ok(Err(error)) => complaint = Some(error),
            Err(_) => {}
        }
        if Instant::now() >= deadline {
            bail!(
                "after {} s still not: {what}: {}",
                PATIENCE.as_secs(),
                complaint.map_or_else(|| "no answer".to_owned(), |error| format!("{error:#}"))
            );
        }
        sleep(LOOK_EVERY).await;
    }
}
