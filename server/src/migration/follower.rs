//! Follows one side: GetTransfer, then its watch until that breaks or says nothing for [`QUIET`].
//! The watch of a process that is stopped stays open: whether it still answers is asked then. What
//! the side says goes to the driver as it comes; how the following ended is the task's answer. A
//! follower decides nothing, and the protocol begins the next one.

use std::time::Duration;

use slat_proto::v1;
use tokio::{sync::mpsc, time::timeout};

use super::{
    calls::{Caller, Ended},
    protocol::{Answer, Side},
    subject::{ASK, Found, ask, role},
};
use crate::phase::side_ended;

/// Before a side is asked again that just broke off.
pub(super) const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// Longer than a side that sends pages goes without a word.
const QUIET: Duration = Duration::from_secs(5);

/// What a follower tells.
pub(super) type News = (Side, Box<v1::Transfer>);

/// The pause after one that brought nothing.
pub(super) fn longer(pause: Duration) -> Duration {
    (pause * 2).clamp(FIRST_PAUSE, LONGEST_PAUSE)
}

/// Follows a side, after a pause. See the module.
pub(super) async fn follow(
    caller: Caller,
    side: Side,
    pause: Duration,
    out: mpsc::Sender<News>,
) -> Ended {
    tokio::time::sleep(pause).await;
    let answer = match caller.subject.find(&caller.fleet, side).await {
        Found::Absent { owner } => Answer::Absent { owner },
        Found::Silent => Answer::Silent,
        Found::Side(transfer) => {
            let last = side_ended(transfer.phase());
            if out.send((side, transfer)).await.is_ok() && !last {
                watch(&caller, side, &out).await;
            }
            Answer::Nothing
        }
    };
    Ended::with(answer)
}

/// Tells what a watch says until it breaks, is quiet for long or has said the last word.
async fn watch(caller: &Caller, side: Side, out: &mpsc::Sender<News>) {
    let Ok(mut client) = caller.subject.transfers(&caller.fleet, side) else {
        return;
    };
    let request = v1::WatchTransferRequest {
        migration: caller.subject.migration.clone(),
        role: role(side).into(),
    };
    let Ok(mut stream) = ask(ASK, client.watch_transfer(request)).await else {
        return;
    };
    while let Ok(Ok(Some(update))) = timeout(QUIET, stream.message()).await {
        let last = side_ended(update.phase());
        if out.send((side, Box::new(update))).await.is_err() || last {
            return;
        }
    }
}
