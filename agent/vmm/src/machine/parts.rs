//! What a machine is built from, in one place: backends and guests. Tests put a fake backend here.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use slat_proto::{
    ApiError,
    model::{BackendKind, VmSpec},
    v1,
};
use slat_record::{
    journal::{Disk, RealDisk},
    uid::VmUid,
};

use crate::{
    backend::{self, Backend, BackendError, EventSink, FaultEvents},
    guest,
    memory::SlotTable,
    pager::Watcher,
};

/// Builds a stopped backend without slots; a raw image prints to the file, when there is one.
pub(crate) type CreateBackend = Arc<
    dyn Fn(&VmSpec, EventSink, Option<&Path>) -> Result<Arc<dyn Backend>, BackendError>
        + Send
        + Sync,
>;

/// Where backends and guests come from.
#[derive(Clone)]
pub(crate) struct Parts {
    /// Backends that work here, best first, and why KVM is not among them.
    pub(crate) available: fn() -> (Vec<BackendKind>, Option<String>),
    /// Whether VMs of a backend can have dirty rings here.
    pub(crate) offers_rings: fn(BackendKind) -> bool,
    /// Builds a backend.
    pub(crate) create: CreateBackend,
    /// Puts the guest into empty memory.
    pub(crate) install: fn(&SlotTable, &VmSpec) -> Result<(), ApiError>,
    /// Reads memstress' counters.
    pub(crate) counters: fn(&SlotTable, u32) -> Option<v1::GuestCounters>,
    /// The file with this process's OOM score adjustment; `None` leaves it alone.
    pub(crate) oom_score: Option<PathBuf>,
    /// What the journal is written through.
    pub(crate) disk: Arc<dyn Disk>,
    /// What tells faults of guest memory. Called once.
    pub(crate) watcher: fn() -> Watcher,
    /// The identity that a VM here must have; `None`: one that is created gets a new one.
    pub(crate) uid: Option<VmUid>,
}

impl Parts {
    /// The real ones, with page faults counted by `faults` where KVM's statistics have none.
    pub(crate) fn real(faults: FaultEvents) -> Self {
        Self {
            available: backend::available,
            offers_rings: backend::offers_dirty_rings,
            create: Arc::new(
                move |spec: &VmSpec, events: EventSink, console: Option<&Path>| {
                    backend::create(spec, events, console, &faults)
                },
            ),
            install: |table, spec| guest::install(table, spec).map_err(ApiError::from),
            counters: guest::memstress::counters,
            oom_score: Some("/proc/self/oom_score_adj".into()),
            disk: Arc::new(RealDisk),
            watcher: Watcher::open,
            uid: None,
        }
    }
}
