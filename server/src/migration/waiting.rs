//! What a new migration waits for in PENDING: sides of the VM's earlier migrations on its two
//! hosts.
//!
//! The wait has an end, and the migration then fails with the name of what it waited for, its VM
//! where it was: nobody was asked for anything yet.

use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use slat_proto::{
    ApiError, Reason,
    v1::{self, TransferRole},
};
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use super::protocol::Side;
use crate::fleet::Fleet;

/// How many report intervals hosts may be unreachable before a wait for them ends. After a restart
/// of the server that is the time its agents have to come back.
pub(super) const HOST_PATIENCE: u32 = 10;
/// How many report intervals a side may stay although its host answers: six times the longest pause
/// between two attempts to release it, at the default interval.
const SIDE_PATIENCE: u32 = 60;

/// One side of a migration as others wait for it.
#[derive(Clone, Debug, Default)]
pub(super) struct Release {
    done: CancellationToken,
    /// Why the last attempt failed. Locked for one read or write.
    refusal: Arc<Mutex<Option<ApiError>>>,
}

impl Release {
    /// It is released, on disk.
    pub(super) fn set(&self) {
        self.done.cancel();
    }

    pub(super) fn is_set(&self) -> bool {
        self.done.is_cancelled()
    }

    /// An attempt to release it has failed.
    pub(super) fn refused(&self, error: ApiError) {
        *self.refusal.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
    }

    fn refusal(&self) -> Option<ApiError> {
        let refusal = self.refusal.lock().unwrap_or_else(PoisonError::into_inner);
        refusal.clone()
    }
}

/// Says to others whether a migration's sides are released.
#[derive(Clone, Debug, Default)]
pub(super) struct Released {
    pub(super) source: Release,
    pub(super) destination: Release,
}

impl Released {
    pub(super) fn of(&self, side: Side) -> &Release {
        match side {
            Side::Source => &self.source,
            Side::Destination => &self.destination,
        }
    }
}

/// A side of an earlier migration of the VM, on a host that a new one uses.
#[derive(Clone, Debug)]
pub(super) struct Earlier {
    pub(super) migration: String,
    pub(super) host: String,
    pub(super) role: TransferRole,
    pub(super) released: Release,
}

impl Earlier {
    pub(super) fn is_released(&self) -> bool {
        self.released.is_set()
    }

    fn role(&self) -> &'static str {
        match self.role {
            TransferRole::Source => "source",
            TransferRole::Destination => "destination",
            TransferRole::Unspecified => "no side",
        }
    }
}

/// As in `Migration.waiting_for`.
impl fmt::Display for Earlier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            host, migration, ..
        } = self;
        let role = self.role();
        write!(f, "{host} ({role} of {migration}) to end its earlier side")
    }
}

/// Waits for earlier sides to be released, for a bounded time each.
///
/// # Errors
/// Whose side is still there, and the refusal for the new migration.
pub(super) async fn wait_for(
    fleet: Arc<Fleet>,
    migration: v1::Migration,
    before: Vec<Earlier>,
) -> Result<(), (Side, ApiError)> {
    let interval: Duration = fleet.interval();
    for earlier in before {
        let begin = Instant::now();
        let mut reachable = begin;
        while !earlier.is_released() {
            tokio::select! {
                () = earlier.released.done.cancelled() => {}
                () = sleep(interval) => match fleet.ready_host(&earlier.host) {
                    Ok(_) => {
                        reachable = Instant::now();
                        if begin.elapsed() >= interval * SIDE_PATIENCE {
                            return Err(barred(&migration, &earlier, kept(&migration, &earlier)));
                        }
                    }
                    Err(error) if reachable.elapsed() >= interval * HOST_PATIENCE => {
                        return Err(barred(&migration, &earlier, silent(&migration, &earlier, &error)));
                    }
                    Err(_) => {}
                },
            }
        }
    }
    Ok(())
}

fn barred(migration: &v1::Migration, earlier: &Earlier, error: ApiError) -> (Side, ApiError) {
    let side = if earlier.host == migration.source {
        Side::Source
    } else {
        Side::Destination
    };
    let error = error
        .with("host", &earlier.host)
        .with("migration", &earlier.migration)
        .with("role", earlier.role.as_str_name());
    (side, error)
}

fn silent(migration: &v1::Migration, earlier: &Earlier, cause: &ApiError) -> ApiError {
    let error = ApiError::new(
        Reason::HostUnreachable,
        format!(
            "{} does not answer and still has its side of {}, an earlier migration of {}",
            earlier.host, earlier.migration, migration.vm
        ),
    );
    match cause.metadata.get("advice") {
        Some(advice) => error.with("advice", advice),
        None => error,
    }
}

fn kept(migration: &v1::Migration, earlier: &Earlier) -> ApiError {
    let text = format!(
        "{} answers and still has its side of {}, an earlier migration of {}",
        earlier.host, earlier.migration, migration.vm
    );
    match earlier.released.refusal() {
        Some(refusal) => ApiError::new(refusal.reason, format!("{text}: {}", refusal.message))
            .with("cause", refusal.message),
        None => ApiError::new(Reason::MigrationInProgress, text),
    }
    .with(
        "advice",
        format_args!(
            "see the agent's log at {}, then migrate again",
            earlier.host
        ),
    )
}
