//! TransferService at the VM process's endpoint: starts the sides and answers for them.
//!
//! A process has at most one running side. The last source's side stays to be asked about after it
//! ended, until it is released or another begins; so does the destination's side that brought the VM
//! here. Blocking work runs on `spawn_blocking`; the sides' threads are their own. The lock around the
//! sides is held for look-ups only; beginning a side has a lock of its own, taken before it.
//!
//! `incoming` prepares the destination's side, `outgoing` describes and starts the source's.

mod incoming;
mod outgoing;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_software;

use std::{
    net::IpAddr,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use slat_proto::{
    ApiError, Reason,
    model::{MigrationName, VmName},
    v1::{self, TransferPhase, TransferRole, transfer_service_server::TransferService},
};
use tokio_stream::Stream;
use tonic::{Request, Response, Status};

use self::incoming::Incoming;
use crate::{
    handover::{
        protocol::source::Source as SourceProtocol,
        side::{AnySide, Side, has_ended},
    },
    machine::Machine,
};

#[derive(Debug, Default)]
struct Sides {
    incoming: Option<Incoming>,
    outgoing: Option<Arc<Side<SourceProtocol>>>,
}

/// The service over one machine.
#[derive(Clone, Debug)]
pub(crate) struct TransferEndpoint {
    machine: Arc<Machine>,
    vm: VmName,
    data_ip: IpAddr,
    sides: Arc<Mutex<Sides>>,
    /// Held while a side begins, which may take long; never by those who only ask.
    starting: Arc<Mutex<()>>,
    #[cfg(test)]
    pub(super) omit: Option<(u32, u32, u32)>,
}

impl TransferEndpoint {
    /// An endpoint to `machine`, whose incoming pages are taken on `data_ip`.
    #[must_use]
    pub(crate) fn new(machine: Arc<Machine>, vm: VmName, data_ip: IpAddr) -> Self {
        Self {
            machine,
            vm,
            data_ip,
            sides: Arc::default(),
            starting: Arc::default(),
            #[cfg(test)]
            omit: None,
        }
    }

    fn sides(&self) -> MutexGuard<'_, Sides> {
        self.sides.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn starting(&self) -> MutexGuard<'_, ()> {
        self.starting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn find(
        &self,
        migration: &str,
        role: TransferRole,
    ) -> Result<Arc<dyn AnySide>, ApiError> {
        let migration = MigrationName::parse(migration)?;
        let sides = self.sides();
        let side: Option<Arc<dyn AnySide>> = match role {
            TransferRole::Source => sides.outgoing.clone().map(|side| side as Arc<dyn AnySide>),
            TransferRole::Destination => sides
                .incoming
                .as_ref()
                .map(|incoming| Arc::clone(&incoming.side) as Arc<dyn AnySide>),
            TransferRole::Unspecified => {
                return Err(ApiError::bad_parameter("role", "is SOURCE or DESTINATION"));
            }
        };
        side.filter(|side| *side.migration() == migration)
            .ok_or_else(|| {
                ApiError::new(
                    Reason::NoSuchMigration,
                    format!(
                        "{} has no {} side of {migration}",
                        self.vm,
                        role.as_str_name()
                    ),
                )
                .with("migration", &migration)
            })
    }

    fn release(&self, request: &v1::ReleaseTransferRequest) -> Result<(), ApiError> {
        let migration = MigrationName::parse(&request.migration)?;
        let role = TransferRole::try_from(request.role).unwrap_or_default();
        let side = match self.find(&request.migration, role) {
            Ok(side) => side,
            // Released before.
            Err(error) if error.reason == Reason::NoSuchMigration => return Ok(()),
            Err(error) => return Err(error),
        };
        let phase = side.phase();
        let relinquished = role == TransferRole::Source
            && matches!(
                phase,
                TransferPhase::Relinquished | TransferPhase::Completed
            );
        if !relinquished && !has_ended(phase) {
            return Err(ApiError::new(
                Reason::MigrationInProgress,
                format!("{migration} has not ended here: {}", phase.as_str_name()),
            )
            .with("migration", &migration)
            .with("phase", phase.as_str_name()));
        }
        side.release_record(self.machine.dir()).map_err(|error| {
            ApiError::new(
                Reason::Store,
                format!("the record of {migration} could not be removed: {error}"),
            )
        })?;
        if relinquished {
            // Before the side is forgotten: a release that fails is tried again.
            self.machine.release()?;
        }
        let mut sides = self.sides();
        match role {
            TransferRole::Source => sides.outgoing = None,
            _ => sides.incoming = None,
        }
        Ok(())
    }
}

/// Runs blocking work of the machine off the runtime's workers.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<Response<T>, Status> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => Ok(Response::new(result?)),
        Err(error) => {
            Err(ApiError::new(Reason::Internal, format!("a call failed: {error}")).into())
        }
    }
}

type TransferStream = Pin<Box<dyn Stream<Item = Result<v1::Transfer, Status>> + Send>>;

#[tonic::async_trait]
impl TransferService for TransferEndpoint {
    async fn describe_outgoing(
        &self,
        request: Request<v1::DescribeOutgoingRequest>,
    ) -> Result<Response<v1::DescribeOutgoingResponse>, Status> {
        let endpoint = self.clone();
        blocking(move || endpoint.describe(request.get_ref())).await
    }

    async fn prepare_incoming(
        &self,
        request: Request<v1::PrepareIncomingRequest>,
    ) -> Result<Response<v1::PrepareIncomingResponse>, Status> {
        let (endpoint, runtime) = (self.clone(), tokio::runtime::Handle::current());
        blocking(move || endpoint.prepare(request.get_ref(), runtime)).await
    }

    async fn start_outgoing(
        &self,
        request: Request<v1::StartOutgoingRequest>,
    ) -> Result<Response<v1::Transfer>, Status> {
        let endpoint = self.clone();
        blocking(move || endpoint.start(request.get_ref())).await
    }

    async fn get_transfer(
        &self,
        request: Request<v1::GetTransferRequest>,
    ) -> Result<Response<v1::Transfer>, Status> {
        let request = request.get_ref();
        Ok(Response::new(
            self.find(&request.migration, request.role())?.transfer(),
        ))
    }

    type WatchTransferStream = TransferStream;

    async fn watch_transfer(
        &self,
        request: Request<v1::WatchTransferRequest>,
    ) -> Result<Response<TransferStream>, Status> {
        let request = request.get_ref();
        let side = self.find(&request.migration, request.role())?;
        let (sender, receiver) = tokio::sync::mpsc::channel(4);
        // Ends with the side or with its watcher.
        tokio::spawn(async move {
            let mut version = side.watch();
            loop {
                version.mark_unchanged();
                let transfer = side.transfer();
                let last = has_ended(transfer.phase());
                if sender.send(Ok(transfer)).await.is_err() || last {
                    return;
                }
                tokio::select! {
                    changed = version.changed() => if changed.is_err() { return },
                    () = sender.closed() => return,
                }
            }
        });
        Ok(Response::new(Box::pin(
            tokio_stream::wrappers::ReceiverStream::new(receiver),
        )))
    }

    async fn cancel_transfer(
        &self,
        request: Request<v1::CancelTransferRequest>,
    ) -> Result<Response<v1::Transfer>, Status> {
        let request = request.into_inner();
        let side = self.find(&request.migration, request.role())?;
        side.cancel(request.error)?;
        Ok(Response::new(side.transfer()))
    }

    async fn resolve_transfer(
        &self,
        request: Request<v1::ResolveTransferRequest>,
    ) -> Result<Response<v1::Transfer>, Status> {
        Ok(Response::new(self.resolve(request.get_ref())?))
    }

    async fn release_transfer(
        &self,
        request: Request<v1::ReleaseTransferRequest>,
    ) -> Result<Response<v1::ReleaseTransferResponse>, Status> {
        let endpoint = self.clone();
        blocking(move || {
            endpoint
                .release(request.get_ref())
                .map(|()| v1::ReleaseTransferResponse {})
        })
        .await
    }
}
