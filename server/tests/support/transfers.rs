//! The fake agent's sides of migrations. A call that was taken goes on when its caller has given
//! up, as at a real agent.

use std::pin::Pin;

use slat_proto::{
    ApiError, Reason,
    model::{nanos_timestamp, timestamp_nanos},
    v1::{
        self, TransferPhase as SidePhase, TransferRole as Role, resolve_transfer_request::Decision,
        transfer_service_server::TransferService, vm::State,
    },
};
use tokio::sync::watch;
use tokio_stream::{Stream, StreamExt as _, wrappers::WatchStream};
use tonic::{Request, Response, Status};

use super::{Fake, ended, key};

/// What a source says of itself.
pub fn preamble() -> v1::Preamble {
    v1::Preamble {
        protocol: Some(v1::VersionRange { min: 1, max: 2 }),
        state: Some(v1::VersionRange { min: 1, max: 1 }),
        architecture: "x86_64".into(),
        page_bytes: 4096,
        backends: vec![v1::Backend::Software.into()],
        cpu: vec![v1::CpuFact {
            name: "x86.tsc_khz".into(),
            value: "2400000".into(),
        }],
        ..Default::default()
    }
}

/// What a destination chooses of it.
pub fn versions() -> v1::ChosenVersions {
    v1::ChosenVersions {
        protocol: 2,
        state: 1,
    }
}

fn role_word(role: i32) -> &'static str {
    match Role::try_from(role) {
        Ok(Role::Source) => "source",
        _ => "destination",
    }
}

/// A call that ends whether or not its caller waits.
async fn detached<T: Send + 'static>(
    call: impl Future<Output = Result<T, Status>> + Send + 'static,
) -> Result<Response<T>, Status> {
    tokio::spawn(call).await.unwrap().map(Response::new)
}

impl Fake {
    async fn describe(
        self,
        request: v1::DescribeOutgoingRequest,
    ) -> Result<v1::DescribeOutgoingResponse, Status> {
        self.gate("describe").await;
        self.called("describe", &request.migration);
        if let Some(status) = self.inner.lock().unwrap().refuse_describe.take() {
            return Err(status);
        }
        let vm = self
            .vm(&request.vm)
            .filter(|vm| request.vm_uid.is_empty() || request.vm_uid == vm.uid)
            .ok_or_else(|| ApiError::no_such_vm(&request.vm))?;
        if vm.epoch != request.epoch {
            return Err(ApiError::new(Reason::StaleEpoch, "another epoch").into());
        }
        Ok(v1::DescribeOutgoingResponse {
            preamble: Some(preamble()),
            vm: Some(vm),
            slots: vec![v1::Slot {
                pages: 16384,
                ..Default::default()
            }],
            send_time: Some(self.now()),
            channel_key: self.inner.lock().unwrap().channel_key.clone(),
        })
    }

    async fn prepare(
        self,
        request: v1::PrepareIncomingRequest,
    ) -> Result<v1::PrepareIncomingResponse, Status> {
        self.gate("prepare").await;
        let migration = request.migration.clone();
        let answer = self.prepare_now(request);
        // Told when it is done: who waits for the call finds the side.
        self.called("prepare", &migration);
        self.gate("after prepare").await;
        answer
    }

    fn prepare_now(
        &self,
        request: v1::PrepareIncomingRequest,
    ) -> Result<v1::PrepareIncomingResponse, Status> {
        let here = timestamp_nanos(&self.now());
        if let Some(error) = self.inner.lock().unwrap().refuse_prepare.take() {
            return Err(error.into());
        }
        if request.validate_only {
            return Ok(v1::PrepareIncomingResponse::default());
        }
        self.take_leave(request.grant.as_ref())?;
        let mut inner = self.inner.lock().unwrap();
        let vm = request.vm.unwrap();
        assert!(!request.slots.is_empty());
        assert!(!request.source_agent_address.is_empty());
        assert_eq!(request.preamble, Some(preamble()));
        let side = v1::Transfer {
            migration: request.migration.clone(),
            vm: vm.name.clone(),
            role: Role::Destination.into(),
            phase: SidePhase::Preparing.into(),
            epoch: vm.epoch,
            ..Default::default()
        };
        let sent = timestamp_nanos(&request.send_time.unwrap());
        let made = vm.create_time.as_ref();
        let made = made.map(|made| nanos_timestamp(here - sent + timestamp_nanos(made)));
        let incoming = v1::Vm {
            state: State::Incoming.into(),
            create_time: made,
            ..vm
        };
        inner.vms.insert(incoming.name.clone(), incoming);
        let side = inner
            .sides
            .entry(key(&request.migration, Role::Destination))
            .or_insert_with(|| watch::channel(side).0)
            .borrow()
            .clone();
        Ok(v1::PrepareIncomingResponse {
            transfer: Some(side),
            data_address: "127.0.0.1:1".into(),
            ticket: vec![7; 32],
            versions: (!inner.forget_versions).then(versions),
            channel: if inner.channel_key.is_empty() {
                v1::PageChannel::Plain.into()
            } else {
                v1::PageChannel::Tls.into()
            },
            channel_key: inner.channel_key.clone(),
        })
    }

    async fn start(self, request: v1::StartOutgoingRequest) -> Result<v1::Transfer, Status> {
        self.gate("start").await;
        let migration = request.migration.clone();
        let answer = self.start_now(request);
        // Told when it is done: who waits for the call finds the side.
        self.called("start", &migration);
        self.gate("after start").await;
        answer
    }

    fn start_now(&self, request: v1::StartOutgoingRequest) -> Result<v1::Transfer, Status> {
        assert_eq!(request.ticket, vec![7; 32]);
        assert_eq!(request.versions, Some(versions()));
        if let Some(error) = self.inner.lock().unwrap().refuse_start.take() {
            return Err(error.into());
        }
        self.take_leave(request.grant.as_ref())?;
        let mut inner = self.inner.lock().unwrap();
        inner.channels.push(request.channel);
        let side = v1::Transfer {
            migration: request.migration.clone(),
            vm: request.vm,
            vm_uid: request.vm_uid,
            role: Role::Source.into(),
            phase: SidePhase::Preparing.into(),
            epoch: request.epoch,
            ..Default::default()
        };
        let side = inner
            .sides
            .entry(key(&request.migration, Role::Source))
            .or_insert_with(|| watch::channel(side).0)
            .borrow()
            .clone();
        Ok(side)
    }

    async fn cancel(self, request: v1::CancelTransferRequest) -> Result<v1::Transfer, Status> {
        let role = request.role();
        self.gate(&format!("cancel {}", role_word(request.role)))
            .await;
        self.called(
            &format!("cancel {}", role.as_str_name()),
            &request.migration,
        );
        let side = self.find(&request.migration, request.role)?;
        let now = side.borrow().clone();
        if matches!(
            now.phase(),
            SidePhase::Relinquished | SidePhase::Ready | SidePhase::Completed
        ) {
            return Err(ApiError::new(Reason::PastPointOfNoReturn, "too late").into());
        }
        if !ended(now.phase()) {
            side.send_modify(|side| {
                side.phase = if request.error.is_some() {
                    SidePhase::Failed.into()
                } else {
                    SidePhase::Cancelled.into()
                };
                side.error = request.error;
            });
            if role == Role::Destination {
                self.remove_vm(&now.vm);
            }
        }
        let now = side.borrow().clone();
        Ok(now)
    }

    async fn resolve(self, request: v1::ResolveTransferRequest) -> Result<v1::Transfer, Status> {
        self.gate("resolve destination").await;
        let decision = request.decision();
        self.called(
            &format!("resolve {}", decision.as_str_name()),
            &request.migration,
        );
        let side = self.find(&request.migration, Role::Destination.into())?;
        self.take_leave(request.grant.as_ref())?;
        let now = side.borrow().clone();
        if now.phase() == SidePhase::Ready {
            match decision {
                Decision::Commit => {
                    let mut vm = self.vm(&now.vm).unwrap();
                    vm.state = State::Running.into();
                    vm.epoch = now.epoch + 1;
                    self.put_vm(vm);
                    side.send_modify(|side| side.phase = SidePhase::Completed.into());
                }
                _ => {
                    self.remove_vm(&now.vm);
                    side.send_modify(|side| side.phase = SidePhase::Failed.into());
                }
            }
        }
        let now = side.borrow().clone();
        Ok(now)
    }

    async fn release(
        self,
        request: v1::ReleaseTransferRequest,
    ) -> Result<v1::ReleaseTransferResponse, Status> {
        let role = request.role();
        self.called(
            &format!("release {}", role.as_str_name()),
            &request.migration,
        );
        self.gate(&format!("release {}", role_word(request.role)))
            .await;
        let side = self.find(&request.migration, request.role)?;
        let now = side.borrow().clone();
        let mut inner = self.inner.lock().unwrap();
        if inner.keep_sides {
            return Err(ApiError::new(Reason::Store, "the disk is full").into());
        }
        let gone = inner
            .vms
            .get(&now.vm)
            .is_some_and(|vm| vm.state() == State::Relinquished);
        if gone {
            inner.vms.remove(&now.vm);
        }
        inner.sides.remove(&(request.migration, request.role));
        Ok(v1::ReleaseTransferResponse {})
    }
}

#[tonic::async_trait]
impl TransferService for Fake {
    async fn describe_outgoing(
        &self,
        request: Request<v1::DescribeOutgoingRequest>,
    ) -> Result<Response<v1::DescribeOutgoingResponse>, Status> {
        detached(self.clone().describe(request.into_inner())).await
    }

    async fn prepare_incoming(
        &self,
        request: Request<v1::PrepareIncomingRequest>,
    ) -> Result<Response<v1::PrepareIncomingResponse>, Status> {
        detached(self.clone().prepare(request.into_inner())).await
    }

    async fn start_outgoing(
        &self,
        request: Request<v1::StartOutgoingRequest>,
    ) -> Result<Response<v1::Transfer>, Status> {
        detached(self.clone().start(request.into_inner())).await
    }

    async fn get_transfer(
        &self,
        request: Request<v1::GetTransferRequest>,
    ) -> Result<Response<v1::Transfer>, Status> {
        let request = request.into_inner();
        self.gate(&format!("get {}", role_word(request.role))).await;
        let side = self.find(&request.migration, request.role)?;
        let mut now = side.borrow().clone();
        if request.without_progress {
            now.progress = None;
        }
        Ok(Response::new(now))
    }

    type WatchTransferStream = Pin<Box<dyn Stream<Item = Result<v1::Transfer, Status>> + Send>>;

    async fn watch_transfer(
        &self,
        request: Request<v1::WatchTransferRequest>,
    ) -> Result<Response<Self::WatchTransferStream>, Status> {
        let request = request.into_inner();
        self.gate(&format!("watch {}", role_word(request.role)))
            .await;
        let side = self.find(&request.migration, request.role)?;
        let updates = WatchStream::new(side.subscribe()).map(Ok);
        Ok(Response::new(Box::pin(updates)))
    }

    async fn cancel_transfer(
        &self,
        request: Request<v1::CancelTransferRequest>,
    ) -> Result<Response<v1::Transfer>, Status> {
        detached(self.clone().cancel(request.into_inner())).await
    }

    async fn resolve_transfer(
        &self,
        request: Request<v1::ResolveTransferRequest>,
    ) -> Result<Response<v1::Transfer>, Status> {
        detached(self.clone().resolve(request.into_inner())).await
    }

    async fn adopt_transfer(
        &self,
        _: Request<v1::AdoptTransferRequest>,
    ) -> Result<Response<v1::AdoptTransferResponse>, Status> {
        Err(Status::internal("the server never asks an agent for this"))
    }

    async fn release_transfer(
        &self,
        request: Request<v1::ReleaseTransferRequest>,
    ) -> Result<Response<v1::ReleaseTransferResponse>, Status> {
        detached(self.clone().release(request.into_inner())).await
    }
}
