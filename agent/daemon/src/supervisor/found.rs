//! Processes and directories found: taken in at the start, and again whenever a process has ended.

use std::{io, sync::Arc};

use slat_proto::{ApiError, Reason, model::ordinary_bytes, v1};

use super::{ADOPT, Supervisor, clear::remove, slot_bytes};
use slat_record::{dir::VmDir, journal::Journal, uid::VmUid};

use crate::{
    announce::found_sides,
    dead::{DeadVm, LastSeen},
    follow::follow_vm,
    identity::{Who, load_seen, save_seen},
    living::LiveVm,
    process::{self, DirLock, Found, Process},
    registry::Claim,
    remains::Remains,
    side::SideKey,
};

impl Supervisor {
    /// Takes in every directory there is: living processes are adopted, dead ones remembered or
    /// cleared.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub(crate) async fn scan(self: &Arc<Self>) -> io::Result<()> {
        let mut dirs = Vec::new();
        for entry in std::fs::read_dir(&self.vms_dir)? {
            let dir = VmDir::new(entry?.path());
            match Who::of(&dir) {
                Some(who) => dirs.push((who, dir)),
                None => {
                    tracing::warn!(path = %dir.path().display(), "not a VM's directory, left alone");
                }
            }
        }
        // Of two that say the same uid, the one that is called by it has it.
        dirs.sort_by_key(|(who, dir)| !is_called(dir, who.uid.as_str()));
        let mut found = tokio::task::JoinSet::new();
        for (who, dir) in dirs {
            let claim = self.registry.claim_found(&who.uid, &who.name);
            let claim = claim.or_else(|| {
                tracing::error!(path = %dir.path().display(), uid = %who.uid, "two directories of one VM");
                let folder = dir.path().file_name()?.to_str()?;
                let uid = VmUid::parse(folder).ok()?;
                self.registry.claim_found(&uid, &who.name)
            });
            if let Some(claim) = claim {
                found.spawn(Arc::clone(self).take_in(claim, dir, None));
            }
        }
        while let Some(result) = found.join_next().await {
            if let Err(error) = result {
                tracing::error!(%error, "taking a VM's directory in failed");
            }
        }
        Ok(())
    }

    /// Finds out what stands behind a VM's directory and fills its claim. `before`: what was seen
    /// of the process that was there and ended.
    pub(super) async fn take_in(
        self: Arc<Self>,
        claim: Claim,
        dir: VmDir,
        before: Option<LastSeen>,
    ) {
        let before = before.unwrap_or_default();
        let mut claim = Some(claim);
        while let Some(held) = claim.take() {
            // The journal may say by now whose it is.
            let (held, who) = match Who::of(&dir) {
                Some(who) if who.uid == *held.uid() => (held, who),
                Some(who) if who.certain => match self.registry.claim_found(&who.uid, &who.name) {
                    Some(own) => (own, who),
                    None => renamed(held, who),
                },
                Some(who) => renamed(held, who),
                None => {
                    tracing::error!(path = %dir.path().display(), "not a VM's directory any more");
                    return;
                }
            };
            match process::find(&dir).await {
                Ok(Found::Living(process)) => claim = self.adopt(held, who, &dir, *process).await,
                Ok(Found::Dead(lock)) => {
                    self.bury(held, who, dir.clone(), lock, before.clone())
                        .await
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    tracing::debug!(vm = %who.name, uid = %who.uid, "its directory is gone already");
                }
                Err(error) => {
                    tracing::error!(vm = %who.name, uid = %who.uid, %error, "a VM's directory cannot be read");
                    let error = ApiError::from_io(Reason::Journal, dir.path(), &error)
                        .with("vm", &who.name);
                    let seen = before.clone().or_kept(&dir);
                    let dead = DeadVm::new(who, dir.clone(), &self.host, Err(error), seen);
                    held.fill_dead(Arc::new(dead));
                }
            }
        }
    }

    /// Makes a found process one of ours. Gives the claim back when there is nothing to keep: look
    /// again.
    async fn adopt(
        self: &Arc<Self>,
        claim: Claim,
        who: Who,
        dir: &VmDir,
        process: Process,
    ) -> Option<Claim> {
        let vm = who.name.clone();
        let journal = Journal::read(&dir.journal());
        if matches!(journal, Ok(None)) {
            // It was being made when its agent ended: it never got a VM, and nobody knows of it.
            tracing::info!(%vm, pid = process.pid(), "ending a process that never got its VM");
            process.put_down().await;
            return Some(claim);
        }
        let pid = process.pid();
        let live = match LiveVm::new(who, &self.host, dir.clone(), process) {
            Ok(live) => live,
            Err(error) => {
                tracing::error!(%vm, pid, %error, "a VM process cannot be reached");
                return None;
            }
        };
        self.keep_pager(&live);
        // Others wait for this one: a stopped process is not asked, and any other two things at a
        // time.
        let (said, slots) = if live.process().is_stopped() {
            (Err(live.unreachable("does not run".to_owned())), None)
        } else {
            let mut vms = live.vms();
            tokio::join!(
                live.answer(ADOPT, vms.get_vm(live.get_request())),
                found_slots(&live)
            )
        };
        match said {
            Ok(said) => {
                save_seen(dir, &said);
                live.see(said);
            }
            Err(error) => {
                tracing::warn!(%vm, pid, %error, "a VM process was found but does not answer yet");
                if let Some(seen) = load_seen(dir) {
                    live.see(seen);
                }
                live.fall_silent().await;
            }
        }
        // Its slots, or what it was made with.
        let made_with = live.snapshot().and_then(|vm| vm.spec);
        let made_bytes = made_with.as_ref().map_or(0, |spec| spec.memory_bytes);
        let memory = ordinary_bytes(made_with.as_ref(), slots.unwrap_or(made_bytes));
        let sides = found_sides(dir);
        live.set_sides_told(sides.is_ok());
        self.go_live(claim, &live, memory);
        for (key, ended) in sides.unwrap_or_default() {
            self.know_side(&live, key, ended);
        }
        tracing::info!(%vm, pid, "VM process found again");
        None
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
            let dir = live.dir().clone();
            self.take_in(claim, dir, Some(LastSeen::of(&live))).await;
        }
    }

    /// Remembers what a dead process left, or clears it away when that is nothing.
    async fn bury(&self, claim: Claim, who: Who, dir: VmDir, lock: DirLock, before: LastSeen) {
        let (host, vm) = (self.host.clone(), who.name.clone());
        let read = tokio::task::spawn_blocking(move || {
            let mut remains = Remains::read(&who.name, &dir);
            let seen = before.or_kept(&dir);
            if let Ok(remains) = &mut remains {
                for side in &seen.sides {
                    if let Some(key) = SideKey::of(side) {
                        remains.add_seen(key, side.clone());
                    }
                }
            }
            let dead = DeadVm::new(who, dir, &host, remains, seen);
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
                if let Some(error) = dead.unreadable() {
                    tracing::error!(%vm, %error, "a dead VM process's directory cannot be read; it is tried again");
                }
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

/// A claim whose uid the directory does not say: it stays, for want of a better one.
fn renamed(claim: Claim, who: Who) -> (Claim, Who) {
    let who = Who {
        uid: claim.uid().clone(),
        certain: false,
        ..who
    };
    (claim, who)
}

fn is_called(dir: &VmDir, uid: &str) -> bool {
    dir.path().file_name().is_some_and(|name| name == uid)
}

/// Memory of a found VM's slots; `None` when its process does not say.
async fn found_slots(live: &LiveVm) -> Option<u64> {
    let request = v1::ListSlotsRequest {
        vm: live.name().to_string(),
        uid: live.own_uid(),
        ..Default::default()
    };
    let mut memory = live.memory();
    match live.answer(ADOPT, memory.list_slots(request)).await {
        Ok(table) => Some(slot_bytes(&table.slots)),
        Err(error) => {
            tracing::debug!(vm = %live.name(), %error, "slots of a found VM are not known");
            None
        }
    }
}
