//! What a VM process serves: `VmService` and `MemoryService` for a collection of one, and
//! [`transfer`], all of them over a [`monitor`]: whatever runs the VM.
//!
//! Handlers hold no state and no lock. A monitor's calls block (they stop vCPUs, sync the journal,
//! read all memory), so each runs on a blocking thread; a caller that goes away does not stop a
//! call that has begun.

mod memory;
mod monitor;
#[cfg(test)]
mod other_monitor;
#[cfg(test)]
mod tests;
pub(crate) mod transfer;
mod vm;

use std::sync::Arc;

use slat_proto::{
    ApiError, Reason,
    model::VmName,
    v1::{memory_service_server::MemoryServiceServer, vm_service_server::VmServiceServer},
};
use tonic::Status;

use self::monitor::Monitor;

/// Serves the VM of one monitor.
#[derive(Clone, Debug)]
pub(crate) struct VmEndpoint {
    monitor: Arc<dyn Monitor>,
}

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

impl VmEndpoint {
    /// Runs `call` on a blocking thread, once `name` is found to be this VM's.
    async fn on<T: Send + 'static>(
        &self,
        name: &str,
        call: impl FnOnce(&dyn Monitor) -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, Status> {
        let name = VmName::parse(name)?;
        if name != *self.monitor.name() {
            return Err(ApiError::no_such_vm(name).into());
        }
        self.blocking(call).await
    }

    async fn blocking<T: Send + 'static>(
        &self,
        call: impl FnOnce(&dyn Monitor) -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, Status> {
        let monitor = Arc::clone(&self.monitor);
        tokio::task::spawn_blocking(move || call(&*monitor))
            .await
            .map_err(|error| ApiError::new(Reason::Internal, format!("a call failed: {error}")))?
            .map_err(Status::from)
    }
}
