//! HostService for the fleet: hosts as they are known here, cordons and deletions, and what is left
//! on hosts, which their agents end by order.

use std::{collections::BTreeSet, time::Duration};

use slat_proto::{
    ApiError,
    model::{HostName, PageRequest, is_uid, paginate},
    transport::{Caller, Scope},
    v1::{
        self, host_service_client::HostServiceClient, host_service_server::HostService,
        vm_service_client::VmServiceClient,
    },
};
use tokio::time::timeout;
use tonic::{Request, Response, Status};

use super::{
    scope::scope_of,
    services::{Services, forwarded},
};
use crate::fleet::{Ending, give_up_required, host_unreachable, lives_elsewhere, taken_over};

/// How long an agent may take to end a leftover.
const LIMIT: Duration = Duration::from_secs(15);
/// How long agents may take to list theirs.
const LOOK: Duration = Duration::from_secs(2);

#[tonic::async_trait]
impl HostService for Services {
    async fn get_host(
        &self,
        request: Request<v1::GetHostRequest>,
    ) -> Result<Response<v1::Host>, Status> {
        let scope = scope_of(&request);
        let name = HostName::parse(&request.into_inner().name)?.to_string();
        self.check_host(&scope, &name)?;
        Ok(Response::new(self.fleet.host(&name)?))
    }

    async fn list_hosts(
        &self,
        request: Request<v1::ListHostsRequest>,
    ) -> Result<Response<v1::ListHostsResponse>, Status> {
        let scope = scope_of(&request);
        let request = request.into_inner();
        let page = PageRequest::new(request.page_size, &request.page_token)?;
        let mut hosts = self.fleet.hosts();
        hosts.retain(|host| self.host_in(&scope, &host.name));
        let (hosts, next_page_token) = paginate(hosts, &page, |host| host.name.clone());
        Ok(Response::new(v1::ListHostsResponse {
            hosts,
            next_page_token,
        }))
    }

    async fn cordon_host(
        &self,
        request: Request<v1::CordonHostRequest>,
    ) -> Result<Response<v1::Host>, Status> {
        let scope = scope_of(&request);
        let name = HostName::parse(&request.into_inner().name)?.to_string();
        self.check_host(&scope, &name)?;
        self.cordon(&name, true).await
    }

    async fn uncordon_host(
        &self,
        request: Request<v1::UncordonHostRequest>,
    ) -> Result<Response<v1::Host>, Status> {
        let scope = scope_of(&request);
        let name = HostName::parse(&request.into_inner().name)?.to_string();
        self.check_host(&scope, &name)?;
        self.cordon(&name, false).await
    }

    async fn fence_host(
        &self,
        request: Request<v1::FenceHostRequest>,
    ) -> Result<Response<v1::Host>, Status> {
        let caller = request.extensions().get::<Caller>();
        let ordered_by = caller.map_or_else(|| "unknown".to_owned(), |it| it.who().to_owned());
        let scope = scope_of(&request);
        let request = request.into_inner();
        let name = HostName::parse(&request.name)?.to_string();
        self.check_all_on(&scope, &name)?;
        let host = self.fences.fence(&name, request.force, &ordered_by).await?;
        Ok(Response::new(host))
    }

    async fn delete_host(
        &self,
        request: Request<v1::DeleteHostRequest>,
    ) -> Result<Response<v1::DeleteHostResponse>, Status> {
        let scope = scope_of(&request);
        let request = request.into_inner();
        let name = HostName::parse(&request.name)?.to_string();
        self.check_all_on(&scope, &name)?;
        let migrations = self.migrations.on_host(&name);
        let give_up = request.give_up_vms;
        // From here the host stays silent: what is given up below is not for nothing.
        let deletion = self.fleet.begin_deletion(&name, give_up, &migrations)?;
        if give_up {
            // Before the host goes: until then the order can be repeated.
            self.migrations.forget_host(&name).await?;
        }
        let vms = deletion.finish(&self.migrations.on_host(&name))?;
        tracing::warn!(host = %name, vms = vms.len(), "a host is forgotten by order");
        self.fleet.settled().await?;
        Ok(Response::new(v1::DeleteHostResponse { vms }))
    }

    async fn list_leftovers(
        &self,
        request: Request<v1::ListLeftoversRequest>,
    ) -> Result<Response<v1::ListLeftoversResponse>, Status> {
        let scope = scope_of(&request);
        let request = request.into_inner();
        let host = if request.host.is_empty() {
            None
        } else {
            Some(HostName::parse(&request.host)?.to_string())
        };
        if let Some(host) = &host {
            self.check_host(&scope, host)?;
        }
        self.look_for_copies().await;
        let mut leftovers = self.fleet.leftovers(host.as_deref())?;
        leftovers.retain(|left| {
            !self.migrations.explains(&left.migration) && self.leftover_in(&scope, left)
        });
        let mut unreachable = self.fleet.silent();
        unreachable.retain(|silent| {
            host.as_ref().is_none_or(|host| host == silent) && self.host_in(&scope, silent)
        });
        Ok(Response::new(v1::ListLeftoversResponse {
            leftovers,
            unreachable,
        }))
    }

    async fn adopt_leftover(
        &self,
        request: Request<v1::AdoptLeftoverRequest>,
    ) -> Result<Response<v1::AdoptLeftoverResponse>, Status> {
        let scope = scope_of(&request);
        let mut message = request.into_inner();
        let (host, ending) = self.ending(&scope, &message.host, &message.uid)?;
        if let Some(home) = &ending.lives_on {
            return Err(lives_elsewhere(&message.uid, &host, home).into());
        }
        if ending.superseded {
            return Err(taken_over(&message.uid, &host).into());
        }
        if !ending.adopt_gives_up.is_empty() && !message.give_up {
            let words = &ending.adopt_gives_up;
            return Err(give_up_required(&message.uid, &host, words).into());
        }
        message.host.clone_from(&host);
        message.epoch = ending.epoch;
        let channel = self.fleet.channel(&host)?;
        let answer = timeout(
            LIMIT,
            HostServiceClient::new(channel).adopt_leftover(message),
        )
        .await;
        let mut answer = answered(&host, answer)?;
        if let Some(vm) = answer.vm.take() {
            answer.vm = Some(self.as_seen(&scope, self.noted(&host, vm)));
        }
        drop(self.fleet.settled().await);
        Ok(Response::new(answer))
    }

    async fn delete_leftover(
        &self,
        request: Request<v1::DeleteLeftoverRequest>,
    ) -> Result<Response<v1::DeleteLeftoverResponse>, Status> {
        let scope = scope_of(&request);
        let mut message = request.into_inner();
        let (host, ending) = self.ending(&scope, &message.host, &message.uid)?;
        match ending.delete_gives_up.as_deref() {
            // The VM lives: whatever the agent fears to lose is not lost.
            Some("") if ending.lives_on.is_some() && !ending.superseded => message.give_up = true,
            Some(words) if !words.is_empty() && !message.give_up => {
                return Err(give_up_required(&message.uid, &host, words).into());
            }
            _ => {}
        }
        message.host.clone_from(&host);
        let uid = message.uid.clone();
        if ending.superseded {
            self.delete_superseded(&host, &uid).await?;
            return Ok(Response::new(v1::DeleteLeftoverResponse {}));
        }
        let channel = self.fleet.channel(&host)?;
        let answer = timeout(
            LIMIT,
            HostServiceClient::new(channel).delete_leftover(message),
        )
        .await;
        let answer = answered(&host, answer)?;
        self.fleet.forget_leftover(&host, &uid);
        Ok(Response::new(answer))
    }
}

/// An agent's answer, or HOST_UNREACHABLE.
fn answered<T>(
    host: &str,
    answer: Result<Result<Response<T>, Status>, tokio::time::error::Elapsed>,
) -> Result<T, Status> {
    match answer {
        Ok(answer) => answer
            .map(Response::into_inner)
            .map_err(|status| forwarded(host, status)),
        Err(_) => {
            let cause = format!("no answer within {} s", LIMIT.as_secs());
            Err(host_unreachable(host).with("cause", cause).into())
        }
    }
}

impl Services {
    async fn cordon(&self, name: &str, cordoned: bool) -> Result<Response<v1::Host>, Status> {
        let host = self.fleet.cordon(name, cordoned)?;
        self.fleet.settled().await?;
        Ok(Response::new(host))
    }

    /// A copy that a migration has just left is in no report yet: its host is asked.
    async fn look_for_copies(&self) {
        let copies = self.migrations.copies();
        let known = self.fleet.leftovers(None).unwrap_or_default();
        let unknown = copies.into_iter().filter(|copy| {
            let mut known = known.iter();
            !known.any(|left| left.uid == copy.uid && left.host == copy.host)
        });
        let hosts: BTreeSet<String> = unknown.map(|copy| copy.host).collect();
        let asked = async {
            for host in &hosts {
                if let Err(error) = self.ask_for_leftovers(host).await {
                    tracing::debug!(%host, %error, "a host does not say what is left on it");
                }
            }
        };
        // The next report says it in any case.
        drop(timeout(LOOK, asked).await);
    }

    async fn ask_for_leftovers(&self, host: &str) -> Result<(), ApiError> {
        self.fleet.ready_host(host)?;
        let mut agent = HostServiceClient::new(self.fleet.channel(host)?);
        let request = v1::ListLeftoversRequest {
            host: host.to_owned(),
        };
        let answer = agent.list_leftovers(request).await?;
        let mut leftovers = answer.into_inner().leftovers;
        leftovers.retain(|left| !self.migrations.explains(&left.migration));
        self.fleet.note_leftovers(host, leftovers);
        Ok(())
    }

    /// To its agent it is a VM, and deleted as one.
    async fn delete_superseded(&self, host: &str, uid: &str) -> Result<(), Status> {
        let request = v1::DeleteVmRequest {
            uid: uid.to_owned(),
            ..Default::default()
        };
        let mut vms = VmServiceClient::new(self.fleet.channel(host)?);
        answered(host, timeout(LIMIT, vms.delete_vm(request)).await)?;
        self.fleet.forget(host, uid);
        self.fleet.forget_leftover(host, uid);
        drop(self.fleet.settled().await);
        Ok(())
    }

    /// The checked name of a leftover's host, and how the leftover can be ended.
    fn ending(&self, scope: &Scope, host: &str, uid: &str) -> Result<(String, Ending), ApiError> {
        let host = HostName::parse(host)?.to_string();
        if !is_uid(uid) {
            let words = "is 1 to 128 visible ASCII characters";
            return Err(ApiError::bad_parameter("uid", words));
        }
        self.check_leftover(scope, &host, uid)?;
        let ending = self.fleet.ending(&host, uid)?;
        let vm = v1::Vm {
            uid: uid.to_owned(),
            ..Default::default()
        };
        // In doubt, an order may be all that can end it.
        if self.migrations.carries(&vm) {
            self.refuse_if_migrating(&vm, "end what is left of it")?;
        }
        Ok((host, ending))
    }
}
