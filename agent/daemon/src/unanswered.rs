//! What is said when a VM's process does not answer, and whether it was the process that said
//! something at all.

use slat_proto::{ApiError, Reason, model::VmName};
use slat_record::uid::VmUid;
use tonic::{Code, Status};

use super::process::Process;

/// The error behind a failed call, when a process made it itself; what the transport said
/// otherwise.
pub(super) fn of(status: Status) -> Result<ApiError, String> {
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
        return Err(message);
    }
    Ok(error)
}

/// VM_UNREACHABLE for a process.
pub(super) fn unreachable(name: &VmName, uid: &VmUid, process: &Process, what: &str) -> ApiError {
    let pid = process.pid();
    let stopped = if process.is_stopped() {
        ", stopped by a signal"
    } else {
        ""
    };
    ApiError::new(
        Reason::VmUnreachable,
        format!("the process of {name} (pid {pid}{stopped}) {what}"),
    )
    .with("vm", name)
    .with("uid", uid)
    .with("pid", pid)
    .with(
        "advice",
        format_args!(
            "try again, and look at its log; if it stays silent: slat delete vm {} --uid {uid} --force",
            name.id(),
        ),
    )
}
