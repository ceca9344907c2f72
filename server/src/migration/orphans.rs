//! Sides that an agent still holds though their migration is over and done with: a call of an
//! earlier life of the server, or one that was given up, took effect after the clean-up. Agents
//! report such sides; here they are ended and released.
//!
//! What is done is safe whatever the side is: only migrations are touched that the store calls
//! finished, a living side only when nothing was committed, and an agent refuses to cancel a side
//! past the point of no return.

use slat_proto::v1::{self, MigrationPhase as Phase, TransferPhase as SidePhase, TransferRole};

use super::{
    calls::{Caller, Ended},
    protocol::{Answer, Side},
    reconciler::Context,
    record::Record,
    subject::Subject,
};
use crate::phase::side_ended;

/// Sides that one report may bring to be looked at.
pub(super) const AT_ONCE: usize = 64;

/// Ends and releases what is left on `host`. What cannot be done now is reported again.
pub(super) async fn sweep(context: Context, host: &str, sides: Vec<v1::Transfer>) {
    for transfer in sides.into_iter().take(AT_ONCE) {
        let key = transfer.migration.clone();
        let stored = context.store.with(move |store| store.migration(&key)).await;
        let Ok(Some(record)) = stored else { continue };
        if record.is_open() {
            continue;
        }
        let Some(record) = Record::from_stored(record) else {
            continue;
        };
        let migration = record.migration();
        let (side, home) = match transfer.role() {
            TransferRole::Source => (Side::Source, &migration.source),
            TransferRole::Destination => (Side::Destination, &migration.destination),
            TransferRole::Unspecified => continue,
        };
        if home != host {
            continue;
        }
        let caller = Caller {
            fleet: context.fleet.clone(),
            grants: context.grants.clone(),
            subject: Subject::of(migration).into(),
        };
        end(caller, side, migration.phase(), &transfer).await;
    }
}

async fn end(caller: Caller, side: Side, phase: Phase, transfer: &v1::Transfer) {
    let migration = caller.subject.migration.clone();
    let host = caller.subject.host(side).to_owned();
    let over = side_ended(transfer.phase())
        || (phase == Phase::Completed && transfer.phase() == SidePhase::Relinquished);
    let Ended { answer, .. } = if over {
        caller.release(side).await
    } else if phase == Phase::Completed {
        return;
    } else {
        // Released when it is reported as ended.
        caller.cancel(side, None).await
    };
    let done = answer != Answer::Silent;
    tracing::info!(%migration, %host, ?side, done, "a side that its migration left behind is ended");
}
