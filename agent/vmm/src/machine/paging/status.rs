//! What is shown of a VM whose memory is watched.

use slat_paging::wire::PagerState;
use slat_proto::{
    ApiError,
    model::PAGE_SIZE,
    v1::{PagingStatus, paging_status::State},
};

use super::super::Machine;
use crate::pager::reason_of;

impl Machine {
    /// Says of a VM whose vCPUs do not stop that they may wait for pages, where that is so.
    pub(in crate::machine) fn with_paging(&self, error: ApiError) -> ApiError {
        let Some(paging) = self.paging_shown() else {
            return error;
        };
        if paging.faults_waiting == 0 && paging.state() == State::Serving {
            return error;
        }
        let error = error
            .with("paging_state", paging.state().as_str_name())
            .with("faults_waiting", paging.faults_waiting)
            .with(
                "advice",
                "vCPUs may wait for pages: see the VM's paging, and mend its source or delete the VM",
            );
        match paging.reason.is_empty() {
            true => error,
            false => error.with("paging_reason", paging.reason),
        }
    }

    /// How its memory is paged; `None` while the kernel does it alone. Waits for nobody.
    pub(in crate::machine) fn paging_shown(&self) -> Option<PagingStatus> {
        let (wanted, because) = {
            let watching = self.watching();
            let wanted = watching.is_on() || watching.is_wanted();
            (wanted, watching.because())
        };
        if !wanted {
            return None;
        }
        let shown = self.pager.shown();
        let PagerState {
            faults,
            latency,
            problem,
            ..
        } = shown.told;
        let (state, message, reason) = match problem {
            _ if !shown.attached => (
                State::NoPager,
                "there is no pager: the guest waits at its next fault".to_owned(),
                "",
            ),
            // Said before whatever it said last.
            _ if shown.silent.is_some() => (
                State::NoPager,
                format!(
                    "the pager has said nothing for {} s: it is replaced soon; the guest waits at \
                     its next fault",
                    shown.silent.unwrap_or_default().as_secs()
                ),
                "",
            ),
            Some(problem) => (
                State::SourceFailed,
                problem.message,
                reason_of(problem.kind).as_str(),
            ),
            None => (State::Serving, String::new(), ""),
        };
        let (there, all) = shown.progress;
        let pages = |pages: u64| pages.saturating_mul(PAGE_SIZE);
        Some(PagingStatus {
            state: state.into(),
            message,
            reason: reason.to_owned(),
            pager_pid: shown.pid,
            pager_restarts: shown.restarts,
            because,
            loaded_bytes: pages(there),
            source_bytes: pages(all),
            snapshots: shown.snapshots,
            kept_bytes: pages(shown.told.kept_pages),
            faults_missing: faults.missing,
            faults_minor: faults.minor,
            faults_write_protect: faults.write_protect,
            pages_prefetched: faults.prefetched,
            faults_waiting: shown.told.waiting,
            latency_buckets: latency.buckets,
            latency_nanos: latency.sum_nanos,
            vcpu_blocked_nanos: shown.told.blocked_nanos,
            mapped_pages: shown.told.mapped_pages.first().copied().unwrap_or(0),
            table_pages: shown.told.table_pages,
            mirror_bytes: shown.told.mirror_bytes,
            changes: shown.told.changes,
            changes_refused: shown.told.refused,
            working_set_bytes: pages(shown.told.working_set.all),
            working_set_loaded_bytes: pages(shown.told.working_set.loaded),
        })
    }
}
