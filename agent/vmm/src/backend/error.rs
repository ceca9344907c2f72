//! What a backend can fail at.

use slat_proto::{ApiError, Reason, model::BackendKind};

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
