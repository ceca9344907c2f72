//! VMs made: name and memory taken, process started, request forwarded — or everything undone.

use std::{io, os::unix::fs::DirBuilderExt as _, sync::Arc};

use slat_proto::{
    ApiError, Reason,
    model::{BackendKind, DirtyEngine, MigrationName, VmName, VmSpec},
    v1,
};

use super::{
    ADOPT, Supervisor,
    clear::remove,
    instead::never_made,
    refuse::{exists, is_here, is_side, refused, side_ended},
    task_failed,
};
use slat_record::{dir::VmDir, journal::Journal, uid::VmUid};

use crate::{
    announce::{announce_side, forget_record},
    doubt,
    identity::{Who, save_seen},
    living::LiveVm,
    process::{self, Found, Launch},
    registry::{Held, Refusal, Work},
    side::SideKey,
};

/// Longest path of a Unix socket (sun_path without its final 0).
const MAX_SOCKET_PATH: usize = 107;

impl Supervisor {
    /// Checks a name, a backend and memory for a VM without taking anything.
    ///
    /// # Errors
    /// BAD_PARAMETER, VM_EXISTS, CAPABILITY_MISSING, NO_MEMORY.
    pub(crate) async fn check_new(
        &self,
        vm: &VmName,
        memory: u64,
        backend: Option<BackendKind>,
    ) -> Result<(), ApiError> {
        self.check_path(&VmUid::fresh())?;
        self.check_backend(backend)?;
        self.settled_name(vm).await;
        self.registry
            .fits(vm, memory)
            .map_err(|refusal| refused(vm, Reason::NoMemory, refusal))
    }

    /// Waits, bounded, for VMs of that name that are being cleared.
    pub(super) async fn settled_name(&self, vm: &VmName) {
        for (uid, held) in self.registry.named(vm) {
            if matches!(
                held,
                Held::Busy {
                    work: Work::Clearing,
                    ..
                }
            ) {
                self.settled(&uid).await;
            }
        }
    }

    pub(super) fn check_path(&self, uid: &VmUid) -> Result<(), ApiError> {
        // The longest of those in it.
        let socket = self.dir(uid).path().join(slat_paging::SOCKET);
        let length = socket.as_os_str().len();
        if length > MAX_SOCKET_PATH {
            return Err(ApiError::bad_parameter(
                "uid",
                format_args!(
                    "its socket's path would be {length} bytes, at most {MAX_SOCKET_PATH}; give the agent a shorter \
                     state directory"
                ),
            )
            .with("value", uid));
        }
        Ok(())
    }

    /// Refuses a backend that did not work here at the last look.
    pub(super) fn check_backend(&self, backend: Option<BackendKind>) -> Result<(), ApiError> {
        let found = self.backends.get();
        match backend {
            Some(kind) if !found.has(kind) => {
                let why = found.why_not_kvm.as_deref().unwrap_or("not built in");
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

    /// Refuses a wish for dirty rings where there are none; the VM's process would, too.
    pub(crate) fn check_rings(&self, spec: &VmSpec) -> Result<(), ApiError> {
        let software = spec.backend == Some(BackendKind::Software);
        if spec.dirty_engine != Some(DirtyEngine::Ring)
            || (!software && self.backends.get().dirty_rings)
        {
            return Ok(());
        }
        Err(ApiError::new(
            Reason::CapabilityMissing,
            if software {
                "VMs of the software backend cannot have dirty rings: only KVM has them".to_owned()
            } else {
                format!("{} has no KVM with dirty rings", self.host)
            },
        )
        .with("host", &self.host)
        .with("capability", v1::Capability::DirtyRing.as_str_name())
        .with(
            "advice",
            "take dirty engine auto or bitmap, or another host",
        ))
    }

    /// Makes a VM: name and memory taken, process started, CreateVm forwarded. On failure nothing
    /// is left; VM_PROCESS_DIED when the process ended meanwhile.
    pub(crate) async fn create(
        self: Arc<Self>,
        vm: VmName,
        memory: u64,
        backend: Option<BackendKind>,
        mut request: v1::CreateVmRequest,
    ) -> Result<v1::Vm, ApiError> {
        let uid = VmUid::fresh();
        self.check_path(&uid)?;
        self.check_backend(backend)?;
        // Decided here, once: the VM's process would look for itself, and may find another answer
        // than the one that this host is known by. With a backend named it can only refuse.
        if let (None, Some(spec)) = (backend, &mut request.spec)
            && let Some(kind) = self.backends.get().choice(spec)
        {
            spec.set_backend(kind.to_message());
        }
        self.reread().await;
        self.settled_name(&vm).await;
        let claim = self
            .registry
            .claim(&uid, &vm, memory, Work::Creating)
            .map_err(|refusal| refused(&vm, Reason::NoMemory, refusal))?;
        let live = self.launch(uid, &vm, false).await?;
        let mut vms = live.vms();
        // Its memory may be asked for before the VM can say that it has no pager.
        let is_paged = request.spec.as_ref().is_some_and(is_paged);
        let asked = is_paged.then(|| live.paged().ask());
        let answer = live.answer_long(vms.create_vm(request)).await;
        drop(asked);
        match answer {
            Ok(made) => {
                save_seen(live.dir(), &made);
                live.see(made.clone());
                self.go_live(claim, &live, memory);
                tracing::info!(%vm, uid = %live.uid(), pid = live.process().pid(), "VM created");
                Ok(made)
            }
            Err(error) => {
                let error = never_made(&live, error, "was made").await;
                self.undo(&live).await;
                drop(claim);
                Err(error)
            }
        }
    }

    /// Prepares the destination side of `migration`. The answer to a repeated request is the
    /// process's own.
    pub(crate) async fn prepare(
        self: Arc<Self>,
        (uid, vm): (VmUid, VmName),
        migration: MigrationName,
        memory: u64,
        backend: Option<BackendKind>,
        request: v1::PrepareIncomingRequest,
    ) -> Result<v1::PrepareIncomingResponse, ApiError> {
        let key = SideKey::destination(migration);
        self.reread().await;
        loop {
            match self.settled(&uid).await {
                Some(Held::Busy {
                    work: Work::Preparing(other),
                    done,
                }) if other == key.migration => {
                    // The same request is being carried out: its result is this one's.
                    done.cancelled().await;
                    continue;
                }
                // This migration's own process: one that an agent before this one began it with may
                // be known by its journal alone.
                Some(Held::Live(live))
                    if live.side(&key).is_some() || live.is_receiving(&key).await =>
                {
                    keep_received(&live, &key, &request).await;
                    let request = self.for_process(request);
                    let mut transfers = live.transfers();
                    let spec = request.vm.clone();
                    let answer = live
                        .answer_long(transfers.prepare_incoming(request))
                        .await?;
                    self.registry.set_memory(&live, memory);
                    if live.snapshot().is_none() {
                        let shown = self.incoming(&live, spec.unwrap_or_default(), &key).await;
                        save_seen(live.dir(), &shown);
                        live.see(shown);
                    }
                    self.know_side(&live, key, answer.transfer.clone());
                    return Ok(answer);
                }
                Some(Held::Dead(dead)) => {
                    if let Some(side) = dead.side(&key)? {
                        return Err(side_ended(&key, &side));
                    }
                    if !dead.replaceable() {
                        return Err(exists(&vm, &Held::Dead(dead)));
                    }
                    self.clear(&dead).await?;
                }
                Some(Held::Live(live)) if !live.snapshot().is_some_and(|vm| is_side(&vm)) => {
                    return Err(is_here(&live));
                }
                Some(held) => return Err(exists(&vm, &held)),
                None => {}
            }
            if let Some(side) = self.ended.get(&key) {
                return Err(side_ended(&key, &side));
            }
            self.not_another_s(&key, &uid)?;
            self.check_path(&uid)?;
            self.check_backend(backend)?;
            self.settled_name(&vm).await;
            let work = Work::Preparing(key.migration.clone());
            let claim = match self.registry.claim(&uid, &vm, memory, work) {
                Ok(claim) => claim,
                // Another request was quicker: look again.
                Err(Refusal::Held(_)) => continue,
                Err(refusal) => {
                    return Err(refused(&vm, Reason::DstNoMemory, refusal)
                        .with("migration", &key.migration));
                }
            };
            let live = self.launch(uid, &vm, true).await?;
            keep_received(&live, &key, &request).await;
            let request = self.for_process(request);
            let mut transfers = live.transfers();
            let spec = request.vm.clone();
            return match live.answer_long(transfers.prepare_incoming(request)).await {
                Ok(prepared) => {
                    let shown = self.incoming(&live, spec.unwrap_or_default(), &key).await;
                    save_seen(live.dir(), &shown);
                    live.see(shown);
                    self.go_live(claim, &live, memory);
                    self.know_side(&live, key, prepared.transfer.clone());
                    tracing::info!(%vm, uid = %live.uid(), pid = live.process().pid(), "ready to receive a VM");
                    Ok(prepared)
                }
                Err(error) => {
                    let error = never_made(&live, error, "was announced").await;
                    self.undo(&live).await;
                    drop(claim);
                    Err(error)
                }
            };
        }
    }

    /// Whether `prepare` of such a VM would find uid, name, memory and backend free. Takes nothing.
    ///
    /// # Errors
    /// As `prepare`.
    pub(crate) async fn could_prepare(
        self: &Arc<Self>,
        (uid, vm): (VmUid, VmName),
        migration: MigrationName,
        memory: u64,
        backend: Option<BackendKind>,
    ) -> Result<(), ApiError> {
        self.reread().await;
        match self.settled(&uid).await {
            Some(Held::Dead(dead)) if dead.replaceable() => {
                // It makes way first, so what it holds cannot be asked for here.
                self.check_path(&uid)?;
                return self.check_backend(backend);
            }
            Some(Held::Live(live)) if !live.snapshot().is_some_and(|vm| is_side(&vm)) => {
                return Err(is_here(&live));
            }
            Some(held) => return Err(exists(&vm, &held)),
            None => {}
        }
        self.check_path(&uid)?;
        self.check_backend(backend)?;
        self.settled_name(&vm).await;
        let work = Work::Preparing(migration);
        let claim = self.registry.claim(&uid, &vm, memory, work);
        claim
            .map(drop)
            .map_err(|refusal| refused(&vm, Reason::DstNoMemory, refusal))
    }

    /// Begins the source side of a migration: on disk first, then at the process.
    pub(crate) async fn start_outgoing(
        self: Arc<Self>,
        live: Arc<LiveVm>,
        key: SideKey,
        request: v1::StartOutgoingRequest,
    ) -> Result<v1::Transfer, ApiError> {
        self.not_another_s(&key, live.uid())?;
        let begins = live.begin_side(&key);
        let (announced, named, epoch) = (Arc::clone(&live), key.clone(), request.epoch);
        let ours = tokio::task::spawn_blocking(move || announce_side(&announced, &named, epoch))
            .await
            .map_err(|error| task_failed(&error))?
            .map_err(|error| {
                ApiError::from_io(Reason::Store, live.dir().path(), &error).with("vm", live.name())
            })?;
        let mut transfers = live.transfers();
        match live.answer_long(transfers.start_outgoing(request)).await {
            Ok(side) => {
                live.witness(&side).await?;
                self.know_side(&live, key, Some(side.clone()));
                drop(begins);
                Ok(side)
            }
            Err(error) => {
                // A refusal began nothing. Silence may have: the process, or what it leaves, will
                // say.
                if ours && error.reason != Reason::VmUnreachable {
                    forget_record(&live, &key);
                }
                Err(error)
            }
        }
    }

    /// Refuses a side that another VM here has: two migrations of one name, by servers that do not
    /// know of each other.
    fn not_another_s(&self, key: &SideKey, uid: &VmUid) -> Result<(), ApiError> {
        for (name, other, held) in self.registry.all() {
            let has = match &held {
                Held::Live(live) => live.side(key).is_some(),
                Held::Dead(dead) => matches!(dead.side(key), Ok(Some(_))),
                Held::Busy { .. } => false,
            };
            if has && other != *uid {
                return Err(ApiError::new(
                    Reason::MigrationExists,
                    format!(
                        "{} is a migration of {name} with uid {other} here",
                        key.migration
                    ),
                )
                .with("migration", &key.migration)
                .with("vm", name)
                .with("uid", other)
                .with(
                    "advice",
                    "take another name for the migration, or end that side first",
                ));
            }
        }
        Ok(())
    }

    /// An incoming VM as it shows itself, or as it was announced when it does not.
    async fn incoming(&self, live: &LiveVm, announced: v1::Vm, key: &SideKey) -> v1::Vm {
        let mut vms = live.vms();
        match live.answer(ADOPT, vms.get_vm(live.get_request())).await {
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
    pub(super) async fn launch(
        &self,
        uid: VmUid,
        vm: &VmName,
        incoming: bool,
    ) -> Result<Arc<LiveVm>, ApiError> {
        let dir = self.dir(&uid);
        let make = || std::fs::DirBuilder::new().mode(0o700).create(dir.path());
        let made = match make() {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                clear_stray(vm, &dir).await;
                make()
            }
            made => made,
        };
        made.map_err(|error| ApiError::from_io(Reason::Store, dir.path(), &error).with("vm", vm))?;
        let launch = Launch {
            program: &self.program,
            vm,
            uid: &uid,
            host: &self.host,
            data_ip: self.data_ip,
            incoming,
        };
        let live = match process::spawn(&launch, &dir).await {
            Ok(process) => {
                // It has no guest memory yet, so all of that will be accounted there.
                // Off the runtime's threads: a sweep may hold the lock over many files.
                let (cgroups, pid, name) =
                    (Arc::clone(&self.cgroups), process.pid(), uid.to_string());
                let entering = tokio::task::spawn_blocking(move || cgroups.enter(&name, pid));
                if let Err(error) = entering.await {
                    tracing::error!(%error, "a VM stays in the agent's cgroup");
                }
                let who = Who {
                    uid,
                    name: vm.clone(),
                    certain: true,
                };
                LiveVm::new(who, &self.host, dir.clone(), process)
            }
            Err(error) => Err(error),
        };
        if let Ok(live) = &live {
            self.keep_pager(live);
        }
        if let Err(error) = &live {
            tracing::warn!(%vm, %error, "no process for a VM");
            clear_dir(&dir).await;
        }
        live
    }

    /// As a VM's process gets it. Where agents know each other by certificates, this agent alone
    /// asks the source's: the process has none.
    fn for_process(&self, mut request: v1::PrepareIncomingRequest) -> v1::PrepareIncomingRequest {
        if self.credentials.is_some() {
            request.source_agent_address.clear();
        }
        request
    }

    /// Takes back a process that never got its VM.
    pub(super) async fn undo(&self, live: &Arc<LiveVm>) {
        live.process().put_down().await;
        live.gone().cancel();
        clear_dir(live.dir()).await;
    }
}

/// Keeps by what grant a VM is received, before its process can be in doubt.
async fn keep_received(live: &LiveVm, key: &SideKey, request: &v1::PrepareIncomingRequest) {
    let (dir, of, request) = (live.dir().clone(), key.clone(), request.clone());
    let kept = tokio::task::spawn_blocking(move || doubt::keep(&dir, &of, &request)).await;
    let kept = kept.unwrap_or_else(|error| Err(io::Error::other(error)));
    // In doubt it has the server then.
    if let Err(error) = kept {
        tracing::warn!(vm = %live.name(), migration = %key.migration, %error, "a source's agent cannot be asked later");
    }
}

fn is_paged(spec: &v1::VmSpec) -> bool {
    spec.paging() == v1::Paging::Agent
}

/// Clears a directory that nobody holds and that has no journal: made by a process that began only
/// after its agent had ended, or left by a removal that failed. One with a journal stays until the
/// agent starts again and reads it.
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

/// Removes the directory of a process that was killed here.
async fn clear_dir(dir: &VmDir) {
    match process::find(dir).await {
        Ok(Found::Dead(lock)) => remove(dir, lock),
        Ok(Found::Living(process)) => {
            tracing::error!(dir = %dir.path().display(), pid = process.pid(), "a process that was put down lives");
        }
        // Not even its lock can be made, on a disk without space. The process that was to take it
        // is gone, and the directory's claim is held: none can begin in it.
        Err(error) if matches!(dir.living_pid(), Ok(None)) => {
            tracing::debug!(dir = %dir.path().display(), %error, "a directory without a lock");
            if let Err(error) = std::fs::remove_dir_all(dir.path()) {
                tracing::error!(dir = %dir.path().display(), %error, "cannot remove a VM's directory");
            }
        }
        Err(error) => {
            tracing::error!(dir = %dir.path().display(), %error, "cannot remove a VM's directory")
        }
    }
}
