//! A side goes on by a grant, and a grant ends: the end of a side that has not changed the VM's
//! owner by then.
//!
//! It ends as by a cancel, so it excludes the point of no return, and it breaks off what blocks:
//! the source's VM runs on, the destination goes away, no stream outlives the grant. After the
//! point of no return the grant's time means nothing.
//!
//! Each side has one task that looks at the clock. It is owned by an [`Expiry`] beside the side and
//! refers to the side weakly: it keeps neither the side nor the process.

use std::{
    sync::{Arc, Weak},
    time::{Duration, SystemTime},
};

use slat_proto::v1::{MigrationPhase, TransferPhase};
use tokio::task::JoinHandle;

use crate::handover::{
    leave::Leave,
    side::{Side, has_ended},
    side_protocol::SideProtocol,
};

/// The host's clock may be set: it is looked at this often.
const LOOK: Duration = Duration::from_secs(1);

/// Ends a side when its grant ends, until this is dropped: whoever keeps the side keeps this.
#[derive(Debug)]
pub(super) struct Expiry(JoinHandle<()>);

impl Drop for Expiry {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Ends `side` when its grant ends. The task lives as long as that can matter, and keeps no side.
pub(super) fn end_with<R>(
    side: &Arc<Side<R>>,
    leave: Leave,
    runtime: &tokio::runtime::Handle,
) -> Expiry
where
    R: SideProtocol,
    R::Action: Send,
{
    let (mut changes, side) = (side.watch(), Arc::downgrade(side));
    Expiry(runtime.spawn(async move {
        while let Some(left) = look(&side, &leave) {
            tokio::select! {
                () = tokio::time::sleep(left.min(LOOK)) => {}
                changed = changes.changed() => if changed.is_err() { return },
            }
        }
    }))
}

/// For how long the grant lasts yet; ends the side when that is over. `None`: nothing can come of
/// it any more.
fn look<R: SideProtocol>(side: &Weak<Side<R>>, leave: &Leave) -> Option<Duration> {
    let side = side.upgrade()?;
    let phase = side.phase();
    if has_ended(phase) || matches!(phase, TransferPhase::Ready | TransferPhase::Relinquished) {
        return None;
    }
    let left = leave.grant().not_after().duration_since(SystemTime::now());
    let left = left.ok().filter(|left| !left.is_zero());
    if left.is_none() {
        let error = leave.expired().to_migration_error(during(phase), R::NAME);
        tracing::warn!(migration = %side.migration(), error = error.message, "the side's grant ended");
        // Too late: the VM is changing its owner.
        drop(side.cancel(Some(error)));
    }
    left
}

fn during(phase: TransferPhase) -> MigrationPhase {
    match phase {
        TransferPhase::Preparing => MigrationPhase::Preparing,
        TransferPhase::Precopy => MigrationPhase::PrecopyActive,
        _ => MigrationPhase::Switchover,
    }
}

#[cfg(test)]
mod tests {
    use slat_proto::model::{HostName, MigrationName, VmName};
    use slat_trust::grant::Purpose;
    use tokio::runtime::Handle;

    use super::*;
    use crate::{
        handover::{leave::Step, protocol::source::Source},
        service::transfer::tests_server as server,
    };

    fn begin() -> (Arc<Side<Source>>, Expiry) {
        let migration = MigrationName::parse("m1").unwrap();
        let (vm, host) = (VmName::parse("v").unwrap(), HostName::parse("a").unwrap());
        let grant = server::grant(Purpose::Send, "m1", ("u", 1), ("a", "b"));
        let step = Step {
            purpose: Purpose::Send,
            migration: &migration,
            vm_uid: "u",
            epoch: 1,
            host: &host,
        };
        let signed = server::signed(&grant);
        let leave = Leave::check(Some(&signed), &server::keys(), &step, SystemTime::now());
        let side = Arc::new(Side::new(&migration, (&vm, "u".into()), 1, 0));
        let expiry = end_with(&side, leave.unwrap(), &Handle::current());
        (side, expiry)
    }

    /// Waits until this many tasks run.
    async fn tasks(wanted: usize) {
        let waited = tokio::time::timeout(Duration::from_secs(60), async {
            while Handle::current().metrics().num_alive_tasks() != wanted {
                tokio::task::yield_now().await;
            }
        });
        waited.await.expect("another number of tasks");
    }

    #[tokio::test]
    async fn it_ends_with_its_side_and_with_its_owner_and_keeps_neither() {
        let (side, expiry) = begin();
        tasks(1).await;
        tokio::task::yield_now().await;
        // Between its looks.
        assert_eq!(Arc::strong_count(&side), 1);
        drop(side);
        tasks(0).await;
        drop(expiry);
        let (_side, expiry) = begin();
        tasks(1).await;
        drop(expiry);
        tasks(0).await;
    }
}
