//! `TransferService` over a monitor's [`Transfers`]: names are read, blocking calls go to blocking
//! threads, and a watch is a task that ends with its side or its watcher.

use std::{pin::Pin, sync::Arc, time::Duration};

use slat_proto::{
    ApiError, Reason,
    model::MigrationName,
    v1::{self, TransferPhase, TransferRole, transfer_service_server::TransferService},
};
use tokio::{sync::mpsc, time::Instant};
use tokio_stream::{Stream, wrappers::ReceiverStream};
use tonic::{Request, Response, Status};

use super::super::monitor::{Transfers, Watched};
use crate::handover::side::has_ended;

/// A watcher that does not read holds up its own task after this many messages, nothing else.
const WATCH_BUFFER: usize = 4;
/// A watcher hears figures no more often than this.
const FIGURES_EVERY: Duration = Duration::from_millis(100);
/// And the lists of iterations and decisions.
const HISTORIES_EVERY: Duration = Duration::from_secs(1);

/// The service over one monitor's sides.
#[derive(Clone, Debug)]
pub(crate) struct TransferApi {
    transfers: Arc<dyn Transfers>,
}

impl TransferApi {
    /// Serves `transfers`.
    #[must_use]
    pub(crate) fn new(transfers: Arc<dyn Transfers>) -> Self {
        Self { transfers }
    }

    async fn blocking<T: Send + 'static>(
        &self,
        call: impl FnOnce(&dyn Transfers) -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, Status> {
        let transfers = Arc::clone(&self.transfers);
        tokio::task::spawn_blocking(move || call(&*transfers))
            .await
            .map_err(|error| ApiError::new(Reason::Internal, format!("a call failed: {error}")))?
            .map_err(Status::from)
    }
}

/// Which side a request means.
fn side(migration: &str, role: i32) -> Result<(MigrationName, TransferRole), ApiError> {
    let migration = MigrationName::parse(migration)?;
    match TransferRole::try_from(role) {
        Ok(role @ (TransferRole::Source | TransferRole::Destination)) => Ok((migration, role)),
        _ => Err(ApiError::bad_parameter("role", "is SOURCE or DESTINATION")),
    }
}

#[tonic::async_trait]
impl TransferService for TransferApi {
    async fn describe_outgoing(
        &self,
        request: Request<v1::DescribeOutgoingRequest>,
    ) -> Result<Response<v1::DescribeOutgoingResponse>, Status> {
        let described =
            self.blocking(move |transfers| transfers.describe_outgoing(request.get_ref()));
        Ok(Response::new(described.await?))
    }

    async fn prepare_incoming(
        &self,
        request: Request<v1::PrepareIncomingRequest>,
    ) -> Result<Response<v1::PrepareIncomingResponse>, Status> {
        let prepared =
            self.blocking(move |transfers| transfers.prepare_incoming(request.get_ref()));
        Ok(Response::new(prepared.await?))
    }

    async fn start_outgoing(
        &self,
        request: Request<v1::StartOutgoingRequest>,
    ) -> Result<Response<v1::Transfer>, Status> {
        let started = self.blocking(move |transfers| transfers.start_outgoing(request.get_ref()));
        Ok(Response::new(started.await?))
    }

    async fn get_transfer(
        &self,
        request: Request<v1::GetTransferRequest>,
    ) -> Result<Response<v1::Transfer>, Status> {
        let request = request.get_ref();
        let (migration, role) = side(&request.migration, request.role)?;
        let transfer = self.blocking(move |transfers| transfers.transfer(&migration, role));
        let mut transfer = transfer.await?;
        if request.without_progress {
            transfer.progress = None;
        }
        Ok(Response::new(transfer))
    }

    type WatchTransferStream = Pin<Box<dyn Stream<Item = Result<v1::Transfer, Status>> + Send>>;

    async fn watch_transfer(
        &self,
        request: Request<v1::WatchTransferRequest>,
    ) -> Result<Response<Self::WatchTransferStream>, Status> {
        let request = request.get_ref();
        let (migration, role) = side(&request.migration, request.role)?;
        let watched = self.blocking(move |transfers| transfers.watch(&migration, role));
        let (sender, receiver) = mpsc::channel(WATCH_BUFFER);
        tokio::spawn(follow(watched.await?, sender));
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn cancel_transfer(
        &self,
        request: Request<v1::CancelTransferRequest>,
    ) -> Result<Response<v1::Transfer>, Status> {
        let request = request.into_inner();
        let (migration, role) = side(&request.migration, request.role)?;
        let cancelled =
            self.blocking(move |transfers| transfers.cancel(&migration, role, request.error));
        Ok(Response::new(cancelled.await?))
    }

    async fn resolve_transfer(
        &self,
        request: Request<v1::ResolveTransferRequest>,
    ) -> Result<Response<v1::Transfer>, Status> {
        let resolved = self.blocking(move |transfers| transfers.resolve(request.get_ref()));
        Ok(Response::new(resolved.await?))
    }

    async fn adopt_transfer(
        &self,
        request: Request<v1::AdoptTransferRequest>,
    ) -> Result<Response<v1::AdoptTransferResponse>, Status> {
        let adopted = self.blocking(move |transfers| transfers.adopt(request.get_ref()));
        Ok(Response::new(adopted.await?))
    }

    async fn release_transfer(
        &self,
        request: Request<v1::ReleaseTransferRequest>,
    ) -> Result<Response<v1::ReleaseTransferResponse>, Status> {
        let request = request.get_ref();
        let (migration, role) = side(&request.migration, request.role)?;
        self.blocking(move |transfers| transfers.release(&migration, role))
            .await?;
        Ok(Response::new(v1::ReleaseTransferResponse {}))
    }
}

/// Sends the side at each change, until it has ended or nobody listens. A new phase goes out at
/// once, figures after [`FIGURES_EVERY`], histories with a new phase and otherwise after
/// [`HISTORIES_EVERY`].
async fn follow(watched: Watched, sender: mpsc::Sender<Result<v1::Transfer, Status>>) {
    let mut changes = watched.changes.clone();
    let mut sent: Option<(TransferPhase, Instant)> = None;
    loop {
        changes.mark_unchanged();
        let mut transfer = (watched.now)();
        let phase = transfer.phase();
        match sent {
            Some((before, at)) if before == phase && at.elapsed() < HISTORIES_EVERY => {
                if let Some(progress) = &mut transfer.progress {
                    progress.omit_histories();
                }
            }
            _ => sent = Some((phase, Instant::now())),
        }
        let next = Instant::now() + FIGURES_EVERY;
        if sender.send(Ok(transfer)).await.is_err() || has_ended(phase) {
            return;
        }
        loop {
            tokio::select! {
                changed = changes.changed() => if changed.is_err() { return },
                () = sender.closed() => return,
            }
            if (watched.phase)() != phase || Instant::now() >= next {
                break;
            }
            // Figures only: they wait, unless a new phase comes.
            tokio::select! {
                () = tokio::time::sleep_until(next) => break,
                changed = changes.changed() => if changed.is_err() { return },
                () = sender.closed() => return,
            }
            if (watched.phase)() != phase {
                break;
            }
        }
    }
}
