//! VmService at the agent: a collection of this host's VMs. The agent keeps names, memory and
//! processes; the VM's process does the rest.

use std::{sync::Arc, time::Duration};

use slat_proto::{
    ApiError, Reason,
    model::{PageRequest, VmName, VmRef, VmSpec, paginate},
    v1::{self, vm_service_server::VmService},
};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

use slat_record::uid::VmUid;

use super::{
    living::{LiveVm, QUICK},
    registry::Held,
    supervisor::{Supervisor, living_meant},
};

/// How long one VM may hold a list up before its last snapshot is listed instead.
const LIST: Duration = Duration::from_secs(2);

/// The service.
#[derive(Debug)]
pub(super) struct Vms(pub(super) Arc<Supervisor>);

impl Vms {
    /// A VM that died here, as it is shown.
    async fn lost(&self, uid: &VmUid) -> Option<v1::Vm> {
        match self.0.settled(uid).await {
            Some(Held::Dead(dead)) => dead.lost().cloned(),
            _ => None,
        }
    }
}

#[tonic::async_trait]
impl VmService for Vms {
    async fn create_vm(
        &self,
        request: Request<v1::CreateVmRequest>,
    ) -> Result<Response<v1::Vm>, Status> {
        let request = request.into_inner();
        let vm = VmName::from_id(&request.vm_id)?;
        let wanted = request
            .spec
            .as_ref()
            .ok_or_else(|| ApiError::bad_parameter("spec", "is missing"))?;
        let spec = VmSpec::from_message(wanted)?;
        // An agent places nothing: whoever names another host meant another endpoint.
        if !request.host.is_empty()
            && slat_proto::model::HostName::parse(&request.host)? != self.0.host
        {
            let own = &self.0.host;
            let words = format_args!("this is the agent of {own}, which creates VMs there alone");
            return Err(ApiError::bad_parameter("host", words)
                .with("host", own)
                .with(
                    "advice",
                    "ask the server with --server, or that host's agent with --server and --agent",
                )
                .into());
        }
        self.0.backends.fresh().await;
        self.0.check_rings(&spec)?;
        if request.validate_only {
            self.0.fits(&spec).await?;
            self.0
                .check_new(&vm, spec.ordinary_bytes(), spec.backend)
                .await?;
            return Ok(Response::new(v1::Vm {
                name: vm.to_string(),
                spec: Some(spec.to_message()),
                host: self.0.host.to_string(),
                ..Default::default()
            }));
        }
        let work = Arc::clone(&self.0).create(vm, spec.ordinary_bytes(), spec.backend, request);
        Ok(Response::new(self.0.finish(work).await?))
    }

    async fn get_vm(&self, request: Request<v1::GetVmRequest>) -> Result<Response<v1::Vm>, Status> {
        let request = request.into_inner();
        let named = VmRef::new(&request.name, &request.uid, &request.host)?;
        let uid = self.0.meant(&named).await?;
        if let Some(lost) = self.lost(&uid).await {
            return Ok(Response::new(lost));
        }
        let live = self.0.living(&named).await?;
        let mut client = live.vms();
        let answer = live.answer(QUICK, client.get_vm(live.get_request()));
        let said = self.0.told(&live, answer).await;
        if said.is_err()
            && let Some(lost) = self.lost(&uid).await
        {
            return Ok(Response::new(lost));
        }
        match (said, live.snapshot()) {
            // That it does not answer is how it stands.
            (Err(error), Some(shown))
                if error.reason == Reason::VmUnreachable && live.is_silent() =>
            {
                Ok(Response::new(shown))
            }
            (said, _) => Ok(Response::new(said?)),
        }
    }

    async fn list_vms(
        &self,
        request: Request<v1::ListVmsRequest>,
    ) -> Result<Response<v1::ListVmsResponse>, Status> {
        let request = request.into_inner();
        let page = PageRequest::new(request.page_size, &request.page_token)?;
        let shown = |held: &Held| match held {
            Held::Live(_) => true,
            Held::Dead(dead) => dead.lost().is_some(),
            Held::Busy { .. } => false,
        };
        self.0.reread().await;
        let all = self.0.registry.all();
        let held: Vec<_> = all.into_iter().filter(|(_, _, held)| shown(held)).collect();
        // Before every character of a name: tokens sort as names and uids do.
        let key = |name: &VmName, uid: &VmUid| format!("{name}!{uid}");
        let (held, next_page_token) = paginate(held, &page, |(name, uid, _)| key(name, uid));
        let mut asked = tokio::task::JoinSet::new();
        for (_, _, held) in held {
            asked.spawn(async move {
                match held {
                    Held::Live(live) if live.is_silent() => live.snapshot(),
                    Held::Live(live) => {
                        let mut client = live.vms();
                        live.answer(LIST, client.get_vm(live.get_request()))
                            .await
                            .ok()
                            .or_else(|| live.snapshot())
                    }
                    Held::Dead(dead) => dead.lost().cloned(),
                    Held::Busy { .. } => None,
                }
            });
        }
        let mut vms: Vec<v1::Vm> = asked.join_all().await.into_iter().flatten().collect();
        vms.sort_by(|a, b| (&a.name, &a.uid).cmp(&(&b.name, &b.uid)));
        Ok(Response::new(v1::ListVmsResponse {
            vms,
            next_page_token,
            unreachable: Vec::new(),
            ..Default::default()
        }))
    }

    type WatchVmStream = ReceiverStream<Result<v1::Vm, Status>>;

    async fn watch_vm(
        &self,
        request: Request<v1::WatchVmRequest>,
    ) -> Result<Response<Self::WatchVmStream>, Status> {
        let request = request.into_inner();
        let named = VmRef::new(&request.name, &request.uid, &request.host)?;
        let uid = self.0.meant(&named).await?;
        let (sender, receiver) = mpsc::channel(4);
        let stop = self.0.stop.clone();
        match self.0.settled(&uid).await {
            Some(Held::Dead(dead)) if dead.lost().is_some() => {
                let supervisor = Arc::clone(&self.0);
                self.0.tasks.spawn(async move {
                    let mut changes = supervisor.registry.changes();
                    if let Some(lost) = dead.lost() {
                        drop(sender.send(Ok(lost.clone())).await);
                    }
                    // Ends when it is deleted; nothing else can happen to it.
                    while dead.lost().is_some()
                        && matches!(supervisor.registry.get(dead.uid()), Some(Held::Dead(now)) if Arc::ptr_eq(&now, &dead))
                    {
                        tokio::select! {
                            () = stop.cancelled() => return,
                            () = sender.closed() => return,
                            changed = changes.changed() => if changed.is_err() { return },
                        }
                    }
                });
            }
            _ => {
                let live = self.0.living(&named).await?;
                let mut client = live.vms();
                let request = v1::WatchVmRequest {
                    name: live.name().to_string(),
                    uid: live.own_uid(),
                    ..Default::default()
                };
                match live.answer(QUICK, client.watch_vm(request)).await {
                    Ok(stream) => drop(self.0.tasks.spawn(relay(live, stream, sender, stop))),
                    // That it does not answer is how it stands.
                    Err(error) if error.reason == Reason::VmUnreachable && live.is_silent() => {
                        let changes = self.0.registry.changes();
                        self.0.tasks.spawn(show_silent(live, changes, sender, stop));
                    }
                    Err(error) => return Err(error.into()),
                }
            }
        }
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn start_vm(
        &self,
        request: Request<v1::StartVmRequest>,
    ) -> Result<Response<v1::Vm>, Status> {
        let mut request = request.into_inner();
        let live = living_meant!(self.0, request, name);
        let mut client = live.vms();
        let answer = live.answer(QUICK, client.start_vm(request));
        Ok(Response::new(self.0.told(&live, answer).await?))
    }

    async fn pause_vm(
        &self,
        request: Request<v1::PauseVmRequest>,
    ) -> Result<Response<v1::Vm>, Status> {
        let mut request = request.into_inner();
        let live = living_meant!(self.0, request, name);
        let mut client = live.vms();
        let answer = live.answer(QUICK, client.pause_vm(request));
        Ok(Response::new(self.0.told(&live, answer).await?))
    }

    async fn resume_vm(
        &self,
        request: Request<v1::ResumeVmRequest>,
    ) -> Result<Response<v1::Vm>, Status> {
        let mut request = request.into_inner();
        let live = living_meant!(self.0, request, name);
        let mut client = live.vms();
        let answer = live.answer(QUICK, client.resume_vm(request));
        Ok(Response::new(self.0.told(&live, answer).await?))
    }

    async fn delete_vm(
        &self,
        request: Request<v1::DeleteVmRequest>,
    ) -> Result<Response<v1::DeleteVmResponse>, Status> {
        let request = request.into_inner();
        if request.force && request.uid.is_empty() {
            return Err(ApiError::bad_parameter(
                "uid",
                "is needed with force, so that it names one VM for good",
            )
            .into());
        }
        let named = VmRef::new(&request.name, &request.uid, &request.host)?;
        let uid = self.0.meant(&named).await?;
        let delete = Arc::clone(&self.0).delete(uid, request.force);
        self.0.finish(delete).await?;
        Ok(Response::new(v1::DeleteVmResponse {}))
    }
}

/// Sends how a silent VM stands, until its process answers or is gone: then it is watched anew.
async fn show_silent(
    live: Arc<LiveVm>,
    mut changes: watch::Receiver<u64>,
    sender: mpsc::Sender<Result<v1::Vm, Status>>,
    stop: CancellationToken,
) {
    let mut sent = None;
    while live.is_silent() {
        let shown = live.snapshot();
        if shown != sent
            && let Some(vm) = shown.clone()
        {
            sent = shown;
            tokio::select! {
                () = stop.cancelled() => return,
                said = sender.send(Ok(vm)) => if said.is_err() { return },
            }
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = sender.closed() => return,
            () = live.gone().cancelled() => return,
            changed = changes.changed() => if changed.is_err() { return },
        }
    }
}

/// Completes when a VM has said nothing for a while and its process answers nothing.
async fn silence(live: &LiveVm) -> ApiError {
    loop {
        tokio::time::sleep(QUICK).await;
        if let Err(silent) = live.awake().await {
            return silent;
        }
    }
}

/// Forwards a VM's stream until either side or the agent ends.
pub(super) async fn relay<T: Send + 'static>(
    live: Arc<LiveVm>,
    mut stream: tonic::Streaming<T>,
    sender: mpsc::Sender<Result<T, Status>>,
    stop: CancellationToken,
) {
    loop {
        let message = tokio::select! {
            () = stop.cancelled() => {
                let error = ApiError::new(Reason::HostUnreachable, "the agent is stopping; watch again");
                drop(sender.try_send(Err(error.into())));
                return;
            }
            () = sender.closed() => return,
            message = stream.message() => message,
            silent = silence(&live) => {
                drop(sender.try_send(Err(silent.into())));
                return;
            }
        };
        let (message, last) = match message {
            Ok(Some(message)) => (Ok(message), false),
            Ok(None) => return,
            Err(status) => (Err(live.refusal(status).into()), true),
        };
        // A reader that is slow holds back the VM's stream, which drops old states; the stop is not
        // held back by it.
        tokio::select! {
            () = stop.cancelled() => return,
            sent = sender.send(message) => if sent.is_err() || last { return },
        }
    }
}
