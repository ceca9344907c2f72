//! A VM process without a VM: holds the lock, serves the endpoint, writes real journals and
//! records. It is this test executable started again, which knows its part by a variable; what goes
//! wrong is chosen by the VM's or the migration's name.

mod copies;

use std::{
    collections::BTreeMap,
    ffi::OsString,
    io::Write as _,
    pin::Pin,
    sync::{Arc, Mutex},
    time::Duration,
};

use slat_proto::{
    ApiError, Reason,
    model::{MigrationName, VmName},
    transport::Endpoint,
    v1::{
        self, copy_service_server::CopyServiceServer, memory_service_server::MemoryService,
        memory_service_server::MemoryServiceServer, paging_service_server::PagingServiceServer,
        transfer_service_server::TransferService, transfer_service_server::TransferServiceServer,
        vm_service_server::VmService, vm_service_server::VmServiceServer,
    },
};
use slat_record::{
    dir::VmDir,
    journal::{Entry, Journal},
};
use tokio::sync::{Notify, watch};
use tokio_stream::{Stream, StreamExt as _, wrappers::WatchStream};
use tonic::{Request, Response, Status};

const VARIABLE: &str = "SLAT_TEST_FAKE_VM";
/// Between what a slow process shows and what it answers.
const SLOW: Duration = Duration::from_millis(200);
/// No fake outlives a test run by more than this.
const LIFE: Duration = Duration::from_secs(120);

/// The `vm_program` of an agent under test.
pub(crate) fn program() -> Vec<OsString> {
    let exe = std::env::current_exe().unwrap();
    let variable = format!("{VARIABLE}=1");
    let mut program: Vec<OsString> = vec!["env".into(), variable.into(), exe.into()];
    program.extend(["--exact", "fake::fake_vm_process", "--nocapture", "--"].map(OsString::from));
    program
}

/// Not a test of its own: the fake's main, when started as one.
#[test]
fn fake_vm_process() {
    if std::env::var_os(VARIABLE).is_none() {
        return;
    }
    let arguments: Vec<String> = std::env::args().collect();
    let argument = |name: &str| {
        let at = arguments
            .iter()
            .position(|argument| argument == name)
            .unwrap();
        arguments[at + 1].clone()
    };
    let vm = VmName::from_id(&argument("--vm")).unwrap();
    if vm.id().starts_with("quits-unlocked") {
        // No lock can be taken any more, as on a disk that is full.
        std::fs::create_dir(VmDir::new(argument("--dir")).path().join("lock")).unwrap();
    }
    if vm.id().starts_with("quits") {
        eprintln!("no KVM here, says the fake");
        std::process::exit(3);
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let dir = VmDir::new(argument("--dir"));
    // An older agent gives none.
    let uid = arguments.iter().any(|argument| argument == "--uid");
    let uid = if uid {
        argument("--uid")
    } else {
        "uid-1".to_owned()
    };
    runtime.block_on(serve(dir, vm, uid, argument("--host")));
    // Not back into the harness, which would report a passed test.
    std::process::exit(0);
}

async fn serve(dir: VmDir, vm: VmName, uid: String, host: String) {
    let lock = dir.lock().unwrap().unwrap();
    let listener = tokio::net::UnixListener::bind(dir.socket()).unwrap();
    let fake = Arc::new(Fake {
        journal: Mutex::new(Journal::open(&dir.journal()).unwrap()),
        dir,
        vm,
        given: uid,
        host,
        shown: watch::Sender::new(None),
        sides: Mutex::default(),
        heard: copies::SharedHeard::default(),
        exit: Notify::new(),
    });
    copies::serve(&fake);
    let endpoint = Endpoint::new()
        .service(VmServiceServer::from_arc(Arc::clone(&fake)))
        .service(MemoryServiceServer::from_arc(Arc::clone(&fake)))
        .service(TransferServiceServer::from_arc(Arc::clone(&fake)))
        .service(CopyServiceServer::from_arc(Arc::clone(&fake)))
        .service(PagingServiceServer::from_arc(Arc::clone(&fake)))
        .serve_unix(listener)
        .await;
    println!("\nready");
    std::io::stdout().flush().unwrap();
    drop(tokio::time::timeout(LIFE, fake.exit.notified()).await);
    // The answer to the call that ended it goes out first.
    tokio::time::sleep(Duration::from_millis(50)).await;
    drop(endpoint);
    drop(lock);
}

struct Fake {
    dir: VmDir,
    vm: VmName,
    given: String,
    host: String,
    journal: Mutex<Journal>,
    shown: watch::Sender<Option<v1::Vm>>,
    sides: Mutex<BTreeMap<(String, i32), watch::Sender<v1::Transfer>>>,
    heard: copies::SharedHeard,
    exit: Notify,
}

type Reply<T> = Result<Response<T>, Status>;
type Streamed<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

impl Fake {
    fn uid(&self) -> String {
        let journal = self.journal.lock().unwrap();
        journal
            .state()
            .map_or_else(String::new, |state| state.uid.clone())
    }

    /// Keeps a request for the test to look at.
    fn keep(&self, file: &str, request: &impl prost::Message) {
        std::fs::write(self.dir.path().join(file), request.encode_to_vec()).unwrap();
    }

    /// As when memory runs out.
    fn die_if_told(&self) {
        if self.vm.id().starts_with("dies") {
            eprintln!("too much, says the fake");
            let own = rustix::process::getpid();
            rustix::process::kill_process(own, rustix::process::Signal::KILL).unwrap();
        }
    }

    fn journal(&self, entry: &Entry) {
        self.journal.lock().unwrap().append(entry).unwrap();
    }

    fn known(&self) -> Result<v1::Vm, ApiError> {
        self.shown
            .borrow()
            .clone()
            .ok_or_else(|| ApiError::no_such_vm(&self.vm))
    }

    fn show(&self, change: impl FnOnce(&mut v1::Vm)) -> Result<v1::Vm, ApiError> {
        let mut vm = self.known()?;
        change(&mut vm);
        self.shown.send_replace(Some(vm.clone()));
        Ok(vm)
    }

    fn side(&self, migration: &str, role: i32) -> Result<watch::Receiver<v1::Transfer>, ApiError> {
        let migration = MigrationName::parse(migration)?.to_string();
        let sides = self.sides.lock().unwrap();
        let side = sides
            .get(&(migration.clone(), role))
            .map(watch::Sender::subscribe);
        side.ok_or_else(|| ApiError::new(Reason::NoSuchMigration, format!("no {migration}")))
    }

    /// Remembers a side; like a real process, on disk only once it has ended, and one at a time.
    fn set_side(&self, side: v1::Transfer) -> v1::Transfer {
        let ended =
            [v1::TransferPhase::Completed, v1::TransferPhase::Cancelled].contains(&side.phase());
        if ended || side.role() == v1::TransferRole::Destination {
            self.dir.save_transfer(&side).unwrap();
        }
        let mut sides = self.sides.lock().unwrap();
        sides
            .entry((side.migration.clone(), side.role))
            .or_insert_with(|| watch::Sender::new(side.clone()))
            .send_replace(side.clone());
        side
    }
}

#[tonic::async_trait]
impl VmService for Fake {
    async fn create_vm(&self, request: Request<v1::CreateVmRequest>) -> Reply<v1::Vm> {
        if self.vm.id().starts_with("refuses") {
            return Err(ApiError::new(Reason::KvmIoctl, "KVM_CREATE_VM failed")
                .with("op", "KVM_CREATE_VM")
                .into());
        }
        self.die_if_told();
        self.journal(&Entry::Created {
            vm: self.vm.id().into(),
            uid: self.given.clone(),
            epoch: 1,
        });
        let mut spec = request.into_inner().spec.unwrap();
        if spec.backend() == v1::Backend::Unspecified {
            spec.set_backend(v1::Backend::Software);
        }
        let paging = (spec.paging() == v1::Paging::Agent).then(v1::PagingStatus::default);
        let vm = v1::Vm {
            name: self.vm.to_string(),
            uid: self.given.clone(),
            spec: Some(spec),
            paging,
            capabilities: vec![v1::Capability::Paging.into()],
            state: v1::vm::State::Created.into(),
            host: format!("hosts/{}", self.host),
            epoch: 1,
            pid: std::process::id(),
            mmu_stats: Some(v1::MmuStats {
                faults_taken: Some(7),
                ..Default::default()
            }),
            ..Default::default()
        };
        self.shown.send_replace(Some(vm));
        self.show_paging();
        Ok(Response::new(self.known()?))
    }

    async fn get_vm(&self, _: Request<v1::GetVmRequest>) -> Reply<v1::Vm> {
        Ok(Response::new(self.known()?))
    }

    async fn list_vms(&self, _: Request<v1::ListVmsRequest>) -> Reply<v1::ListVmsResponse> {
        Err(Status::unimplemented("not asked by agents"))
    }

    type WatchVmStream = Streamed<v1::Vm>;

    async fn watch_vm(&self, _: Request<v1::WatchVmRequest>) -> Reply<Self::WatchVmStream> {
        self.known()?;
        let stream = WatchStream::new(self.shown.subscribe()).filter_map(|vm| vm.map(Ok));
        Ok(Response::new(Box::pin(stream)))
    }

    async fn start_vm(&self, _: Request<v1::StartVmRequest>) -> Reply<v1::Vm> {
        Ok(Response::new(
            self.show(|vm| vm.set_state(v1::vm::State::Running))?,
        ))
    }

    async fn pause_vm(&self, _: Request<v1::PauseVmRequest>) -> Reply<v1::Vm> {
        Ok(Response::new(
            self.show(|vm| vm.set_state(v1::vm::State::Paused))?,
        ))
    }

    async fn resume_vm(&self, _: Request<v1::ResumeVmRequest>) -> Reply<v1::Vm> {
        Err(ApiError::new(Reason::StaleEpoch, "says the fake").into())
    }

    async fn delete_vm(&self, _: Request<v1::DeleteVmRequest>) -> Reply<v1::DeleteVmResponse> {
        self.known()?;
        self.journal(&Entry::Ended { uid: self.uid() });
        self.exit.notify_one();
        Ok(Response::new(v1::DeleteVmResponse {}))
    }
}

#[tonic::async_trait]
impl MemoryService for Fake {
    async fn list_slots(&self, _: Request<v1::ListSlotsRequest>) -> Reply<v1::ListSlotsResponse> {
        let pages = self.known()?.spec.unwrap_or_default().memory_bytes / 4096;
        let slots = vec![v1::Slot {
            pages,
            ..Default::default()
        }];
        Ok(Response::new(v1::ListSlotsResponse {
            slots,
            generation: 1,
            ..Default::default()
        }))
    }

    async fn update_slots(
        &self,
        request: Request<v1::UpdateSlotsRequest>,
    ) -> Reply<v1::UpdateSlotsResponse> {
        let request = request.into_inner();
        if request.expected_generation == 9 {
            return Err(ApiError::new(Reason::StaleGeneration, "says the fake").into());
        }
        let pages = self.known()?.spec.unwrap_or_default().memory_bytes / 4096;
        let mut slots = vec![v1::Slot {
            pages,
            ..Default::default()
        }];
        for change in request.changes {
            if let Some(v1::slot_change::Change::Create(create)) = change.change {
                slots.extend(create.slot);
            }
        }
        Ok(Response::new(v1::UpdateSlotsResponse {
            slots,
            generation: 2,
            ..Default::default()
        }))
    }

    async fn harvest_dirty_pages(
        &self,
        _: Request<v1::HarvestDirtyPagesRequest>,
    ) -> Reply<v1::HarvestDirtyPagesResponse> {
        Ok(Response::new(v1::HarvestDirtyPagesResponse {
            batch: 4,
            ..Default::default()
        }))
    }

    async fn delete_dirty_cursor(
        &self,
        _: Request<v1::DeleteDirtyCursorRequest>,
    ) -> Reply<v1::DeleteDirtyCursorResponse> {
        Err(ApiError::new(Reason::NoSuchCursor, "says the fake").into())
    }

    async fn list_dirty_cursors(
        &self,
        _: Request<v1::ListDirtyCursorsRequest>,
    ) -> Reply<v1::ListDirtyCursorsResponse> {
        Ok(Response::new(v1::ListDirtyCursorsResponse::default()))
    }

    async fn measure_dirty_rate(
        &self,
        _: Request<v1::MeasureDirtyRateRequest>,
    ) -> Reply<v1::MeasureDirtyRateResponse> {
        Ok(Response::new(v1::MeasureDirtyRateResponse::default()))
    }

    async fn invalidate_memory(
        &self,
        _: Request<v1::InvalidateMemoryRequest>,
    ) -> Reply<v1::InvalidateMemoryResponse> {
        Ok(Response::new(v1::InvalidateMemoryResponse {
            pages: 5,
            duration_nanos: 1,
            ..Default::default()
        }))
    }

    async fn discard_memory(
        &self,
        _: Request<v1::DiscardMemoryRequest>,
    ) -> Reply<v1::DiscardMemoryResponse> {
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
    ) -> Reply<v1::DigestMemoryResponse> {
        Ok(Response::new(v1::DigestMemoryResponse {
            digest: "00".into(),
            ..Default::default()
        }))
    }
}

#[tonic::async_trait]
impl TransferService for Fake {
    async fn describe_outgoing(
        &self,
        request: Request<v1::DescribeOutgoingRequest>,
    ) -> Reply<v1::DescribeOutgoingResponse> {
        let vm = self.known()?;
        if vm.epoch != request.get_ref().epoch {
            return Err(ApiError::new(Reason::StaleEpoch, "says the fake").into());
        }
        Ok(Response::new(v1::DescribeOutgoingResponse {
            preamble: Some(v1::Preamble {
                architecture: "fake".into(),
                ..Default::default()
            }),
            vm: Some(vm),
            ..Default::default()
        }))
    }

    async fn prepare_incoming(
        &self,
        request: Request<v1::PrepareIncomingRequest>,
    ) -> Reply<v1::PrepareIncomingResponse> {
        let request = request.into_inner();
        self.keep("prepared.pb", &request);
        self.die_if_told();
        let role = v1::TransferRole::Destination.into();
        let side = match self.side(&request.migration, role) {
            Ok(side) => side.borrow().clone(),
            Err(_) => {
                if request.migration.ends_with("refused") {
                    return Err(ApiError::new(Reason::BadSlotTable, "says the fake").into());
                }
                let vm = request.vm.unwrap();
                if self.uid().is_empty() {
                    self.journal(&Entry::Incoming {
                        vm: self.vm.id().into(),
                        uid: vm.uid.clone(),
                        migration: MigrationName::parse(&request.migration)?.id().into(),
                        epoch: vm.epoch,
                    });
                }
                if request.migration.contains("slow") && !self.dir.path().join("waited").exists() {
                    std::fs::write(self.dir.path().join("waited"), "").unwrap();
                    std::future::pending::<()>().await;
                }
                let ready = request.migration.contains("ready");
                if ready {
                    self.journal(&Entry::Prepared {
                        uid: vm.uid.clone(),
                        migration: MigrationName::parse(&request.migration)?.id().into(),
                        epoch: vm.epoch + 1,
                        grant: None,
                    });
                }
                let phase = if ready {
                    v1::TransferPhase::Ready
                } else {
                    v1::TransferPhase::Preparing
                };
                self.shown.send_replace(Some(v1::Vm {
                    state: v1::vm::State::Incoming.into(),
                    host: format!("hosts/{}", self.host),
                    pid: std::process::id(),
                    migration: request.migration.clone(),
                    ..vm.clone()
                }));
                self.set_side(v1::Transfer {
                    migration: request.migration,
                    vm: self.vm.to_string(),
                    vm_uid: vm.uid.clone(),
                    role,
                    phase: phase.into(),
                    epoch: vm.epoch,
                    ..Default::default()
                })
            }
        };
        Ok(Response::new(v1::PrepareIncomingResponse {
            versions: None,
            transfer: Some(side),
            data_address: "127.0.0.1:9".into(),
            ticket: std::process::id().to_be_bytes().to_vec(),
            ..Default::default()
        }))
    }

    async fn start_outgoing(
        &self,
        request: Request<v1::StartOutgoingRequest>,
    ) -> Reply<v1::Transfer> {
        let request = request.into_inner();
        self.keep("started.pb", &request);
        let migration = MigrationName::parse(&request.migration)?;
        let vm = self.show(|vm| vm.migration = migration.to_string())?;
        if migration.id().starts_with("refused") {
            return Err(ApiError::new(Reason::StaleEpoch, "says the fake").into());
        }
        if migration.id().starts_with("slow") {
            tokio::time::sleep(SLOW).await;
        }
        self.sides
            .lock()
            .unwrap()
            .retain(|(_, role), _| *role != i32::from(v1::TransferRole::Source));
        let mut side = v1::Transfer {
            migration: migration.to_string(),
            vm: self.vm.to_string(),
            vm_uid: vm.uid.clone(),
            role: v1::TransferRole::Source.into(),
            phase: v1::TransferPhase::Precopy.into(),
            epoch: vm.epoch,
            progress: Some(v1::MigrationProgress {
                remaining_bytes: 77,
                ..Default::default()
            }),
            ..Default::default()
        };
        if migration.id().starts_with("commit") {
            self.journal(&Entry::Relinquished {
                uid: vm.uid.clone(),
                migration: migration.id().into(),
                epoch: vm.epoch,
                grant: None,
            });
            side.set_phase(v1::TransferPhase::Completed);
        }
        if migration.id().starts_with("gone") {
            self.journal(&Entry::Relinquished {
                uid: vm.uid.clone(),
                migration: migration.id().into(),
                epoch: vm.epoch,
                grant: None,
            });
            self.show(|vm| vm.set_state(v1::vm::State::Relinquished))?;
            side.set_phase(v1::TransferPhase::Relinquished);
        }
        if migration.id().starts_with("undurable") {
            side.set_phase(v1::TransferPhase::Relinquished);
        }
        Ok(Response::new(self.set_side(side)))
    }

    async fn get_transfer(&self, request: Request<v1::GetTransferRequest>) -> Reply<v1::Transfer> {
        let request = request.into_inner();
        Ok(Response::new(
            self.side(&request.migration, request.role)?
                .borrow()
                .clone(),
        ))
    }

    type WatchTransferStream = Streamed<v1::Transfer>;

    async fn watch_transfer(
        &self,
        request: Request<v1::WatchTransferRequest>,
    ) -> Reply<Self::WatchTransferStream> {
        let request = request.into_inner();
        let side = self.side(&request.migration, request.role);
        if side.is_err() && request.migration.contains("slow") {
            // What was true when it was asked is told when it is true no more.
            tokio::time::sleep(SLOW * 2).await;
        }
        Ok(Response::new(Box::pin(WatchStream::new(side?).map(Ok))))
    }

    async fn cancel_transfer(
        &self,
        request: Request<v1::CancelTransferRequest>,
    ) -> Reply<v1::Transfer> {
        let request = request.into_inner();
        let mut side = self
            .side(&request.migration, request.role)?
            .borrow()
            .clone();
        side.set_phase(v1::TransferPhase::Cancelled);
        let side = self.set_side(side);
        if side.role() == v1::TransferRole::Destination {
            let migration = MigrationName::parse(&side.migration)?.id().to_owned();
            self.journal(&Entry::Aborted {
                uid: self.uid(),
                migration: migration.clone(),
            });
            // One of that name stays, so that somebody else has to see it off.
            if !migration.starts_with("stays") {
                self.exit.notify_one();
            }
        }
        Ok(Response::new(side))
    }

    async fn resolve_transfer(
        &self,
        request: Request<v1::ResolveTransferRequest>,
    ) -> Reply<v1::Transfer> {
        let request = request.into_inner();
        self.keep("resolved.pb", &request);
        let role = v1::TransferRole::Destination.into();
        let mut side = self.side(&request.migration, role)?.borrow().clone();
        let migration = MigrationName::parse(&side.migration)?.id().to_owned();
        if request.decision() == v1::resolve_transfer_request::Decision::Commit {
            let epoch = side.epoch + 1;
            self.journal(&Entry::Owned {
                uid: self.uid(),
                migration,
                epoch,
            });
            self.show(|vm| {
                vm.epoch = epoch;
                vm.migration.clear();
                vm.set_state(v1::vm::State::Running);
            })?;
            side.set_phase(v1::TransferPhase::Completed);
        } else {
            self.journal(&Entry::Aborted {
                uid: self.uid(),
                migration,
            });
            side.set_phase(v1::TransferPhase::Cancelled);
            self.exit.notify_one();
        }
        Ok(Response::new(self.set_side(side)))
    }

    async fn adopt_transfer(
        &self,
        request: Request<v1::AdoptTransferRequest>,
    ) -> Reply<v1::AdoptTransferResponse> {
        let request = request.into_inner();
        let role = v1::TransferRole::Source.into();
        let mut side = self.side(&request.migration, role)?.borrow().clone();
        if side.phase() != v1::TransferPhase::Relinquished {
            return Err(ApiError::new(Reason::VmState, "says the fake").into());
        }
        self.journal(&Entry::Adopted {
            uid: self.uid(),
            epoch: request.epoch,
        });
        side.set_phase(v1::TransferPhase::Cancelled);
        let side = self.set_side(side);
        let vm = self.show(|vm| {
            vm.epoch = request.epoch;
            vm.migration.clear();
            vm.set_state(v1::vm::State::Paused);
        })?;
        Ok(Response::new(v1::AdoptTransferResponse {
            vm: Some(vm),
            transfer: Some(side),
        }))
    }

    async fn release_transfer(
        &self,
        request: Request<v1::ReleaseTransferRequest>,
    ) -> Reply<v1::ReleaseTransferResponse> {
        let request = request.into_inner();
        let side = self
            .side(&request.migration, request.role)?
            .borrow()
            .clone();
        let migration = MigrationName::parse(&side.migration)?;
        self.dir.remove_transfer(&migration, side.role()).unwrap();
        self.sides
            .lock()
            .unwrap()
            .remove(&(side.migration.clone(), side.role));
        let relinquished = side.role() == v1::TransferRole::Source
            && side.phase() == v1::TransferPhase::Relinquished;
        if relinquished || side.phase() == v1::TransferPhase::Completed {
            self.journal(&Entry::Ended { uid: self.uid() });
            self.exit.notify_one();
        }
        Ok(Response::new(v1::ReleaseTransferResponse {}))
    }
}

/// Four pages of 2 MiB, of which three are free.
pub(crate) fn paging() -> v1::HostPaging {
    v1::HostPaging {
        can_watch: true,
        can_protect: true,
        message: String::new(),
    }
}

pub(crate) fn huge_pages() -> v1::HugePages {
    v1::HugePages {
        pools: vec![v1::HugePagePool {
            page_bytes: 2 << 20,
            node: None,
            total_pages: 4,
            free_pages: 3,
        }],
    }
}

/// Takes whatever is announced, unless its architecture is called `other`.
pub(crate) fn admit(request: &v1::PrepareIncomingRequest) -> Result<v1::ChosenVersions, ApiError> {
    let other = |preamble: &v1::Preamble| preamble.architecture == "other";
    if request.preamble.as_ref().is_some_and(other) {
        return Err(
            ApiError::new(Reason::IsaMismatch, "says the fake").with("vm_location", "SOURCE")
        );
    }
    Ok(v1::ChosenVersions {
        protocol: 1,
        state: 1,
    })
}
