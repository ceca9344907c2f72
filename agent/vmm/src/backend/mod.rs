//! What runs a VM's vCPUs and walks its second stage, behind one trait.
//!
//! # Protocol
//! A backend is built stopped. Slots are added before the first [`Backend::run`];
//! [`Backend::load_state`] only while stopped and before the first run. `run` and `pause`
//! alternate; `pause` returns when no vCPU executes guest code and every store of the guest is
//! visible in guest memory. A backend never resumes by itself. The calls are made by one owner (the
//! VM's machine) in order, except [`Backend::stats`], [`Backend::invalidate`] and those of
//! [`DirtySource`], which may come from another thread while vCPUs run.
//!
//! # Invariants
//! What a backend cannot do it refuses with [`BackendError::Unsupported`]. The guest
//! reaches a slot's memory through the guest view alone.

use std::{path::Path, sync::Arc};

use slat_proto::{
    ApiError, Reason,
    model::{BackendKind, VmSpec},
    v1,
};

use crate::memory::{DirtyError, DirtySource, SlotMemory};

mod cpu;
pub(crate) mod kvm;
pub(crate) mod software;

pub use self::cpu::{CpuDifference, CpuFact, compare_facts};

/// A failure of a backend.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BackendError {
    /// A kernel call failed.
    #[error("{op} failed: {source}")]
    Ioctl {
        /// The call, e.g. `KVM_SET_USER_MEMORY_REGION`.
        op: &'static str,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// This backend cannot do that.
    #[error("the {backend} backend cannot {what}")]
    Unsupported {
        /// Which backend.
        backend: BackendKind,
        /// What was asked, as a verb phrase.
        what: String,
    },
    /// No slot of that number.
    #[error("no slot {slot}")]
    NoSuchSlot {
        /// The number asked for.
        slot: u32,
    },
    /// A slot the backend refuses.
    #[error("slot {slot}: {message}")]
    BadSlot {
        /// Its number.
        slot: u32,
        /// Why.
        message: String,
    },
    /// Saved vCPU state that this backend cannot load.
    #[error("vCPU state: {message}")]
    State {
        /// What is wrong with it.
        message: String,
    },
    /// vCPU threads did not do what they were told.
    #[error("{message}")]
    Vcpu {
        /// What happened.
        message: String,
    },
}

impl From<DirtyError> for BackendError {
    fn from(error: DirtyError) -> Self {
        match error {
            DirtyError::Kernel { op, source, .. } => Self::Ioctl { op, source },
            DirtyError::NoSuchSlot { slot } => Self::NoSuchSlot { slot },
            DirtyError::Refused { slot, message } => Self::BadSlot { slot, message },
        }
    }
}

impl From<BackendError> for ApiError {
    fn from(error: BackendError) -> Self {
        let message = error.to_string();
        match error {
            BackendError::Ioctl { op, source } => ApiError::new(Reason::KvmIoctl, message)
                .with("op", op)
                .with("errno", source.raw_os_error().unwrap_or(0)),
            BackendError::Unsupported { what, .. } => {
                ApiError::new(Reason::CapabilityMissing, message).with("capability", what)
            }
            BackendError::NoSuchSlot { slot } => {
                ApiError::new(Reason::NoSuchSlot, message).with("slot", slot)
            }
            BackendError::BadSlot { slot, .. } => {
                ApiError::new(Reason::BadSlotTable, message).with("slot", slot)
            }
            BackendError::State { .. } => ApiError::new(Reason::StateVersionUnsupported, message),
            BackendError::Vcpu { .. } => ApiError::new(Reason::Internal, message),
        }
    }
}

/// What a vCPU reports on its own account.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum GuestEvent {
    /// The guest ended by itself; the vCPUs are stopped.
    Stopped,
    /// The guest or the backend failed (triple fault, internal error, a stale translation used);
    /// the vCPUs are stopped.
    Failed(String),
}

/// Where a backend reports [`GuestEvent`]s. Called on a vCPU thread; must not block and must not
/// call the backend.
pub(crate) type EventSink = Arc<dyn Fn(GuestEvent) + Send + Sync>;

/// Runs vCPUs and walks the second stage of one VM. See the module for the protocol.
pub(crate) trait Backend: DirtySource {
    /// What it can do here.
    fn capabilities(&self) -> Vec<v1::Capability>;

    /// What its vCPUs were told of their CPU, whatever this host could tell them: a VM that came
    /// from a lesser host can go back there. Empty where that is nothing.
    fn cpu_facts(&self) -> Vec<CpuFact>;

    /// Makes a slot's memory visible to the guest at its `base_gfn`. Keeps the memory mapped as
    /// long as the slot exists.
    ///
    /// # Errors
    /// `BadSlot` when it overlaps, is out of the format's range or there are too many.
    fn add_slot(&self, memory: &Arc<SlotMemory>) -> Result<(), BackendError>;
    /// Takes a slot away. Returns when nothing maps it any more.
    ///
    /// # Errors
    /// `NoSuchSlot`.
    fn remove_slot(&self, slot: u32) -> Result<(), BackendError>;
    /// Moves a slot; not atomic for the guest.
    ///
    /// # Errors
    /// `NoSuchSlot`, `BadSlot`.
    fn move_slot(&self, slot: u32, base_gfn: u64) -> Result<(), BackendError>;

    /// Drops second-stage mappings of guest frames `[gfn, gfn + pages)`; contents stay. Returns
    /// when no vCPU can use a dropped translation.
    ///
    /// # Errors
    /// When the kernel refuses.
    fn invalidate(&self, gfn: u64, pages: u64) -> Result<(), BackendError>;

    /// Lets the vCPUs run. Returns at once.
    ///
    /// # Errors
    /// `Vcpu` when a vCPU thread is gone.
    fn run(&self) -> Result<(), BackendError>;
    /// Stops the vCPUs. No effect when stopped.
    ///
    /// # Errors
    /// `Vcpu` when a vCPU does not stop within some seconds.
    fn pause(&self) -> Result<(), BackendError>;
    /// State of all vCPUs, versioned, for [`Backend::load_state`] of the same kind elsewhere. Only
    /// while stopped.
    ///
    /// # Errors
    /// `Ioctl`.
    fn save_state(&self) -> Result<Vec<u8>, BackendError>;
    /// Sets the state of all vCPUs. `state` comes from another host: every length in it is checked.
    ///
    /// # Errors
    /// `State` when it is malformed, of another kind, version or number of vCPUs; `Ioctl`.
    fn load_state(&self, state: &[u8]) -> Result<(), BackendError>;

    /// Counters now. Reads only; never stops a vCPU. What is not offered stays unset.
    fn stats(&self) -> v1::MmuStats;
}

/// Backends that work on this host, best first, and why KVM is not among them when it is not.
#[must_use]
pub fn available() -> (Vec<BackendKind>, Option<String>) {
    let why_no_kvm = kvm::probe().err().map(|error| error.to_string());
    let mut kinds = vec![BackendKind::Software];
    if why_no_kvm.is_none() {
        kinds.insert(0, BackendKind::Kvm);
    }
    (kinds, why_no_kvm)
}

/// What VMs of that backend can rely on here, for [`compare_facts`]. The first call asks the kernel,
/// some milliseconds.
///
/// # Errors
/// KVM_IOCTL when KVM cannot be asked.
pub fn host_facts(kind: BackendKind) -> Result<Vec<CpuFact>, ApiError> {
    match kind {
        BackendKind::Software => Ok(Vec::new()),
        BackendKind::Kvm => Ok(kvm::host_facts()?),
    }
}

/// Builds a stopped backend for `spec` without slots. `spec.backend` and `spec.format` are already
/// resolved. What a raw image prints is appended to the file `console`.
///
/// # Errors
/// `Unsupported` when the host lacks it; `Ioctl`.
pub(crate) fn create(
    spec: &VmSpec,
    events: EventSink,
    console: Option<&Path>,
) -> Result<Arc<dyn Backend>, BackendError> {
    match spec.backend.unwrap_or(BackendKind::Software) {
        BackendKind::Software => Ok(Arc::new(software::SoftwareBackend::new(spec, events)?)),
        BackendKind::Kvm => Ok(Arc::new(kvm::KvmBackend::new(spec, events, console)?)),
    }
}
