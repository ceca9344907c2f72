//! The fake's part in snapshots and copies: a pager socket that knows who is connected, and
//! CopyService and PagingService over it.

use std::{
    os::fd::{AsFd as _, OwnedFd},
    sync::{Arc, Mutex},
    time::Duration,
};

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use slat_paging::{
    Role, SOCKET,
    wire::{
        FromAgent, Greeting, Layer, LayerMemory, Listener, Problem, ProblemKind, Socket, ToAgent,
    },
};
use slat_proto::{
    ApiError, Reason,
    v1::{self, copy_service_server::CopyService, paging_service_server::PagingService},
};
use slat_record::journal::Entry;
use tonic::Request;

use super::{Fake, Reply};

/// A pager comes within this.
const COMES: Duration = Duration::from_secs(5);

/// What came over the pager socket.
#[derive(Default)]
pub(super) struct Heard {
    pager: Option<u32>,
    restarts: u64,
    /// Layers of the source that was handed over, and descriptors with them.
    pub(super) source: Option<(usize, usize)>,
    /// Others read its snapshot, too.
    shared: bool,
}

/// Serves the pager socket for the process's life.
pub(super) fn serve(fake: &Arc<Fake>) {
    let listener = Listener::bind(&fake.dir.path().join(SOCKET)).unwrap();
    let fake = Arc::clone(fake);
    std::thread::spawn(move || {
        loop {
            let socket = listener.accept().unwrap();
            let fake = Arc::clone(&fake);
            std::thread::spawn(move || fake.connected(&socket));
        }
    });
}

fn memfd() -> OwnedFd {
    let file = memfd_create("fake", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&file, 4096).unwrap();
    file
}

impl Fake {
    fn heard(&self) -> std::sync::MutexGuard<'_, Heard> {
        self.heard.lock().unwrap()
    }

    fn connected(&self, socket: &Socket) {
        let Ok(greeting) = socket.receive::<Greeting>() else {
            return;
        };
        let Greeting::Hello { role, pid, .. } = greeting.message;
        if role == Role::Agent {
            return self.order(socket);
        }
        self.heard().pager = Some(pid);
        self.show_paging();
        // Nothing is asked of it: this is its end.
        drop(socket.receive::<Greeting>());
        let mut heard = self.heard();
        heard.pager = None;
        heard.restarts += 1;
        drop(heard);
        self.show_paging();
    }

    fn order(&self, socket: &Socket) {
        let (mut layers, mut fds) = (0, 0);
        while let Ok(packet) = socket.receive::<FromAgent>() {
            fds += packet.fds.len();
            match packet.message {
                FromAgent::Layer(layer) => {
                    layers += 1;
                    if let Layer::Snapshot { shared, .. } = layer {
                        self.heard().shared = shared;
                    }
                }
                FromAgent::SourceEnd => {
                    self.heard().source = Some((layers, fds));
                    socket.send(&ToAgent::Done, &[]).unwrap();
                }
                FromAgent::TakeSnapshot { .. } if self.vm.id().starts_with("lost") => {
                    let message = "the lease is gone, says the fake".to_owned();
                    let kind = ProblemKind::Refused;
                    let problem = Problem { kind, message };
                    socket.send(&ToAgent::Failed(problem), &[]).unwrap();
                }
                FromAgent::TakeSnapshot { .. } => {
                    let name = self.vm.id().to_owned();
                    let layer = Layer::Snapshot {
                        memories: 1,
                        name,
                        shared: false,
                    };
                    socket
                        .send(&ToAgent::Layer(layer), &[memfd().as_fd()])
                        .unwrap();
                    let memory = LayerMemory {
                        number: 0,
                        pages: 1,
                        file_start: 0,
                        origin: None,
                        has_loaded: false,
                    };
                    let fds = [memfd(), memfd(), memfd()];
                    let fds: Vec<_> = fds.iter().map(|fd| fd.as_fd()).collect();
                    socket.send(&ToAgent::LayerMemory(memory), &fds).unwrap();
                    socket.send(&ToAgent::Done, &[]).unwrap();
                }
                FromAgent::LayerMemory(_) | FromAgent::Hello { .. } => {}
            }
        }
    }

    /// Shows who pages it, if anybody is to.
    pub(super) fn show_paging(&self) {
        use v1::paging_status::State;
        let heard = self.heard();
        let (pid, restarts) = (heard.pager.unwrap_or(0), heard.restarts);
        drop(heard);
        drop(self.show(|vm| {
            if let Some(paging) = &mut vm.paging {
                let state = if pid == 0 {
                    State::NoPager
                } else {
                    State::Serving
                };
                paging.set_state(state);
                paging.pager_pid = pid;
                paging.pager_restarts = restarts;
            }
        }));
    }

    async fn await_pager(&self) -> Result<(), ApiError> {
        let came = tokio::time::timeout(COMES, async {
            while self.heard().pager.is_none() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        });
        came.await
            .map_err(|_| ApiError::new(Reason::PagerUnreachable, "no pager came, says the fake"))
    }
}

/// For the fake's field.
pub(super) type SharedHeard = Mutex<Heard>;

#[tonic::async_trait]
impl CopyService for Fake {
    async fn take_snapshot(
        &self,
        request: Request<v1::TakeSnapshotRequest>,
    ) -> Reply<v1::TakeSnapshotResponse> {
        let vm = self.known()?;
        let mut paused = String::new();
        if self.vm.id().starts_with("still") {
            if !request.get_ref().may_pause {
                let words = "says the fake";
                return Err(ApiError::new(Reason::CapabilityMissing, words).into());
            }
            "says the fake".clone_into(&mut paused);
        } else {
            self.await_pager().await?;
        }
        let pages = vm.spec.as_ref().map_or(0, |spec| spec.memory_bytes) / 4096;
        let ran = vm.state() == v1::vm::State::Running;
        let architecture = if self.vm.id().starts_with("other") {
            "other"
        } else {
            "fake"
        };
        Ok(tonic::Response::new(v1::TakeSnapshotResponse {
            snapshot: 1,
            manifest: Some(v1::PrepareIncomingRequest {
                vm: Some(vm),
                slots: vec![v1::Slot {
                    pages,
                    ..Default::default()
                }],
                preamble: Some(v1::Preamble {
                    architecture: architecture.into(),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            state: b"state".to_vec(),
            pause_nanos: u64::from(ran) * 5_000_000,
            paused,
            working_set: Vec::new(),
            ran,
        }))
    }

    async fn build_copy(&self, request: Request<v1::BuildCopyRequest>) -> Reply<v1::Vm> {
        let request = request.into_inner();
        if self.vm.id().starts_with("refuses") {
            return Err(ApiError::new(Reason::StateLoad, "says the fake").into());
        }
        self.die_if_told();
        assert_eq!(request.state, b"state");
        assert!(self.heard().source.is_some(), "a source came before");
        self.await_pager().await?;
        self.journal(&Entry::Created {
            vm: self.vm.id().into(),
            uid: self.given.clone(),
            epoch: 1,
        });
        let copied = request.manifest.unwrap().vm.unwrap();
        let state = if request.start {
            v1::vm::State::Running
        } else {
            v1::vm::State::Paused
        };
        let bytes = copied.spec.as_ref().map_or(0, |spec| spec.memory_bytes);
        let paging = request.lazy.then(|| v1::PagingStatus {
            source_bytes: bytes,
            ..Default::default()
        });
        self.shown.send_replace(Some(v1::Vm {
            name: self.vm.to_string(),
            uid: self.given.clone(),
            spec: copied.spec,
            state: state.into(),
            host: format!("hosts/{}", self.host),
            epoch: 1,
            pid: std::process::id(),
            paging,
            state_message: format!("shared: {}", self.heard().shared),
            ..Default::default()
        }));
        self.show_paging();
        Ok(tonic::Response::new(self.known()?))
    }
}

#[tonic::async_trait]
impl PagingService for Fake {
    /// All of the source is there at once.
    async fn retry_page_source(&self, _: Request<v1::RetryPageSourceRequest>) -> Reply<v1::Vm> {
        Ok(tonic::Response::new(self.show(|vm| {
            if let Some(paging) = &mut vm.paging {
                paging.loaded_bytes = paging.source_bytes;
            }
        })?))
    }

    async fn harvest_working_set(
        &self,
        _: Request<v1::HarvestWorkingSetRequest>,
    ) -> Reply<v1::HarvestWorkingSetResponse> {
        let missing = v1::Capability::Paging;
        Err(ApiError::capability_missing(&self.vm, missing).into())
    }

    async fn list_mappings(
        &self,
        _: Request<v1::ListMappingsRequest>,
    ) -> Reply<v1::ListMappingsResponse> {
        Ok(tonic::Response::new(v1::ListMappingsResponse {
            runs: Vec::new(),
            next_gfn: 7,
        }))
    }

    async fn prefault_memory(
        &self,
        request: Request<v1::PrefaultMemoryRequest>,
    ) -> Reply<v1::PrefaultMemoryResponse> {
        Ok(tonic::Response::new(v1::PrefaultMemoryResponse {
            pages: request.into_inner().pages,
            ..Default::default()
        }))
    }
}
