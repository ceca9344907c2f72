//! How this backend says no.

use slat_proto::model::BackendKind;

use super::super::BackendError;

/// The kernel refused a call.
pub(super) fn failed(op: &'static str) -> impl Fn(kvm_ioctls::Error) -> BackendError {
    move |error| BackendError::Ioctl {
        op,
        source: error.into(),
    }
}

/// KVM, or this build, cannot do that.
pub(super) fn unsupported(what: impl Into<String>) -> BackendError {
    BackendError::Unsupported {
        backend: BackendKind::Kvm,
        what: what.into(),
    }
}
