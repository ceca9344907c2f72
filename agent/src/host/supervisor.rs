//! The VM processes of this host: found again at the start, made, watched to their end, cleared away.
//!
//! # Invariants
//! * Work on a name happens under its [`Claim`]; a claim that is dropped frees name and memory.
//! * A directory is removed only with its lock held ([`process::find`] said Dead) and after every half that nobody released
//!   is kept in [`EndedHalves`].
//! * The agent kills a process only when it owns nothing: it never got its VM, or its journal says Aborted, Ended or (after
//!   the server released it) Relinquished. Who may run a VM is decided by the VM processes and their journals alone.
//!
//! # Tasks
//! All run on one tracker and end with the agent's token; work that changes directories is not cut off but awaited, for it
//! is bounded. A caller that goes away does not cut it off either: it runs in a task of its own.

use std::{
    ffi::OsString, future::Future, io, net::IpAddr, os::unix::fs::DirBuilderExt as _,
    path::PathBuf, sync::Arc, time::Duration,
};

use slat_proto::{
    ApiError, Reason,
    model::{BackendKind, HostName, MigrationName, PAGE_SIZE, VmName},
    v1,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    dead::DeadVm,
    ended::EndedHalves,
    half::{HalfKey, Role},
    living::{HEAVY, LiveVm, follow_half, follow_vm, load_seen, save_seen},
    process::{self, DirLock, Found, Launch, Process},
    registry::{Claim, Held, Refusal, Registry, Work},
    remains::Remains,
};
use crate::vm::{
    dir::VmDir,
    journal::{Journal, JournalState, Ownership},
};

/// How long a process may take to answer when it is found at the start.
const ADOPT: Duration = Duration::from_secs(2);
/// How long a process may take to end by itself once it has nothing left to do.
const LEAVE: Duration = Duration::from_secs(5);
/// How long a question waits for a name that is being cleared.
const SETTLE: Duration = Duration::from_secs(15);
/// Longest path of a Unix socket (sun_path without its final 0).
const MAX_SOCKET_PATH: usize = 107;

/// See the module.
#[derive(Debug)]
pub(super) struct Supervisor {
    pub(super) host: HostName,
    pub(super) vms_dir: PathBuf,
    pub(super) program: Vec<OsString>,
    pub(super) data_ip: IpAddr,
    pub(super) registry: Arc<Registry>,
    pub(super) ended: Arc<EndedHalves>,
    /// That work here, best first.
    pub(super) backends: Vec<BackendKind>,
    /// Why one is missing.
    pub(super) backend_message: Option<String>,
    pub(super) stop: CancellationToken,
    pub(super) tasks: TaskTracker,
}

/// The task that did some work has failed: a fault of ours.
pub(super) fn task_failed(error: &tokio::task::JoinError) -> ApiError {
    ApiError::new(
        Reason::Internal,
        format!("a task of the agent failed: {error}"),
    )
}

impl Supervisor {
    fn dir(&self, vm: &VmName) -> VmDir {
        VmDir::new(self.vms_dir.join(vm.id()))
    }

    /// Runs `work` to its end even when the caller goes away.
    pub(super) async fn finish<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T, ApiError>> + Send + 'static,
    ) -> Result<T, ApiError> {
        match self.tasks.spawn(work).await {
            Ok(result) => result,
            Err(error) => Err(task_failed(&error)),
        }
    }

    /// Runs `task` until it ends or the agent stops.
    fn follow(&self, task: impl Future<Output = ()> + Send + 'static) {
        let stop = self.stop.clone();
        self.tasks.spawn(async move {
            tokio::select! {
                () = stop.cancelled() => {}
                () = task => {}
            }
        });
    }

    /// Takes in every directory there is: living processes are adopted, dead ones remembered or cleared.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub(super) async fn scan(self: &Arc<Self>) -> io::Result<()> {
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

    /// Finds out what stands behind a VM's directory and fills its claim. `before`: the process that was there and ended.
    async fn take_in(self: Arc<Self>, claim: Claim, vm: VmName, before: Option<Arc<LiveVm>>) {
        let dir = self.dir(&vm);
        let mut claim = Some(claim);
        while let Some(held) = claim.take() {
            match process::find(&dir).await {
                Ok(Found::Living(process)) => claim = self.adopt(held, &vm, &dir, process).await,
                Ok(Found::Dead(lock)) => {
                    self.bury(held, &vm, dir.clone(), lock, before.clone())
                        .await
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    tracing::debug!(%vm, "its directory is gone already");
                }
                Err(error) => {
                    tracing::error!(%vm, %error, "a VM's directory cannot be read");
                    let error = ApiError::new(Reason::Journal, error.to_string()).with("vm", &vm);
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

    /// Makes a found process one of ours. Gives the claim back when there turned out to be nothing to keep: look again.
    async fn adopt(
        self: &Arc<Self>,
        claim: Claim,
        vm: &VmName,
        dir: &VmDir,
        process: Process,
    ) -> Option<Claim> {
        let journal = Journal::read(&dir.journal());
        if matches!(journal, Ok(None)) {
            // It was being made when its agent ended: it never got a VM and nobody was told of it.
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
        let halves = found_halves(dir, journal.ok().flatten().as_ref());
        self.go_live(claim, &live, memory);
        for key in halves {
            self.know_half(&live, key, None);
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
    fn go_live(self: &Arc<Self>, claim: Claim, live: &Arc<LiveVm>, memory: u64) {
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
        // Not under `follow`: once an end was seen, clearing up is finished even when the agent stops.
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

    /// Learns of a half from what the VM says of itself, when nothing else told of it.
    fn discover(self: &Arc<Self>, live: &Arc<LiveVm>, said: &v1::Vm) {
        let Ok(migration) = MigrationName::parse(&said.migration) else {
            return;
        };
        let key = match said.state() {
            v1::vm::State::Incoming => HalfKey::destination(migration),
            _ => HalfKey::source(migration.clone()),
        };
        // A VM that has just arrived may still name the migration it came by.
        let arrived = HalfKey::destination(key.migration.clone());
        if live.half(&arrived).is_none() {
            self.know_half(live, key, None);
        }
    }

    /// Begins to follow a half, once.
    pub(super) fn know_half(
        self: &Arc<Self>,
        live: &Arc<LiveVm>,
        key: HalfKey,
        said: Option<v1::Transfer>,
    ) {
        let told = said.is_some();
        if !live.add_half(&key, said) {
            return;
        }
        if told {
            self.registry.note_change();
        }
        let (me, live) = (Arc::clone(self), Arc::clone(live));
        self.follow(async move {
            let ended = follow_half(Arc::clone(&live), Arc::clone(&me.registry), key.clone()).await;
            // A destination that gave up has nothing to wait for: its memory must not stay taken until a release.
            if ended && key.role == Role::Destination {
                me.see_off(&live, |ownership| match ownership {
                    Ownership::Aborted { migration } => key.is_of(migration),
                    Ownership::Ended => true,
                    _ => false,
                })
                .await;
            }
        });
    }

    /// Waits for a process that has nothing left to do, and ends it when it stays although its journal says that it owns
    /// nothing (`owns_nothing`). True when it is gone.
    async fn see_off(
        &self,
        live: &Arc<LiveVm>,
        owns_nothing: impl Fn(&Ownership) -> bool + Send,
    ) -> bool {
        let ownership = || {
            Journal::read(&live.dir().journal())
                .ok()
                .flatten()
                .map(|state| state.ownership)
        };
        let idle = || ownership().is_some_and(|ownership| owns_nothing(&ownership));
        if !idle() {
            return live.gone().is_cancelled();
        }
        if tokio::time::timeout(LEAVE, live.gone().cancelled())
            .await
            .is_err()
            && idle()
        {
            tracing::warn!(vm = %live.name(), pid = live.process().pid(), "ending a process that owns nothing and stays");
            live.process().put_down().await;
        }
        tokio::time::timeout(LEAVE, live.gone().cancelled())
            .await
            .is_ok()
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
                for half in before.halves() {
                    if let Some(key) = HalfKey::of(&half) {
                        remains.add_seen(key, half);
                    }
                }
            }
            let dead = DeadVm::new(name, dir, &host, remains, seen.as_ref());
            if dead.is_told() {
                remove(dead.dir(), lock);
                return None;
            }
            // From here on the answers are on disk, whatever the process had managed to write.
            for half in dead.halves() {
                if let Err(error) = dead.dir().save_transfer(&half) {
                    tracing::error!(vm = half.vm, migration = half.migration, %error, "cannot keep how a half ended");
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
                        tracing::info!(%vm, "a VM process ended; its migration half waits for its release")
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

    /// What a name stands for, once it is not being cleared.
    pub(super) async fn settled(&self, vm: &VmName) -> Option<Held> {
        loop {
            match self.registry.get(vm) {
                Some(Held::Busy {
                    work: Work::Clearing,
                    done,
                }) => {
                    if tokio::time::timeout(SETTLE, done.cancelled())
                        .await
                        .is_err()
                    {
                        return self.registry.get(vm);
                    }
                }
                other => return other,
            }
        }
    }

    /// The living VM of that name.
    ///
    /// # Errors
    /// NO_SUCH_VM; VM_UNREACHABLE when its process is dead.
    pub(super) async fn living(&self, vm: &VmName) -> Result<Arc<LiveVm>, ApiError> {
        match self.settled(vm).await {
            Some(Held::Live(live)) => Ok(live),
            Some(Held::Dead(dead)) => match dead.lost() {
                Some(lost) => Err(ApiError::new(
                    Reason::VmUnreachable,
                    format!("{vm} is lost: {}", lost.state_message),
                )
                .with("vm", vm)
                .with("state", "LOST")
                .with("vm_location", "LOST")
                .with("advice", "delete it and create it anew")),
                None => Err(ApiError::no_such_vm(vm)),
            },
            Some(Held::Busy { .. }) | None => Err(ApiError::no_such_vm(vm)),
        }
    }

    /// Checks a name, a backend and memory for a VM without taking anything.
    ///
    /// # Errors
    /// BAD_PARAMETER, VM_EXISTS, CAPABILITY_MISSING, NO_MEMORY.
    pub(super) async fn check_new(
        &self,
        vm: &VmName,
        memory: u64,
        backend: Option<BackendKind>,
    ) -> Result<(), ApiError> {
        self.check_path(vm)?;
        self.check_backend(backend)?;
        if let Some(held) = self.settled(vm).await {
            return Err(exists(vm, &held));
        }
        self.registry
            .fits(memory)
            .map_err(|refusal| refused(vm, Reason::NoMemory, refusal))
    }

    fn check_path(&self, vm: &VmName) -> Result<(), ApiError> {
        let length = self.dir(vm).socket().as_os_str().len();
        if length > MAX_SOCKET_PATH {
            return Err(ApiError::bad_parameter(
                "vm",
                format_args!(
                    "its socket's path would be {length} bytes, at most {MAX_SOCKET_PATH}; take a shorter name or a \
                     shorter state directory"
                ),
            )
            .with("value", vm));
        }
        Ok(())
    }

    /// Refuses a backend that does not work here.
    pub(super) fn check_backend(&self, backend: Option<BackendKind>) -> Result<(), ApiError> {
        match backend {
            Some(kind) if !self.backends.contains(&kind) => {
                let why = self.backend_message.as_deref().unwrap_or("not built in");
                Err(ApiError::new(
                    Reason::CapabilityMissing,
                    format!("{} has no {kind} backend: {why}", self.host),
                )
                .with("host", &self.host)
                .with("capability", kind)
                .with("advice", "take another backend or another host"))
            }
            _ => Ok(()),
        }
    }

    /// Makes a VM: name and memory taken, process started, CreateVm forwarded. On failure nothing is left.
    pub(super) async fn create(
        self: Arc<Self>,
        vm: VmName,
        memory: u64,
        backend: Option<BackendKind>,
        request: v1::CreateVmRequest,
    ) -> Result<v1::Vm, ApiError> {
        self.check_path(&vm)?;
        self.check_backend(backend)?;
        self.clear_told(&vm).await?;
        let claim = self
            .registry
            .claim(&vm, memory, Work::Creating)
            .map_err(|refusal| refused(&vm, Reason::NoMemory, refusal))?;
        let live = self.launch(&vm).await?;
        let mut vms = live.vms();
        match live.answer(HEAVY, vms.create_vm(request)).await {
            Ok(made) => {
                save_seen(live.dir(), &made);
                live.see(made.clone());
                self.go_live(claim, &live, memory);
                tracing::info!(%vm, pid = live.process().pid(), "VM created");
                Ok(made)
            }
            Err(error) => {
                self.undo(&live).await;
                drop(claim);
                Err(error)
            }
        }
    }

    /// Prepares the destination half of `migration`. The answer to a repeated request is the process's own.
    pub(super) async fn prepare(
        self: Arc<Self>,
        vm: VmName,
        migration: MigrationName,
        memory: u64,
        backend: Option<BackendKind>,
        request: v1::PrepareIncomingRequest,
    ) -> Result<v1::PrepareIncomingResponse, ApiError> {
        let key = HalfKey::destination(migration);
        loop {
            match self.settled(&vm).await {
                Some(Held::Busy {
                    work: Work::Preparing(other),
                    done,
                }) if other == key.migration => {
                    // The same request is being worked on: its outcome is this one's.
                    done.cancelled().await;
                    continue;
                }
                Some(Held::Live(live)) if live.half(&key).is_some() => {
                    let mut transfers = live.transfers();
                    return live
                        .answer(HEAVY, transfers.prepare_incoming(request))
                        .await;
                }
                Some(Held::Dead(dead)) => {
                    if let Some(half) = dead.half(&key)? {
                        return Err(half_ended(&key, &half));
                    }
                    if !dead.replaceable() {
                        return Err(exists(&vm, &Held::Dead(dead)));
                    }
                    self.clear(&dead).await?;
                }
                Some(held) => return Err(exists(&vm, &held)),
                None => {}
            }
            if let Some(half) = self.ended.get(&key) {
                return Err(half_ended(&key, &half));
            }
            self.check_path(&vm)?;
            self.check_backend(backend)?;
            let claim =
                match self
                    .registry
                    .claim(&vm, memory, Work::Preparing(key.migration.clone()))
                {
                    Ok(claim) => claim,
                    // Somebody was quicker: look again who.
                    Err(Refusal::Held(_)) => continue,
                    Err(refusal) => {
                        return Err(refused(&vm, Reason::DstNoMemory, refusal)
                            .with("migration", &key.migration));
                    }
                };
            let live = self.launch(&vm).await?;
            let mut transfers = live.transfers();
            let spec = request.vm.clone();
            return match live
                .answer(HEAVY, transfers.prepare_incoming(request))
                .await
            {
                Ok(prepared) => {
                    let shown = self.incoming(&live, spec.unwrap_or_default(), &key).await;
                    save_seen(live.dir(), &shown);
                    live.see(shown);
                    self.go_live(claim, &live, memory);
                    self.know_half(&live, key, prepared.transfer.clone());
                    tracing::info!(%vm, pid = live.process().pid(), "ready to receive a VM");
                    Ok(prepared)
                }
                Err(error) => {
                    self.undo(&live).await;
                    drop(claim);
                    Err(error)
                }
            };
        }
    }

    /// An incoming VM as it shows itself, or as it was announced when it does not.
    async fn incoming(&self, live: &LiveVm, announced: v1::Vm, key: &HalfKey) -> v1::Vm {
        let mut vms = live.vms();
        let request = v1::GetVmRequest {
            name: live.name().to_string(),
        };
        match live.answer(ADOPT, vms.get_vm(request)).await {
            Ok(vm) => vm,
            Err(error) => {
                tracing::debug!(vm = %live.name(), %error, "an incoming VM does not show itself");
                v1::Vm {
                    state: v1::vm::State::Incoming.into(),
                    state_message: String::new(),
                    host: self.host.to_string(),
                    migration: key.migration.to_string(),
                    pid: live.process().pid(),
                    mmu_stats: None,
                    guest_counters: None,
                    ..announced
                }
            }
        }
    }

    /// Starts a process in a new directory. On failure neither is left.
    async fn launch(&self, vm: &VmName) -> Result<Arc<LiveVm>, ApiError> {
        let dir = self.dir(vm);
        let make = || std::fs::DirBuilder::new().mode(0o700).create(dir.path());
        let made = match make() {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                clear_stray(vm, &dir).await;
                make()
            }
            made => made,
        };
        made.map_err(|error| {
            ApiError::new(Reason::Store, format!("{}: {error}", dir.path().display()))
                .with("vm", vm)
        })?;
        let launch = Launch {
            program: &self.program,
            vm,
            host: &self.host,
            data_ip: self.data_ip,
        };
        let live = match process::spawn(&launch, &dir).await {
            Ok(process) => LiveVm::new(vm.clone(), dir.clone(), process),
            Err(error) => Err(error),
        };
        if live.is_err() {
            clear_dir(&dir).await;
        }
        live
    }

    /// Takes back a process that never got its VM.
    async fn undo(&self, live: &Arc<LiveVm>) {
        live.process().put_down().await;
        live.gone().cancel();
        clear_dir(live.dir()).await;
    }

    /// Clears a dead directory that only holds ended halves, so that its name is free.
    ///
    /// # Errors
    /// As [`Supervisor::clear`].
    async fn clear_told(&self, vm: &VmName) -> Result<(), ApiError> {
        match self.settled(vm).await {
            Some(Held::Dead(dead)) if dead.replaceable() => self.clear(&dead).await,
            _ => Ok(()),
        }
    }

    /// Removes a dead process's directory; its unreleased halves are kept elsewhere first.
    ///
    /// # Errors
    /// STORE when they cannot be: then all stays as it was.
    async fn clear(&self, dead: &Arc<DeadVm>) -> Result<(), ApiError> {
        let Some(claim) = self.registry.claim_from_dead(dead) else {
            // Somebody else is at it.
            return Ok(());
        };
        let failed = |error: io::Error| {
            ApiError::new(
                Reason::Store,
                format!("{}: {error}", dead.dir().path().display()),
            )
            .with("vm", dead.name())
        };
        let (ended, halves) = (Arc::clone(&self.ended), dead.halves());
        let kept = tokio::task::spawn_blocking(move || ended.keep(&halves)).await;
        let lock = match kept {
            Ok(Ok(())) => process::find(dead.dir()).await,
            Ok(Err(error)) => Err(error),
            Err(error) => Err(io::Error::other(error)),
        };
        match lock {
            Ok(Found::Dead(lock)) => {
                remove(dead.dir(), lock);
                drop(claim);
                Ok(())
            }
            // Removed by hand: nothing is left to remove.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                drop(claim);
                Ok(())
            }
            Ok(Found::Living(process)) => {
                claim.fill_dead(Arc::clone(dead));
                Err(failed(io::Error::other(format!(
                    "process {} has begun in it",
                    process.pid()
                ))))
            }
            Err(error) => {
                claim.fill_dead(Arc::clone(dead));
                Err(failed(error))
            }
        }
    }

    /// Deletes a VM: returns when its process is gone and its directory removed.
    pub(super) async fn delete(self: Arc<Self>, vm: VmName) -> Result<(), ApiError> {
        match self.settled(&vm).await {
            Some(Held::Live(live)) => {
                let mut vms = live.vms();
                let request = v1::DeleteVmRequest {
                    name: vm.to_string(),
                };
                if let Err(error) = live.answer(HEAVY, vms.delete_vm(request)).await {
                    // A process that ended instead of answering has deleted its VM or lost it: the directory tells.
                    let gone = error.reason == Reason::VmUnreachable
                        && tokio::time::timeout(Duration::from_secs(1), live.gone().cancelled())
                            .await
                            .is_ok();
                    if !gone {
                        return Err(error);
                    }
                } else if tokio::time::timeout(LEAVE, live.gone().cancelled())
                    .await
                    .is_err()
                    && !self
                        .see_off(&live, |ownership| matches!(ownership, Ownership::Ended))
                        .await
                {
                    return Err(live.unreachable("has deleted its VM and does not end".to_owned()));
                }
                match self.settled(&vm).await {
                    Some(Held::Dead(dead)) => self.clear(&dead).await,
                    _ => Ok(()),
                }
            }
            Some(Held::Dead(dead)) if dead.lost().is_some() => self.clear(&dead).await,
            Some(Held::Busy {
                work: Work::Preparing(migration),
                ..
            }) => Err(ApiError::new(
                Reason::MigrationInProgress,
                format!("{vm} is being received by {migration}"),
            )
            .with("vm", &vm)
            .with("migration", migration)
            .with("advice", "cancel the migration first")),
            Some(Held::Busy { .. } | Held::Dead(_)) | None => Err(ApiError::no_such_vm(&vm)),
        }
    }

    /// Releases a half wherever it is told. Returns when a process and a directory that existed only for it are gone.
    pub(super) async fn release(self: Arc<Self>, key: HalfKey) -> Result<(), ApiError> {
        match self.locate(&key).await? {
            Some(Place::Live(live)) => {
                let mut transfers = live.transfers();
                let request = v1::ReleaseTransferRequest {
                    migration: key.migration.to_string(),
                    role: key.role.to_message().into(),
                };
                match live
                    .answer(HEAVY, transfers.release_transfer(request))
                    .await
                {
                    Ok(_) => {}
                    Err(error) if error.reason == Reason::NoSuchMigration => {}
                    Err(error)
                        if error.reason == Reason::VmUnreachable
                            && tokio::time::timeout(
                                Duration::from_secs(1),
                                live.gone().cancelled(),
                            )
                            .await
                            .is_ok() => {}
                    Err(error) => return Err(error),
                }
                live.forget_half(&key);
                self.registry.note_change();
                // A source that gave its VM away, and a destination that gave up, were there only for this migration.
                self.see_off(&live, |ownership| match ownership {
                    Ownership::Relinquished { migration, .. } => {
                        key.role == Role::Source && key.is_of(migration)
                    }
                    Ownership::Aborted { migration } => {
                        key.role == Role::Destination && key.is_of(migration)
                    }
                    Ownership::Ended => true,
                    _ => false,
                })
                .await;
                if let Some(Held::Dead(dead)) = self.settled(live.name()).await {
                    self.release_dead(&dead, &key).await?;
                }
            }
            Some(Place::Dead(dead, _)) => self.release_dead(&dead, &key).await?,
            Some(Place::Ended(_)) | None => {}
        }
        self.ended
            .forget(&key)
            .map_err(|error| ApiError::new(Reason::Store, error.to_string()))?;
        self.registry.note_change();
        Ok(())
    }

    async fn release_dead(&self, dead: &Arc<DeadVm>, key: &HalfKey) -> Result<(), ApiError> {
        dead.dir()
            .remove_transfer(&key.migration, key.role.to_message())
            .map_err(|error| {
                ApiError::new(Reason::Store, error.to_string()).with("vm", dead.name())
            })?;
        dead.forget(key);
        if dead.is_told() {
            self.clear(dead).await?;
        }
        Ok(())
    }

    /// Where a half is told.
    ///
    /// # Errors
    /// VM_UNREACHABLE or JOURNAL when nobody knows it and somebody could not be asked: "no such half" would be a guess.
    pub(super) async fn locate(self: &Arc<Self>, key: &HalfKey) -> Result<Option<Place>, ApiError> {
        let mut silent = None;
        // Twice: once as things are, once more after names in work on this half have settled.
        for _ in 0..2 {
            silent = None;
            let mut in_work = Vec::new();
            for (_, held) in self.registry.all() {
                match held {
                    Held::Live(live) if live.half(key).is_some() => {
                        return Ok(Some(Place::Live(live)));
                    }
                    Held::Live(_) => {}
                    Held::Dead(dead) => match dead.half(key) {
                        Ok(Some(half)) => return Ok(Some(Place::Dead(dead, half))),
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
            if let Some(half) = self.ended.get(key) {
                return Ok(Some(Place::Ended(half)));
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
        // A half this agent was not told of: it restarted while the process began it, or did not answer then.
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
                Ok(half) => {
                    self.know_half(&live, key.clone(), Some(half));
                    return Ok(Some(Place::Live(live)));
                }
                Err(error) if error.reason == Reason::VmUnreachable => silent = Some(error),
                Err(_) => {}
            }
        }
        silent.map_or(Ok(None), Err)
    }

    /// Every half nobody released, from caches, directories and records; calls nobody.
    pub(super) fn halves(&self) -> Vec<v1::Transfer> {
        let mut halves = self.ended.all();
        for (_, held) in self.registry.all() {
            match held {
                Held::Live(live) => halves.extend(live.halves()),
                Held::Dead(dead) => halves.extend(dead.halves()),
                Held::Busy { .. } => {}
            }
        }
        halves
    }

    /// Every VM as last seen, by name; calls nobody.
    pub(super) fn snapshots(&self) -> Vec<v1::Vm> {
        let shown = |(_, held): (VmName, Held)| match held {
            Held::Live(live) => live.snapshot(),
            Held::Dead(dead) => dead.lost().cloned(),
            Held::Busy { .. } => None,
        };
        self.registry.all().into_iter().filter_map(shown).collect()
    }
}

/// Where a half is told.
#[derive(Debug)]
pub(super) enum Place {
    /// By its living process.
    Live(Arc<LiveVm>),
    /// By its dead process's directory, so.
    Dead(Arc<DeadVm>, v1::Transfer),
    /// By the record that outlived its directory.
    Ended(v1::Transfer),
}

/// Bytes of a slot table.
pub(super) fn slot_bytes(slots: &[v1::Slot]) -> u64 {
    slots.iter().fold(0, |sum, slot| {
        sum.saturating_add(slot.pages.saturating_mul(PAGE_SIZE))
    })
}

/// Halves that a found VM's directory names.
fn found_halves(dir: &VmDir, journal: Option<&JournalState>) -> Vec<HalfKey> {
    let records = dir.transfers().unwrap_or_else(|error| {
        tracing::warn!(dir = %dir.path().display(), %error, "transfer records cannot be read");
        Vec::new()
    });
    let mut halves: Vec<HalfKey> = records.iter().filter_map(HalfKey::of).collect();
    let named = journal.and_then(|state| match &state.ownership {
        Ownership::Relinquished { migration, .. } => {
            MigrationName::parse(migration).map(HalfKey::source).ok()
        }
        Ownership::Incoming { migration, .. }
        | Ownership::Prepared { migration, .. }
        | Ownership::Aborted { migration } => MigrationName::parse(migration)
            .map(HalfKey::destination)
            .ok(),
        Ownership::Owner { .. } => {
            let arrived = state.arrived_by.as_deref()?;
            MigrationName::parse(arrived).map(HalfKey::destination).ok()
        }
        Ownership::Ended => None,
    });
    halves.extend(named);
    halves
}

/// Removes a directory without a process. The lock goes with it.
fn remove(dir: &VmDir, lock: DirLock) {
    if let Err(error) = std::fs::remove_dir_all(dir.path()) {
        tracing::error!(dir = %dir.path().display(), %error, "cannot remove a VM's directory");
    }
    drop(lock);
}

/// Clears a directory that nobody holds and that has no journal: made by a process that began only after its agent had
/// ended, or left by a removal that failed. One with a journal is left alone: it is looked at when the agent starts.
async fn clear_stray(vm: &VmName, dir: &VmDir) {
    match Journal::read(&dir.journal()) {
        Ok(None) => {}
        _ => return,
    }
    tracing::warn!(%vm, dir = %dir.path().display(), "clearing a directory that no VM was made in");
    if let Ok(Found::Living(process)) = process::find(dir).await {
        process.put_down().await;
    }
    if let Ok(Found::Dead(lock)) = process::find(dir).await
        && matches!(Journal::read(&dir.journal()), Ok(None))
    {
        remove(dir, lock);
    }
}

/// Removes the directory of a process that was put down.
async fn clear_dir(dir: &VmDir) {
    match process::find(dir).await {
        Ok(Found::Dead(lock)) => remove(dir, lock),
        Ok(Found::Living(process)) => {
            tracing::error!(dir = %dir.path().display(), pid = process.pid(), "a process that was put down lives");
        }
        Err(error) => {
            tracing::error!(dir = %dir.path().display(), %error, "cannot remove a VM's directory")
        }
    }
}

/// VM_EXISTS, with what holds the name.
fn exists(vm: &VmName, held: &Held) -> ApiError {
    let (state, advice) = match held {
        Held::Busy {
            work: Work::Creating,
            ..
        } => ("being created", "wait for it or take another name"),
        Held::Busy {
            work: Work::Preparing(_),
            ..
        } => ("being received", "wait for the migration"),
        Held::Busy {
            work: Work::Clearing,
            ..
        } => ("being removed", "try again"),
        Held::Live(_) => ("there", "take another name or delete it"),
        Held::Dead(dead) if dead.lost().is_some() => ("lost with its process", "delete it first"),
        Held::Dead(_) => (
            "in a migration that was not released yet",
            "try again when the server has stored its outcome",
        ),
    };
    ApiError::new(Reason::VmExists, format!("{vm} is here already: {state}"))
        .with("vm", vm)
        .with("state", state)
        .with("advice", advice)
}

fn refused(vm: &VmName, reason: Reason, refusal: Refusal) -> ApiError {
    match refusal {
        Refusal::Held(held) => exists(vm, &held),
        Refusal::NoMemory { needed, free } => no_memory(vm, reason, needed, free),
    }
}

/// NO_MEMORY or DST_NO_MEMORY with the figures.
pub(super) fn no_memory(vm: &VmName, reason: Reason, needed: u64, free: u64) -> ApiError {
    ApiError::new(
        reason,
        format!("{vm} needs {needed} bytes, {free} are free on this host"),
    )
    .with("vm", vm)
    .with("needed_bytes", needed)
    .with("free_bytes", free)
    .with(
        "advice",
        "delete a VM here, take less memory or another host",
    )
}

/// A half that has ended cannot be prepared again.
fn half_ended(key: &HalfKey, half: &v1::Transfer) -> ApiError {
    let cause = half
        .error
        .as_ref()
        .map(|error| error.message.clone())
        .unwrap_or_default();
    ApiError::new(
        Reason::MigrationExists,
        format!(
            "the {} half of {} has ended ({}) {cause}",
            key.role.as_str(),
            key.migration,
            half.phase().as_str_name()
        )
        .trim_end()
        .to_owned(),
    )
    .with("migration", &key.migration)
    .with("phase", half.phase().as_str_name())
    .with("advice", "release it and begin a new migration")
}
