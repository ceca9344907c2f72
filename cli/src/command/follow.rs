//! Follows a migration to its end, through restarts of the server: the server stores its state, so
//! a broken stream is opened again until the server answers or patience is over. When digests are
//! still being compared after the migration has completed, that is waited for.

use std::time::{Duration, Instant};

use slat_proto::{ApiError, Reason, v1};
use tokio_stream::StreamExt as _;

use super::patience::Patience;
use crate::{client::Client, failure::Failure, view};

/// A digest comparison after the commit may take this long beyond the migration's end.
const VERIFICATION: Duration = Duration::from_secs(300);
/// Between two looks at it.
const LOOK: Duration = Duration::from_millis(100);

/// Calls `seen` with each state of the migration and returns the terminal one.
pub(crate) async fn follow(
    client: &Client,
    name: &str,
    mut patience: Patience,
    mut seen: impl FnMut(&v1::Migration) -> Result<(), Failure>,
) -> Result<v1::Migration, Failure> {
    loop {
        match watch(client, name, &mut seen, &mut patience).await? {
            Ok(migration) => return Ok(migration),
            Err(error) => patience.lost(&format!("watch {name}"), error).await?,
        }
    }
}

async fn watch(
    client: &Client,
    name: &str,
    seen: &mut impl FnMut(&v1::Migration) -> Result<(), Failure>,
    patience: &mut Patience,
) -> Result<Result<v1::Migration, ApiError>, Failure> {
    let request = v1::WatchMigrationRequest {
        name: name.to_owned(),
    };
    let mut stream = match client.migrations().watch_migration(request).await {
        Ok(stream) => stream.into_inner(),
        Err(status) => return Ok(Err(status.into())),
    };
    while let Some(migration) = stream.next().await {
        let migration = match migration {
            Ok(migration) => migration,
            Err(status) => return Ok(Err(status.into())),
        };
        patience.heard();
        seen(&migration)?;
        if view::ended(migration.phase()) {
            return verified(client, migration, seen).await;
        }
    }
    Ok(Err(ApiError::new(
        Reason::ConnectionLost,
        "the stream ended before the migration",
    )))
}

/// The migration once its digests are compared, or as it is when that takes too long.
async fn verified(
    client: &Client,
    mut migration: v1::Migration,
    seen: &mut impl FnMut(&v1::Migration) -> Result<(), Failure>,
) -> Result<Result<v1::Migration, ApiError>, Failure> {
    let started = Instant::now();
    let pending = |migration: &v1::Migration| {
        let progress = migration.progress.as_ref();
        progress.is_some_and(|progress| progress.verification() == v1::Verification::Pending)
    };
    while pending(&migration) && started.elapsed() < VERIFICATION {
        tokio::time::sleep(LOOK).await;
        let request = v1::GetMigrationRequest {
            name: migration.name.clone(),
        };
        migration = match client.migrations().get_migration(request).await {
            Ok(answer) => answer.into_inner(),
            Err(status) => return Ok(Err(status.into())),
        };
        seen(&migration)?;
    }
    Ok(Ok(migration))
}
