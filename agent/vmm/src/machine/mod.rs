//! One VM: its life, its slots, its vCPUs, and who may run them.
//!
//! The API is synchronous and may be called from any thread; calls that stop vCPUs, write the
//! journal or read all memory block, so async callers keep them from the runtime's tasks.
//! [`Machine::update_slots_at_once`] does not block.
//!
//! # Locking
//! * `control` serialises everything that changes the VM: it is held for the whole of a call,
//!   across the backend, the journal's fsync and a digest. Order: `control`, then the dirty log's
//!   lock, then whatever the backend locks inside.
//! * `view::Shared` holds what everybody sees. It is locked for a few instructions, alone or under
//!   `control`, never across a call. [`Machine::snapshot`] does without `control`, so it answers
//!   while a call blocks.
//! * `collapser` is held while huge pages are made, and for the whole of a discard: after
//!   `control`, before the dirty log's lock. `prefault` is a leaf.
//! * `arming` is held while a snapshot is armed and taken, before `control`, which is free while it
//!   is armed.
//! * The pager's lock ([`crate::pager`]) comes after all of these, and `watching` is a leaf. See
//!   `paging` for what is done under which.
//! * The event sink runs on vCPU threads and takes only the view's lock.
//!
//! # Invariants
//! * vCPUs run only through `lifecycle::run_vcpus`, which asks the journal's state: this process
//!   owns exactly the epoch it shows, and no fence is up.
//! * The fence goes up *before* an entry that gives ownership up is appended: RELINQUISHED,
//!   ABORTED, ENDED. It comes down in two cases. The append of RELINQUISHED failed, and the
//!   journal, read again and made durable, holds no such entry: only the process itself acts on the
//!   journal of a living process, so nobody has acted on the entry. Or an operator took the VM
//!   back, and ADOPTED is durable: then what others did with the entry is theirs to answer for.
//! * An append of RELINQUISHED that failed is settled before anything else: the source's driver
//!   calls [`Machine::settle_relinquished`] until it gives an answer. Until then the vCPUs stay
//!   stopped, and the process refuses to end.
//! * The published slot table, the backend's slots and the dirty log's are the same whenever
//!   `control` is free.

mod adopt;
mod birth;
mod build;
mod counting;
mod guarded;
mod huge;
mod incoming;
mod lifecycle;
mod measure;
mod oom;
mod outgoing;
mod paging;
mod parts;
mod populating;
mod prefault;
mod probe;
mod room;
mod slots;
#[cfg(test)]
mod tests;
mod view;

use std::{
    fmt,
    future::Future,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, TryLockError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use slat_proto::{
    ApiError, Reason,
    model::{GuestSpec, HostName, PAGE_SIZE, VmName},
    v1,
};
use slat_record::{
    dir::VmDir,
    journal::{Disk, GrantMark, Journal, Ownership},
};
use tokio::sync::watch;

pub use self::build::fits_here;
pub(crate) use self::{
    build::{no_dirty_rings, resolve},
    parts::Parts,
    probe::SyncProbe,
    slots::SlotUpdate,
};
use self::{
    guarded::Guarded,
    view::{Shared, State, View},
};
pub(crate) use self::{
    outgoing::{RelinquishError, Switchover},
    paging::{CopyOrder, Taken},
    view::Exit,
};
use crate::{
    backend::Backend,
    memory::{Collapser, DirtyLog, GuestMemory},
    pager::{Pager, Readers, Watching},
};

/// What every machine can do, whatever its backend.
const OWN_CAPABILITIES: [v1::Capability; 4] = [
    v1::Capability::Discard,
    v1::Capability::UpdateSlots,
    v1::Capability::Digest,
    v1::Capability::Transfer,
];

/// One VM. See the module for locking and invariants.
pub(crate) struct Machine {
    dir: VmDir,
    parts: Parts,
    memory: GuestMemory,
    dirty: DirtyLog,
    shared: Arc<Shared>,
    backend: Mutex<Option<Arc<dyn Backend>>>,
    control: Mutex<Control>,
    /// Nanoseconds that the last pause of running vCPUs took; 0 before the first.
    paused_in: AtomicU64,
    /// Held for one step, or a whole discard. See the module.
    collapser: Mutex<Collapser>,
    prefault: Mutex<prefault::Prefault>,
    pager: Arc<Pager>,
    watching: Mutex<Watching>,
    /// Held while a snapshot is prepared, armed and begun: one at a time.
    arming: Mutex<()>,
    readers: Mutex<Readers>,
}

/// Whether vCPUs may run at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fence {
    Down,
    /// RELINQUISHED may be durable: nothing runs and nothing ends before that is settled.
    Unsettled,
    /// The VM was given up here, for good.
    Up,
}

/// What only the holder of the control lock may touch.
struct Control {
    journal: Journal,
    fence: Fence,
    /// Held while the VM is received.
    oom: Option<oom::OomScore>,
    /// By which the VM is being handed over.
    leave: Option<GrantMark>,
}

impl fmt::Debug for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Machine")
            .field("vm", &self.shared.vm)
            .field("view", &self.shared.view())
            .finish_non_exhaustive()
    }
}

impl Machine {
    /// As [`Machine::with_parts`], from the real ones.
    #[cfg(test)]
    pub(crate) fn new(dir: VmDir, vm: VmName, host: HostName) -> Result<Arc<Self>, ApiError> {
        Self::with_parts(
            dir,
            vm,
            host,
            Parts::real(crate::backend::FaultEvents::default()),
        )
    }

    /// Opens the journal in `dir`. There is no VM yet. A journal that ended (deleted, released,
    /// aborted) is begun anew.
    ///
    /// # Errors
    /// A journal that says anything else belongs to a dead process, whose memory is gone: VM_STATE
    /// when it owned the VM or was receiving it, IN_DOUBT when it had PREPARED, STALE_EPOCH when it
    /// had RELINQUISHED. JOURNAL when it cannot be read.
    pub(crate) fn with_parts(
        dir: VmDir,
        vm: VmName,
        host: HostName,
        parts: Parts,
    ) -> Result<Arc<Self>, ApiError> {
        let journal = fresh_journal(&dir, &vm, &parts.disk)?;
        let pager = Arc::new(Pager::new(vm.to_string(), (parts.watcher)()));
        Ok(Arc::new(Self {
            dir,
            parts,
            memory: GuestMemory::new(),
            dirty: DirtyLog::new(),
            shared: Arc::new(Shared::new(vm, host)),
            backend: Mutex::new(None),
            control: Mutex::new(Control {
                journal,
                fence: Fence::Down,
                oom: None,
                leave: None,
            }),
            paused_in: AtomicU64::new(0),
            collapser: Mutex::default(),
            prefault: Mutex::default(),
            pager,
            watching: Mutex::default(),
            arming: Mutex::default(),
            readers: Mutex::default(),
        }))
    }

    /// The VM now; `None` before it is built and after it was deleted. Takes no lock that a
    /// blocking call holds; looks at each slot's memory file.
    pub(crate) fn snapshot(&self) -> Option<v1::Vm> {
        let view = self.shared.view();
        self.show(&view)
    }

    fn show(&self, view: &View) -> Option<v1::Vm> {
        let identity = view.identity.as_ref()?;
        let backend = self.raw_backend();
        let engine = backend.as_ref().map(|backend| backend.dirty_engine());
        let made_of = self.memory.table().made_of();
        let stats = backend.as_ref().map(|backend| v1::MmuStats {
            dirty_pages_harvested: backend
                .capabilities()
                .contains(&v1::Capability::DirtyLog)
                .then(|| self.dirty.pages_harvested()),
            backing_4k_bytes: made_of.small,
            backing_2m_bytes: made_of.huge,
            backing_1g_bytes: made_of.giant,
            ..backend.stats()
        });
        // While pages arrive, the guest's counters page may be anything.
        let counters = match (&identity.spec.guest, view.state) {
            (GuestSpec::RawImage(_), _) | (_, State::Incoming) => None,
            (GuestSpec::Memstress(_), _) => {
                (self.parts.counters)(&self.memory.table(), identity.spec.vcpus)
            }
        };
        Some(v1::Vm {
            name: self.shared.vm.to_string(),
            uid: identity.uid.clone(),
            spec: Some(identity.spec.to_resource()),
            state: view.state.into(),
            state_message: view.message.clone(),
            host: self.shared.host.to_string(),
            epoch: view.epoch,
            migration: view
                .participation
                .migration()
                .map(ToString::to_string)
                .unwrap_or_default(),
            mmu_stats: stats,
            guest_counters: counters,
            capabilities: backend
                .map(|backend| backend.capabilities())
                .unwrap_or_default()
                .into_iter()
                .chain(OWN_CAPABILITIES)
                .chain(self.paging_capabilities(&identity.spec))
                .map(Into::into)
                .collect(),
            create_time: identity.birth.map(|birth| birth.time()),
            pid: std::process::id(),
            dirty_logging: self.dirty.enabled(),
            memory_bytes: self.memory.table().pages() * PAGE_SIZE,
            dirty_cursors: self.dirty.readers(),
            dirty_cursors_dropped: self.dirty.dropped(),
            dirty_engine: engine
                .as_ref()
                .map_or(v1::DirtyEngine::Unspecified, |used| {
                    used.engine.to_message()
                })
                .into(),
            dirty_engine_reason: engine.map(|used| used.reason).unwrap_or_default(),
            backing_shortfall: made_of.shortfall(identity.spec.backing),
            prefault: self
                .prefault_shown()
                .filter(|_| view.state != State::Incoming),
            paging: self.paging_shown(),
            ..Default::default()
        })
    }

    /// The VM after a call that succeeded.
    fn shown(&self) -> Result<v1::Vm, ApiError> {
        self.snapshot()
            .ok_or_else(|| ApiError::no_such_vm(&self.shared.vm))
    }

    /// A number that grows at each change of state.
    #[must_use]
    pub(crate) fn watch(&self) -> watch::Receiver<u64> {
        self.shared.changes()
    }

    /// Ends when the process is to end: the VM was deleted, released or given up.
    pub(crate) fn exited(&self) -> impl Future<Output = Exit> + Send + 'static {
        let mut exit = self.shared.exit();
        async move {
            match exit.wait_for(Option::is_some).await {
                Ok(exit) => exit.unwrap_or(Exit::Deleted),
                // The machine itself is gone.
                Err(_) => Exit::Deleted,
            }
        }
    }

    /// Whether the process is to end.
    pub(crate) fn is_over(&self) -> bool {
        self.shared.exit().borrow().is_some()
    }

    /// Its name.
    #[must_use]
    pub(crate) fn name(&self) -> &VmName {
        &self.shared.vm
    }

    /// The identity of its VM, or that it will have; `None` before that is known.
    #[must_use]
    pub(crate) fn uid(&self) -> Option<String> {
        let own = || self.parts.uid.as_ref().map(ToString::to_string);
        let identity = self.shared.view().identity;
        identity.map(|identity| identity.uid).or_else(own)
    }

    /// The host it is on.
    #[must_use]
    pub(crate) fn host(&self) -> &HostName {
        &self.shared.host
    }

    /// Whether its vCPUs run.
    #[must_use]
    pub(crate) fn runs(&self) -> bool {
        self.shared.view().state == State::Running
    }

    /// How long the last pause of running vCPUs took. `None` before the first.
    #[must_use]
    pub(crate) fn last_pause(&self) -> Option<Duration> {
        match self.paused_in.load(Ordering::Relaxed) {
            0 => None,
            nanos => Some(Duration::from_nanos(nanos)),
        }
    }

    /// Guest memory and the slot table.
    #[must_use]
    pub(crate) fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// The readers of dirty pages.
    #[must_use]
    pub(crate) fn dirty(&self) -> &DirtyLog {
        &self.dirty
    }

    /// The VM's directory.
    #[must_use]
    pub(crate) fn dir(&self) -> &VmDir {
        &self.dir
    }

    /// The backend, to look, to save vCPU state and to invalidate; everything else goes through the
    /// machine and is refused there.
    ///
    /// # Errors
    /// NO_SUCH_VM before the VM is built.
    pub(crate) fn backend(&self) -> Result<Arc<dyn Backend>, ApiError> {
        let backend = self.built_backend()?;
        Ok(Arc::new(Guarded(backend)))
    }

    fn raw_backend(&self) -> Option<Arc<dyn Backend>> {
        self.backend
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    fn built_backend(&self) -> Result<Arc<dyn Backend>, ApiError> {
        self.raw_backend()
            .ok_or_else(|| ApiError::no_such_vm(&self.shared.vm))
    }

    fn set_backend(&self, backend: Option<Arc<dyn Backend>>) {
        *self.backend.lock().unwrap_or_else(PoisonError::into_inner) = backend;
    }

    fn control(&self) -> MutexGuard<'_, Control> {
        self.control.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// None while somebody has it.
    fn control_if_free(&self) -> Option<MutexGuard<'_, Control>> {
        match self.control.try_lock() {
            Ok(control) => Some(control),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }
}

/// Opens the journal of a VM that is to begin here.
fn fresh_journal(dir: &VmDir, vm: &VmName, disk: &Arc<dyn Disk>) -> Result<Journal, ApiError> {
    let journal = Journal::open_on(&dir.journal(), Arc::clone(disk))?;
    let Some(state) = journal.state() else {
        return Ok(journal);
    };
    let (reason, what) = match &state.ownership {
        Ownership::Ended | Ownership::Aborted { .. } => {
            drop(journal);
            std::fs::remove_file(dir.journal()).map_err(|error| {
                ApiError::new(
                    Reason::Journal,
                    format!("an ended journal cannot be removed: {error}"),
                )
                .because_of(&error)
                .with("vm", vm)
            })?;
            return Ok(Journal::open_on(&dir.journal(), Arc::clone(disk))?);
        }
        Ownership::Owner { epoch } => (
            Reason::VmState,
            format!("an earlier process owned it at epoch {epoch} and died; its memory is gone"),
        ),
        Ownership::Incoming { migration, .. } => (
            Reason::VmState,
            format!("an earlier process was receiving it by migrations/{migration} and died"),
        ),
        Ownership::Prepared { migration, .. } => (
            Reason::InDoubt,
            format!(
                "an earlier process had PREPARED it for migrations/{migration} and died; the source's journal decides"
            ),
        ),
        Ownership::Relinquished { migration, epoch } => (
            Reason::StaleEpoch,
            format!("an earlier process gave epoch {epoch} away by migrations/{migration}"),
        ),
    };
    Err(ApiError::new(reason, format!("{vm}: {what}"))
        .with("vm", vm)
        .with("state", State::Lost.as_str_name())
        .with(
            "advice",
            "settle the old journal, remove the VM's directory, then create the VM again",
        ))
}
