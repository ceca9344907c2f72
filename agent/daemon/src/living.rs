//! A VM with a living process: one channel to its endpoint, and the cache of what it last said.
//!
//! # The cache
//! One [`follow_vm`](super::follow::follow_vm) task per VM keeps the last `slat.v1.Vm` of its
//! WatchVm stream, one [`follow_side`](super::follow::follow_side) task per migration side keeps
//! the last `slat.v1.Transfer`. Reports and scrapes read these and never call a VM. The tasks end
//! with the process (`gone`) or with the agent; the side's also when the side is released.
//!
//! How its memory is paged is in [`Paged`], which wakes who keeps its pager.
//!
//! # Silence
//! A process that [`LiveVm::fall_silent`] was called for is shown as its journal has it
//! ([`super::silence`]), until it says anything again; calls to it are given up sooner.
//!
//! A process may be stopped, or hang. Calls that a healthy one answers at once wait [`QUICK`];
//! during those that may take long it is asked something small over and over
//! ([`LiveVm::answer_long`], in `calls`), so that silence ends them within ten seconds too.
//!
//! # Locking
//! `seen` and `sides` are leaf mutexes: held for one read or write, nothing is called under them.
//! `sighted` is held over the write or removal of a sighting's record, so that none is written
//! after its release; only blocking threads write.

mod calls;

use std::{
    collections::{BTreeMap, BTreeSet, btree_map},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use slat_proto::{
    ApiError, Reason,
    model::{HostName, VmName, timestamp},
    transport::{Address, TracedChannel, connect},
    v1,
};
use tokio_util::sync::CancellationToken;

use super::{
    beginning::{Beginning, Begins},
    identity::{Who, save_seen},
    paged::Paged,
    process::Process,
    side::{Role, SideKey, is_terminal},
    sighting,
    silence::Silent,
};
use slat_record::{
    dir::VmDir,
    journal::{Journal, Ownership},
    uid::VmUid,
};

/// For calls that a healthy process answers at once.
pub(super) const QUICK: Duration = Duration::from_secs(10);
/// For calls that touch all of a VM's memory.
const HEAVY: Duration = Duration::from_secs(300);
/// A process that answers nothing for so long is taken for silent when asked again as long.
pub(super) const SMALL: Duration = Duration::from_secs(4);
/// What a process that has been silent may take for any answer.
const SILENT: Duration = Duration::from_secs(1);
/// From the moment a process that ends closes its sockets until what it left is taken in.
const ENDING: Duration = Duration::from_secs(1);
/// How often it is asked something small while it works.
pub(super) const ASK_EVERY: Duration = Duration::from_secs(1);

/// One living VM process.
#[derive(Debug)]
pub(super) struct LiveVm {
    uid: VmUid,
    /// Whether the uid is known to be the VM's own; else it is the directory's name.
    certain: bool,
    name: VmName,
    host: HostName,
    dir: VmDir,
    /// Whether the disk told which sides it has; else only the process knows.
    sides_told: AtomicBool,
    process: Process,
    channel: TracedChannel,
    seen: Mutex<Seen>,
    sides: Mutex<BTreeMap<SideKey, Option<v1::Transfer>>>,
    beginning: Beginning,
    /// Sides whose sighting is on disk, or was and is released.
    sighted: Mutex<BTreeSet<SideKey>>,
    /// Sides whose end was asked for while the process was silent.
    cancelled: Mutex<BTreeSet<SideKey>>,
    paged: Paged,
    gone: CancellationToken,
}

/// What the VM last said.
#[derive(Debug)]
struct Seen {
    vm: Option<v1::Vm>,
    /// When it last said anything.
    heard: (Instant, SystemTime),
    /// Its process does not answer: what is shown in place of what it last said.
    silent: Option<Option<v1::Vm>>,
    /// It was seen INCOMING at this epoch and never at a higher one: it was never owned here.
    arriving: Option<u64>,
}

impl Seen {
    fn shown(&self) -> Option<&v1::Vm> {
        match &self.silent {
            Some(standing) => standing.as_ref(),
            None => self.vm.as_ref(),
        }
    }

    fn hear(&mut self) -> bool {
        self.heard = (Instant::now(), SystemTime::now());
        self.silent.take().is_some()
    }
}

/// What a message of the VM brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct News {
    /// More than new figures.
    pub(super) any: bool,
    /// It arrived: it was received until now, and is owned here.
    pub(super) arrived: bool,
}

impl LiveVm {
    /// For a process that serves its endpoint.
    pub(super) fn new(
        who: Who,
        host: &HostName,
        dir: VmDir,
        process: Process,
    ) -> Result<Arc<Self>, ApiError> {
        let channel = connect(&Address::Unix(dir.socket()))?.relaying();
        Ok(Arc::new(Self {
            uid: who.uid,
            certain: who.certain,
            name: who.name,
            host: host.clone(),
            dir,
            sides_told: AtomicBool::new(true),
            process,
            channel,
            seen: Mutex::new(Seen {
                vm: None,
                heard: (Instant::now(), SystemTime::now()),
                silent: None,
                arriving: None,
            }),
            sides: Mutex::default(),
            beginning: Beginning::default(),
            sighted: Mutex::default(),
            cancelled: Mutex::default(),
            paged: Paged::default(),
            gone: CancellationToken::new(),
        }))
    }

    pub(super) fn uid(&self) -> &VmUid {
        &self.uid
    }

    /// The uid to name the VM by at its process; empty when only the process knows it.
    pub(super) fn own_uid(&self) -> String {
        if self.certain {
            self.uid.to_string()
        } else {
            String::new()
        }
    }

    pub(super) fn name(&self) -> &VmName {
        &self.name
    }

    /// Asks for the VM itself.
    pub(super) fn get_request(&self) -> v1::GetVmRequest {
        v1::GetVmRequest {
            name: self.name.to_string(),
            uid: self.own_uid(),
            ..Default::default()
        }
    }

    pub(super) fn dir(&self) -> &VmDir {
        &self.dir
    }

    pub(super) fn process(&self) -> &Process {
        &self.process
    }

    /// Cancelled when the process has ended and its name was taken from it.
    pub(super) fn gone(&self) -> &CancellationToken {
        &self.gone
    }

    /// Whether the process has just ended: for a call that it did not answer.
    pub(super) async fn has_gone(&self) -> bool {
        let gone = tokio::time::timeout(ENDING, self.gone.cancelled());
        gone.await.is_ok()
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn side_map(&self) -> MutexGuard<'_, BTreeMap<SideKey, Option<v1::Transfer>>> {
        self.sides.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The VM as it last said; as its journal has it while its process does not answer.
    pub(super) fn snapshot(&self) -> Option<v1::Vm> {
        self.seen().shown().cloned()
    }

    /// Whether its process does not answer.
    pub(super) fn is_silent(&self) -> bool {
        self.seen().silent.is_some()
    }

    /// How long its process has said nothing.
    pub(super) fn quiet(&self) -> Duration {
        self.seen().heard.0.elapsed()
    }

    /// Its process answers, if only with a refusal. True when it did not before.
    pub(super) fn hear(&self) -> bool {
        self.seen().hear()
    }

    /// Shows the VM as its journal has it from now on, until its process says anything. True when
    /// that is another view than before.
    pub(super) async fn fall_silent(self: &Arc<Self>) -> bool {
        let me = Arc::clone(self);
        tokio::task::spawn_blocking(move || me.read_silent())
            .await
            .unwrap_or_else(|error| {
                tracing::error!(%error, "reading a silent VM's journal failed");
                false
            })
    }

    fn read_silent(&self) -> bool {
        let (known, heard) = {
            let seen = self.seen();
            (seen.vm.clone(), seen.heard)
        };
        let pid = self.process.pid();
        let silent = Silent {
            name: &self.name,
            host: &self.host,
            pid,
            message: format!(
                "its process (pid {pid}{}) has not answered since {}",
                if self.process.is_stopped() {
                    ", stopped by a signal"
                } else {
                    ""
                },
                timestamp(heard.1)
            ),
        };
        let standing = silent.standing(&self.dir, known.as_ref());
        let mut seen = self.seen();
        if seen.heard.0 != heard.0 {
            // It has answered meanwhile.
            return false;
        }
        let news = seen.silent.as_ref() != Some(&standing.vm);
        // It has arrived unseen, and is lost when it dies: kept on disk too.
        let arrived = standing.owns && seen.arriving.take().is_some();
        seen.silent = Some(standing.vm.clone());
        drop(seen);
        if arrived && let Some(vm) = &standing.vm {
            save_seen(&self.dir, vm);
        }
        news
    }

    /// Whether its journal says that it receives by this side's migration, and has not ended that.
    pub(super) async fn is_receiving(self: &Arc<Self>, key: &SideKey) -> bool {
        let (journal, key) = (self.dir.journal(), key.clone());
        let read = move || {
            let state = Journal::read(&journal).ok().flatten();
            state.is_some_and(|state| match &state.ownership {
                Ownership::Incoming { migration, .. } | Ownership::Prepared { migration, .. } => {
                    key.role == Role::Destination && key.is_of(migration)
                }
                _ => false,
            })
        };
        tokio::task::spawn_blocking(read).await.unwrap_or(false)
    }

    /// Whether the disk told which sides it has.
    pub(super) fn sides_told(&self) -> bool {
        self.sides_told.load(Ordering::Acquire)
    }

    /// Says whether the disk told which sides it has.
    pub(super) fn set_sides_told(&self, told: bool) {
        self.sides_told.store(told, Ordering::Release);
    }

    /// Whether it gave its VM away: then it is no VM of its name any more.
    pub(super) fn gave_away(&self) -> bool {
        let seen = self.seen();
        seen.shown()
            .is_some_and(|vm| vm.state() == v1::vm::State::Relinquished)
    }

    /// Whether it was only ever seen to receive its VM.
    pub(super) fn never_owned(&self) -> bool {
        self.seen().arriving.is_some()
    }

    /// Remembers that somebody wants the end of a side and the process did not answer.
    pub(super) fn note_cancel(&self, key: &SideKey) {
        let mut cancelled = self
            .cancelled
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        cancelled.insert(key.clone());
    }

    /// A side that has not ended and whose end nobody asked for in vain.
    pub(super) fn unfinished(&self) -> Option<v1::Transfer> {
        let cancelled = self
            .cancelled
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let sides = self.side_map();
        let mut going_on = sides.iter().filter(|(key, side)| {
            !cancelled.contains(key) && side.as_ref().is_none_or(|side| !is_terminal(side.phase()))
        });
        going_on.next().map(|(key, side)| {
            side.clone().unwrap_or_else(|| v1::Transfer {
                migration: key.migration.to_string(),
                role: key.role.to_message().into(),
                ..Default::default()
            })
        })
    }

    /// What is known of its paging, and who needs a pager.
    pub(super) fn paged(&self) -> &Paged {
        &self.paged
    }

    /// Keeps what the VM said; answers what of it was new.
    pub(super) fn see(&self, vm: v1::Vm) -> News {
        let paging = self.paged.hear(vm.paging.as_ref());
        let mut seen = self.seen();
        let back = seen.hear();
        if vm.state() == v1::vm::State::Incoming {
            seen.arriving = Some(vm.epoch);
        }
        // Owning raises the epoch; a side that gives up shows FAILED at the old one.
        let arrived = seen.arriving.take_if(|epoch| vm.epoch > *epoch).is_some();
        let any = back
            || paging
            || seen.vm.as_ref().is_none_or(|old| {
                (
                    old.state,
                    old.epoch,
                    &old.migration,
                    &old.state_message,
                    old.dirty_logging,
                ) != (
                    vm.state,
                    vm.epoch,
                    &vm.migration,
                    &vm.state_message,
                    vm.dirty_logging,
                )
            });
        seen.vm = Some(vm);
        News { any, arrived }
    }

    /// Every side followed here that has said something.
    pub(super) fn sides(&self) -> Vec<v1::Transfer> {
        self.side_map().values().flatten().cloned().collect()
    }

    /// The side as it last said; the outer `None`: it is not known here.
    pub(super) fn side(&self, key: &SideKey) -> Option<Option<v1::Transfer>> {
        self.side_map().get(key).cloned()
    }

    /// How a side ended that the process has replaced by a later one: as it said then.
    pub(super) fn kept(&self, key: &SideKey) -> Option<v1::Transfer> {
        self.side(key)
            .flatten()
            .filter(|side| is_terminal(side.phase()))
    }

    /// Keeps what a side said; true when its phase is new. No effect on a side that is not followed
    /// any more.
    pub(super) fn see_side(&self, key: &SideKey, mut side: v1::Transfer) -> bool {
        match self.side_map().get_mut(key) {
            Some(seen) => {
                if let Some(progress) = &mut side.progress {
                    let known = seen.as_ref().and_then(|old| old.progress.as_ref());
                    progress.restore_histories(known);
                }
                let news = seen.as_ref().is_none_or(|old| old.phase != side.phase);
                *seen = Some(side);
                news
            }
            None => false,
        }
    }

    /// Makes it durable that a source side gave its VM away, when `side` says so. Await it before
    /// anybody else learns of it: the journal of its process may lack it.
    ///
    /// # Errors
    /// STORE: nobody else may learn of it then.
    pub(super) async fn witness(self: &Arc<Self>, side: &v1::Transfer) -> Result<(), ApiError> {
        let Some(key) = SideKey::of(side).filter(|key| sighting::gave_away(key, side.phase()))
        else {
            return Ok(());
        };
        let (me, side) = (Arc::clone(self), side.clone());
        let saved = tokio::task::spawn_blocking(move || {
            let mut sighted = me.sighted.lock().unwrap_or_else(PoisonError::into_inner);
            if !sighted.contains(&key) {
                sighting::save(&me.dir, &side)?;
                sighted.insert(key);
            }
            Ok(())
        })
        .await
        .unwrap_or_else(|error| Err(std::io::Error::other(error)));
        match saved {
            // Its directory is gone: the side was released, or `ended` answers for it.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                Err(self.unreachable(format!("is gone: {}: {error}", self.dir.path().display())))
            }
            saved => saved.map_err(|error| {
                ApiError::from_io(Reason::Store, self.dir.path(), &error)
                    .with("vm", &self.name)
                    .with("advice", "free space on the host's disk and ask again")
            }),
        }
    }

    /// Forgets a released side's sighting; none is kept of it again. Blocks on the disk.
    pub(super) fn forget_sighting(&self, key: &SideKey) {
        let mut sighted = self.sighted.lock().unwrap_or_else(PoisonError::into_inner);
        sighted.insert(key.clone());
        if let Err(error) = sighting::forget(&self.dir, key) {
            tracing::warn!(vm = %self.name, migration = %key.migration, %error, "cannot remove a sighting");
        }
    }

    /// Begins to know a side; true when it is new here. The caller then starts
    /// [`follow_side`](super::follow::follow_side).
    pub(super) fn add_side(&self, key: &SideKey, said: Option<v1::Transfer>) -> bool {
        match self.side_map().entry(key.clone()) {
            btree_map::Entry::Vacant(entry) => {
                entry.insert(said);
                true
            }
            // Known by name only (the VM's stream was quicker than the answer to the call that
            // began it).
            btree_map::Entry::Occupied(mut entry) => {
                if entry.get().is_none() {
                    entry.insert(said);
                }
                false
            }
        }
    }

    /// Forgets a released side.
    pub(super) fn forget_side(&self, key: &SideKey) {
        self.side_map().remove(key);
    }

    /// A source side is being begun while the answer is kept.
    pub(super) fn begin_side(&self, key: &SideKey) -> Begins<'_> {
        self.beginning.begin(key)
    }

    /// Forgets a side that the process does not know, and its record by `remove`. False, and
    /// nothing is forgotten, when it is being begun or was told of since it stood as `known`.
    pub(super) fn forget_unknown_side(
        &self,
        key: &SideKey,
        known: Option<&v1::Transfer>,
        remove: impl FnOnce(),
    ) -> bool {
        self.beginning.unless(key, || {
            let mut sides = self.side_map();
            if sides.get(key).is_some_and(|now| now.as_ref() != known) {
                return false;
            }
            sides.remove(key);
            drop(sides);
            remove();
            true
        })
    }
}
