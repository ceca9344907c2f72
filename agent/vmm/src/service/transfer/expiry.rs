//! A side goes on by a grant, and a grant ends: the end of a side that has not changed the VM's
//! owner by then.
//!
//! It ends as by a cancel, so it excludes the point of no return, and it breaks off what blocks:
//! the source's VM runs on, the destination goes away, no stream outlives the grant. After the
//! point of no return the grant's time means nothing.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use slat_proto::v1::{MigrationPhase, TransferPhase};

use crate::handover::{
    leave::Leave,
    side::{Side, has_ended},
    side_protocol::SideProtocol,
};

/// The host's clock may be set: it is looked at this often.
const LOOK: Duration = Duration::from_secs(1);

/// Ends `side` when its grant ends. The task lives as long as that can matter.
pub(super) fn end_with<R>(side: &Arc<Side<R>>, leave: Leave, runtime: &tokio::runtime::Handle)
where
    R: SideProtocol,
    R::Action: Send,
{
    let side = Arc::clone(side);
    runtime.spawn(async move {
        let mut changes = side.watch();
        loop {
            let phase = side.phase();
            let matters =
                !has_ended(phase) && !matches!(phase, TransferPhase::Ready | TransferPhase::Relinquished);
            if !matters {
                return;
            }
            let left = leave.grant().not_after().duration_since(SystemTime::now());
            let Some(left) = left.ok().filter(|left| !left.is_zero()) else {
                let error = leave.expired().to_migration_error(during(phase), R::NAME);
                tracing::warn!(migration = %side.migration(), error = error.message, "the side's grant ended");
                // Too late: the VM is changing its owner.
                drop(side.cancel(Some(error)));
                return;
            };
            tokio::select! {
                () = tokio::time::sleep(left.min(LOOK)) => {}
                changed = changes.changed() => if changed.is_err() { return },
            }
        }
    });
}

fn during(phase: TransferPhase) -> MigrationPhase {
    match phase {
        TransferPhase::Preparing => MigrationPhase::Preparing,
        TransferPhase::Precopy => MigrationPhase::PrecopyActive,
        _ => MigrationPhase::Switchover,
    }
}
