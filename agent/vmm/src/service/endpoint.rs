//! The VM of one monitor, as handlers reach it: the name is checked, blocking calls go to blocking
//! threads.

use std::sync::Arc;

use slat_proto::{ApiError, Reason, model::VmName};
use tonic::Status;

use super::monitor::Monitor;

/// Serves the VM of one monitor.
#[derive(Clone, Debug)]
pub(crate) struct VmEndpoint {
    pub(super) monitor: Arc<dyn Monitor>,
}

impl VmEndpoint {
    /// Runs `call` on a blocking thread, once `name` is found to be this VM's.
    pub(super) async fn on<T: Send + 'static>(
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

    pub(super) async fn blocking<T: Send + 'static>(
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
