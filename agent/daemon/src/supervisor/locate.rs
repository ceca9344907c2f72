//! Which endpoint tells a migration side.

use std::sync::Arc;

use slat_proto::{ApiError, Reason, v1};

use super::{ADOPT, SETTLE, Supervisor};
use crate::{
    dead::DeadVm,
    living::LiveVm,
    registry::{Held, Work},
    side::{Role, SideKey},
};

/// Where a side is told.
#[derive(Debug)]
pub(crate) enum Place {
    /// By its living process.
    Live(Arc<LiveVm>),
    /// By its dead process's directory, so.
    Dead(Arc<DeadVm>, v1::Transfer),
    /// By the record that outlived its directory.
    Ended(v1::Transfer),
}

impl Supervisor {
    /// Where a side is told.
    ///
    /// # Errors
    /// VM_UNREACHABLE or JOURNAL when nobody knows it and somebody could not be asked: "no such
    /// side" would be a guess.
    pub(crate) async fn locate(self: &Arc<Self>, key: &SideKey) -> Result<Option<Place>, ApiError> {
        let mut silent = None;
        // Twice: once as things are, once more after names in work on this side have settled.
        for _ in 0..2 {
            silent = None;
            let mut in_work = Vec::new();
            for (_, held) in self.registry.all() {
                match held {
                    Held::Live(live) if live.side(key).is_some() => {
                        return Ok(Some(Place::Live(live)));
                    }
                    Held::Live(_) => {}
                    Held::Dead(dead) => match dead.side(key) {
                        Ok(Some(side)) => return Ok(Some(Place::Dead(dead, side))),
                        Ok(None) => {}
                        Err(error) => silent = Some(error),
                    },
                    Held::Busy {
                        work: Work::Clearing,
                        done,
                    } => in_work.push(done),
                    Held::Busy {
                        work: Work::Preparing(migration),
                        done,
                    } if key.role == Role::Destination && migration == key.migration => {
                        in_work.push(done);
                    }
                    Held::Busy { .. } => {}
                }
            }
            if let Some(side) = self.ended.get(key) {
                return Ok(Some(Place::Ended(side)));
            }
            if in_work.is_empty() {
                break;
            }
            for done in in_work {
                if tokio::time::timeout(SETTLE, done.cancelled())
                    .await
                    .is_err()
                {
                    silent = Some(ApiError::new(
                        Reason::VmUnreachable,
                        "a VM's directory is still being worked on",
                    ));
                }
            }
        }
        // A side this agent was not told of: it restarted while the process began it, or did not
        // answer then.
        let mut asked = tokio::task::JoinSet::new();
        for (_, held) in self.registry.all() {
            if let Held::Live(live) = held {
                let request = v1::GetTransferRequest {
                    migration: key.migration.to_string(),
                    role: key.role.to_message().into(),
                };
                asked.spawn(async move {
                    let mut transfers = live.transfers();
                    let answer = live.answer(ADOPT, transfers.get_transfer(request)).await;
                    (live, answer)
                });
            }
        }
        while let Some(Ok((live, answer))) = asked.join_next().await {
            match answer {
                Ok(side) => {
                    live.witness(&side).await?;
                    self.know_side(&live, key.clone(), Some(side));
                    return Ok(Some(Place::Live(live)));
                }
                Err(error) if error.reason == Reason::VmUnreachable => silent = Some(error),
                Err(_) => {}
            }
        }
        silent.map_or(Ok(None), Err)
    }
}
