//! What is said of a call whose VM's process ended instead of answering.
//!
//! "Does not answer, try again" is untrue of a process that is no more: the answer is then how the
//! VM stands, which is what the next call would be told. A call that a process took in before it
//! ended may or may not have been carried out; how the VM stands covers both.

use std::{future::Future, sync::Arc};

use slat_proto::{ApiError, Reason, model::VmRef};

use super::Supervisor;
use crate::living::LiveVm;

impl Supervisor {
    /// Awaits a VM's answer to a caller's request.
    ///
    /// # Errors
    /// The answer's own; NO_SUCH_VM or VM_STATE (LOST) when the process ended instead.
    pub(crate) async fn told<T>(
        self: &Arc<Self>,
        live: &LiveVm,
        answer: impl Future<Output = Result<T, ApiError>>,
    ) -> Result<T, ApiError> {
        match answer.await {
            Err(error) if error.reason == Reason::VmUnreachable && live.has_gone().await => {
                let named = VmRef::new("", live.uid().as_str(), "")?;
                // Should another process have it by now, the call was this one's all the same.
                Err(self.living(&named).await.err().unwrap_or(error))
            }
            answer => answer,
        }
    }
}
