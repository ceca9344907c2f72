//! Follows a migration to its end, through restarts of the server: the server stores its state, so
//! a broken stream is opened again until the server answers or too much time has passed. When
//! digests are still being compared after the migration has completed, that is waited for.

use std::time::{Duration, Instant};

use slat_proto::{ApiError, Reason, v1};
use tokio_stream::StreamExt as _;

use crate::{client::Client, failure::Failure, term::out, view};

/// A server that does not come back is given up after this long.
const PATIENCE: Duration = Duration::from_secs(60);
/// Between two attempts.
const PAUSE: Duration = Duration::from_millis(500);

/// A digest comparison after the commit may take this long beyond the migration's end.
const VERIFICATION: Duration = Duration::from_secs(300);
/// Between two looks at it.
const LOOK: Duration = Duration::from_millis(100);

/// Calls `seen` with each state of the migration and returns the terminal one.
pub(crate) async fn follow(
    client: &Client,
    name: &str,
    mut seen: impl FnMut(&v1::Migration),
) -> Result<v1::Migration, Failure> {
    let mut silent_since: Option<Instant> = None;
    loop {
        let error = match watch(client, name, &mut seen, &mut silent_since).await {
            Ok(migration) => return Ok(migration),
            Err(error) => error,
        };
        let gone = is_silence(&error);
        let since = *silent_since.get_or_insert_with(|| {
            if gone {
                out::say(format!("no word from the server ({error}); asking again"));
            }
            Instant::now()
        });
        if !gone || since.elapsed() > PATIENCE {
            return Err(Failure::api(format!("watch {name}"), error));
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// Whether nobody answered, as against an answer that something is wrong. A stream that breaks off
/// in the middle comes as a status of the transport's own making, whatever its code.
fn is_silence(error: &ApiError) -> bool {
    matches!(
        error.reason,
        Reason::PeerUnreachable | Reason::ConnectionLost
    ) || (error.reason == Reason::Internal && error.metadata.contains_key("grpc_code"))
}

async fn watch(
    client: &Client,
    name: &str,
    seen: &mut impl FnMut(&v1::Migration),
    silent_since: &mut Option<Instant>,
) -> Result<v1::Migration, ApiError> {
    let request = v1::WatchMigrationRequest {
        name: name.to_owned(),
    };
    let mut stream = client
        .migrations()
        .watch_migration(request)
        .await?
        .into_inner();
    while let Some(migration) = stream.next().await {
        let migration = migration?;
        *silent_since = None;
        seen(&migration);
        if view::ended(migration.phase()) {
            return verified(client, migration, seen).await;
        }
    }
    Err(ApiError::new(
        Reason::ConnectionLost,
        "the stream ended before the migration",
    ))
}

/// The migration once its digests are compared, or as it is when that takes too long.
async fn verified(
    client: &Client,
    mut migration: v1::Migration,
    seen: &mut impl FnMut(&v1::Migration),
) -> Result<v1::Migration, ApiError> {
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
        migration = client
            .migrations()
            .get_migration(request)
            .await?
            .into_inner();
        seen(&migration);
    }
    Ok(migration)
}

#[cfg(test)]
mod tests {
    use tonic::Status;

    use super::*;

    #[test]
    fn a_broken_stream_is_silence_and_a_refusal_is_an_answer() {
        let silence = |status: Status| is_silence(&ApiError::from(status));
        assert!(silence(Status::internal("h2 protocol error")));
        assert!(silence(Status::unavailable("tcp connect error")));
        assert!(!silence(Status::unimplemented("")));
        assert!(!silence(Status::out_of_range(
            "Error, decoded message length too large: found 9 bytes"
        )));
        assert!(!silence(
            ApiError::new(Reason::NoSuchMigration, "no migration m").into()
        ));
    }
}
