//! The VM processes of this host: found again at the start, made, watched to their end, cleared
//! away.
//!
//! | file | what |
//! |---|---|
//! | `meant` | which VM a request means |
//! | `instead` | what is said when a VM's process ended instead of answering |
//! | `found`, `reread` | directories and processes found, and read again |
//! | `make`, `refuse` | VMs made, and why they are not |
//! | `clear` | VMs deleted, sides released, directories removed |
//! | `save`, `copies` | VMs saved; VMs made of a save or of another VM |
//! | `leftover`, `order` | what is here and is no VM: listed; taken back or ended |
//! | `locate` | who answers for a side |
//!
//! # Invariants
//! * Work on a VM happens under its [`Claim`]; a claim that is dropped frees uid, name and memory.
//! * A directory is removed only with its lock held ([`process::find`] said Dead) and after every
//!   side that nobody released is kept in [`EndedSides`].
//! * The agent kills a process only when it owns nothing: it never got its VM, or its journal says
//!   Aborted, Ended or (after the server or an operator released it) Relinquished. Two exceptions.
//!   A process just made whose create or prepare failed or was not answered in time is killed and
//!   its directory removed (`make::undo`), without a look at the journal: its claim is still held
//!   and nobody was told that it has a VM, so whatever it journalled, no guest of it ever ran. And
//!   an operator's forced delete, by uid, of a process that answers nothing. Who may run a VM is
//!   decided by the VM processes and their journals alone.
//!
//! # Tasks
//! All run on one tracker and end with the agent's token; work that changes directories is not cut
//! off but awaited, for it is bounded. A caller that goes away does not cut it off either: it runs
//! in a task of its own.

use std::{
    ffi::OsString, fmt, future::Future, net::IpAddr, path::PathBuf, sync::Arc, time::Duration,
};

use slat_proto::{
    ApiError, Reason,
    model::{HostName, MigrationName, VmName, VmRef, VmSpec},
    v1,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    admission::{Admit, Backends, Fits},
    cgroup::Cgroups,
    doubt,
    ended::EndedSides,
    follow::follow_side,
    grants::Grants,
    helper::Programs,
    living::LiveVm,
    pager,
    registry::{Held, Registry, Work},
    saves::Saves,
    side::{Role, SideKey, is_terminal},
    traffic::Counted,
};
use slat_record::{
    dir::VmDir,
    journal::{Journal, Ownership},
    uid::VmUid,
};
use slat_trust::Credentials;

mod clear;
mod copies;
mod found;
mod instead;
mod leftover;
mod locate;
mod make;
mod meant;
mod order;
mod refuse;
mod reread;
mod save;

pub(super) use locate::Place;
pub(super) use meant::living_meant;
pub(super) use refuse::{no_memory, slot_bytes};
pub(super) use save::SaveOrder;

/// How long a process may take to answer a question asked in passing.
const ADOPT: Duration = Duration::from_secs(2);
/// How long a process may take to end by itself once it has nothing left to do.
const LEAVE: Duration = Duration::from_secs(5);
/// How long a question waits for a VM that is being cleared.
const SETTLE: Duration = Duration::from_secs(15);

/// See the module.
pub(super) struct Supervisor {
    pub(super) host: HostName,
    pub(super) vms_dir: PathBuf,
    pub(super) program: Vec<OsString>,
    pub(super) data_ip: IpAddr,
    /// How pagers and writers are started.
    pub(super) programs: Arc<Programs>,
    pub(super) saves: Arc<Saves>,
    /// How its processes are confined, for people to see.
    pub(super) confinement: v1::VmConfinement,
    pub(super) cgroups: Arc<Cgroups>,
    pub(super) registry: Arc<Registry>,
    pub(super) ended: Arc<EndedSides>,
    /// What migrations have leave for.
    pub(super) grants: Arc<Grants>,
    pub(super) backends: Arc<Backends>,
    /// Compares what a VM's source said of itself with this host.
    pub(super) admit: Admit,
    /// Compares a new VM's memory with this host.
    pub(super) fits: Fits,
    /// By which other agents are called; `None`: in the clear.
    pub(super) credentials: Option<Credentials>,
    pub(super) stop: CancellationToken,
    pub(super) tasks: TaskTracker,
}

impl fmt::Debug for Supervisor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Supervisor")
            .field("host", &self.host)
            .finish_non_exhaustive()
    }
}

/// The task that did some work has failed: a fault of ours.
fn task_failed(error: &tokio::task::JoinError) -> ApiError {
    ApiError::new(
        Reason::Internal,
        format!("a task of the agent failed: {error}"),
    )
}

impl Supervisor {
    /// The directory of a new VM.
    fn dir(&self, uid: &VmUid) -> VmDir {
        VmDir::new(self.vms_dir.join(uid.as_str()))
    }

    /// Whether the VM that is announced could live here. Takes nothing.
    ///
    /// # Errors
    /// CPU_INCOMPATIBLE, ISA_MISMATCH, PAGE_SIZE_MISMATCH, CAPABILITY_MISSING,
    /// STATE_VERSION_UNSUPPORTED, each with the names of what differs; BAD_PARAMETER.
    pub(super) async fn admits(
        &self,
        request: &v1::PrepareIncomingRequest,
    ) -> Result<(), ApiError> {
        let (admit, request) = (Arc::clone(&self.admit), request.clone());
        // It may open /dev/kvm: off the runtime's threads.
        match tokio::task::spawn_blocking(move || admit(&request)).await {
            Ok(admitted) => admitted
                .map(drop)
                .map_err(|error| error.with("host", &self.host)),
            Err(error) => Err(task_failed(&error)),
        }
    }

    /// Whether memory for a new VM could be made here.
    ///
    /// # Errors
    /// The port's.
    pub(super) async fn fits(&self, spec: &VmSpec) -> Result<(), ApiError> {
        let (fits, spec) = (self.fits, spec.clone());
        match tokio::task::spawn_blocking(move || fits(&spec)).await {
            Ok(fits) => fits.map_err(|error| error.with("host", &self.host)),
            Err(error) => Err(task_failed(&error)),
        }
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

    /// Keeps a VM's pager from its process's beginning on.
    fn keep_pager(&self, live: &Arc<LiveVm>) {
        let (programs, cgroups) = (Arc::clone(&self.programs), Arc::clone(&self.cgroups));
        self.follow(pager::keep(Arc::clone(live), programs, cgroups));
    }

    /// Learns of a side from what the VM says of itself, when nothing else told of it.
    fn discover(self: &Arc<Self>, live: &Arc<LiveVm>, said: &v1::Vm) {
        let Ok(migration) = MigrationName::parse(&said.migration) else {
            return;
        };
        let key = match said.state() {
            v1::vm::State::Incoming => SideKey::destination(migration),
            _ => SideKey::source(migration.clone()),
        };
        // A VM that has just arrived may still name the migration it came by.
        let arrived = SideKey::destination(key.migration.clone());
        if live.side(&arrived).is_none() {
            self.know_side(live, key, None);
        }
    }

    /// Begins to follow a side, once.
    pub(super) fn know_side(
        self: &Arc<Self>,
        live: &Arc<LiveVm>,
        key: SideKey,
        said: Option<v1::Transfer>,
    ) {
        let told = said.is_some();
        let over = said.as_ref().is_some_and(|side| is_terminal(side.phase()));
        let ended = said.clone().filter(|_| over);
        if !live.add_side(&key, said) {
            return;
        }
        // Nobody follows it, so nobody else counts what it moved.
        if let Some(side) = ended {
            Counted::default().see(&side);
        }
        if told {
            self.registry.note_change();
        }
        if key.role == Role::Destination && !over {
            let credentials = self.credentials.clone();
            self.follow(doubt::look_after(
                Arc::clone(live),
                key.clone(),
                credentials,
            ));
        }
        let (me, live) = (Arc::clone(self), Arc::clone(live));
        self.follow(async move {
            // An ended side changes no more, and its process may have replaced it by a later one.
            let ended =
                over || follow_side(Arc::clone(&live), Arc::clone(&me.registry), key.clone()).await;
            // A destination that gave up has nothing to wait for: its memory must not stay taken
            // until a release.
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

    /// Waits for a process that has nothing left to do, and ends it when it stays although its
    /// journal says that it owns nothing (`owns_nothing`). True when it is gone.
    async fn see_off(
        &self,
        live: &Arc<LiveVm>,
        owns_nothing: impl Fn(&Ownership) -> bool + Send,
    ) -> bool {
        if tokio::time::timeout(LEAVE, live.gone().cancelled())
            .await
            .is_ok()
        {
            return true;
        }
        if !owns(live).is_some_and(|ownership| owns_nothing(&ownership)) {
            return false;
        }
        tracing::warn!(vm = %live.name(), pid = live.process().pid(), "ending a process that owns nothing and stays");
        live.process().put_down().await;
        tokio::time::timeout(LEAVE, live.gone().cancelled())
            .await
            .is_ok()
    }

    /// What a uid stands for, once it is not being cleared.
    pub(super) async fn settled(&self, uid: &VmUid) -> Option<Held> {
        loop {
            match self.registry.get(uid) {
                Some(Held::Busy {
                    work: Work::Clearing,
                    done,
                }) => {
                    if tokio::time::timeout(SETTLE, done.cancelled())
                        .await
                        .is_err()
                    {
                        return self.registry.get(uid);
                    }
                }
                other => return other,
            }
        }
    }

    /// The living VM that is meant.
    ///
    /// # Errors
    /// NO_SUCH_VM, NAME_CONFLICT; VM_STATE when it is LOST; VM_UNREACHABLE while it is cleared
    /// away.
    pub(super) async fn living(self: &Arc<Self>, named: &VmRef) -> Result<Arc<LiveVm>, ApiError> {
        let uid = self.meant(named).await?;
        match self.settled(&uid).await {
            Some(Held::Live(live)) => Ok(live),
            Some(Held::Dead(dead)) => match dead.lost() {
                Some(lost) => Err(ApiError::new(
                    Reason::VmState,
                    format!("{} is LOST: {}", dead.name(), lost.state_message),
                )
                .with("vm", dead.name())
                .with("uid", &uid)
                .with("state", "LOST")
                .with("vm_location", "LOST")
                .with("advice", "delete it and create it anew")),
                None => Err(named.not_here()),
            },
            Some(Held::Busy {
                work: Work::Clearing,
                ..
            }) => Err(ApiError::new(
                Reason::VmUnreachable,
                format!("the VM with uid {uid} is still being cleared away"),
            )
            .with("uid", &uid)
            .with("advice", "try again")),
            Some(Held::Busy { .. }) | None => Err(named.not_here()),
        }
    }

    /// Every side nobody released, from caches, directories and records; calls nobody.
    pub(super) fn sides(&self) -> Vec<v1::Transfer> {
        let mut sides = self.ended.all();
        for (_, _, held) in self.registry.all() {
            match held {
                Held::Live(live) => sides.extend(live.sides()),
                Held::Dead(dead) => sides.extend(dead.sides()),
                Held::Busy { .. } => {}
            }
        }
        sides
    }

    /// Every VM as last seen, by name, then uid; calls nobody.
    pub(super) fn snapshots(&self) -> Vec<v1::Vm> {
        let shown = |(_, _, held): (VmName, VmUid, Held)| match held {
            Held::Live(live) => live.snapshot(),
            Held::Dead(dead) => dead.lost().cloned(),
            Held::Busy { .. } => None,
        };
        self.registry.all().into_iter().filter_map(shown).collect()
    }
}

/// What a living process's journal says now.
fn owns(live: &LiveVm) -> Option<Ownership> {
    Journal::read(&live.dir().journal())
        .ok()
        .flatten()
        .map(|state| state.ownership)
}
