//! TransferService at the agent: forwarded to the side's process while it lives, answered from what
//! it left when it is dead. The agent decides nothing: for a dead side it says what the journal
//! says ([`super::remains`]).

use std::sync::Arc;

use slat_proto::{
    ApiError, Reason,
    model::{
        MigrationName, MigrationParams, SlotSpec, VmName, VmRef, VmSpec, check_slot_table,
        to_own_clock,
    },
    transport::Caller,
    v1::{self, resolve_transfer_request::Decision, transfer_service_server::TransferService},
};
use slat_trust::grant::Purpose;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use slat_record::uid::VmUid;

use super::{
    grants::Step,
    living::{LiveVm, QUICK},
    side::{Role, SideKey, is_terminal},
    supervisor::{Place, Supervisor, slot_bytes},
};

/// The service.
#[derive(Debug)]
pub(super) struct Transfers(pub(super) Arc<Supervisor>);

/// How a side stands where nobody can be asked any more.
fn told(place: Place) -> Result<Arc<LiveVm>, Box<v1::Transfer>> {
    match place {
        Place::Live(live) => Ok(live),
        Place::Dead(_, side) | Place::Ended(side) => Err(Box::new(side)),
    }
}

impl Transfers {
    async fn locate(
        &self,
        key: &SideKey,
    ) -> Result<Result<Arc<LiveVm>, Box<v1::Transfer>>, ApiError> {
        self.0
            .locate(key)
            .await?
            .map(told)
            .ok_or_else(|| key.unknown())
    }

    /// How a side stands, from its process or from what that left.
    async fn side(&self, key: &SideKey, without_progress: bool) -> Result<v1::Transfer, ApiError> {
        loop {
            let live = match self.locate(key).await? {
                Ok(live) => live,
                Err(side) => return Ok(*side),
            };
            let request = v1::GetTransferRequest {
                migration: key.migration.to_string(),
                role: key.role.to_message().into(),
                without_progress,
                ..Default::default()
            };
            let mut client = live.transfers();
            match live.answer(QUICK, client.get_transfer(request)).await {
                Ok(side) => {
                    live.witness(&side).await?;
                    return Ok(side);
                }
                Err(error) if error.reason == Reason::NoSuchMigration => {
                    return live.kept(key).ok_or(error);
                }
                // It died meanwhile: what it left answers.
                Err(error) if error.reason == Reason::VmUnreachable && live.has_gone().await => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// The side cannot be ended any more.
fn past(key: &SideKey, side: &v1::Transfer) -> ApiError {
    let phase = side.phase().as_str_name();
    let location = if side.phase() == v1::TransferPhase::Completed {
        "DESTINATION"
    } else {
        "UNKNOWN"
    };
    ApiError::new(
        Reason::PastPointOfNoReturn,
        format!("{} has handed {} over: {phase}", key.migration, side.vm),
    )
    .with("migration", &key.migration)
    .with("vm", &side.vm)
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
    async fn describe_outgoing(
        &self,
        request: Request<v1::DescribeOutgoingRequest>,
    ) -> Result<Response<v1::DescribeOutgoingResponse>, Status> {
        let mut request = request.into_inner();
        MigrationName::parse(&request.migration)?;
        let named = VmRef::new(&request.vm, &request.vm_uid, "")?;
        let live = self.0.living(&named).await?;
        (request.vm, request.vm_uid) = (live.name().to_string(), live.own_uid());
        let mut client = live.transfers();
        let answer = live
            .answer(QUICK, client.describe_outgoing(request))
            .await?;
        Ok(Response::new(answer))
    }

    async fn prepare_incoming(
        &self,
        request: Request<v1::PrepareIncomingRequest>,
    ) -> Result<Response<v1::PrepareIncomingResponse>, Status> {
        let mut request = request.into_inner();
        // Here, and not in the VM's process, which has to be started first.
        let sent = request.send_time.take();
        if let Some(vm) = &mut request.vm {
            to_own_clock(&mut vm.create_time, sent.as_ref());
        }
        let migration = MigrationName::parse(&request.migration)?;
        let shown = request
            .vm
            .as_ref()
            .ok_or_else(|| ApiError::bad_parameter("vm", "is missing"))?;
        let vm = (VmUid::parse(&shown.uid)?, VmName::parse(&shown.name)?);
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
        if !request.validate_only {
            let key = SideKey::destination(migration.clone());
            let step = Step {
                purpose: Purpose::Receive,
                side: &key,
                vm_uid: Some(vm.0.as_str()),
                epoch: Some(shown.epoch),
            };
            self.0.grants.accept(request.grant.as_ref(), step).await?;
        }
        request.grant_keys = self.0.grants.keys();
        self.0.backends.fresh().await;
        // Before anything is taken, and before a process is started.
        self.0.admits(&request).await?;
        let memory = spec.backing.ordinary_bytes(if slots.is_empty() {
            spec.memory_bytes
        } else {
            slot_bytes(&request.slots)
        });
        if request.validate_only {
            let free = self.0.could_prepare(vm, migration, memory, spec.backend);
            free.await?;
            return Ok(Response::new(v1::PrepareIncomingResponse::default()));
        }
        let work = Arc::clone(&self.0).prepare(vm, migration, memory, spec.backend, request);
        Ok(Response::new(self.0.finish(work).await?))
    }

    async fn start_outgoing(
        &self,
        request: Request<v1::StartOutgoingRequest>,
    ) -> Result<Response<v1::Transfer>, Status> {
        let mut request = request.into_inner();
        let key = SideKey::source(MigrationName::parse(&request.migration)?);
        let named = VmRef::new(&request.vm, &request.vm_uid, "")?;
        let live = self.0.living(&named).await?;
        (request.vm, request.vm_uid) = (live.name().to_string(), live.own_uid());
        let uid = live.own_uid();
        let step = Step {
            purpose: Purpose::Send,
            side: &key,
            vm_uid: (!uid.is_empty()).then_some(uid.as_str()),
            // The process compares the request's with its own.
            epoch: Some(request.epoch),
        };
        let grants = &self.0.grants;
        grants.accept(request.grant.as_ref(), step).await?;
        request.grant_keys = grants.keys();
        let work = Arc::clone(&self.0).start_outgoing(live, key, request);
        Ok(Response::new(self.0.finish(work).await?))
    }

    async fn get_transfer(
        &self,
        request: Request<v1::GetTransferRequest>,
    ) -> Result<Response<v1::Transfer>, Status> {
        let caller = request.extensions().get::<Caller>().cloned();
        let mut request = request.into_inner();
        let key = SideKey::from_fields(&request.migration, request.role)?;
        let asking = caller.as_ref().and_then(Caller::agent);
        let nobody = caller.as_ref().is_none_or(|it| it.identity.is_none());
        // Who cannot be told apart is believed, unless it shows something that is wrong.
        let shown = if asking.is_some() || (nobody && request.grant.is_some()) {
            request.without_progress = true;
            let grants = &self.0.grants;
            Some(grants.may_ask(request.grant.as_ref(), &key, asking)?)
        } else {
            None
        };
        let mut side = self.side(&key, request.without_progress).await?;
        if let Some(grant) = shown
            && !side.vm_uid.is_empty()
            && side.vm_uid != grant.vm_uid
        {
            return Err(key.unknown().into());
        }
        if request.without_progress {
            side.progress = None;
        }
        Ok(Response::new(side))
    }

    type WatchTransferStream = ReceiverStream<Result<v1::Transfer, Status>>;

    async fn watch_transfer(
        &self,
        request: Request<v1::WatchTransferRequest>,
    ) -> Result<Response<Self::WatchTransferStream>, Status> {
        let request = request.into_inner();
        let key = SideKey::from_fields(&request.migration, request.role)?;
        let (sender, receiver) = mpsc::channel(4);
        match self.locate(&key).await? {
            Ok(live) => {
                let mut client = live.transfers();
                let stream = match live.answer(QUICK, client.watch_transfer(request)).await {
                    Ok(stream) => stream,
                    Err(error) if error.reason == Reason::NoSuchMigration => {
                        let side = live.kept(&key).ok_or(error)?;
                        self.0
                            .tasks
                            .spawn(tell(Arc::clone(&self.0), key, side, sender));
                        return Ok(Response::new(ReceiverStream::new(receiver)));
                    }
                    Err(error) => return Err(error.into()),
                };
                self.0
                    .tasks
                    .spawn(relay_side(Arc::clone(&self.0), key, live, stream, sender));
            }
            Err(side) => {
                self.0
                    .tasks
                    .spawn(tell(Arc::clone(&self.0), key, *side, sender));
            }
        }
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn cancel_transfer(
        &self,
        request: Request<v1::CancelTransferRequest>,
    ) -> Result<Response<v1::Transfer>, Status> {
        let request = request.into_inner();
        let key = SideKey::from_fields(&request.migration, request.role)?;
        let side = match self.locate(&key).await? {
            Ok(live) => {
                let mut client = live.transfers();
                match live.answer_long(client.cancel_transfer(request)).await {
                    Ok(side) => {
                        live.witness(&side).await?;
                        return Ok(Response::new(side));
                    }
                    Err(error) if error.reason == Reason::NoSuchMigration => {
                        live.kept(&key).ok_or(error)?
                    }
                    Err(error) if error.reason == Reason::VmUnreachable => {
                        if !live.has_gone().await {
                            live.note_cancel(&key);
                            return Err(error.into());
                        }
                        self.side(&key, false).await?
                    }
                    Err(error) => return Err(error.into()),
                }
            }
            Err(side) => *side,
        };
        match side.phase() {
            v1::TransferPhase::Relinquished | v1::TransferPhase::Completed => {
                Err(past(&key, &side).into())
            }
            _ => Ok(Response::new(side)),
        }
    }

    async fn resolve_transfer(
        &self,
        request: Request<v1::ResolveTransferRequest>,
    ) -> Result<Response<v1::Transfer>, Status> {
        let mut request = request.into_inner();
        let key = SideKey {
            migration: MigrationName::parse(&request.migration)?,
            role: Role::Destination,
        };
        let place = self.locate(&key).await?;
        let purpose = match request.decision() {
            Decision::Commit => Purpose::Commit,
            Decision::Abort => Purpose::Abort,
            Decision::Unspecified => {
                return Err(ApiError::bad_parameter("decision", "is COMMIT or ABORT").into());
            }
        };
        let uid = match &place {
            Ok(live) => live.own_uid(),
            Err(side) => side.vm_uid.clone(),
        };
        let step = Step {
            purpose,
            side: &key,
            vm_uid: (!uid.is_empty()).then_some(uid.as_str()),
            epoch: None,
        };
        let grants = &self.0.grants;
        grants.accept(request.grant.as_ref(), step).await?;
        request.grant_keys = grants.keys();
        request.ordered = false;
        match place {
            Ok(live) => {
                let mut client = live.transfers();
                match live.answer_long(client.resolve_transfer(request)).await {
                    Ok(side) => Ok(Response::new(side)),
                    Err(error)
                        if error.reason == Reason::VmUnreachable && live.has_gone().await =>
                    {
                        Ok(Response::new(self.side(&key, false).await?))
                    }
                    Err(error) => Err(error.into()),
                }
            }
            // Its memory is gone; no decision changes how it stands.
            Err(side) => Ok(Response::new(*side)),
        }
    }

    async fn adopt_transfer(
        &self,
        request: Request<v1::AdoptTransferRequest>,
    ) -> Result<Response<v1::AdoptTransferResponse>, Status> {
        // Here it would bypass what the order has to say that it gives up.
        Err(ApiError::new(
            Reason::NoSuchMethod,
            "a VM is taken back through HostService.AdoptLeftover",
        )
        .with("migration", &request.get_ref().migration)
        .into())
    }

    async fn release_transfer(
        &self,
        request: Request<v1::ReleaseTransferRequest>,
    ) -> Result<Response<v1::ReleaseTransferResponse>, Status> {
        let request = request.into_inner();
        let key = SideKey::from_fields(&request.migration, request.role)?;
        self.0.finish(Arc::clone(&self.0).release(key)).await?;
        Ok(Response::new(v1::ReleaseTransferResponse {}))
    }
}

/// Forwards a side's stream. When its process dies meanwhile, goes on with what that left.
async fn relay_side(
    supervisor: Arc<Supervisor>,
    key: SideKey,
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
        && live.has_gone().await
        && let Ok(Some(Place::Dead(_, side) | Place::Ended(side))) = supervisor.locate(&key).await
    {
        tell(supervisor, key, side, sender).await;
        return;
    }
    tokio::select! {
        () = stop.cancelled() => {}
        sent = sender.send(Err(failed.into())) => drop(sent),
    }
}

/// Sends a dead side's state. A terminal one ends the stream; another waits for nothing but its
/// release.
async fn tell(
    supervisor: Arc<Supervisor>,
    key: SideKey,
    side: v1::Transfer,
    sender: mpsc::Sender<Result<v1::Transfer, Status>>,
) {
    let terminal = is_terminal(side.phase());
    let mut changes = supervisor.registry.changes();
    tokio::select! {
        () = supervisor.stop.cancelled() => return,
        sent = sender.send(Ok(side)) => if sent.is_err() || terminal { return },
    }
    while supervisor
        .sides()
        .iter()
        .any(|side| SideKey::of(side).as_ref() == Some(&key))
    {
        tokio::select! {
            () = supervisor.stop.cancelled() => return,
            () = sender.closed() => return,
            changed = changes.changed() => if changed.is_err() { return },
        }
    }
}
