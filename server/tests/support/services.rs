//! The fake agent's other services: its host, its VMs, their memory.

use slat_proto::{
    ApiError,
    v1::{
        self, host_service_server::HostService, memory_service_server::MemoryService, vm::State,
        vm_service_server::VmService,
    },
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::*;

/// Between two looks of a watch at its VM.
const LOOK: Duration = Duration::from_millis(5);

impl Fake {
    /// A VM now and whenever it changes, until it is gone, the agent stops or nobody listens.
    async fn tell(self, name: String, out: mpsc::Sender<Result<v1::Vm, Status>>) {
        let mut told = None;
        while let Some(vm) = self.watched(&name) {
            if told.as_ref() != Some(&vm) {
                if out.send(Ok(vm.clone())).await.is_err() {
                    return;
                }
                told = Some(vm);
            }
            tokio::select! {
                () = out.closed() => return,
                () = tokio::time::sleep(LOOK) => {}
            }
        }
    }
}

#[tonic::async_trait]
impl HostService for Fake {
    async fn get_host(&self, _: Request<v1::GetHostRequest>) -> Result<Response<v1::Host>, Status> {
        if let Some(other) = &self.inner.lock().unwrap().answers_as {
            return Ok(Response::new(other.clone()));
        }
        Ok(Response::new(v1::Host {
            memory_used_bytes: self.report().memory_used_bytes,
            ..self.host()
        }))
    }

    async fn list_hosts(
        &self,
        _: Request<v1::ListHostsRequest>,
    ) -> Result<Response<v1::ListHostsResponse>, Status> {
        // An agent's fleet is its own host.
        let host = self
            .get_host(Request::new(v1::GetHostRequest::default()))
            .await?;
        Ok(Response::new(v1::ListHostsResponse {
            hosts: vec![host.into_inner()],
            ..Default::default()
        }))
    }

    async fn cordon_host(
        &self,
        _request: Request<v1::CordonHostRequest>,
    ) -> Result<Response<v1::Host>, Status> {
        Err(Status::internal("this agent has none"))
    }

    async fn fence_host(
        &self,
        _: Request<v1::FenceHostRequest>,
    ) -> Result<Response<v1::Host>, Status> {
        Err(Status::internal("this agent has none"))
    }

    async fn uncordon_host(
        &self,
        _request: Request<v1::UncordonHostRequest>,
    ) -> Result<Response<v1::Host>, Status> {
        Err(Status::internal("this agent has none"))
    }

    async fn delete_host(
        &self,
        _request: Request<v1::DeleteHostRequest>,
    ) -> Result<Response<v1::DeleteHostResponse>, Status> {
        Err(Status::internal("this agent has none"))
    }

    async fn list_leftovers(
        &self,
        _: Request<v1::ListLeftoversRequest>,
    ) -> Result<Response<v1::ListLeftoversResponse>, Status> {
        Ok(Response::new(v1::ListLeftoversResponse {
            leftovers: self.inner.lock().unwrap().leftovers.clone(),
            ..Default::default()
        }))
    }

    async fn adopt_leftover(
        &self,
        request: Request<v1::AdoptLeftoverRequest>,
    ) -> Result<Response<v1::AdoptLeftoverResponse>, Status> {
        let request = request.into_inner();
        let left = self.end_leftover(&request.uid, request.give_up, |left| &left.adopt_gives_up)?;
        self.called("adopt", &format!("{} {}", left.uid, request.epoch));
        let mut adopted = vm(&left.vm, 64);
        adopted.uid = left.uid;
        adopted.epoch = request.epoch;
        adopted.state = State::Paused.into();
        self.put_vm(adopted.clone());
        Ok(Response::new(v1::AdoptLeftoverResponse {
            vm: Some(adopted),
        }))
    }

    async fn delete_leftover(
        &self,
        request: Request<v1::DeleteLeftoverRequest>,
    ) -> Result<Response<v1::DeleteLeftoverResponse>, Status> {
        let request = request.into_inner();
        let left =
            self.end_leftover(&request.uid, request.give_up, |left| &left.delete_gives_up)?;
        self.called("delete-leftover", &left.uid);
        Ok(Response::new(v1::DeleteLeftoverResponse {}))
    }
}

impl Fake {
    /// Takes a leftover away, when the order gives up what that needs.
    fn end_leftover(
        &self,
        uid: &str,
        give_up: bool,
        gives_up: impl Fn(&v1::Leftover) -> &String,
    ) -> Result<v1::Leftover, ApiError> {
        let mut inner = self.inner.lock().unwrap();
        let found = inner.leftovers.iter().position(|left| left.uid == uid);
        let Some(at) = found else {
            return Err(ApiError::new(Reason::NoSuchLeftover, "none").with("uid", uid));
        };
        if !gives_up(&inner.leftovers[at]).is_empty() && !give_up {
            return Err(ApiError::new(Reason::GiveUpRequired, "say so"));
        }
        Ok(inner.leftovers.remove(at))
    }
}

#[tonic::async_trait]
impl VmService for Fake {
    async fn create_vm(
        &self,
        request: Request<v1::CreateVmRequest>,
    ) -> Result<Response<v1::Vm>, Status> {
        let request = request.into_inner();
        self.called("create", &request.vm_id);
        let mut vm = vm(&format!("vms/{}", request.vm_id), 64);
        vm.spec.as_mut().unwrap().memory_bytes = request.spec.unwrap().memory_bytes;
        vm.state = State::Created.into();
        vm.create_time = Some(self.now());
        if !request.validate_only {
            self.put_vm(vm.clone());
        }
        Ok(Response::new(vm))
    }

    async fn get_vm(&self, request: Request<v1::GetVmRequest>) -> Result<Response<v1::Vm>, Status> {
        self.change_vm(&request.into_inner().name, |_| {})
    }

    async fn list_vms(
        &self,
        _: Request<v1::ListVmsRequest>,
    ) -> Result<Response<v1::ListVmsResponse>, Status> {
        Ok(Response::new(v1::ListVmsResponse {
            vms: self.report().vms,
            ..Default::default()
        }))
    }

    type WatchVmStream = Pin<Box<dyn Stream<Item = Result<v1::Vm, Status>> + Send>>;

    async fn watch_vm(
        &self,
        request: Request<v1::WatchVmRequest>,
    ) -> Result<Response<Self::WatchVmStream>, Status> {
        let name = request.into_inner().name;
        self.called("watch", &name);
        self.change_vm(&name, |_| {})?;
        let (send, receive) = mpsc::channel(4);
        tokio::spawn(self.clone().tell(name, send));
        Ok(Response::new(Box::pin(ReceiverStream::new(receive))))
    }

    async fn start_vm(
        &self,
        request: Request<v1::StartVmRequest>,
    ) -> Result<Response<v1::Vm>, Status> {
        self.change_vm(&request.into_inner().name, |vm| {
            vm.state = State::Running.into()
        })
    }

    async fn pause_vm(
        &self,
        request: Request<v1::PauseVmRequest>,
    ) -> Result<Response<v1::Vm>, Status> {
        self.change_vm(&request.into_inner().name, |vm| {
            vm.state = State::Paused.into()
        })
    }

    async fn resume_vm(
        &self,
        request: Request<v1::ResumeVmRequest>,
    ) -> Result<Response<v1::Vm>, Status> {
        self.change_vm(&request.into_inner().name, |vm| {
            vm.state = State::Running.into()
        })
    }

    async fn delete_vm(
        &self,
        request: Request<v1::DeleteVmRequest>,
    ) -> Result<Response<v1::DeleteVmResponse>, Status> {
        let request = request.into_inner();
        let name = if request.name.is_empty() {
            let meant = self.vm_by_uid(&request.uid);
            meant.map_or_else(String::new, |vm| vm.name)
        } else {
            request.name
        };
        let vm = self.change_vm(&name, |_| {})?.into_inner();
        if vm.state() == State::Relinquished {
            return Err(ApiError::new(Reason::StaleEpoch, "handed over").into());
        }
        self.remove_vm(&name);
        Ok(Response::new(v1::DeleteVmResponse {}))
    }
}

#[tonic::async_trait]
impl MemoryService for Fake {
    async fn list_slots(
        &self,
        request: Request<v1::ListSlotsRequest>,
    ) -> Result<Response<v1::ListSlotsResponse>, Status> {
        self.change_vm(&request.into_inner().vm, |_| {})?;
        Ok(Response::new(v1::ListSlotsResponse {
            slots: vec![v1::Slot {
                pages: 16384,
                ..Default::default()
            }],
            generation: 1,
            ..Default::default()
        }))
    }

    async fn update_slots(
        &self,
        _: Request<v1::UpdateSlotsRequest>,
    ) -> Result<Response<v1::UpdateSlotsResponse>, Status> {
        Err(ApiError::new(Reason::BadSlotTable, "slot 3: overlaps")
            .with("slot", 3)
            .into())
    }

    async fn harvest_dirty_pages(
        &self,
        _: Request<v1::HarvestDirtyPagesRequest>,
    ) -> Result<Response<v1::HarvestDirtyPagesResponse>, Status> {
        Ok(Response::new(v1::HarvestDirtyPagesResponse {
            created: true,
            ..Default::default()
        }))
    }

    async fn delete_dirty_cursor(
        &self,
        _: Request<v1::DeleteDirtyCursorRequest>,
    ) -> Result<Response<v1::DeleteDirtyCursorResponse>, Status> {
        Ok(Response::new(v1::DeleteDirtyCursorResponse {
            ..Default::default()
        }))
    }

    async fn list_dirty_cursors(
        &self,
        _: Request<v1::ListDirtyCursorsRequest>,
    ) -> Result<Response<v1::ListDirtyCursorsResponse>, Status> {
        Ok(Response::new(v1::ListDirtyCursorsResponse::default()))
    }

    async fn measure_dirty_rate(
        &self,
        _: Request<v1::MeasureDirtyRateRequest>,
    ) -> Result<Response<v1::MeasureDirtyRateResponse>, Status> {
        Ok(Response::new(v1::MeasureDirtyRateResponse::default()))
    }

    async fn invalidate_memory(
        &self,
        _: Request<v1::InvalidateMemoryRequest>,
    ) -> Result<Response<v1::InvalidateMemoryResponse>, Status> {
        Ok(Response::new(v1::InvalidateMemoryResponse {
            pages: 16384,
            duration_nanos: 1,
            ..Default::default()
        }))
    }

    async fn discard_memory(
        &self,
        _: Request<v1::DiscardMemoryRequest>,
    ) -> Result<Response<v1::DiscardMemoryResponse>, Status> {
        Ok(Response::new(v1::DiscardMemoryResponse {
            pages: 4,
            freed_bytes: 4096,
            duration_nanos: 1,
            ..Default::default()
        }))
    }

    async fn digest_memory(
        &self,
        _: Request<v1::DigestMemoryRequest>,
    ) -> Result<Response<v1::DigestMemoryResponse>, Status> {
        Err(ApiError::new(Reason::VmRunning, "running").into())
    }
}
