//! What a VM process serves: `VmService` and `MemoryService` for a collection of one, and
//! [`transfer`], all of them over a [`monitor`]: whatever runs the VM.
//!
//! Handlers hold no state and no lock. A monitor's calls block (they stop vCPUs, sync the journal,
//! read all memory), so each runs on a blocking thread; a caller that goes away does not stop a
//! call that has begun.

mod endpoint;
mod memory;
mod monitor;
#[cfg(test)]
mod other_monitor;
#[cfg(test)]
mod tests;
pub(crate) mod transfer;
mod vm;

use std::sync::Arc;

use slat_proto::v1::{
    memory_service_server::MemoryServiceServer, vm_service_server::VmServiceServer,
};

use self::{endpoint::VmEndpoint, monitor::Monitor};

/// `VmService` of a monitor.
#[must_use]
pub(crate) fn vm_service(monitor: Arc<impl Monitor>) -> VmServiceServer<VmEndpoint> {
    VmServiceServer::new(VmEndpoint { monitor })
}

/// `MemoryService` of a monitor.
#[must_use]
pub(crate) fn memory_service(monitor: Arc<impl Monitor>) -> MemoryServiceServer<VmEndpoint> {
    MemoryServiceServer::new(VmEndpoint { monitor })
}
