//! TransferService at the agent: forwarded to the half's process while it lives, answered from what it left when it is
//! dead. The agent decides nothing: a dead half's answer is its journal's ([`super::remains`]).

use std::sync::Arc;

use slat_proto::{
    ApiError, Reason,
    model::{MigrationName, MigrationParams, SlotSpec, VmName, VmSpec, check_slot_table},
    v1::{self, transfer_service_server::TransferService},
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::{
    living::{HEAVY, LiveVm, QUICK},
    side::{HalfKey, Role, is_terminal},
    supervisor::{Place, Supervisor, slot_bytes},
};

/// The service.
#[derive(Debug)]
pub(super) struct Transfers(pub(super) Arc<Supervisor>);

/// How a half stands where nobody can be asked any more.
fn told(place: Place) -> Result<Arc<LiveVm>, Box<v1::Transfer>> {
    match place {
        Place::Live(live) => Ok(live),
        Place::Dead(_, half) | Place::Ended(half) => Err(Box::new(half)),
    }
}

impl Transfers {
    async fn locate(
        &self,
        key: &HalfKey,
    ) -> Result<Result<Arc<LiveVm>, Box<v1::Transfer>>, ApiError> {
        self.0
            .locate(key)
            .await?
            .map(told)
            .ok_or_else(|| key.unknown())
    }

    /// How a half stands, from its process or from what that left.
    async fn half(&self, key: &HalfKey) -> Result<v1::Transfer, ApiError> {
        loop {
            let live = match self.locate(key).await? {
                Ok(live) => live,
                Err(half) => return Ok(*half),
            };
            let request = v1::GetTransferRequest {
                migration: key.migration.to_string(),
                role: key.role.to_message().into(),
            };
            let mut client = live.transfers();
            match live.answer(QUICK, client.get_transfer(request)).await {
                Ok(half) => {
                    live.witness(&half).await?;
                    return Ok(half);
                }
                Err(error) if error.reason == Reason::NoSuchMigration => {
                    return live.kept(key).ok_or(error);
                }
                // It died over the question: what it left answers.
                Err(error) if error.reason == Reason::VmUnreachable && went(&live).await => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// Whether the process has just gone.
async fn went(live: &LiveVm) -> bool {
    tokio::time::timeout(std::time::Duration::from_secs(1), live.gone().cancelled())
        .await
        .is_ok()
}

/// The half cannot be ended any more.
fn past(key: &HalfKey, half: &v1::Transfer) -> ApiError {
    let phase = half.phase().as_str_name();
    let location = if half.phase() == v1::TransferPhase::Completed {
        "DESTINATION"
    } else {
        "UNKNOWN"
    };
    ApiError::new(
        Reason::PastPointOfNoReturn,
        format!("{} has handed {} over: {phase}", key.migration, half.vm),
    )
    .with("migration", &key.migration)
    .with("vm", &half.vm)
    .with("phase", phase)
    .with("side", key.role.as_str())
    .with("vm_location", location)
    .with(
        "advice",
        "wait for its end; move the VM back if it should not stay there",
    )
}

#[tonic::async_trait]
impl TransferService for Transfers {
    async fn prepare_incoming(
        &self,
        request: Request<v1::PrepareIncomingRequest>,
    ) -> Result<Response<v1::PrepareIncomingResponse>, Status> {
        let request = request.into_inner();
        let migration = MigrationName::parse(&request.migration)?;
        let shown = request
            .vm
            .as_ref()
            .ok_or_else(|| ApiError::bad_parameter("vm", "is missing"))?;
        let vm = VmName::parse(&shown.name)?;
        let spec = shown
            .spec
            .as_ref()
            .ok_or_else(|| ApiError::bad_parameter("vm.spec", "is missing"))?;
        let spec = VmSpec::from_resource(spec)?;
        MigrationParams::from_message(request.params.as_ref())?;
        let slots: Vec<SlotSpec> = request
            .slots
            .iter()
            .map(SlotSpec::from_message)
            .collect::<Result<_, _>>()?;
        check_slot_table(&slots)?;
        let memory = if slots.is_empty() {
            spec.memory_bytes
        } else {
            slot_bytes(&request.slots)
        };
        let work = Arc::clone(&self.0).prepare(vm, migration, memory, spec.backend, request);
        Ok(Response::new(self.0.finish(work).await?))
    }

    async fn start_outgoing(
        &self,
        request: Request<v1::StartOutgoingRequest>,
    ) -> Result<Response<v1::Transfer>, Status> {
        let request = request.into_inner();
        let key = HalfKey::source(MigrationName::parse(&request.migration)?);
        let live = self.0.living(&VmName::parse(&request.vm)?).await?;
        let work = Arc::clone(&self.0).start_outgoing(live, key, request);
        Ok(Response::new(self.0.finish(work).await?))
    }

    async fn get_transfer(
        &self,
        request: Request<v1::GetTransferRequest>,
    ) -> Result<Response<v1::Transfer>, Status> {
        let request = request.into_inner();
        let key = HalfKey::from_fields(&request.migration, request.role)?;
        Ok(Response::new(self.half(&key).await?))
    }

    type WatchTransferStream = ReceiverStream<Result<v1::Transfer, Status>>;

    async fn watch_transfer(
        &self,
        request: Request<v1::WatchTransferRequest>,
    ) -> Result<Response<Self::WatchTransferStream>, Status> {
        let request = request.into_inner();
        let key = HalfKey::from_fields(&request.migration, request.role)?;
        let (sender, receiver) = mpsc::channel(4);
        match self.locate(&key).await? {
            Ok(live) => {
                let mut client = live.transfers();
                let stream = match live.answer(QUICK, client.watch_transfer(request)).await {
                    Ok(stream) => stream,
                    Err(error) if error.reason == Reason::NoSuchMigration => {
                        let half = live.kept(&key).ok_or(error)?;
                        self.0
                            .tasks
                            .spawn(tell(Arc::clone(&self.0), key, half, sender));
                        return Ok(Response::new(ReceiverStream::new(receiver)));
                    }
                    Err(error) => return Err(error.into()),
                };
                self.0
                    .tasks
                    .spawn(relay_half(Arc::clone(&self.0), key, live, stream, sender));
            }
            Err(half) => {
                self.0
                    .tasks
                    .spawn(tell(Arc::clone(&self.0), key, *half, sender));
            }
        }
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn cancel_transfer(
        &self,
        request: Request<v1::CancelTransferRequest>,
    ) -> Result<Response<v1::Transfer>, Status> {
        let request = request.into_inner();
        let key = HalfKey::from_fields(&request.migration, request.role)?;
        let half = match self.locate(&key).await? {
            Ok(live) => {
                let mut client = live.transfers();
                match live.answer(HEAVY, client.cancel_transfer(request)).await {
                    Ok(half) => {
                        live.witness(&half).await?;
                        return Ok(Response::new(half));
                    }
                    Err(error) if error.reason == Reason::NoSuchMigration => {
                        live.kept(&key).ok_or(error)?
                    }
                    Err(error) if error.reason == Reason::VmUnreachable && went(&live).await => {
                        self.half(&key).await?
                    }
                    Err(error) => return Err(error.into()),
                }
            }
            Err(half) => *half,
        };
        match half.phase() {
            v1::TransferPhase::Relinquished | v1::TransferPhase::Completed => {
                Err(past(&key, &half).into())
            }
            _ => Ok(Response::new(half)),
        }
    }

    async fn resolve_transfer(
        &self,
        request: Request<v1::ResolveTransferRequest>,
    ) -> Result<Response<v1::Transfer>, Status> {
        let request = request.into_inner();
        let key = HalfKey {
            migration: MigrationName::parse(&request.migration)?,
            role: Role::Destination,
        };
        match self.locate(&key).await? {
            Ok(live) => {
                let mut client = live.transfers();
                match live.answer(HEAVY, client.resolve_transfer(request)).await {
                    Ok(half) => Ok(Response::new(half)),
                    Err(error) if error.reason == Reason::VmUnreachable && went(&live).await => {
                        Ok(Response::new(self.half(&key).await?))
                    }
                    Err(error) => Err(error.into()),
                }
            }
            // Its memory is gone; no decision changes how it stands.
            Err(half) => Ok(Response::new(*half)),
        }
    }

    async fn release_transfer(
        &self,
        request: Request<v1::ReleaseTransferRequest>,
    ) -> Result<Response<v1::ReleaseTransferResponse>, Status> {
        let request = request.into_inner();
        let key = HalfKey::from_fields(&request.migration, request.role)?;
        self.0.finish(Arc::clone(&self.0).release(key)).await?;
        Ok(Response::new(v1::ReleaseTransferResponse {}))
    }
}

/// Passes a half's stream on; when its process dies under it, goes on with what that left.
async fn relay_half(
    supervisor: Arc<Supervisor>,
    key: HalfKey,
    live: Arc<LiveVm>,
    mut stream: tonic::Streaming<v1::Transfer>,
    sender: mpsc::Sender<Result<v1::Transfer, Status>>,
) {
    let stop = supervisor.stop.clone();
    let failed = loop {
        let message = tokio::select! {
            () = stop.cancelled() => {
                let error = ApiError::new(Reason::HostUnreachable, "the agent is stopping; watch again");
                drop(sender.try_send(Err(error.into())));
                return;
            }
            () = sender.closed() => return,
            message = stream.message() => message,
        };
        let message = match message {
            Ok(Some(message)) => match live.witness(&message).await {
                Ok(()) => message,
                Err(error) => break error,
            },
            Ok(None) => return,
            Err(status) => break live.refusal(status),
        };
        tokio::select! {
            () = stop.cancelled() => return,
            sent = sender.send(Ok(message)) => if sent.is_err() { return },
        }
    };
    if failed.reason == Reason::VmUnreachable
        && went(&live).await
        && let Ok(Some(Place::Dead(_, half) | Place::Ended(half))) = supervisor.locate(&key).await
    {
        tell(supervisor, key, half, sender).await;
        return;
    }
    tokio::select! {
        () = stop.cancelled() => {}
        sent = sender.send(Err(failed.into())) => drop(sent),
    }
}

/// Sends a dead half's state. A terminal one ends the stream; another waits for nothing but its release.
async fn tell(
    supervisor: Arc<Supervisor>,
    key: HalfKey,
    half: v1::Transfer,
    sender: mpsc::Sender<Result<v1::Transfer, Status>>,
) {
    let terminal = is_terminal(half.phase());
    let mut changes = supervisor.registry.changes();
    tokio::select! {
        () = supervisor.stop.cancelled() => return,
        sent = sender.send(Ok(half)) => if sent.is_err() || terminal { return },
    }
    while supervisor
        .halves()
        .iter()
        .any(|half| HalfKey::of(half).as_ref() == Some(&key))
    {
        tokio::select! {
            () = supervisor.stop.cancelled() => return,
            () = sender.closed() => return,
            changed = changes.changed() => if changed.is_err() { return },
        }
    }
}
