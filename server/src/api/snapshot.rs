//! SnapshotService for the fleet. A save's name says its host, and a VM is found as for any other
//! call; the host's agent does the rest. New VMs get their name and memory kept here first, as
//! created ones do, so that no two hosts make one name.

use std::{collections::BTreeSet, pin::Pin, time::Duration};

use slat_proto::{
    ApiError, Reason,
    model::{HostName, PageRequest, SaveName, VmName, VmRef, VmSpec, children_of, paginate},
    transport::{Scope, TracedChannel},
    v1::{
        self, snapshot_service_client::SnapshotServiceClient,
        snapshot_service_server::SnapshotService,
    },
};
use tokio::{task::JoinSet, time::timeout};
use tokio_stream::{Stream, StreamExt as _};
use tonic::{Request, Response, Status};

use super::{
    scope::{no_such_save, scope_of, spec_in, taken_unseen},
    services::{Services, forwarded},
};

/// How long one host may hold a list up.
const LIST: Duration = Duration::from_secs(5);
/// Most entries of a host's page.
const PAGE: i32 = 1000;

fn client(channel: TracedChannel) -> SnapshotServiceClient<TracedChannel> {
    SnapshotServiceClient::new(channel)
}

/// As the fleet shows it: where its file is is the host's own matter.
fn shown(mut save: v1::Save) -> v1::Save {
    save.path.clear();
    save
}

impl Services {
    /// The way to the host of a save.
    async fn to_save(
        &self,
        scope: &Scope,
        name: &str,
    ) -> Result<(SaveName, String, SnapshotServiceClient<TracedChannel>), Status> {
        let name = SaveName::parse(name)?;
        let host = name.host().to_string();
        if !self.host_in(scope, &host) {
            return Err(no_such_save(&name).into());
        }
        self.fleet.ready_host(&host)?;
        let mut agent = client(self.fleet.channel(&host)?);
        if !scope.vms.is_empty() {
            let request = v1::GetSaveRequest {
                name: name.to_string(),
            };
            let save = agent.get_save(request).await;
            let save = save.map_err(|status| forwarded(&host, status))?;
            if !spec_in(scope, save.get_ref().vm_spec.as_ref()) {
                return Err(no_such_save(&name).into());
            }
        }
        Ok((name, host, agent))
    }

    /// The way to the host of a VM, which its request then names for good.
    fn to_vm(
        &self,
        scope: &Scope,
        vm: &mut String,
        uid: &mut String,
        host: &mut String,
    ) -> Result<(v1::Vm, String, SnapshotServiceClient<TracedChannel>), ApiError> {
        let named = VmRef::new(vm, uid, host)?;
        let (owner, channel) = self.route(scope, &named)?;
        let at = owner.host.name;
        self.migrations.refuse_frozen_copy(&owner.vm, &at)?;
        vm.clone_from(&owner.vm.name);
        uid.clone_from(&owner.vm.uid);
        host.clear();
        Ok((owner.vm, at, client(channel)))
    }

    /// All saves of a host.
    async fn saves_of(&self, host: &str) -> Result<Vec<v1::Save>, Status> {
        self.fleet.ready_host(host)?;
        let mut agent = client(self.fleet.channel(host)?);
        let mut all = Vec::new();
        let mut request = v1::ListSavesRequest {
            page_size: PAGE,
            ..Default::default()
        };
        loop {
            let page = agent.list_saves(request.clone()).await?.into_inner();
            all.extend(page.saves.into_iter().map(shown));
            if page.next_page_token.is_empty() {
                return Ok(all);
            }
            request.page_token = page.next_page_token;
        }
    }

    /// A VM that an agent has just made, as the fleet shows it from now on.
    fn made(&self, host: &str, vm: v1::Vm) -> v1::Vm {
        let vm = self.noted(host, vm);
        self.with_migration(vm)
    }
}

/// What a VM is made of that comes from a save or from another VM.
fn spec_of(spec: Option<&v1::VmSpec>, what: &str) -> Result<VmSpec, ApiError> {
    let spec = spec.ok_or_else(|| {
        let words = format!("{what} does not say what its VM is made of");
        ApiError::new(Reason::SaveCorrupt, words)
            .with("save", what)
            .with("advice", "slat verify save SAVE says more")
    })?;
    VmSpec::from_resource(spec)
}

#[tonic::async_trait]
impl SnapshotService for Services {
    async fn create_save(
        &self,
        request: Request<v1::CreateSaveRequest>,
    ) -> Result<Response<v1::Save>, Status> {
        let scope = scope_of(&request);
        let mut message = request.into_inner();
        let (vm, uid, host) = (&mut message.vm, &mut message.uid, &mut message.host);
        let (_, host, mut agent) = self.to_vm(&scope, vm, uid, host)?;
        let answer = agent.create_save(message).await;
        let save = answer.map_err(|status| forwarded(&host, status))?;
        Ok(Response::new(shown(save.into_inner())))
    }

    async fn get_save(
        &self,
        request: Request<v1::GetSaveRequest>,
    ) -> Result<Response<v1::Save>, Status> {
        let scope = scope_of(&request);
        let message = request.into_inner();
        let (_, host, mut agent) = self.to_save(&scope, &message.name).await?;
        let answer = agent.get_save(message).await;
        let save = answer.map_err(|status| forwarded(&host, status))?;
        Ok(Response::new(shown(save.into_inner())))
    }

    async fn list_saves(
        &self,
        request: Request<v1::ListSavesRequest>,
    ) -> Result<Response<v1::ListSavesResponse>, Status> {
        let scope = scope_of(&request);
        let request = request.into_inner();
        let page = PageRequest::new(request.page_size, &request.page_token)?;
        let mut hosts: Vec<String> = if request.parent.is_empty() {
            self.fleet
                .hosts()
                .into_iter()
                .map(|host| host.name)
                .collect()
        } else {
            let host = HostName::parse(&request.parent)?.to_string();
            self.check_host(&scope, &host)?;
            self.fleet.host(&host)?;
            vec![host]
        };
        hosts.retain(|host| self.host_in(&scope, host));
        let mut asked = JoinSet::new();
        for host in hosts {
            let me = self.clone();
            asked.spawn(async move {
                let saves = timeout(LIST, me.saves_of(&host)).await;
                (host, saves)
            });
        }
        let (mut saves, mut unreachable) = (Vec::new(), BTreeSet::new());
        while let Some(answer) = asked.join_next().await {
            match answer {
                Ok((_, Ok(Ok(some)))) => saves.extend(some),
                Ok((host, Ok(Err(error)))) => {
                    tracing::debug!(%host, %error, "a host does not list its saves");
                    unreachable.insert(host);
                }
                Ok((host, Err(_))) => drop(unreachable.insert(host)),
                Err(error) => tracing::error!(%error, "asking a host for its saves failed"),
            }
        }
        saves.retain(|save: &v1::Save| spec_in(&scope, save.vm_spec.as_ref()));
        saves.sort_by(|a: &v1::Save, b| a.name.cmp(&b.name));
        let (saves, next_page_token) = paginate(saves, &page, |save| save.name.clone());
        Ok(Response::new(v1::ListSavesResponse {
            saves,
            next_page_token,
            unreachable: unreachable.into_iter().collect(),
        }))
    }

    type WatchSaveStream = Pin<Box<dyn Stream<Item = Result<v1::Save, Status>> + Send>>;

    async fn watch_save(
        &self,
        request: Request<v1::WatchSaveRequest>,
    ) -> Result<Response<Self::WatchSaveStream>, Status> {
        let scope = scope_of(&request);
        let message = request.into_inner();
        let (_, host, mut agent) = self.to_save(&scope, &message.name).await?;
        let answer = agent.watch_save(message).await;
        let stream = answer.map_err(|status| forwarded(&host, status))?;
        // Nobody reads on here when the listener does not: the agent's own stream waits.
        let told = stream
            .into_inner()
            .map(move |save| save.map(shown).map_err(|status| forwarded(&host, status)));
        Ok(Response::new(Box::pin(told)))
    }

    async fn verify_save(
        &self,
        request: Request<v1::VerifySaveRequest>,
    ) -> Result<Response<v1::VerifySaveResponse>, Status> {
        let scope = scope_of(&request);
        let message = request.into_inner();
        let (_, host, mut agent) = self.to_save(&scope, &message.name).await?;
        let answer = agent.verify_save(message).await;
        answer.map_err(|status| forwarded(&host, status))
    }

    async fn delete_save(
        &self,
        request: Request<v1::DeleteSaveRequest>,
    ) -> Result<Response<v1::DeleteSaveResponse>, Status> {
        let scope = scope_of(&request);
        let message = request.into_inner();
        let (_, host, mut agent) = self.to_save(&scope, &message.name).await?;
        let answer = agent.delete_save(message).await;
        answer.map_err(|status| forwarded(&host, status))
    }

    async fn restore_vm(
        &self,
        request: Request<v1::RestoreVmRequest>,
    ) -> Result<Response<v1::RestoreVmResponse>, Status> {
        let scope = scope_of(&request);
        let mut message = request.into_inner();
        let (name, host, mut agent) = self.to_save(&scope, &message.save).await?;
        let save = v1::GetSaveRequest {
            name: name.to_string(),
        };
        let answer = agent.get_save(save).await;
        let save = answer
            .map_err(|status| forwarded(&host, status))?
            .into_inner();
        let dry_run = message.validate_only;
        // What is no file yet, or none any more, is refused by its host in its own words.
        let reservation = if save.state() == v1::save::State::Written {
            let vm = if message.vm_id.is_empty() {
                VmName::parse(&save.vm)?
            } else {
                VmName::from_id(&message.vm_id)?
            };
            vm.id().clone_into(&mut message.vm_id);
            let spec = spec_of(save.vm_spec.as_ref(), &save.name)?;
            let kept = self
                .fleet
                .reserve(&vm, &spec, Some(name.host()), &scope.hosts);
            Some(kept.map_err(|error| taken_unseen(&scope, &vm, error))?)
        } else {
            None
        };
        let answer = agent.restore_vm(message).await;
        let mut answer = answer
            .map_err(|status| forwarded(&host, status))?
            .into_inner();
        if !dry_run && let Some(vm) = answer.vm.take() {
            answer.vm = Some(self.as_seen(&scope, self.made(&host, vm)));
        }
        drop(reservation);
        if !dry_run {
            // It is there whatever the disk says; who writes says it in the log.
            drop(self.fleet.settled().await);
        }
        Ok(Response::new(answer))
    }

    async fn fork_vm(
        &self,
        request: Request<v1::ForkVmRequest>,
    ) -> Result<Response<v1::ForkVmResponse>, Status> {
        let scope = scope_of(&request);
        let mut message = request.into_inner();
        let (vm, uid, host) = (&mut message.vm, &mut message.uid, &mut message.host);
        let (parent, host, mut agent) = self.to_vm(&scope, vm, uid, host)?;
        let spec = spec_of(parent.spec.as_ref(), &parent.name)?;
        let at = HostName::parse(&host)?;
        let mut reservations = Vec::new();
        for child in children_of(&message.vm_ids)? {
            let kept = self.fleet.reserve(&child, &spec, Some(&at), &scope.hosts);
            reservations.push(kept.map_err(|error| taken_unseen(&scope, &child, error))?);
        }
        let answer = agent.fork_vm(message).await;
        let mut answer = answer
            .map_err(|status| forwarded(&host, status))?
            .into_inner();
        let vms = std::mem::take(&mut answer.vms).into_iter();
        answer.vms = vms
            .map(|vm| self.as_seen(&scope, self.made(&host, vm)))
            .collect();
        drop(reservations);
        drop(self.fleet.settled().await);
        Ok(Response::new(answer))
    }
}
