//! The three services over a monitor that is not our machine: a VM that another program runs, with
//! its own way to migrate, and without what only our machine can do. It has no machine, no backend
//! and no guest memory, so a service that reaches past the traits does not compile here.

use std::{
    future::Future,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use slat_proto::{
    ApiError, Reason,
    model::{CursorName, DirtyRateOrder, HostName, MigrationName, SlotChange, VmName, VmSpec},
    transport::{Address, Endpoint, EndpointHandle, TracedChannel, connect},
    v1::{
        self, Capability, TransferPhase, TransferRole, copy_service_client::CopyServiceClient,
        memory_service_client::MemoryServiceClient, paging_service_client::PagingServiceClient,
        slot_change, transfer_service_client::TransferServiceClient,
        transfer_service_server::TransferServiceServer, vm::State,
        vm_service_client::VmServiceClient,
    },
};
use tokio::{net::UnixListener, sync::watch};
use tonic::{Code, Status};

use super::{
    copy_service, memory_service,
    monitor::{Cancel, CopySpec, HarvestOrder, Monitor, Transfers, Watched},
    paging_service,
    transfer::TransferApi,
    vm_service,
};

mod paging;

const PATIENCE: Duration = Duration::from_secs(20);

/// What another program told us of its VM.
#[derive(Debug)]
struct Adopted {
    name: VmName,
    host: HostName,
    can: Vec<Capability>,
    state: Mutex<State>,
    side: Mutex<Option<v1::Transfer>>,
    changes: watch::Sender<u64>,
    over: watch::Sender<bool>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Adopted {
    fn new(can: &[Capability]) -> Arc<Self> {
        Arc::new(Self {
            name: VmName::parse("web").unwrap(),
            host: HostName::parse("a").unwrap(),
            can: can.to_vec(),
            state: Mutex::new(State::Running),
            side: Mutex::default(),
            changes: watch::Sender::new(0),
            over: watch::Sender::new(false),
        })
    }

    fn needs(&self, capability: Capability) -> Result<(), ApiError> {
        if self.can.contains(&capability) {
            Ok(())
        } else {
            Err(ApiError::capability_missing(&self.name, capability))
        }
    }

    fn enter_state(&self, state: State) -> Result<v1::Vm, ApiError> {
        *lock(&self.state) = state;
        self.changes.send_modify(|count| *count += 1);
        self.snapshot()
            .ok_or_else(|| ApiError::no_such_vm(&self.name))
    }

    /// Moves the side on, as the other program would tell us.
    fn enter_phase(&self, phase: TransferPhase) {
        lock(&self.side)
            .as_mut()
            .expect("a side has begun")
            .set_phase(phase);
        self.changes.send_modify(|count| *count += 1);
    }

    fn begin(&self, migration: &str, role: TransferRole) -> Result<v1::Transfer, ApiError> {
        self.needs(Capability::Transfer)?;
        let side = v1::Transfer {
            migration: MigrationName::parse(migration)?.to_string(),
            vm: self.name.to_string(),
            role: role.into(),
            phase: TransferPhase::Preparing.into(),
            ..v1::Transfer::default()
        };
        *lock(&self.side) = Some(side.clone());
        Ok(side)
    }
}

impl Monitor for Adopted {
    fn name(&self) -> &VmName {
        &self.name
    }

    fn uid(&self) -> Option<String> {
        None
    }

    fn host(&self) -> &HostName {
        &self.host
    }

    fn snapshot(&self) -> Option<v1::Vm> {
        let state = *lock(&self.state);
        (!*self.over.borrow()).then(|| v1::Vm {
            name: self.name.to_string(),
            host: self.host.to_string(),
            state: state.into(),
            capabilities: self.can.iter().map(|can| (*can).into()).collect(),
            ..v1::Vm::default()
        })
    }

    fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    fn ended(&self) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        let mut over = self.over.subscribe();
        Box::pin(async move {
            // An error is the monitor's own end.
            drop(over.wait_for(|over| *over).await);
        })
    }

    fn plan(&self, _: &VmSpec) -> Result<VmSpec, ApiError> {
        Err(ApiError::new(Reason::VmExists, "adopted, not created"))
    }

    fn create(&self, spec: VmSpec) -> Result<v1::Vm, ApiError> {
        self.plan(&spec).map(|_| v1::Vm::default())
    }

    fn start(&self) -> Result<v1::Vm, ApiError> {
        Err(ApiError::new(Reason::VmState, "it runs"))
    }

    fn pause(&self) -> Result<v1::Vm, ApiError> {
        self.enter_state(State::Paused)
    }

    fn resume(&self) -> Result<v1::Vm, ApiError> {
        self.enter_state(State::Running)
    }

    fn delete(&self) -> Result<(), ApiError> {
        self.over.send_replace(true);
        Ok(())
    }

    fn list_slots(&self) -> Result<v1::ListSlotsResponse, ApiError> {
        let slot = v1::Slot {
            pages: 2048,
            ..v1::Slot::default()
        };
        Ok(v1::ListSlotsResponse {
            slots: vec![slot],
            generation: 1,
            ..Default::default()
        })
    }

    fn update_slots(&self, _: &[SlotChange], _: u64) -> Result<v1::UpdateSlotsResponse, ApiError> {
        Err(ApiError::capability_missing(
            &self.name,
            Capability::UpdateSlots,
        ))
    }

    fn update_slots_at_once(
        &self,
        changes: &[SlotChange],
        expected_generation: u64,
    ) -> Option<Result<v1::UpdateSlotsResponse, ApiError>> {
        Some(self.update_slots(changes, expected_generation))
    }

    fn harvest_dirty_pages(
        &self,
        cursor: &CursorName,
        acknowledge: u64,
        _: v1::DirtyFormat,
        most: usize,
    ) -> Result<v1::HarvestDirtyPagesResponse, ApiError> {
        self.needs(Capability::DirtyLog)?;
        assert!(cursor.id() == "default" && most > 0);
        Ok(v1::HarvestDirtyPagesResponse {
            batch: acknowledge + 1,
            ..v1::HarvestDirtyPagesResponse::default()
        })
    }

    fn list_dirty_cursors(&self) -> Result<v1::ListDirtyCursorsResponse, ApiError> {
        self.needs(Capability::DirtyLog)?;
        Ok(v1::ListDirtyCursorsResponse::default())
    }

    fn measure_dirty_rate(
        &self,
        _: DirtyRateOrder,
        _: &Cancel,
    ) -> Result<v1::MeasureDirtyRateResponse, ApiError> {
        self.needs(Capability::DirtyBitmap)?;
        Ok(v1::MeasureDirtyRateResponse::default())
    }

    fn delete_dirty_cursor(&self, _: &CursorName) -> Result<(), ApiError> {
        self.needs(Capability::DirtyLog)
    }

    fn invalidate(
        &self,
        _: Option<v1::GfnRange>,
    ) -> Result<v1::InvalidateMemoryResponse, ApiError> {
        Err(ApiError::capability_missing(
            &self.name,
            Capability::Invalidate,
        ))
    }

    fn discard(&self, _: &[v1::GfnRange]) -> Result<v1::DiscardMemoryResponse, ApiError> {
        Err(ApiError::capability_missing(
            &self.name,
            Capability::Discard,
        ))
    }

    fn digest(&self) -> Result<v1::DigestMemoryResponse, ApiError> {
        Err(ApiError::capability_missing(&self.name, Capability::Digest))
    }
    fn retry_page_source(&self) -> Result<v1::Vm, ApiError> {
        Err(ApiError::capability_missing(&self.name, Capability::Paging))
    }
    fn harvest_working_set(
        &self,
        _: HarvestOrder,
    ) -> Result<v1::HarvestWorkingSetResponse, ApiError> {
        Err(ApiError::capability_missing(&self.name, Capability::Paging))
    }
    fn prefault_memory(&self, _: u64, _: u64) -> Result<v1::PrefaultMemoryResponse, ApiError> {
        Err(ApiError::capability_missing(&self.name, Capability::Paging))
    }
    fn list_mappings(&self, _: u64) -> Result<v1::ListMappingsResponse, ApiError> {
        Err(ApiError::capability_missing(&self.name, Capability::Paging))
    }
    fn take_snapshot(&self, _: &str, _: bool) -> Result<v1::TakeSnapshotResponse, ApiError> {
        Err(ApiError::capability_missing(&self.name, Capability::Paging))
    }
    fn build_copy(&self, _: &CopySpec) -> Result<v1::Vm, ApiError> {
        Err(ApiError::capability_missing(&self.name, Capability::Paging))
    }
}

/// The transfers of [`Adopted`]: the other program's protocol, of which we see the phases.
#[derive(Debug)]
struct AdoptedSides(Arc<Adopted>);

impl Transfers for AdoptedSides {
    fn describe_outgoing(
        &self,
        _: &v1::DescribeOutgoingRequest,
    ) -> Result<v1::DescribeOutgoingResponse, ApiError> {
        Ok(v1::DescribeOutgoingResponse {
            preamble: Some(v1::Preamble {
                architecture: "another program's".into(),
                ..v1::Preamble::default()
            }),
            ..v1::DescribeOutgoingResponse::default()
        })
    }

    fn prepare_incoming(
        &self,
        request: &v1::PrepareIncomingRequest,
    ) -> Result<v1::PrepareIncomingResponse, ApiError> {
        Ok(v1::PrepareIncomingResponse {
            transfer: Some(
                self.0
                    .begin(&request.migration, TransferRole::Destination)?,
            ),
            data_address: "127.0.0.1:1".into(),
            ..v1::PrepareIncomingResponse::default()
        })
    }

    fn start_outgoing(&self, request: &v1::StartOutgoingRequest) -> Result<v1::Transfer, ApiError> {
        self.0.begin(&request.migration, TransferRole::Source)
    }

    fn transfer(
        &self,
        migration: &MigrationName,
        role: TransferRole,
    ) -> Result<v1::Transfer, ApiError> {
        let side = lock(&self.0.side).clone();
        side.filter(|side| side.migration == migration.to_string() && side.role() == role)
            .ok_or_else(|| ApiError::new(Reason::NoSuchMigration, "no such side"))
    }

    fn watch(&self, migration: &MigrationName, role: TransferRole) -> Result<Watched, ApiError> {
        let first = self.transfer(migration, role)?;
        let phase = first.phase();
        let [adopted, shown] = [Arc::clone(&self.0), Arc::clone(&self.0)];
        Ok(Watched {
            changes: self.0.changes(),
            phase: Box::new(move || {
                lock(&shown.side)
                    .as_ref()
                    .map_or(phase, v1::Transfer::phase)
            }),
            now: Box::new(move || lock(&adopted.side).clone().unwrap_or_else(|| first.clone())),
        })
    }

    fn cancel(
        &self,
        migration: &MigrationName,
        role: TransferRole,
        _: Option<v1::MigrationError>,
    ) -> Result<v1::Transfer, ApiError> {
        self.transfer(migration, role)?;
        self.0.enter_phase(TransferPhase::Cancelled);
        self.transfer(migration, role)
    }

    fn resolve(&self, request: &v1::ResolveTransferRequest) -> Result<v1::Transfer, ApiError> {
        // Its protocol leaves no doubt, so a decision changes nothing.
        self.transfer(
            &MigrationName::parse(&request.migration)?,
            TransferRole::Destination,
        )
    }

    fn adopt(
        &self,
        request: &v1::AdoptTransferRequest,
    ) -> Result<v1::AdoptTransferResponse, ApiError> {
        // Its protocol gives nothing away for good before the other end runs.
        self.transfer(
            &MigrationName::parse(&request.migration)?,
            TransferRole::Source,
        )?;
        Err(ApiError::new(Reason::VmState, "it was not given away"))
    }

    fn release(&self, migration: &MigrationName, role: TransferRole) -> Result<(), ApiError> {
        if self.transfer(migration, role).is_ok() {
            *lock(&self.0.side) = None;
        }
        Ok(())
    }
}

struct Served {
    endpoint: EndpointHandle,
    vms: VmServiceClient<TracedChannel>,
    memory: MemoryServiceClient<TracedChannel>,
    transfers: TransferServiceClient<TracedChannel>,
    paging: PagingServiceClient<TracedChannel>,
    copies: CopyServiceClient<TracedChannel>,
    _dir: slat_test_dir::TestDir,
}

async fn serve(monitor: &Arc<Adopted>) -> Served {
    let dir = slat_test_dir::TestDir::new();
    let socket = dir.path().join("vm.sock");
    let transfers = TransferApi::new(Arc::new(AdoptedSides(Arc::clone(monitor))));
    let endpoint = Endpoint::new()
        .service(vm_service(Arc::clone(monitor)))
        .service(memory_service(Arc::clone(monitor)))
        .service(TransferServiceServer::new(transfers))
        .service(paging_service(Arc::clone(monitor)))
        .service(copy_service(Arc::clone(monitor)))
        .serve_unix(UnixListener::bind(&socket).unwrap())
        .await;
    let channel = connect(&Address::Unix(socket)).unwrap();
    Served {
        endpoint,
        vms: VmServiceClient::new(channel.clone()),
        memory: MemoryServiceClient::new(channel.clone()),
        transfers: TransferServiceClient::new(channel.clone()),
        paging: PagingServiceClient::new(channel.clone()),
        copies: CopyServiceClient::new(channel),
        _dir: dir,
    }
}

/// The capability that a refused call names.
fn missing<T: std::fmt::Debug>(answer: Result<T, Status>) -> String {
    let error = ApiError::from(answer.unwrap_err());
    assert_eq!(error.reason, Reason::CapabilityMissing, "{error:?}");
    error.metadata["capability"].clone()
}

async fn next<T>(watch: &mut tonic::Streaming<T>) -> Option<T> {
    tokio::time::timeout(PATIENCE, watch.message())
        .await
        .expect("the watch moves")
        .unwrap()
}

#[tokio::test]
async fn its_life_is_seen_and_steered_like_any_vms() {
    let adopted = Adopted::new(&[]);
    let mut served = serve(&adopted).await;
    let name = || "vms/web".to_owned();
    let request = v1::WatchVmRequest {
        name: name(),
        ..Default::default()
    };
    let mut watch = served.vms.watch_vm(request).await.unwrap().into_inner();
    assert_eq!(next(&mut watch).await.unwrap().state(), State::Running);
    let paused = served.vms.pause_vm(v1::PauseVmRequest {
        name: name(),
        ..Default::default()
    });
    assert_eq!(paused.await.unwrap().into_inner().state(), State::Paused);
    while next(&mut watch).await.unwrap().state() != State::Paused {}
    let create = v1::CreateVmRequest {
        vm_id: "web".into(),
        spec: Some(v1::VmSpec {
            memory_bytes: 8 << 20,
            vcpus: 1,
            ..v1::VmSpec::default()
        }),
        ..v1::CreateVmRequest::default()
    };
    let error = served.vms.create_vm(create).await.unwrap_err();
    assert_eq!(error.code(), Code::AlreadyExists);
    let delete = v1::DeleteVmRequest {
        name: name(),
        ..Default::default()
    };
    served.vms.delete_vm(delete).await.unwrap();
    while next(&mut watch).await.is_some() {}
    let get = served.vms.get_vm(v1::GetVmRequest {
        name: name(),
        ..Default::default()
    });
    assert_eq!(get.await.unwrap_err().code(), Code::NotFound);
    served.endpoint.stop().await;
}

#[tokio::test]
async fn what_it_cannot_do_is_refused_by_the_capabilitys_name() {
    let adopted = Adopted::new(&[]);
    let mut served = serve(&adopted).await;
    let memory = &mut served.memory;
    let vm = || "vms/web".to_owned();
    let slots = memory
        .list_slots(v1::ListSlotsRequest {
            vm: vm(),
            ..Default::default()
        })
        .await;
    assert_eq!(slots.unwrap().into_inner().slots[0].pages, 2048);
    let update = v1::UpdateSlotsRequest {
        vm: vm(),
        changes: vec![v1::SlotChange {
            change: Some(slot_change::Change::Delete(slot_change::Delete { slot: 0 })),
        }],
        expected_generation: 0,
        ..Default::default()
    };
    let harvest = || v1::HarvestDirtyPagesRequest {
        vm: vm(),
        ..v1::HarvestDirtyPagesRequest::default()
    };
    let cursor = v1::DeleteDirtyCursorRequest {
        vm: vm(),
        ..v1::DeleteDirtyCursorRequest::default()
    };
    let invalidate = v1::InvalidateMemoryRequest {
        vm: vm(),
        range: None,
        ..Default::default()
    };
    let discard = v1::DiscardMemoryRequest {
        vm: vm(),
        ranges: vec![v1::GfnRange { gfn: 0, pages: 1 }],
        ..Default::default()
    };
    let digest = v1::DigestMemoryRequest {
        vm: vm(),
        ..Default::default()
    };
    let prepare = v1::PrepareIncomingRequest {
        migration: "migrations/m1".into(),
        ..v1::PrepareIncomingRequest::default()
    };
    let refused = [
        missing(memory.update_slots(update).await),
        missing(memory.harvest_dirty_pages(harvest()).await),
        missing(memory.delete_dirty_cursor(cursor).await),
        missing(memory.invalidate_memory(invalidate).await),
        missing(memory.discard_memory(discard).await),
        missing(memory.digest_memory(digest).await),
        missing(served.transfers.prepare_incoming(prepare).await),
    ];
    assert_eq!(
        refused,
        [
            "CAPABILITY_UPDATE_SLOTS",
            "CAPABILITY_DIRTY_LOG",
            "CAPABILITY_DIRTY_LOG",
            "CAPABILITY_INVALIDATE",
            "CAPABILITY_DISCARD",
            "CAPABILITY_DIGEST",
            "CAPABILITY_TRANSFER",
        ]
    );
    served.endpoint.stop().await;

    let adopted = Adopted::new(&[Capability::DirtyLog]);
    let mut served = serve(&adopted).await;
    let harvested = served.memory.harvest_dirty_pages(harvest()).await;
    assert_eq!(harvested.unwrap().into_inner().batch, 1);
    served.endpoint.stop().await;
}

#[tokio::test]
async fn its_own_way_to_migrate_is_followed_to_the_end() {
    let adopted = Adopted::new(&[Capability::Transfer]);
    let mut served = serve(&adopted).await;
    let transfers = &mut served.transfers;
    let migration = || "migrations/m1".to_owned();
    let role = i32::from(TransferRole::Source);
    let nowhere = v1::GetTransferRequest {
        migration: migration(),
        role: 0,
        ..Default::default()
    };
    let error = transfers.get_transfer(nowhere).await.unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument);
    let watch = || v1::WatchTransferRequest {
        migration: migration(),
        role,
    };
    let error = transfers.watch_transfer(watch()).await.unwrap_err();
    assert_eq!(error.code(), Code::NotFound);

    let start = v1::StartOutgoingRequest {
        migration: migration(),
        ..v1::StartOutgoingRequest::default()
    };
    transfers.start_outgoing(start).await.unwrap();
    let mut watched = transfers
        .watch_transfer(watch())
        .await
        .unwrap()
        .into_inner();
    let first = next(&mut watched).await.unwrap();
    assert_eq!(first.phase(), TransferPhase::Preparing);
    for phase in [TransferPhase::Precopy, TransferPhase::Completed] {
        adopted.enter_phase(phase);
        while next(&mut watched).await.unwrap().phase() != phase {}
    }
    assert!(next(&mut watched).await.is_none(), "it ended with its side");
    let release = || v1::ReleaseTransferRequest {
        migration: migration(),
        role,
    };
    transfers.release_transfer(release()).await.unwrap();
    transfers.release_transfer(release()).await.unwrap();
    let error = transfers.watch_transfer(watch()).await.unwrap_err();
    assert_eq!(error.code(), Code::NotFound);
    served.endpoint.stop().await;
}
