//! What a new migration waits for in PENDING: sides of the VM's earlier migrations on its two
//! hosts.

use std::{sync::Arc, time::Duration};

use slat_proto::{
    ApiError, Reason,
    v1::{self, TransferRole},
};
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use super::protocol::Side;
use crate::fleet::Fleet;

/// How many report intervals a host that holds an earlier side may be unreachable before a new
/// migration gives up on it. After a server's restart that is the time its agents have to come
/// back.
const HOST_PATIENCE: u32 = 10;

/// Says to others that a migration's sides are released; each is cancelled when its side is, on
/// disk.
#[derive(Clone, Debug, Default)]
pub(super) struct Released {
    pub(super) source: CancellationToken,
    pub(super) destination: CancellationToken,
}

/// A side of an earlier migration of the VM, on a host that a new one uses.
#[derive(Clone, Debug)]
pub(super) struct Earlier {
    pub(super) migration: String,
    pub(super) host: String,
    pub(super) role: TransferRole,
    pub(super) released: CancellationToken,
}

/// Waits for earlier sides to be released, no longer than their hosts can be reached.
///
/// # Errors
/// Whose host does not answer, and the refusal for the new migration.
pub(super) async fn wait_for(
    fleet: Arc<Fleet>,
    migration: v1::Migration,
    before: Vec<Earlier>,
) -> Result<(), (Side, ApiError)> {
    let interval: Duration = fleet.interval();
    for earlier in before {
        let mut reachable = Instant::now();
        while !earlier.released.is_cancelled() {
            tokio::select! {
                () = earlier.released.cancelled() => {}
                () = sleep(interval) => match fleet.ready_host(&earlier.host) {
                    Ok(_) => reachable = Instant::now(),
                    Err(error) if reachable.elapsed() >= interval * HOST_PATIENCE => {
                        return Err(barred(&migration, &earlier, &error));
                    }
                    Err(_) => {}
                },
            }
        }
    }
    Ok(())
}

fn barred(migration: &v1::Migration, earlier: &Earlier, cause: &ApiError) -> (Side, ApiError) {
    let side = if earlier.host == migration.source {
        Side::Source
    } else {
        Side::Destination
    };
    let mut error = ApiError::new(
        Reason::HostUnreachable,
        format!(
            "{} does not answer and still has its side of {}, an earlier migration of {}",
            earlier.host, earlier.migration, migration.vm
        ),
    )
    .with("host", &earlier.host)
    .with("migration", &earlier.migration)
    .with("role", earlier.role.as_str_name());
    if let Some(advice) = cause.metadata.get("advice") {
        error = error.with("advice", advice);
    }
    (side, error)
}
