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
/// A side that cannot be released for so long is shown as a leftover.
const STUCK: Duration = Duration::from_secs(10);

/// One side of a migration as others wait for it.
#[derive(Clone, Debug, Default)]
pub(super) struct Release {
    done: CancellationToken,
    /// Since when attempts fail, and why the last one did. Locked for one read or write.
    refusal: Arc<Mutex<Option<(Instant, ApiError)>>>,
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
        let mut refusal = self.refusal.lock().unwrap_or_else(PoisonError::into_inner);
        let since = refusal.as_ref().map(|(since, _)| *since);
        *refusal = Some((since.unwrap_or_else(Instant::now), error));
    }

    /// Whether it has been tried in vain for so long that a person should see it.
    pub(super) fn is_stuck(&self) -> bool {
        self.is_stuck_at(Instant::now())
    }

    fn is_stuck_at(&self, now: Instant) -> bool {
        let refusal = self.refusal.lock().unwrap_or_else(PoisonError::into_inner);
        let since = refusal.as_ref().map(|(since, _)| *since);
        !self.is_set() && since.is_some_and(|since| now.duration_since(since) >= STUCK)
    }

    fn refusal(&self) -> Option<ApiError> {
        let refusal = self.refusal.lock().unwrap_or_else(PoisonError::into_inner);
        refusal.as_ref().map(|(_, error)| error.clone())
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
    let host = earlier.host.strip_prefix("hosts/").unwrap_or(&earlier.host);
    match earlier.released.refusal() {
        Some(refusal) => {
            let error = ApiError::new(refusal.reason, format!("{text}: {}", refusal.message))
                .with("cause", &refusal.message);
            match refusal.metadata.get("pid") {
                Some(pid) => error.with("pid", pid),
                None => error,
            }
        }
        None => ApiError::new(Reason::MigrationInProgress, text),
    }
    .with(
        "advice",
        format_args!(
            "end what is left there, `slat get leftovers --host {host}`, or see its agent's log; then migrate again",
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_side_is_stuck_once_it_was_refused_for_long_and_until_it_is_released() {
        let release = Release::default();
        let late = || Instant::now() + STUCK;
        assert!(!release.is_stuck_at(late()), "nothing was tried");
        let refused = || ApiError::new(Reason::VmUnreachable, "stopped").with("pid", 7);
        let before = Instant::now();
        release.refused(refused());
        let first = Instant::now();
        assert!(!release.is_stuck_at(before + STUCK / 2));
        release.refused(refused());
        assert!(release.is_stuck_at(first + STUCK), "from the first on");
        let earlier = Earlier {
            migration: "migrations/old".into(),
            host: "hosts/b".into(),
            role: TransferRole::Destination,
            released: release.clone(),
        };
        let error = kept(&v1::Migration::default(), &earlier);
        assert_eq!(error.reason, Reason::VmUnreachable);
        assert_eq!(error.metadata["pid"], "7");
        assert!(error.metadata["advice"].contains("--host b"), "{error}");
        release.set();
        assert!(!release.is_stuck_at(late()));
    }
}
