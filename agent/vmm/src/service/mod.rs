//! What a VM process serves: `VmService`, `MemoryService` and `PagingService` for a collection of
//! one, `CopyService` for its host's agent, and [`transfer`], all of them over a [`monitor`]:
//! whatever runs the VM.
//!
//! Handlers hold no state and no lock. A monitor's calls block (they stop vCPUs, sync the journal,
//! read all memory), so none runs among the tasks of the runtime (`endpoint`); a caller that goes
//! away does not stop a call that has begun.

mod copy;
mod endpoint;
#[cfg(any(test, feature = "fuzz"))]
mod fuzzed;
mod memory;
mod monitor;
#[cfg(test)]
mod other_monitor;
mod paging;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_dirty_log;
pub(crate) mod transfer;
mod vm;

use std::sync::Arc;

use slat_proto::v1::{
    copy_service_server::CopyServiceServer, memory_service_server::MemoryServiceServer,
    paging_service_server::PagingServiceServer, vm_service_server::VmServiceServer,
};

#[cfg(feature = "fuzz")]
pub(crate) use self::fuzzed::SOCKET as FUZZED_SOCKET;
use self::{endpoint::VmEndpoint, monitor::Monitor};

/// `VmService` of a monitor.
#[must_use]
pub(crate) fn vm_service(monitor: Arc<impl Monitor>) -> VmServiceServer<VmEndpoint> {
    VmServiceServer::new(VmEndpoint::new(monitor))
}

/// `MemoryService` of a monitor.
#[must_use]
pub(crate) fn memory_service(monitor: Arc<impl Monitor>) -> MemoryServiceServer<VmEndpoint> {
    MemoryServiceServer::new(VmEndpoint::new(monitor))
}

/// `PagingService` of a monitor.
#[must_use]
pub(crate) fn paging_service(monitor: Arc<impl Monitor>) -> PagingServiceServer<VmEndpoint> {
    PagingServiceServer::new(VmEndpoint::new(monitor))
}

/// `CopyService` of a monitor.
#[must_use]
pub(crate) fn copy_service(monitor: Arc<impl Monitor>) -> CopyServiceServer<VmEndpoint> {
    CopyServiceServer::new(VmEndpoint::new(monitor))
}
