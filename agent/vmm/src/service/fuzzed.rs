//! Damaged requests to the socket of a VM's process: any method, any message. They go through the
//! generated servers and the handlers to a monitor that refuses everything, so what is tried is all
//! that stands before a VM: decoding, and every check of a field.
//!
//! The first byte of an input chooses the method, the rest is the message.

use std::{future::Future, pin::Pin, sync::Arc, time::Duration};

use http_body_util::Full;
use slat_proto::{
    ApiError, Reason,
    model::{
        CursorName, DirtyRateOrder, HostName, MigrationName, MigrationParams, SlotChange, SlotSpec,
        VmName, VmSpec, check_slot_table,
    },
    v1::{
        self, DirtyFormat, TransferRole, copy_service_server::CopyServiceServer,
        memory_service_server::MemoryServiceServer, paging_service_server::PagingServiceServer,
        transfer_service_server::TransferServiceServer, vm_service_server::VmServiceServer,
    },
};
use tokio::sync::watch;
use tonic::{
    body::Body,
    codegen::{Bytes, Service, http},
};

use super::{
    endpoint::VmEndpoint,
    monitor::{Cancel, CopySpec, HarvestOrder, Monitor, Transfers, Watched},
    transfer::TransferApi,
};
use crate::{fuzz::Target, handover::preamble};

/// See the module.
pub(crate) const SOCKET: Target = Target {
    name: "vm-socket",
    rounds: 100,
    corpus,
    check,
};

/// No answer takes so long.
const PATIENCE: Duration = Duration::from_secs(20);

const METHODS: [&str; 32] = [
    "slat.v1.VmService/CreateVm",
    "slat.v1.VmService/GetVm",
    "slat.v1.VmService/ListVms",
    "slat.v1.VmService/WatchVm",
    "slat.v1.VmService/StartVm",
    "slat.v1.VmService/PauseVm",
    "slat.v1.VmService/ResumeVm",
    "slat.v1.VmService/DeleteVm",
    "slat.v1.MemoryService/ListSlots",
    "slat.v1.MemoryService/UpdateSlots",
    "slat.v1.MemoryService/HarvestDirtyPages",
    "slat.v1.MemoryService/DeleteDirtyCursor",
    "slat.v1.MemoryService/ListDirtyCursors",
    "slat.v1.MemoryService/MeasureDirtyRate",
    "slat.v1.MemoryService/InvalidateMemory",
    "slat.v1.MemoryService/DiscardMemory",
    "slat.v1.MemoryService/DigestMemory",
    "slat.v1.TransferService/DescribeOutgoing",
    "slat.v1.TransferService/PrepareIncoming",
    "slat.v1.TransferService/StartOutgoing",
    "slat.v1.TransferService/GetTransfer",
    "slat.v1.TransferService/WatchTransfer",
    "slat.v1.TransferService/CancelTransfer",
    "slat.v1.TransferService/ResolveTransfer",
    "slat.v1.TransferService/ReleaseTransfer",
    "slat.v1.TransferService/AdoptTransfer",
    "slat.v1.PagingService/RetryPageSource",
    "slat.v1.PagingService/HarvestWorkingSet",
    "slat.v1.PagingService/ListMappings",
    "slat.v1.CopyService/TakeSnapshot",
    "slat.v1.CopyService/BuildCopy",
    "slat.v1.PagingService/PrefaultMemory",
];

/// The fields of a protobuf message, as little as is needed to write one: number, and a text or
/// what is inside.
fn field(number: u8, contents: &[u8]) -> Vec<u8> {
    // Short ones: a length is one byte.
    let mut bytes = vec![number << 3 | 2, contents.len() as u8];
    bytes.extend(contents);
    bytes
}

fn corpus() -> Vec<Vec<u8>> {
    let of = |method: u8, fields: &[&[u8]]| [&[method][..], &fields.concat()].concat();
    let vm = field(1, b"vms/web");
    // 8 MiB and one vCPU.
    let spec = field(2, &[0x08, 0x80, 0x80, 0x80, 0x04, 0x10, 0x01]);
    (0..METHODS.len() as u8)
        .map(|method| of(method, &[&vm]))
        .chain([
            of(0, &[&field(1, b"web"), &spec]),
            of(
                9,
                &[
                    &vm,
                    &field(2, &field(1, &[0x08, 0x01, 0x10, 0x80, 0x02])),
                    &[0x18, 0x01],
                ],
            ),
            of(
                10,
                &[
                    &vm,
                    &field(2, b"backup"),
                    &[0x18, 0x01, 0x20, 0x02, 0x28, 0x07],
                ],
            ),
            of(15, &[&vm, &field(2, &[0x08, 0x01, 0x10, 0x02])]),
            of(18, &[&field(1, b"migrations/m1"), &field(2, &vm)]),
            of(20, &[&field(1, b"migrations/m1"), &[0x10, 0x01]]),
            of(31, &[&field(1, b"vms/web"), &[0x20, 0x01, 0x28, 0x02]]),
            of(
                30,
                &[&field(1, b"web"), &field(2, &vm), &[0x20, 0x01, 0x30, 0x02]],
            ),
        ])
        .collect()
}

#[allow(clippy::ptr_arg, reason = "the form of every target: others cut")]
fn check(bytes: &mut Vec<u8>) -> bool {
    let Some((method, message)) = bytes.split_first() else {
        return false;
    };
    let method = METHODS[usize::from(*method) % METHODS.len()];
    thread_local! {
        static RUNTIME: Option<tokio::runtime::Runtime> = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .max_blocking_threads(1)
            .build()
            .ok();
    }
    RUNTIME.with(|runtime| {
        let runtime = runtime.as_ref().expect("this test needs a runtime");
        runtime.block_on(async {
            let answer = tokio::time::timeout(PATIENCE, call(method, message));
            answer.await.expect("an answer in time")
        })
    })
}

/// Whether a monitor heard of it.
async fn call(method: &str, message: &[u8]) -> bool {
    let mut framed = vec![0];
    framed.extend((message.len() as u32).to_be_bytes());
    framed.extend(message);
    let request = http::Request::builder()
        .method("POST")
        .uri(format!("http://vm/{method}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(Body::new(Full::new(Bytes::from(framed))))
        .expect("a request of constant parts");
    let monitor = Arc::new(Refusing::new());
    let endpoint = VmEndpoint::new(monitor.clone());
    let answered = match method.split('/').next() {
        Some("slat.v1.VmService") => VmServiceServer::new(endpoint).call(request).await,
        Some("slat.v1.PagingService") => PagingServiceServer::new(endpoint).call(request).await,
        Some("slat.v1.CopyService") => CopyServiceServer::new(endpoint).call(request).await,
        Some("slat.v1.MemoryService") => MemoryServiceServer::new(endpoint).call(request).await,
        _ => {
            let api = TransferApi::new(monitor.clone());
            TransferServiceServer::new(api).call(request).await
        }
    };
    let Ok(answer) = answered;
    let status = tonic::Status::from_header_map(answer.headers());
    if let Some(status) = status {
        // A panic on the way is INTERNAL, and an unknown method would be UNIMPLEMENTED.
        assert!(
            !matches!(
                status.code(),
                tonic::Code::Internal | tonic::Code::Unimplemented
            ) || status.message().contains("decode"),
            "{method}: {status:?}"
        );
    }
    monitor.heard()
}

/// Says no to everything, once a request is understood.
#[derive(Debug)]
struct Refusing {
    name: VmName,
    host: HostName,
    changes: watch::Sender<u64>,
}

impl Refusing {
    fn new() -> Self {
        Self {
            name: VmName::parse("vms/web").expect("a name"),
            host: HostName::parse("hosts/a").expect("a name"),
            changes: watch::Sender::new(0),
        }
    }

    fn heard(&self) -> bool {
        *self.changes.borrow() > 0
    }

    fn no<T>(&self) -> Result<T, ApiError> {
        self.changes.send_modify(|count| *count += 1);
        Err(ApiError::new(Reason::VmState, "refused"))
    }
}

impl Monitor for Refusing {
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
        self.changes.send_modify(|count| *count += 1);
        None
    }
    fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }
    fn ended(&self) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        Box::pin(std::future::ready(()))
    }
    fn plan(&self, _: &VmSpec) -> Result<VmSpec, ApiError> {
        self.no()
    }
    fn create(&self, spec: VmSpec) -> Result<v1::Vm, ApiError> {
        assert_eq!(VmSpec::from_message(&spec.to_message()).ok(), Some(spec));
        self.no()
    }
    fn start(&self) -> Result<v1::Vm, ApiError> {
        self.no()
    }
    fn pause(&self) -> Result<v1::Vm, ApiError> {
        self.no()
    }
    fn resume(&self) -> Result<v1::Vm, ApiError> {
        self.no()
    }
    fn delete(&self) -> Result<(), ApiError> {
        self.no()
    }
    fn list_slots(&self) -> Result<v1::ListSlotsResponse, ApiError> {
        self.no()
    }
    fn update_slots(&self, _: &[SlotChange], _: u64) -> Result<v1::UpdateSlotsResponse, ApiError> {
        self.no()
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
        _: &CursorName,
        _: u64,
        _: DirtyFormat,
        most: usize,
    ) -> Result<v1::HarvestDirtyPagesResponse, ApiError> {
        assert!((1..=100_000).contains(&most));
        self.no()
    }
    fn delete_dirty_cursor(&self, _: &CursorName) -> Result<(), ApiError> {
        self.no()
    }
    fn list_dirty_cursors(&self) -> Result<v1::ListDirtyCursorsResponse, ApiError> {
        self.no()
    }
    fn measure_dirty_rate(
        &self,
        _: DirtyRateOrder,
        _: &Cancel,
    ) -> Result<v1::MeasureDirtyRateResponse, ApiError> {
        self.no()
    }
    fn invalidate(
        &self,
        _: Option<v1::GfnRange>,
    ) -> Result<v1::InvalidateMemoryResponse, ApiError> {
        self.no()
    }
    fn discard(&self, _: &[v1::GfnRange]) -> Result<v1::DiscardMemoryResponse, ApiError> {
        self.no()
    }
    fn digest(&self) -> Result<v1::DigestMemoryResponse, ApiError> {
        self.no()
    }
    fn retry_page_source(&self) -> Result<v1::Vm, ApiError> {
        self.no()
    }
    fn harvest_working_set(
        &self,
        _: HarvestOrder,
    ) -> Result<v1::HarvestWorkingSetResponse, ApiError> {
        self.no()
    }
    fn prefault_memory(&self, _: u64, _: u64) -> Result<v1::PrefaultMemoryResponse, ApiError> {
        self.no()
    }
    fn list_mappings(&self, _: u64) -> Result<v1::ListMappingsResponse, ApiError> {
        self.no()
    }
    fn take_snapshot(&self, _: &str, _: bool) -> Result<v1::TakeSnapshotResponse, ApiError> {
        self.no()
    }
    fn build_copy(&self, _: &CopySpec) -> Result<v1::Vm, ApiError> {
        self.no()
    }
}

impl Transfers for Refusing {
    fn describe_outgoing(
        &self,
        _: &v1::DescribeOutgoingRequest,
    ) -> Result<v1::DescribeOutgoingResponse, ApiError> {
        self.no()
    }
    /// What our own machine checks before it builds anything.
    fn prepare_incoming(
        &self,
        request: &v1::PrepareIncomingRequest,
    ) -> Result<v1::PrepareIncomingResponse, ApiError> {
        MigrationName::parse(&request.migration)?;
        MigrationParams::from_message(request.params.as_ref())?;
        let slots: Result<Vec<SlotSpec>, _> =
            request.slots.iter().map(SlotSpec::from_message).collect();
        check_slot_table(&slots?)?;
        let own = preamble::describe(slat_proto::model::BackendKind::Software, Vec::new());
        preamble::admit(&request.preamble.clone().unwrap_or_default(), &own)?;
        self.no()
    }
    fn start_outgoing(&self, request: &v1::StartOutgoingRequest) -> Result<v1::Transfer, ApiError> {
        MigrationParams::from_message(request.params.as_ref())?;
        self.no()
    }
    fn transfer(&self, _: &MigrationName, _: TransferRole) -> Result<v1::Transfer, ApiError> {
        self.no()
    }
    fn watch(&self, _: &MigrationName, _: TransferRole) -> Result<Watched, ApiError> {
        self.no()
    }
    fn cancel(
        &self,
        _: &MigrationName,
        _: TransferRole,
        _: Option<v1::MigrationError>,
    ) -> Result<v1::Transfer, ApiError> {
        self.no()
    }
    fn resolve(&self, _: &v1::ResolveTransferRequest) -> Result<v1::Transfer, ApiError> {
        self.no()
    }
    fn adopt(&self, _: &v1::AdoptTransferRequest) -> Result<v1::AdoptTransferResponse, ApiError> {
        self.no()
    }
    fn release(&self, _: &MigrationName, _: TransferRole) -> Result<(), ApiError> {
        self.no()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn damaged_requests_are_refused_or_heard() {
        // What each method is given whole is at least decoded; some is heard.
        assert!(corpus().iter().filter(|input| SOCKET.run(input)).count() >= 10);
        let any: fn(&mut Vec<u8>) -> bool = |bytes| {
            check(bytes);
            true
        };
        crate::fuzz::bounded(&Target {
            check: any,
            ..SOCKET
        });
    }
}
