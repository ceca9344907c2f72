//! Refusals about hosts.

use slat_proto::{ApiError, Reason};

pub(crate) fn no_such_host(name: &str) -> ApiError {
    ApiError::new(Reason::NoSuchHost, format!("no host {name}")).with("host", name)
}

pub(crate) fn host_unreachable(name: &str) -> ApiError {
    ApiError::new(
        Reason::HostUnreachable,
        format!("the agent of {name} does not answer"),
    )
    .with("host", name)
    .with(
        "advice",
        "see that `slat agent` runs there and reaches the server",
    )
}
