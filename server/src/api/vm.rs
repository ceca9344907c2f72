//! VmService for the fleet: lists from the reports, everything else at the owner's agent. Watches
//! are in [`super::watch`].

use std::{pin::Pin, time::Duration};

use slat_proto::{
    ApiError, Reason,
    model::{HostName, PageRequest, VmName, VmRef, VmSpec, paginate},
    transport::TracedChannel,
    v1::{self, vm::State, vm_service_client::VmServiceClient, vm_service_server::VmService},
};
use tokio::sync::mpsc;
use tokio_stream::{Stream, wrappers::ReceiverStream};
use tonic::{Request, Response, Status};

use super::{
    scope::{must_have, scope_of, taken_unseen},
    services::{Services, forwarded, is_silence},
};
use crate::fleet::vm_exists;

/// How long a host that has not reported yet may take to say whether it has a VM.
const LOOK: Duration = Duration::from_secs(5);

fn client(channel: TracedChannel) -> VmServiceClient<TracedChannel> {
    VmServiceClient::new(channel)
}

macro_rules! verb {
    ($self:ident, $request:ident, $call:ident) => {{
        let scope = scope_of(&$request);
        let mut message = $request.into_inner();
        let vm = VmRef::new(&message.name, &message.uid, &message.host)?;
        let (owner, channel) = $self.route(&scope, &vm)?;
        let host = owner.host.name;
        $self.migrations.refuse_frozen_copy(&owner.vm, &host)?;
        message.name = owner.vm.name;
        message.uid = owner.vm.uid;
        message.host.clear();
        let answer = client(channel)
            .$call(message)
            .await
            .map_err(|status| forwarded(&host, status))?;
        let vm = $self.seen(&host, answer.into_inner());
        Ok(Response::new($self.as_seen(&scope, vm)))
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
        self.fleet.shown(vm)
    }

    /// What was last seen of a VM whose host cannot be asked.
    pub(super) fn last_seen(&self, vm: v1::Vm) -> v1::Vm {
        self.with_migration(v1::Vm { stale: true, ..vm })
    }

    /// Hosts that registered and have not told their VMs yet are asked for this one.
    async fn refuse_if_unreported_host_has(&self, vm: &VmName) -> Result<(), ApiError> {
        for host in self.fleet.untold() {
            let request = v1::GetVmRequest {
                name: vm.to_string(),
                ..Default::default()
            };
            let channel = self.fleet.channel(&host)?;
            let answer = tokio::time::timeout(LOOK, client(channel).get_vm(request)).await;
            if let Ok(Ok(found)) = answer {
                let mut found = found.into_inner();
                found.host = host;
                return Err(vm_exists(&found, true));
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
        let scope = scope_of(&request);
        let request = request.into_inner();
        let vm = VmName::from_id(&request.vm_id)?;
        let spec = request
            .spec
            .as_ref()
            .ok_or_else(|| ApiError::bad_parameter("spec", "is missing"))?;
        let checked = VmSpec::from_message(spec)?;
        must_have(&scope, spec)?;
        let host = if request.host.is_empty() {
            None
        } else {
            let host = HostName::parse(&request.host)?;
            self.check_host(&scope, &host.to_string())?;
            Some(host)
        };
        // Name and memory are kept until the agent has answered and the registry knows the VM.
        let unseen = |error| taken_unseen(&scope, &vm, error);
        let reservation = self
            .fleet
            .reserve(&vm, &checked, host.as_ref(), &scope.hosts)
            .map_err(unseen)?;
        let reported = self.refuse_if_unreported_host_has(&vm).await;
        reported.map_err(unseen)?;
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
        // It is there whatever the disk says; who writes says it in the log.
        drop(self.fleet.settled().await);
        Ok(Response::new(answer))
    }

    async fn get_vm(&self, request: Request<v1::GetVmRequest>) -> Result<Response<v1::Vm>, Status> {
        let scope = scope_of(&request);
        let mut message = request.into_inner();
        let vm = VmRef::new(&message.name, &message.uid, &message.host)?;
        let found = self.as_seen(&scope, self.find(&scope, &vm)?);
        let host = found.host.clone();
        if found.kept_by_server {
            return Ok(Response::new(self.with_migration(found)));
        }
        if self.fleet.ready_host(&host).is_err() {
            return Ok(Response::new(self.last_seen(found)));
        }
        message.name.clone_from(&found.name);
        message.uid.clone_from(&found.uid);
        message.host.clear();
        match client(self.fleet.channel(&host)?).get_vm(message).await {
            Ok(answer) => {
                let vm = self.seen(&host, answer.into_inner());
                Ok(Response::new(self.as_seen(&scope, vm)))
            }
            Err(status) if is_silence(&status) => Ok(Response::new(self.last_seen(found))),
            Err(status) => Err(status),
        }
    }

    async fn list_vms(
        &self,
        request: Request<v1::ListVmsRequest>,
    ) -> Result<Response<v1::ListVmsResponse>, Status> {
        let scope = scope_of(&request);
        let request = request.into_inner();
        let page = PageRequest::new(request.page_size, &request.page_token)?;
        let mut vms = self.fleet.vms();
        let (mut unreachable, mut unreported) = (self.fleet.silent(), self.fleet.unreported());
        if !scope.is_all() {
            vms.retain(|vm| self.vm_in(&scope, vm));
            unreachable.retain(|host| self.host_in(&scope, host));
            unreported.retain(|host| self.host_in(&scope, host));
        }
        let (vms, next_page_token) = paginate(vms, &page, |vm| {
            // Below every character of a name, so that the order is by name, then uid.
            format!("{} {}", vm.name, vm.uid)
        });
        Ok(Response::new(v1::ListVmsResponse {
            vms: vms
                .into_iter()
                .map(|vm| self.as_seen(&scope, self.with_migration(vm)))
                .collect(),
            next_page_token,
            unreachable,
            unreported,
        }))
    }

    type WatchVmStream = Pin<Box<dyn Stream<Item = Result<v1::Vm, Status>> + Send>>;

    async fn watch_vm(
        &self,
        request: Request<v1::WatchVmRequest>,
    ) -> Result<Response<Self::WatchVmStream>, Status> {
        let scope = scope_of(&request);
        let request = request.into_inner();
        let vm = VmRef::new(&request.name, &request.uid, &request.host)?;
        // An unknown VM is an error of the call, not of its stream. From here on it is this one,
        // whatever else gets its name.
        let vm = self.find(&scope, &vm)?;
        let (out, updates) = mpsc::channel(8);
        self.watches.spawn(self.clone().follow(scope, vm, out));
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
        let scope = scope_of(&request);
        let mut message = request.into_inner();
        let vm = VmRef::new(&message.name, &message.uid, &message.host)?;
        if message.force && vm.uid().is_none() {
            let words = "is needed with force, so that it names one VM";
            return Err(ApiError::bad_parameter("uid", words).into());
        }
        let found = match self.find(&scope, &vm) {
            Ok(found) => Ok(found),
            // Of what only a migration keeps nobody knows the labels.
            Err(error) if error.reason == Reason::NoSuchVm && scope.is_all() => Err(error),
            Err(error) => return Err(error.into()),
        };
        // What the fleet does not show may be kept by a migration all the same.
        let meant = found.clone().unwrap_or_else(|_| v1::Vm {
            name: vm.name().map(ToString::to_string).unwrap_or_default(),
            uid: vm.uid().unwrap_or_default().to_owned(),
            ..Default::default()
        });
        self.refuse_if_migrating(&meant, "delete it")?;
        // What a failed migration keeps is ended by its migration: agents delete no VM that was
        // handed over.
        let owned = found
            .as_ref()
            .is_ok_and(|vm| !matches!(vm.state(), State::Incoming | State::Relinquished));
        if !owned && let Some(host) = self.migrations.delete_kept(&meant).await? {
            self.fleet.forget(&host, &meant.uid);
            drop(self.fleet.settled().await);
            return Ok(Response::new(v1::DeleteVmResponse {}));
        }
        if let Ok(vm) = &found
            && vm.kept_by_server
        {
            // The server alone has it.
            self.fleet.forget(&vm.host, &vm.uid);
            drop(self.fleet.settled().await);
            return Ok(Response::new(v1::DeleteVmResponse {}));
        }
        // Looked up again: waiting for a migration may have changed it, and its host must answer.
        let (owner, channel) = self.route(&scope, &vm)?;
        let host = owner.host.name;
        message.name.clone_from(&owner.vm.name);
        message.uid.clone_from(&owner.vm.uid);
        message.host.clear();
        let answer = client(channel)
            .delete_vm(message)
            .await
            .map_err(|status| forwarded(&host, status))?;
        // Who deletes a VM that was lost after its handover deletes the copy at its source too. A
        // copy whose own process died is LOST, and deleted as such. Its migration keeps nothing
        // from now on; asked before, it would carry a refused order out later.
        if owner.vm.state() == State::Lost {
            self.migrations.delete_kept(&meant).await?;
        }
        self.fleet.forget(&host, &owner.vm.uid);
        drop(self.fleet.settled().await);
        Ok(answer)
    }
}
