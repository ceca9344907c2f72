//! Processes and directories found: taken in at the start, and again whenever a process has ended.

use std::{io, sync::Arc};

use slat_proto::{
    ApiError, Reason,
    model::{MigrationName, VmName},
    v1,
};

use super::{ADOPT, Supervisor, clear::remove, slot_bytes};
use slat_record::{
    dir::VmDir,
    journal::{Journal, JournalState, Ownership},
};

use crate::{
    dead::DeadVm,
    follow::follow_vm,
    living::{LiveVm, load_seen, save_seen},
    process::{self, DirLock, Found, Process},
    registry::Claim,
    remains::Remains,
    side::{SideKey, is_terminal},
};

impl Supervisor {
    /// Takes in every directory there is: living processes are adopted, dead ones remembered or
    /// cleared.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub(crate) async fn scan(self: &Arc<Self>) -> io::Result<()> {
        let mut found = tokio::task::JoinSet::new();
        for entry in std::fs::read_dir(&self.vms_dir)? {
            let entry = entry?;
            let name = entry.file_name();
            let Some(vm) = name.to_str().and_then(|name| VmName::from_id(name).ok()) else {
                tracing::warn!(path = %entry.path().display(), "not a VM's directory, left alone");
                continue;
            };
            let Some(claim) = self.registry.claim_found(&vm) else {
                continue;
            };
            found.spawn(Arc::clone(self).take_in(claim, vm, None));
        }
        while let Some(result) = found.join_next().await {
            if let Err(error) = result {
                tracing::error!(%error, "taking a VM's directory in failed");
            }
        }
        Ok(())
    }

    /// Finds out what stands behind a VM's directory and fills its claim. `before`: the process
    /// that was there and ended.
    async fn take_in(self: Arc<Self>, claim: Claim, vm: VmName, before: Option<Arc<LiveVm>>) {
        let dir = self.dir(&vm);
        let mut claim = Some(claim);
        while let Some(held) = claim.take() {
            match process::find(&dir).await {
                Ok(Found::Living(process)) => claim = self.adopt(held, &vm, &dir, *process).await,
                Ok(Found::Dead(lock)) => {
                    self.bury(held, &vm, dir.clone(), lock, before.clone())
                        .await
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    tracing::debug!(%vm, "its directory is gone already");
                }
                Err(error) => {
                    tracing::error!(%vm, %error, "a VM's directory cannot be read");
                    let error =
                        ApiError::from_io(Reason::Journal, dir.path(), &error).with("vm", &vm);
                    let seen = before.as_ref().and_then(|vm| vm.snapshot());
                    held.fill_dead(Arc::new(DeadVm::new(
                        vm.clone(),
                        dir.clone(),
                        &self.host,
                        Err(error),
                        seen.as_ref(),
                    )));
                }
            }
        }
    }

    /// Makes a found process one of ours. Gives the claim back when there is nothing to keep: look
    /// again.
    async fn adopt(
        self: &Arc<Self>,
        claim: Claim,
        vm: &VmName,
        dir: &VmDir,
        process: Process,
    ) -> Option<Claim> {
        let journal = Journal::read(&dir.journal());
        if matches!(journal, Ok(None)) {
            // It was being made when its agent ended: it never got a VM, and nobody knows of it.
            tracing::info!(%vm, pid = process.pid(), "ending a process that never got its VM");
            process.put_down().await;
            return Some(claim);
        }
        let pid = process.pid();
        let live = match LiveVm::new(vm.clone(), dir.clone(), process) {
            Ok(live) => live,
            Err(error) => {
                tracing::error!(%vm, pid, %error, "a VM process cannot be reached");
                return None;
            }
        };
        let mut asked = live.vms();
        let said = live
            .answer(
                ADOPT,
                asked.get_vm(v1::GetVmRequest {
                    name: vm.to_string(),
                    ..Default::default()
                }),
            )
            .await;
        let seen = match said {
            Ok(said) => {
                save_seen(dir, &said);
                Some(said)
            }
            Err(error) => {
                tracing::warn!(%vm, pid, %error, "a VM process was found but does not answer yet");
                load_seen(dir)
            }
        };
        let memory = self.found_memory(&live, seen.as_ref()).await;
        if let Some(seen) = seen {
            live.see(seen);
        }
        let sides = found_sides(dir, journal.ok().flatten().as_ref());
        self.go_live(claim, &live, memory);
        for (key, ended) in sides {
            self.know_side(&live, key, ended);
        }
        tracing::info!(%vm, pid, "VM process found again");
        None
    }

    /// Memory of a found VM: its slots, or what it was made with.
    async fn found_memory(&self, live: &Arc<LiveVm>, seen: Option<&v1::Vm>) -> u64 {
        let spec = seen
            .and_then(|vm| vm.spec.as_ref())
            .map_or(0, |spec| spec.memory_bytes);
        let request = v1::ListSlotsRequest {
            vm: live.name().to_string(),
            ..Default::default()
        };
        let mut memory = live.memory();
        match live.answer(ADOPT, memory.list_slots(request)).await {
            Ok(table) => slot_bytes(&table.slots),
            Err(error) => {
                tracing::debug!(vm = %live.name(), %error, "slots of a found VM are not known");
                spec
            }
        }
    }

    /// Shows a living VM and starts what follows it.
    pub(super) fn go_live(self: &Arc<Self>, claim: Claim, live: &Arc<LiveVm>, memory: u64) {
        claim.fill_live(live, memory);
        let (me, followed) = (Arc::clone(self), Arc::clone(live));
        self.follow(async move {
            let registry = Arc::clone(&me.registry);
            let heard = {
                let followed = Arc::clone(&followed);
                move |said: &v1::Vm| me.discover(&followed, said)
            };
            follow_vm(followed, registry, heard).await;
        });
        let (me, watched) = (Arc::clone(self), Arc::clone(live));
        // Not under `follow`: once an end was seen, clearing up is finished even when the agent
        // stops.
        self.tasks.spawn(async move {
            tokio::select! {
                () = me.stop.cancelled() => return,
                () = watched.process().ended() => {}
            }
            me.lost_sight(watched).await;
        });
    }

    /// A process has ended.
    async fn lost_sight(self: Arc<Self>, live: Arc<LiveVm>) {
        let claim = self.registry.claim_from_live(&live);
        live.gone().cancel();
        if let Some(claim) = claim {
            let vm = live.name().clone();
            self.take_in(claim, vm, Some(live)).await;
        }
    }

    /// Remembers what a dead process left, or clears it away when that is nothing.
    async fn bury(
        &self,
        claim: Claim,
        vm: &VmName,
        dir: VmDir,
        lock: DirLock,
        before: Option<Arc<LiveVm>>,
    ) {
        let (host, name) = (self.host.clone(), vm.clone());
        let read = tokio::task::spawn_blocking(move || {
            let mut remains = Remains::read(&name, &dir);
            let seen = before.as_ref().and_then(|vm| vm.snapshot()).or_else(|| load_seen(&dir));
            if let (Ok(remains), Some(before)) = (&mut remains, &before) {
                for side in before.sides() {
                    if let Some(key) = SideKey::of(&side) {
                        remains.add_seen(key, side);
                    }
                }
            }
            let dead = DeadVm::new(name, dir, &host, remains, seen.as_ref());
            if dead.is_told() {
                remove(dead.dir(), lock);
                return None;
            }
            // From here on the answers are on disk, whatever the process had managed to write.
            for side in dead.sides() {
                if let Err(error) = dead.dir().save_transfer(&side) {
                    tracing::error!(vm = side.vm, migration = side.migration, %error, "cannot keep how a side ended");
                }
            }
            Some(dead)
        })
        .await;
        match read {
            Ok(Some(dead)) => {
                match dead.lost() {
                    Some(lost) => tracing::error!(%vm, reason = lost.state_message, "VM lost"),
                    None => {
                        tracing::info!(%vm, "a VM process ended; its migration side waits for its release")
                    }
                }
                claim.fill_dead(Arc::new(dead));
            }
            Ok(None) => {
                tracing::info!(%vm, "VM process ended, directory removed");
                drop(claim);
            }
            Err(error) => {
                tracing::error!(%vm, %error, "reading a dead VM's directory failed");
                drop(claim);
            }
        }
    }
}

/// Sides that a found VM's directory names, with how they ended where a record says so.
fn found_sides(
    dir: &VmDir,
    journal: Option<&JournalState>,
) -> Vec<(SideKey, Option<v1::Transfer>)> {
    let records = dir.transfers().unwrap_or_else(|error| {
        tracing::warn!(dir = %dir.path().display(), %error, "transfer records cannot be read");
        Vec::new()
    });
    let named = journal.and_then(|state| match &state.ownership {
        Ownership::Relinquished { migration, .. } => {
            MigrationName::parse(migration).map(SideKey::source).ok()
        }
        Ownership::Incoming { migration, .. }
        | Ownership::Prepared { migration, .. }
        | Ownership::Aborted { migration } => MigrationName::parse(migration)
            .map(SideKey::destination)
            .ok(),
        Ownership::Owner { .. } => {
            let arrived = state.arrived_by.as_deref()?;
            MigrationName::parse(arrived).map(SideKey::destination).ok()
        }
        Ownership::Ended => None,
    });
    let recorded = records.into_iter().filter_map(|record| {
        let key = SideKey::of(&record)?;
        Some((key, is_terminal(record.phase()).then_some(record)))
    });
    recorded.chain(named.map(|key| (key, None))).collect()
}
