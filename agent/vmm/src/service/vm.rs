//! `VmService` for the one VM of this process.
//!
//! A watch is a task of its own that ends with its caller, with the VM, or with the process's
//! monitor; it sends the VM at once, at each change, and every [`WATCH_INTERVAL`] while the VM
//! runs or its memory is being populated, so that statistics move.

use std::{sync::Arc, time::Duration};

use slat_proto::{
    ApiError,
    model::{PageRequest, VmName, VmSpec, paginate},
    v1::{
        CreateVmRequest, DeleteVmRequest, DeleteVmResponse, GetVmRequest, ListVmsRequest,
        ListVmsResponse, PauseVmRequest, ResumeVmRequest, StartVmRequest, Vm, WatchVmRequest,
        vm::State, vm_service_server::VmService,
    },
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::{endpoint::VmEndpoint, monitor::Monitor};

/// How often a watcher of a RUNNING VM hears of it at least.
const WATCH_INTERVAL: Duration = Duration::from_secs(1);
/// A watcher that does not read holds up its own task after this many messages, nothing else.
const WATCH_BUFFER: usize = 4;

/// What a request says of the VM it means.
macro_rules! named {
    ($request:expr, $name:ident) => {{
        let request = $request;
        (
            request.$name.as_str(),
            request.uid.as_str(),
            request.host.as_str(),
        )
    }};
}
pub(super) use named;

fn seen(monitor: &dyn Monitor) -> Result<Vm, ApiError> {
    monitor
        .snapshot()
        .ok_or_else(|| ApiError::no_such_vm(monitor.name()))
}

#[tonic::async_trait]
impl VmService for VmEndpoint {
    async fn create_vm(&self, request: Request<CreateVmRequest>) -> Result<Response<Vm>, Status> {
        let request = request.into_inner();
        let name = VmName::from_id(&request.vm_id)?;
        if name != *self.monitor.name() {
            let vm = self.monitor.name();
            return Err(
                ApiError::bad_parameter("vm_id", format_args!("this process is for {vm}"))
                    .with("vm", vm)
                    .into(),
            );
        }
        let spec = request
            .spec
            .ok_or_else(|| ApiError::bad_parameter("spec", "is missing"))?;
        let spec = VmSpec::from_message(&spec)?;
        let validate_only = request.validate_only;
        let vm = self
            .blocking(move |monitor| {
                if validate_only {
                    Ok(Vm {
                        name: monitor.name().to_string(),
                        spec: Some(monitor.plan(&spec)?.to_message()),
                        host: monitor.host().to_string(),
                        ..Vm::default()
                    })
                } else {
                    monitor.create(spec)
                }
            })
            .await?;
        Ok(Response::new(vm))
    }

    async fn get_vm(&self, request: Request<GetVmRequest>) -> Result<Response<Vm>, Status> {
        let vm = self.on(named!(request.get_ref(), name), seen).await?;
        Ok(Response::new(vm))
    }

    async fn list_vms(
        &self,
        request: Request<ListVmsRequest>,
    ) -> Result<Response<ListVmsResponse>, Status> {
        let request = request.into_inner();
        let page = PageRequest::new(request.page_size, &request.page_token)?;
        let vms = self
            .blocking(|monitor| Ok(monitor.snapshot().into_iter().collect::<Vec<_>>()))
            .await?;
        let (vms, next_page_token) = paginate(vms, &page, |vm| vm.name.clone());
        Ok(Response::new(ListVmsResponse {
            vms,
            next_page_token,
            unreachable: Vec::new(),
            ..Default::default()
        }))
    }

    type WatchVmStream = ReceiverStream<Result<Vm, Status>>;

    async fn watch_vm(
        &self,
        request: Request<WatchVmRequest>,
    ) -> Result<Response<Self::WatchVmStream>, Status> {
        // Before the first look, so that no change falls between.
        let changes = self.monitor.changes();
        let first = self.on(named!(request.get_ref(), name), seen).await?;
        let (send, receive) = mpsc::channel(WATCH_BUFFER);
        tokio::spawn(watch(self.clone(), first, changes, send));
        Ok(Response::new(ReceiverStream::new(receive)))
    }

    async fn start_vm(&self, request: Request<StartVmRequest>) -> Result<Response<Vm>, Status> {
        let vm = self
            .on(named!(request.get_ref(), name), Monitor::start)
            .await?;
        Ok(Response::new(vm))
    }

    async fn pause_vm(&self, request: Request<PauseVmRequest>) -> Result<Response<Vm>, Status> {
        let vm = self
            .on(named!(request.get_ref(), name), Monitor::pause)
            .await?;
        Ok(Response::new(vm))
    }

    async fn resume_vm(&self, request: Request<ResumeVmRequest>) -> Result<Response<Vm>, Status> {
        let vm = self
            .on(named!(request.get_ref(), name), Monitor::resume)
            .await?;
        Ok(Response::new(vm))
    }

    async fn delete_vm(
        &self,
        request: Request<DeleteVmRequest>,
    ) -> Result<Response<DeleteVmResponse>, Status> {
        self.on(named!(request.get_ref(), name), Monitor::delete)
            .await?;
        Ok(Response::new(DeleteVmResponse {}))
    }
}

/// Whether its memory is being populated, so that there is progress to tell.
fn is_populated_now(vm: &Vm) -> bool {
    let prefault = vm.prefault.as_ref();
    prefault.is_some_and(|prefault| !prefault.done && prefault.error.is_empty())
}

/// Sends the VM until it ends, the process is to end, or nobody listens.
async fn watch(
    endpoint: VmEndpoint,
    mut vm: Vm,
    mut changes: tokio::sync::watch::Receiver<u64>,
    send: mpsc::Sender<Result<Vm, Status>>,
) {
    let mut ended = endpoint.monitor.ended();
    loop {
        let moves = vm.state() == State::Running || is_populated_now(&vm);
        if send.send(Ok(vm)).await.is_err() {
            return;
        }
        tokio::select! {
            _ = &mut ended => return,
            () = send.closed() => return,
            changed = changes.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(WATCH_INTERVAL), if moves => {}
        }
        let monitor = Arc::clone(&endpoint.monitor);
        vm = match tokio::task::spawn_blocking(move || monitor.snapshot()).await {
            Ok(Some(vm)) => vm,
            Ok(None) | Err(_) => return,
        };
    }
}
