//! What a backend can fail at.

use slat_proto::{ApiError, Reason, model::BackendKind};

use super::{run_failure::of_errno, unavailable::KvmUnavailable};
use crate::memory::DirtyError;

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
    /// A kernel call about a slot failed.
    #[error("{op} of slot {slot} (frames {base_gfn:#x}+{pages:#x}) failed: {source}")]
    SlotCall {
        /// The call.
        op: &'static str,
        /// The slot's number.
        slot: u32,
        /// Its first frame, as it was to be.
        base_gfn: u64,
        /// Its length, as it was to be.
        pages: u64,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// A kernel call about a vCPU failed.
    #[error("{}{op} ({what}) failed: {meaning} ({source})", of_vcpu(*.vcpu))]
    VcpuCall {
        /// The call.
        op: &'static str,
        /// Which registers, or which section of saved state.
        what: String,
        /// Which vCPU, where there are several.
        vcpu: Option<u32>,
        /// What the kernel means by it.
        meaning: &'static str,
        /// Saved state was to be set, and the kernel does not take it: no fault of the host's.
        refused: bool,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// There is no KVM to run VMs on.
    #[error(transparent)]
    NoKvm(#[from] KvmUnavailable),
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
    /// A slot that was to be made anew could not be, neither as it was to be nor as it was before.
    #[error("slot {slot} is gone: {message}")]
    SlotLost {
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

impl BackendError {
    /// Whether saved state is at fault, and not this host.
    #[cfg(test)]
    pub(super) fn refuses_state(&self) -> bool {
        matches!(
            self,
            Self::State { .. } | Self::VcpuCall { refused: true, .. }
        )
    }
}

fn of_vcpu(vcpu: Option<u32>) -> String {
    vcpu.map_or_else(String::new, |vcpu| format!("vCPU {vcpu}: "))
}

/// The reason of a kernel call that failed.
fn of_kernel(error: &std::io::Error) -> Reason {
    of_errno(error.raw_os_error().unwrap_or(0))
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
            BackendError::Ioctl { op, source } => ApiError::new(of_kernel(&source), message)
                .with("op", op)
                .with("errno", source.raw_os_error().unwrap_or(0)),
            BackendError::SlotCall {
                op,
                slot,
                base_gfn,
                pages,
                source,
            } => {
                let errno = source.raw_os_error().unwrap_or(0);
                let mut error = ApiError::new(of_kernel(&source), message);
                if error.reason == Reason::NoMemory {
                    error = error.with(
                        "advice",
                        "the kernel has no memory for its own tables of this slot: free some on the host, or raise \
                         the limit of the agent's cgroup",
                    );
                }
                error
                    .with("op", op)
                    .with("errno", errno)
                    .with("slot", slot)
                    .with("base_gfn", base_gfn)
                    .with("pages", pages)
            }
            BackendError::VcpuCall {
                op,
                what,
                vcpu,
                meaning,
                refused,
                source,
            } => {
                let reason = if refused {
                    Reason::StateVersionUnsupported
                } else {
                    of_kernel(&source)
                };
                let mut error = ApiError::new(reason, message)
                    .with("op", op)
                    .with("errno", source.raw_os_error().unwrap_or(0))
                    .with("registers", what)
                    .with("meaning", meaning);
                if let Some(vcpu) = vcpu {
                    error = error.with("vcpu", vcpu);
                }
                error
            }
            BackendError::NoKvm(why) => ApiError::new(Reason::KvmUnavailable, message)
                .with("why", why.word())
                .with("advice", why.advice()),
            BackendError::Unsupported { what, .. } => {
                ApiError::new(Reason::CapabilityMissing, message).with("capability", what)
            }
            BackendError::NoSuchSlot { slot } => {
                ApiError::new(Reason::NoSuchSlot, message).with("slot", slot)
            }
            BackendError::BadSlot { slot, .. } => {
                ApiError::new(Reason::BadSlotTable, message).with("slot", slot)
            }
            BackendError::SlotLost { slot, .. } => {
                ApiError::new(Reason::Internal, message).with("slot", slot)
            }
            BackendError::State { .. } => ApiError::new(Reason::StateVersionUnsupported, message),
            BackendError::Vcpu { .. } => ApiError::new(Reason::Internal, message),
        }
    }
}
