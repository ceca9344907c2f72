//! VmService for the fleet: lists from the reports, everything else at the owner's agent. Watches
//! are in [`super::watch`].

use std::{pin::Pin, time::Duration};

use slat_proto::{
    ApiError, Reason,
    model::{HostName, PageRequest, VmName, VmSpec, paginate},
    transport::TracedChannel,
    v1::{self, vm::State, vm_service_client::VmServiceClient, vm_service_server::VmService},
};
use tokio::sync::mpsc;
use tokio_stream::{Stream, wrappers::ReceiverStream};
use tonic::{Request, Response, Status};

use super::services::{Services, forwarded};

/// How long a host that has not reported yet may take to say whether it has a VM.
const LOOK: Duration = Duration::from_secs(5);

fn client(channel: TracedChannel) -> VmServiceClient<TracedChannel> {
    VmServiceClient::new(channel)
}

macro_rules! verb {
    ($self:ident, $request:ident, $call:ident) => {{
        let mut message = $request.into_inner();
        let vm = VmName::parse(&message.name)?;
        message.name = vm.to_string();
        let (owner, channel) = $self.route(&vm)?;
        let host = owner.host.name;
        let answer = client(channel)
            .$call(message)
            .await
            .map_err(|status| forwarded(&host, status))?;
        Ok(Response::new($self.seen(&host, answer.into_inner())))
    }};
}

impl Services {
    /// Keeps what an agent answered, and shows it as the fleet does.
    fn seen(&self, host: &str, vm: v1::Vm) -> v1::Vm {
        let vm = self.noted(host, vm);
        self.with_migration(vm)
    }

    /// Keeps what an agent answered.
    pub(super) fn noted(&self, host: &str, mut vm: v1::Vm) -> v1::Vm {
        host.clone_into(&mut vm.host);
        self.fleet.clocks().vm_from(host, &mut vm);
        self.fleet.observe(host, vm.clone());
        vm
    }

    /// With the migration it is part of now, whatever its agent knows of that.
    pub(super) fn with_migration(&self, mut vm: v1::Vm) -> v1::Vm {
        if let Some(migration) = self.migrations.of_vm(&vm) {
            vm.migration = migration;
        }
        vm
    }

    /// Hosts that registered and have not told their VMs yet are asked for this one.
    async fn refuse_if_unreported_host_has(&self, vm: &VmName) -> Result<(), ApiError> {
        for host in self.fleet.unreported() {
            let request = v1::GetVmRequest {
                name: vm.to_string(),
                ..Default::default()
            };
            let channel = self.fleet.channel(&host)?;
            let answer = tokio::time::timeout(LOOK, client(channel).get_vm(request)).await;
            if let Ok(Ok(_)) = answer {
                return Err(ApiError::new(
                    Reason::VmExists,
                    format!("{vm} exists already, on {host}"),
                )
                .with("vm", vm)
                .with("host", host));
            }
        }
        Ok(())
    }
}

#[tonic::async_trait]
impl VmService for Services {
    async fn create_vm(
        &self,
        request: Request<v1::CreateVmRequest>,
    ) -> Result<Response<v1::Vm>, Status> {
        let request = request.into_inner();
        let vm = VmName::from_id(&request.vm_id)?;
        let spec = request
            .spec
            .as_ref()
            .ok_or_else(|| ApiError::bad_parameter("spec", "is missing"))?;
        let checked = VmSpec::from_message(spec)?;
        let host = if request.host.is_empty() {
            None
        } else {
            Some(HostName::parse(&request.host)?)
        };
        // Name and memory are kept until the agent has answered and the registry knows the VM.
        let reservation = self.fleet.reserve(&vm, &checked, host.as_ref())?;
        self.refuse_if_unreported_host_has(&vm).await?;
        let host = reservation.host().to_owned();
        let forward = v1::CreateVmRequest {
            vm_id: vm.id().to_owned(),
            spec: request.spec,
            host: host.clone(),
            validate_only: request.validate_only,
        };
        let answer = client(self.fleet.channel(&host)?)
            .create_vm(forward)
            .await
            .map_err(|status| forwarded(&host, status))?
            .into_inner();
        if request.validate_only {
            return Ok(Response::new(answer));
        }
        let answer = self.seen(&host, answer);
        drop(reservation);
        Ok(Response::new(answer))
    }

    async fn get_vm(&self, request: Request<v1::GetVmRequest>) -> Result<Response<v1::Vm>, Status> {
        verb!(self, request, get_vm)
    }

    async fn list_vms(
        &self,
        request: Request<v1::ListVmsRequest>,
    ) -> Result<Response<v1::ListVmsResponse>, Status> {
        let request = request.into_inner();
        let page = PageRequest::new(request.page_size, &request.page_token)?;
        let (vms, next_page_token) = paginate(self.fleet.vms(), &page, |vm| vm.name.clone());
        Ok(Response::new(v1::ListVmsResponse {
            vms: vms.into_iter().map(|vm| self.with_migration(vm)).collect(),
            next_page_token,
            unreachable: self.fleet.unreachable(),
            ..Default::default()
        }))
    }

    type WatchVmStream = Pin<Box<dyn Stream<Item = Result<v1::Vm, Status>> + Send>>;

    async fn watch_vm(
        &self,
        request: Request<v1::WatchVmRequest>,
    ) -> Result<Response<Self::WatchVmStream>, Status> {
        let vm = VmName::parse(&request.into_inner().name)?;
        // An unknown VM is an error of the call, not of its stream.
        self.fleet.owner(&vm)?;
        let (out, updates) = mpsc::channel(8);
        self.watches.spawn(self.clone().follow(vm, out));
        Ok(Response::new(Box::pin(ReceiverStream::new(updates))))
    }

    async fn start_vm(
        &self,
        request: Request<v1::StartVmRequest>,
    ) -> Result<Response<v1::Vm>, Status> {
        verb!(self, request, start_vm)
    }

    async fn pause_vm(
        &self,
        request: Request<v1::PauseVmRequest>,
    ) -> Result<Response<v1::Vm>, Status> {
        verb!(self, request, pause_vm)
    }

    async fn resume_vm(
        &self,
        request: Request<v1::ResumeVmRequest>,
    ) -> Result<Response<v1::Vm>, Status> {
        verb!(self, request, resume_vm)
    }

    async fn delete_vm(
        &self,
        request: Request<v1::DeleteVmRequest>,
    ) -> Result<Response<v1::DeleteVmResponse>, Status> {
        let mut message = request.into_inner();
        let vm = VmName::parse(&message.name)?;
        message.name = vm.to_string();
        self.migrations.refuse_if_migrating(&vm, "delete it")?;
        // What a failed migration keeps is ended by its migration: agents delete no VM that was
        // handed over. A VM of that name that may run is another one.
        let owned = self
            .fleet
            .owner(&vm)
            .is_ok_and(|owner| !matches!(owner.vm.state(), State::Incoming | State::Relinquished));
        if !owned && let Some(host) = self.migrations.delete_kept(&vm).await? {
            self.fleet.forget(&host, &vm.to_string());
            return Ok(Response::new(v1::DeleteVmResponse {}));
        }
        let (owner, channel) = self.route(&vm)?;
        let host = owner.host.name;
        let answer = client(channel)
            .delete_vm(message)
            .await
            .map_err(|status| forwarded(&host, status))?;
        self.fleet.forget(&host, &vm.to_string());
        Ok(answer)
    }
}
