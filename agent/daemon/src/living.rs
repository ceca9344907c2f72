//! A VM with a living process: one channel to its endpoint, and the cache of what it last said.
//!
//! # The cache
//! One [`follow_vm`](super::follow::follow_vm) task per VM keeps the last `slat.v1.Vm` of its
//! WatchVm stream, one [`follow_side`](super::follow::follow_side) task per migration side keeps
//! the last `slat.v1.Transfer`. Reports and scrapes read these and never call a VM. The tasks end
//! with the process (`gone`) or with the agent; the side's also when the side is released.
//!
//! # Locking
//! `seen` and `sides` are leaf mutexes: held for one read or write, nothing is called under them.
//! `sighted` is held over the write or removal of a sighting's record, so that none is written
//! after its release; only blocking threads write.

use std::{
    collections::{BTreeMap, BTreeSet, btree_map},
    future::Future,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use prost::Message as _;
use slat_proto::{
    ApiError, Reason,
    model::VmName,
    transport::{Address, TracedChannel, connect},
    v1::{
        self, memory_service_client::MemoryServiceClient,
        transfer_service_client::TransferServiceClient, vm_service_client::VmServiceClient,
    },
};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Response, Status};

use super::{
    process::Process,
    side::{SideKey, is_terminal},
    sighting,
};
use slat_record::dir::VmDir;

/// For calls that a healthy process answers at once.
pub(super) const QUICK: Duration = Duration::from_secs(10);
/// For calls that touch all of a VM's memory.
pub(super) const HEAVY: Duration = Duration::from_secs(300);

/// One living VM process.
#[derive(Debug)]
pub(super) struct LiveVm {
    name: VmName,
    dir: VmDir,
    process: Process,
    channel: TracedChannel,
    seen: Mutex<Option<v1::Vm>>,
    sides: Mutex<BTreeMap<SideKey, Option<v1::Transfer>>>,
    /// Sides whose sighting is on disk, or was and is released.
    sighted: Mutex<BTreeSet<SideKey>>,
    gone: CancellationToken,
}

impl LiveVm {
    /// For a process that serves its endpoint.
    pub(super) fn new(name: VmName, dir: VmDir, process: Process) -> Result<Arc<Self>, ApiError> {
        let channel = connect(&Address::Unix(dir.socket()))?.relaying();
        Ok(Arc::new(Self {
            name,
            dir,
            process,
            channel,
            seen: Mutex::default(),
            sides: Mutex::default(),
            sighted: Mutex::default(),
            gone: CancellationToken::new(),
        }))
    }

    pub(super) fn name(&self) -> &VmName {
        &self.name
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

    pub(super) fn vms(&self) -> VmServiceClient<TracedChannel> {
        VmServiceClient::new(self.channel.clone())
    }

    pub(super) fn memory(&self) -> MemoryServiceClient<TracedChannel> {
        MemoryServiceClient::new(self.channel.clone())
    }

    pub(super) fn transfers(&self) -> TransferServiceClient<TracedChannel> {
        TransferServiceClient::new(self.channel.clone())
    }

    /// Awaits a call to this process for at most `limit`.
    ///
    /// # Errors
    /// What the process answered; VM_UNREACHABLE when it did not.
    pub(super) async fn answer<T>(
        &self,
        limit: Duration,
        call: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<T, ApiError> {
        match tokio::time::timeout(limit, call).await {
            Ok(Ok(response)) => Ok(response.into_inner()),
            Ok(Err(status)) => Err(self.refusal(status)),
            Err(_) => {
                Err(self.unreachable(format!("does not answer within {} s", limit.as_secs())))
            }
        }
    }

    /// The error behind a failed call: the process's own, or VM_UNREACHABLE when the transport made
    /// it.
    pub(super) fn refusal(&self, status: Status) -> ApiError {
        let transport = matches!(
            status.code(),
            Code::Unavailable
                | Code::Unknown
                | Code::Internal
                | Code::Cancelled
                | Code::DeadlineExceeded
        );
        let message = status.message().to_owned();
        let error = ApiError::from(status);
        // Only a status without our details carries its bare gRPC code.
        if transport && error.metadata.contains_key("grpc_code") {
            return self.unreachable(format!("does not answer: {message}"));
        }
        error
    }

    /// VM_UNREACHABLE for this process.
    pub(super) fn unreachable(&self, what: String) -> ApiError {
        ApiError::new(
            Reason::VmUnreachable,
            format!(
                "the process of {} (pid {}) {what}",
                self.name,
                self.process.pid()
            ),
        )
        .with("vm", &self.name)
        .with("pid", self.process.pid())
        .with(
            "advice",
            "try again; if it stays silent, look at its log and end the process by its pid",
        )
    }

    fn seen(&self) -> MutexGuard<'_, Option<v1::Vm>> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn side_map(&self) -> MutexGuard<'_, BTreeMap<SideKey, Option<v1::Transfer>>> {
        self.sides.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The VM as it last said.
    pub(super) fn snapshot(&self) -> Option<v1::Vm> {
        self.seen().clone()
    }

    /// Keeps what the VM said; true when it is more than new figures.
    pub(super) fn see(&self, vm: v1::Vm) -> bool {
        let mut seen = self.seen();
        let news = seen.as_ref().is_none_or(|old| {
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
        *seen = Some(vm);
        news
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
    pub(super) fn see_side(&self, key: &SideKey, side: v1::Transfer) -> bool {
        match self.side_map().get_mut(key) {
            Some(seen) => {
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
}

/// Where the agent keeps a VM as it first saw it, for the time when its process is gone: what was
/// asked for is in no journal.
fn seen_path(dir: &VmDir) -> std::path::PathBuf {
    dir.path().join("seen.pb")
}

/// Writes a VM beside its journal. Best effort: losing it costs a lost VM its specification,
/// nothing else.
pub(super) fn save_seen(dir: &VmDir, vm: &v1::Vm) {
    let aside = dir.path().join("seen.new");
    let written = std::fs::write(&aside, vm.encode_to_vec())
        .and_then(|()| std::fs::rename(&aside, seen_path(dir)));
    if let Err(error) = written {
        tracing::warn!(dir = %dir.path().display(), %error, "cannot keep a VM's description");
    }
}

/// The VM as written by [`save_seen`].
pub(super) fn load_seen(dir: &VmDir) -> Option<v1::Vm> {
    let bytes = std::fs::read(seen_path(dir)).ok()?;
    v1::Vm::decode(bytes.as_slice()).ok()
}

/// Makes a source side known on disk before its process is asked to begin: a process and an agent
/// that die together leave an answer then. The process itself writes its record when the side ends.
/// True when this made it.
pub(super) fn announce_side(vm: &LiveVm, key: &SideKey, epoch: u64) -> std::io::Result<bool> {
    let known = vm
        .dir
        .transfers()?
        .iter()
        .any(|side| SideKey::of(side).as_ref() == Some(key));
    if known || vm.side(key).is_some() {
        return Ok(false);
    }
    vm.dir.save_transfer(&v1::Transfer {
        migration: key.migration.to_string(),
        vm: vm.name.to_string(),
        role: key.role.to_message().into(),
        phase: v1::TransferPhase::Preparing.into(),
        epoch,
        ..Default::default()
    })?;
    Ok(true)
}

/// Removes a side's record; best effort, for one that its process does not know.
pub(super) fn forget_record(vm: &LiveVm, key: &SideKey) {
    if let Err(error) = vm
        .dir
        .remove_transfer(&key.migration, key.role.to_message())
    {
        tracing::warn!(vm = %vm.name, migration = %key.migration, %error, "cannot remove a transfer's record");
    }
}
