//! Who answers for a migration side: a living process, what a dead one left, or a record.

use std::sync::Arc;

use slat_proto::{ApiError, Reason, v1};

use super::{ADOPT, SETTLE, Supervisor};
use crate::{
    announce::found_sides,
    dead::DeadVm,
    living::LiveVm,
    registry::{Held, Work},
    side::{Role, SideKey},
};

/// Who answers for a side.
#[derive(Debug)]
pub(crate) enum Place {
    /// Its living process.
    Live(Arc<LiveVm>),
    /// Its dead process's directory, in these words.
    Dead(Arc<DeadVm>, v1::Transfer),
    /// The record that outlived its directory.
    Ended(v1::Transfer),
}

impl Supervisor {
    /// Who answers for a side.
    ///
    /// # Errors
    /// VM_UNREACHABLE or JOURNAL when nobody knows it and not everybody could be asked: "no such
    /// side" would be a guess.
    pub(crate) async fn locate(self: &Arc<Self>, key: &SideKey) -> Result<Option<Place>, ApiError> {
        self.reread().await;
        let mut silent = None;
        // Twice: once as things are, once more after names in work on this side have settled.
        for _ in 0..2 {
            silent = None;
            let mut in_work = Vec::new();
            for (_, _, held) in self.registry.all() {
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
        // The disk tells every side of a process. One whose disk could not be read is asked.
        let mut asked = tokio::task::JoinSet::new();
        for (_, _, held) in self.registry.all() {
            if let Held::Live(live) = held
                && !live.sides_told()
            {
                self.tell_sides(&live).await;
                if live.side(key).is_some() {
                    return Ok(Some(Place::Live(live)));
                }
                if live.sides_told() {
                    continue;
                }
                let request = v1::GetTransferRequest {
                    migration: key.migration.to_string(),
                    role: key.role.to_message().into(),
                    ..Default::default()
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
    /// Reads once more which sides a VM has whose disk could not be read.
    async fn tell_sides(self: &Arc<Self>, live: &Arc<LiveVm>) {
        let dir = live.dir().clone();
        let Ok(Ok(sides)) = tokio::task::spawn_blocking(move || found_sides(&dir)).await else {
            return;
        };
        for (key, ended) in sides {
            self.know_side(live, key, ended);
        }
        live.set_sides_told(true);
    }
}
