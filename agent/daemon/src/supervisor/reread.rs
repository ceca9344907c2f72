//! Directories that could not be read, read again.
//!
//! A directory may be unreadable for a moment only: a record was being replaced, a disk came back,
//! a program of the right version was installed. So it is tried again at each report and each
//! question, with a pause between, and shown as it was meanwhile.

use std::{io, sync::Arc};

use super::Supervisor;
use crate::{
    dead::DeadVm,
    process::{self, Found},
    registry::Held,
    remains::Remains,
};

impl Supervisor {
    /// Reads every unreadable directory again whose pause is over, and takes in what can be read.
    pub(crate) async fn reread(self: &Arc<Self>) {
        let mut due = tokio::task::JoinSet::new();
        for (_, _, held) in self.registry.all() {
            if let Held::Dead(dead) = held
                && dead.is_due()
            {
                due.spawn(Arc::clone(self).try_again(dead));
            }
        }
        while let Some(result) = due.join_next().await {
            if let Err(error) = result {
                tracing::error!(%error, "reading a VM's directory again failed");
            }
        }
    }

    async fn try_again(self: Arc<Self>, dead: Arc<DeadVm>) {
        if !is_readable(&dead).await {
            return;
        }
        if let Some(claim) = self.registry.claim_from_dead(&dead) {
            tracing::info!(vm = %dead.name(), uid = %dead.uid(), "a VM's directory can be read again");
            let before = dead.last_seen().clone();
            self.take_in(claim, dead.dir().clone(), Some(before)).await;
        }
    }
}

/// Whether looking at it anew would find more than before.
async fn is_readable(dead: &Arc<DeadVm>) -> bool {
    match process::find(dead.dir()).await {
        Ok(Found::Living(_)) => true,
        Ok(Found::Dead(lock)) => {
            let dead = Arc::clone(dead);
            let read = tokio::task::spawn_blocking(move || {
                let readable = Remains::read(dead.name(), dead.dir()).is_ok();
                drop(lock);
                readable
            });
            read.await.unwrap_or(false)
        }
        // Removed by hand.
        Err(error) => error.kind() == io::ErrorKind::NotFound,
    }
}
