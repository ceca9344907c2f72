//! SnapshotService at the agent: saves, restores and forks of this host. What blocks on a disk is
//! done off the runtime's threads; what changes something is finished even when the caller goes
//! away.

use std::{sync::Arc, time::Duration};

use slat_proto::{
    ApiError, Reason,
    model::{HostName, PageRequest, Paging, SaveName, VmRef, children_of, paginate},
    v1::{self, save::State, snapshot_service_server::SnapshotService},
};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

use super::{
    registry::Held,
    saves::{self, Standing, blocking},
    supervisor::{SaveOrder, Supervisor},
};

/// The highest level of zstd that is taken.
const MOST_LEVEL: u32 = 19;
/// How often a save that is being written is told anew.
const TELL: Duration = Duration::from_secs(1);
/// How long a save that is given up may take to end.
const END: Duration = Duration::from_secs(15);

/// The service.
#[derive(Debug)]
pub(super) struct Snapshots(pub(super) Arc<Supervisor>);

impl Snapshots {
    /// A save of this host.
    fn own(&self, name: &str) -> Result<SaveName, ApiError> {
        let name = SaveName::parse(name)?;
        self.is_own(name.host())?;
        Ok(name)
    }

    fn is_own(&self, host: &HostName) -> Result<(), ApiError> {
        let own = &self.0.host;
        if host == own {
            return Ok(());
        }
        let words = format!("this is {own}, not {host}");
        Err(ApiError::new(Reason::NoSuchHost, words)
            .with("host", host)
            .with("own", own)
            .with("advice", "ask the server, or that host's agent"))
    }

    async fn standing(&self, name: &SaveName) -> Result<Standing, ApiError> {
        let (saves, name) = (Arc::clone(&self.0.saves), name.clone());
        blocking(move || saves.standing(&name)).await
    }
}

#[tonic::async_trait]
impl SnapshotService for Snapshots {
    async fn create_save(
        &self,
        request: Request<v1::CreateSaveRequest>,
    ) -> Result<Response<v1::Save>, Status> {
        let request = request.into_inner();
        let named = VmRef::new(&request.vm, &request.uid, &request.host)?;
        let name = SaveName::new(self.0.host.clone(), &request.save_id)?;
        let base = match request.base.as_str() {
            "" => None,
            base => Some(self.own(base)?),
        };
        let zstd_level = request.compression.map_or(0, |packed| packed.zstd_level);
        if zstd_level > MOST_LEVEL {
            let words = format_args!("{zstd_level} is more than {MOST_LEVEL}");
            return Err(ApiError::bad_parameter("compression.zstd_level", words)
                .with("value", zstd_level)
                .with("most", MOST_LEVEL)
                .into());
        }
        let live = self.0.living(&named).await?;
        let order = SaveOrder {
            name,
            base,
            zstd_level,
        };
        let work = Arc::clone(&self.0).save(live, order);
        Ok(Response::new(self.0.finish(work).await?))
    }

    async fn get_save(
        &self,
        request: Request<v1::GetSaveRequest>,
    ) -> Result<Response<v1::Save>, Status> {
        let name = self.own(&request.into_inner().name)?;
        Ok(Response::new(match self.standing(&name).await? {
            Standing::Going(shown) => shown.borrow().clone(),
            Standing::Ended(save) => *save,
        }))
    }

    async fn list_saves(
        &self,
        request: Request<v1::ListSavesRequest>,
    ) -> Result<Response<v1::ListSavesResponse>, Status> {
        let request = request.into_inner();
        if !request.parent.is_empty() {
            self.is_own(&HostName::parse(&request.parent)?)?;
        }
        let page = PageRequest::new(request.page_size, &request.page_token)?;
        let saves = Arc::clone(&self.0.saves);
        let all = blocking(move || saves.list()).await?;
        let (saves, next_page_token) = paginate(all, &page, |save| save.name.clone());
        Ok(Response::new(v1::ListSavesResponse {
            saves,
            next_page_token,
            unreachable: Vec::new(),
        }))
    }

    type WatchSaveStream = ReceiverStream<Result<v1::Save, Status>>;

    async fn watch_save(
        &self,
        request: Request<v1::WatchSaveRequest>,
    ) -> Result<Response<Self::WatchSaveStream>, Status> {
        let name = self.own(&request.into_inner().name)?;
        let (sender, receiver) = mpsc::channel(4);
        match self.standing(&name).await? {
            Standing::Going(shown) => {
                let stop = self.0.stop.clone();
                self.0.tasks.spawn(tell(shown, sender, stop));
            }
            // There is room for one.
            Standing::Ended(save) => drop(sender.try_send(Ok(*save))),
        }
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn verify_save(
        &self,
        request: Request<v1::VerifySaveRequest>,
    ) -> Result<Response<v1::VerifySaveResponse>, Status> {
        let name = self.own(&request.into_inner().name)?;
        Ok(Response::new(self.0.saves.verify(&name).await?))
    }

    async fn delete_save(
        &self,
        request: Request<v1::DeleteSaveRequest>,
    ) -> Result<Response<v1::DeleteSaveResponse>, Status> {
        let name = self.own(&request.into_inner().name)?;
        if let Some(ended) = self.0.saves.cancel(&name) {
            if tokio::time::timeout(END, ended.cancelled()).await.is_err() {
                let words = format!("{name} was told to end and does not");
                return Err(ApiError::new(Reason::ProgressStalled, words)
                    .with("save", &name)
                    .with("advice", "look at the disk that saves are written to")
                    .into());
            }
            return Ok(Response::new(v1::DeleteSaveResponse {}));
        }
        let supervisor = Arc::clone(&self.0);
        let removed = blocking(move || {
            let held = supervisor.registry.all().into_iter();
            let needed: Vec<(String, Vec<String>)> = held
                .filter_map(|(vm, _, held)| match held {
                    Held::Live(live) => Some((vm.to_string(), saves::needed_by(&live))),
                    Held::Dead(_) | Held::Busy { .. } => None,
                })
                .collect();
            supervisor.saves.remove(&name, &needed)
        });
        self.0.finish(removed).await?;
        Ok(Response::new(v1::DeleteSaveResponse {}))
    }

    async fn restore_vm(
        &self,
        request: Request<v1::RestoreVmRequest>,
    ) -> Result<Response<v1::RestoreVmResponse>, Status> {
        let request = request.into_inner();
        let name = self.own(&request.save)?;
        Paging::from_field(request.paging)?;
        let work = Arc::clone(&self.0).restore(name, request);
        Ok(Response::new(self.0.finish(work).await?))
    }

    async fn fork_vm(
        &self,
        request: Request<v1::ForkVmRequest>,
    ) -> Result<Response<v1::ForkVmResponse>, Status> {
        let request = request.into_inner();
        let named = VmRef::new(&request.vm, &request.uid, &request.host)?;
        let children = children_of(&request.vm_ids)?;
        let parent = self.0.living(&named).await?;
        let work = Arc::clone(&self.0).fork(parent, children, request.paused);
        Ok(Response::new(self.0.finish(work).await?))
    }
}

/// Sends a save at each change and each second, until it has ended.
async fn tell(
    mut shown: watch::Receiver<v1::Save>,
    sender: mpsc::Sender<Result<v1::Save, Status>>,
    stop: CancellationToken,
) {
    loop {
        let save = shown.borrow_and_update().clone();
        let ended = save.state() != State::Writing;
        tokio::select! {
            () = stop.cancelled() => {
                let words = "the agent is stopping; watch again";
                let error = ApiError::new(Reason::HostUnreachable, words);
                drop(sender.try_send(Err(error.into())));
                return;
            }
            sent = sender.send(Ok(save)) => if sent.is_err() || ended { return },
        }
        tokio::select! {
            () = stop.cancelled() => {}
            () = sender.closed() => return,
            () = tokio::time::sleep(TELL) => {}
            // It was given up: nothing is left to tell.
            changed = shown.changed() => if changed.is_err() { return },
        }
    }
}
