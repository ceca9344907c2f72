//! Leftovers taken back or ended, by uid, on an operator's order that says what it gives up.
//!
//! An order is carried out by the calls that end a migration (a release, a cancel, the decision for
//! a destination in doubt) and by one of its own, which takes back a VM that was given away. None
//! of them changes what a journal has settled.

use std::{sync::Arc, time::Duration};

use slat_proto::{
    ApiError, Reason,
    model::MigrationName,
    v1::{self, leftover::Kind},
};
use slat_record::uid::VmUid;

use super::{Supervisor, leftover::of_record, refuse::exists, task_failed};
use crate::{
    dead::DeadVm,
    follow::keep_seen,
    living::{LiveVm, QUICK},
    process::{self, Found},
    registry::Held,
    side::{Role, SideKey},
};

/// How long a destination that was told to commit may take to own its VM.
const COMMIT: Duration = Duration::from_secs(10);
/// How often it is looked at meanwhile.
const LOOK: Duration = Duration::from_millis(50);

impl Supervisor {
    /// Makes a leftover a VM that can run again.
    ///
    /// # Errors
    /// NO_SUCH_LEFTOVER; VM_STATE when it cannot be taken back; GIVE_UP_REQUIRED with `gives_up`;
    /// VM_EXISTS when another VM of its name is here; VM_UNREACHABLE, JOURNAL: it may have
    /// happened, and can be ordered again.
    pub(crate) async fn adopt_leftover(
        self: Arc<Self>,
        uid: VmUid,
        give_up: bool,
        epoch: u64,
    ) -> Result<v1::Vm, ApiError> {
        self.reread().await;
        let leftover = self.leftover(&uid)?;
        let Some(Held::Live(live)) = self.registry.get(&uid).filter(|_| leftover.adoptable) else {
            return Err(ApiError::new(
                Reason::VmState,
                format!("it cannot be taken back: {}", leftover.message),
            )
            .with("uid", &uid)
            .with("kind", leftover.kind().as_str_name())
            .with("advice", "delete the leftover"));
        };
        accepted(&uid, give_up, &leftover.adopt_gives_up)?;
        self.name_is_free_for(&live)?;
        tracing::warn!(vm = %live.name(), %uid, kind = leftover.kind().as_str_name(), epoch, "taking a leftover back on an operator's order");
        match leftover.kind() {
            Kind::RelinquishedSource => self.take_back(&live, &leftover, epoch).await,
            _ => self.commit(&live, &leftover).await,
        }
    }

    /// Another VM of its name would stand in its way from now on.
    fn name_is_free_for(&self, live: &LiveVm) -> Result<(), ApiError> {
        for (uid, held) in self.registry.named(live.name()) {
            let shown = match &held {
                Held::Live(other) => !other.gave_away(),
                Held::Dead(dead) => dead.lost().is_some(),
                Held::Busy { .. } => true,
            };
            if shown && uid != *live.uid() {
                return Err(exists(live.name(), &held).with("uid", uid));
            }
        }
        Ok(())
    }

    async fn take_back(
        self: &Arc<Self>,
        live: &Arc<LiveVm>,
        leftover: &v1::Leftover,
        epoch: u64,
    ) -> Result<v1::Vm, ApiError> {
        let request = v1::AdoptTransferRequest {
            migration: leftover.migration.clone(),
            vm_uid: live.own_uid(),
            epoch: epoch.max(leftover.epoch.saturating_add(2)),
        };
        let mut transfers = live.transfers();
        let adopted = live
            .answer(QUICK, transfers.adopt_transfer(request))
            .await?;
        let vm = adopted
            .vm
            .ok_or_else(|| live.unreachable("did not say what it took back".to_owned()))?;
        if let Some(side) = adopted.transfer
            && let Some(key) = SideKey::of(&side)
        {
            // Its sighting said that the VM is another's. It is not, from now on, and no late word
            // makes it so again.
            let (forgetting, of) = (Arc::clone(live), key.clone());
            tokio::task::spawn_blocking(move || forgetting.forget_sighting(&of))
                .await
                .map_err(|error| task_failed(&error))?;
            live.see_side(&key, side);
        }
        live.see(vm.clone());
        self.registry.note_change();
        Ok(vm)
    }

    /// Tells a READY destination that its source gave the VM away, and waits until it owns it.
    async fn commit(
        self: &Arc<Self>,
        live: &Arc<LiveVm>,
        leftover: &v1::Leftover,
    ) -> Result<v1::Vm, ApiError> {
        self.resolve(
            live,
            leftover,
            v1::resolve_transfer_request::Decision::Commit,
        )
        .await?;
        let owned = async {
            loop {
                let mut vms = live.vms();
                let vm = live.answer(QUICK, vms.get_vm(live.get_request())).await?;
                if vm.state() != v1::vm::State::Incoming {
                    return Ok(vm);
                }
                tokio::time::sleep(LOOK).await;
            }
        };
        let vm = tokio::time::timeout(COMMIT, owned)
            .await
            .unwrap_or_else(|_| {
                Err(live.unreachable("was told to commit and does not own its VM yet".to_owned()))
            })?;
        keep_seen(live, &vm).await;
        self.registry.note_change();
        Ok(vm)
    }

    async fn resolve(
        &self,
        live: &LiveVm,
        leftover: &v1::Leftover,
        decision: v1::resolve_transfer_request::Decision,
    ) -> Result<(), ApiError> {
        let mut transfers = live.transfers();
        let request = v1::ResolveTransferRequest {
            migration: leftover.migration.clone(),
            decision: decision.into(),
            ordered: true,
            ..Default::default()
        };
        live.answer(QUICK, transfers.resolve_transfer(request))
            .await
            .map(drop)
    }

    /// Ends a leftover for good: returns when its process and its directory are gone.
    ///
    /// # Errors
    /// NO_SUCH_LEFTOVER; GIVE_UP_REQUIRED with `gives_up`; VM_UNREACHABLE; STORE; VM_STATE for an
    /// unreadable directory that a process holds.
    pub(crate) async fn delete_leftover(
        self: Arc<Self>,
        uid: VmUid,
        give_up: bool,
    ) -> Result<(), ApiError> {
        self.reread().await;
        let leftover = self.leftover(&uid)?;
        accepted(&uid, give_up, &leftover.delete_gives_up)?;
        tracing::warn!(%uid, kind = leftover.kind().as_str_name(), "ending a leftover on an operator's order");
        match self.settled(&uid).await {
            // What is left beside a VM that lives here is only records.
            Some(Held::Live(live)) if leftover.kind() != Kind::EndedSide => {
                self.end_living(&live, &leftover).await?;
            }
            Some(Held::Dead(dead)) if leftover.kind() == Kind::Unreadable => {
                return self.remove_unreadable(&dead).await;
            }
            Some(Held::Dead(dead)) if dead.lost().is_none() => {
                for key in dead.sides().iter().filter_map(SideKey::of) {
                    self.release_dead(&dead, &key).await?;
                }
            }
            _ => {}
        }
        let ended = self.ended.all().into_iter();
        let own = ended.filter(|side| {
            let record = of_record(side);
            record.uid == uid.as_str() && (give_up || record.delete_gives_up.is_empty())
        });
        for key in own.filter_map(|side| SideKey::of(&side)) {
            let ended = Arc::clone(&self.ended);
            tokio::task::spawn_blocking(move || ended.forget(&key))
                .await
                .map_err(|error| task_failed(&error))?
                .map_err(|error| ApiError::new(Reason::Store, error.to_string()))?;
        }
        self.registry.note_change();
        Ok(())
    }

    async fn end_living(
        self: &Arc<Self>,
        live: &Arc<LiveVm>,
        leftover: &v1::Leftover,
    ) -> Result<(), ApiError> {
        let migration = MigrationName::parse(&leftover.migration)?;
        let (key, ended) = match leftover.kind() {
            Kind::RelinquishedSource => (SideKey::source(migration), Ok(())),
            kind => {
                let key = SideKey::destination(migration);
                let ended = if kind == Kind::ReadyDestination {
                    let abort = v1::resolve_transfer_request::Decision::Abort;
                    self.resolve(live, leftover, abort).await
                } else {
                    self.cancel_destination(live, leftover).await
                };
                (key, ended)
            }
        };
        let over = match ended {
            Ok(()) if key.role == Role::Destination => {
                // It records its end, then goes by itself.
                let gone = tokio::time::timeout(QUICK, live.gone().cancelled()).await;
                gone.map_err(|_| live.unreachable("was given up and does not end".to_owned()))
            }
            other => other,
        };
        let released = match over {
            Ok(()) => Arc::clone(self).release(key.clone()).await,
            Err(error) => Err(error),
        };
        match released {
            // It owns nothing, or the order gave it up: what keeps it is only that it is stopped.
            Err(error) if error.reason == Reason::VmUnreachable => {
                self.kill(live).await?;
                Arc::clone(self).release(key).await
            }
            released => released,
        }
    }

    async fn cancel_destination(
        &self,
        live: &LiveVm,
        leftover: &v1::Leftover,
    ) -> Result<(), ApiError> {
        let mut transfers = live.transfers();
        let request = v1::CancelTransferRequest {
            migration: leftover.migration.clone(),
            role: v1::TransferRole::Destination.into(),
            error: None,
        };
        live.answer(QUICK, transfers.cancel_transfer(request))
            .await
            .map(drop)
    }

    /// Removes a directory that answers nothing, once it is sure that no process is behind it.
    async fn remove_unreadable(&self, dead: &Arc<DeadVm>) -> Result<(), ApiError> {
        let held = |what: String| {
            ApiError::new(
                Reason::VmState,
                format!("{}: {what}", dead.dir().path().display()),
            )
            .with("uid", dead.uid())
            .with(
                "advice",
                "end that process first, or repair what cannot be read",
            )
        };
        match process::find(dead.dir()).await {
            Ok(Found::Dead(lock)) => {
                // The lock is given back: `remove_dead` takes it again, under the claim.
                drop(lock);
                self.remove_dead(dead).await
            }
            Ok(Found::Living(process)) => {
                Err(held(format!("process {} holds its lock", process.pid())))
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                self.remove_dead(dead).await
            }
            Err(error) => Err(held(error.to_string())),
        }
    }
}

/// The caller has accepted what an order gives up.
fn accepted(uid: &VmUid, give_up: bool, gives_up: &str) -> Result<(), ApiError> {
    if give_up || gives_up.is_empty() {
        return Ok(());
    }
    Err(ApiError::new(
        Reason::GiveUpRequired,
        format!("this gives something up: {gives_up}"),
    )
    .with("uid", uid)
    .with("gives_up", gives_up)
    .with(
        "advice",
        "repeat the order with give_up when that is what you want",
    ))
}
