//! Calls to a VM's process: how long each is waited for, and what is said when there is no answer.
//!
//! Nothing here holds a lock while it waits; a call is made by its own task and bounded.

use std::{future::Future, time::Duration};

use slat_proto::{
    ApiError, Reason,
    transport::{TracedChannel, begun_within},
    v1::{
        copy_service_client::CopyServiceClient, memory_service_client::MemoryServiceClient,
        paging_service_client::PagingServiceClient, transfer_service_client::TransferServiceClient,
        vm_service_client::VmServiceClient,
    },
};
use tonic::{Response, Status};

use super::{ASK_EVERY, HEAVY, LiveVm, QUICK, SILENT, SMALL};
use crate::unanswered;

impl LiveVm {
    pub(crate) fn vms(&self) -> VmServiceClient<TracedChannel> {
        VmServiceClient::new(self.channel.clone())
    }

    pub(crate) fn memory(&self) -> MemoryServiceClient<TracedChannel> {
        MemoryServiceClient::new(self.channel.clone())
    }

    pub(crate) fn transfers(&self) -> TransferServiceClient<TracedChannel> {
        TransferServiceClient::new(self.channel.clone())
    }

    pub(crate) fn copies(&self) -> CopyServiceClient<TracedChannel> {
        CopyServiceClient::new(self.channel.clone())
    }

    pub(crate) fn pagings(&self) -> PagingServiceClient<TracedChannel> {
        PagingServiceClient::new(self.channel.clone())
    }

    /// Awaits a call to this process for at most `limit`; it does not begin later.
    ///
    /// # Errors
    /// What the process answered; VM_UNREACHABLE when it did not.
    pub(crate) async fn answer<T>(
        &self,
        limit: Duration,
        call: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<T, ApiError> {
        let limit = if self.is_silent() {
            limit.min(SILENT)
        } else {
            limit
        };
        match tokio::time::timeout(limit, begun_within(limit, call)).await {
            Ok(Ok(response)) => Ok(response.into_inner()),
            Ok(Err(status)) => Err(self.refusal(status)),
            Err(_) => {
                Err(self.unreachable(format!("does not answer within {} s", limit.as_secs())))
            }
        }
    }

    /// Awaits a call that may take long for as long as the process answers anything at all.
    ///
    /// # Errors
    /// What the process answered; VM_UNREACHABLE when it did not, within ten seconds of its
    /// silence. A process that is silent at first may not begin it afterwards.
    pub(crate) async fn answer_long<T>(
        &self,
        call: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<T, ApiError> {
        self.answer_within(HEAVY, call).await
    }

    /// As [`LiveVm::answer_long`], for at most `limit`.
    ///
    /// # Errors
    /// As [`LiveVm::answer_long`].
    pub(crate) async fn answer_within<T>(
        &self,
        limit: Duration,
        call: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<T, ApiError> {
        let silence = async {
            loop {
                tokio::time::sleep(ASK_EVERY).await;
                if let Err(silent) = self.awake().await {
                    return silent;
                }
            }
        };
        tokio::select! {
            answered = self.answer(limit, begun_within(QUICK, call)) => answered,
            silent = silence => Err(silent),
        }
    }

    /// Whether the process answers anything at all.
    ///
    /// # Errors
    /// VM_UNREACHABLE when it was silent twice, eight seconds in all.
    pub(crate) async fn awake(&self) -> Result<(), ApiError> {
        let mut silent = None;
        for _ in 0..2 {
            let mut vms = self.vms();
            match self.answer(SMALL, vms.get_vm(self.get_request())).await {
                Err(error) if error.reason == Reason::VmUnreachable => silent = Some(error),
                _ => return Ok(()),
            }
        }
        silent.map_or(Ok(()), Err)
    }

    /// The error behind a failed call: the process's own, or VM_UNREACHABLE when the transport made
    /// it.
    pub(crate) fn refusal(&self, status: Status) -> ApiError {
        unanswered::of(status)
            .unwrap_or_else(|said| self.unreachable(format!("does not answer: {said}")))
    }

    /// VM_UNREACHABLE for this process.
    pub(crate) fn unreachable(&self, what: String) -> ApiError {
        unanswered::unreachable(&self.name, &self.uid, &self.process, &what)
    }
}
