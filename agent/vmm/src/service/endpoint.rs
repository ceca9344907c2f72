//! The VM of one monitor, as handlers reach it: who is meant is checked, blocking calls go to
//! blocking threads.

use std::sync::Arc;

use slat_proto::{ApiError, Reason, model::NamedVm};
use tonic::Status;

use super::monitor::Monitor;

/// Serves the VM of one monitor.
#[derive(Clone, Debug)]
pub(crate) struct VmEndpoint {
    pub(super) monitor: Arc<dyn Monitor>,
}

impl VmEndpoint {
    /// Runs `call` on a blocking thread, once name, uid and host are found to mean this VM.
    pub(super) async fn on<T: Send + 'static>(
        &self,
        (name, uid, host): (&str, &str, &str),
        call: impl FnOnce(&dyn Monitor) -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, Status> {
        let own = self.uid();
        NamedVm::of(name, uid, host)?.check(self.monitor.name(), &own, self.monitor.host())?;
        self.blocking(call).await
    }

    /// The identity of the VM; empty before that is known.
    pub(super) fn uid(&self) -> String {
        self.monitor.uid().unwrap_or_default()
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
