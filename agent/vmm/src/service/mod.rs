//! What a VM process serves: `VmService` and `MemoryService` for a collection of one, and [`transfer`].
//!
//! Handlers of the two hold no state and no lock. A machine's calls block (they stop vCPUs, sync the journal, read all memory), so
//! each runs on a blocking thread; a caller that goes away does not stop a call that has begun.

mod memory;
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

use crate::machine::Machine;

/// Serves one machine.
#[derive(Clone, Debug)]
pub(crate) struct VmEndpoint {
    machine: Arc<Machine>,
}

/// `VmService` of a machine.
#[must_use]
pub(crate) fn vm_service(machine: Arc<Machine>) -> VmServiceServer<VmEndpoint> {
    VmServiceServer::new(VmEndpoint { machine })
}

/// `MemoryService` of a machine.
#[must_use]
pub(crate) fn memory_service(machine: Arc<Machine>) -> MemoryServiceServer<VmEndpoint> {
    MemoryServiceServer::new(VmEndpoint { machine })
}

impl VmEndpoint {
    /// Runs `call` on a blocking thread, once `name` is found to be this VM's.
    async fn on<T: Send + 'static>(
        &self,
        name: &str,
        call: impl FnOnce(&Machine) -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, Status> {
        let name = VmName::parse(name)?;
        if name != *self.machine.name() {
            return Err(ApiError::no_such_vm(name).into());
        }
        self.blocking(call).await
    }

    async fn blocking<T: Send + 'static>(
        &self,
        call: impl FnOnce(&Machine) -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, Status> {
        let machine = Arc::clone(&self.machine);
        tokio::task::spawn_blocking(move || call(&machine))
            .await
            .map_err(|error| ApiError::new(Reason::Internal, format!("a call failed: {error}")))?
            .map_err(Status::from)
    }
}
