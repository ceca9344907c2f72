//! What is said of a call whose VM's process ended instead of answering.
//!
//! "Does not answer, try again" is untrue of a process that is no more: the answer is then how the
//! VM stands, which is what the next call would be told. A call that a process took in before it
//! ended may or may not have been carried out; how the VM stands covers both.

use std::{future::Future, sync::Arc};

use slat_proto::{ApiError, Reason, model::VmRef};

use super::Supervisor;
use crate::{
    living::LiveVm,
    process::{last_words, log_tail},
};

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

/// What is said of a new process that did not answer while its VM `was` made or announced. Call it
/// before the directory is removed: its log goes with it.
pub(super) async fn never_made(live: &LiveVm, error: ApiError, was: &str) -> ApiError {
    if error.reason != Reason::VmUnreachable {
        return error;
    }
    let (vm, pid) = (live.name(), live.process().pid());
    let ended = live.process().is_ending().await;
    let log = log_tail(live.dir());
    let last = match last_words(&log) {
        Some(words) => format!("its log ends with: {words}"),
        None if log.is_empty() => "it left nothing in its log".to_owned(),
        None => "its log warns of nothing".to_owned(),
    };
    let error = if ended {
        let end = live.process().end();
        let how = end.map_or_else(String::new, |end| format!(": it {end}"));
        let words =
            format!("the new process of {vm} (pid {pid}) ended while the VM {was}{how}; {last}");
        let error = ApiError::new(Reason::VmProcessDied, words)
            .with("vm", vm)
            .with("uid", live.uid())
            .with("pid", pid);
        end.map_or(error.clone(), |end| end.tell(error))
    } else {
        // It is put down next, and nothing of it is left to look at.
        let words = format!("{}, so it was ended; {last}", error.message);
        ApiError {
            message: words,
            ..error.with("advice", "try again; nothing is left of it")
        }
    };
    let error = error.with("log", log);
    tracing::warn!(%vm, uid = %live.uid(), pid, %error, "a VM's process ended before it had its VM");
    error
}
