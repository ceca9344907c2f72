//! What a VM's memory is to be made of, as a destination's calls answer it.

use slat_proto::{
    ApiError, Reason,
    model::{MemoryBacking, MigrationParams, VmSpec},
    v1::{self, transfer_service_server::TransferService as _},
};
use tonic::Request;

use super::{
    tests::{api, endpoint, name},
    tests_server as server,
};
use crate::{
    fake::{self, FakeVm},
    handover::preamble,
    memory::Reserved,
};

/// Announces the VM, on the software backend: that is there on every host.
fn announce(vm: &FakeVm, validate_only: bool) -> v1::PrepareIncomingRequest {
    let backend = slat_proto::model::BackendKind::Software;
    let table = vm.machine.memory().table();
    let slots = table.slots().iter().map(|slot| slot.spec().to_message());
    let leave = server::receive(&vm.machine.uid().unwrap(), v1::PageChannel::Tls);
    v1::PrepareIncomingRequest {
        migration: name().to_string(),
        vm: vm.machine.snapshot(),
        slots: slots.collect(),
        params: Some(MigrationParams::from_message(None).unwrap().to_message()),
        validate_only,
        preamble: Some(v1::Preamble {
            channels: preamble::channels(false),
            ..preamble::describe(backend, Vec::new())
        }),
        grant: Some(server::signed(&leave)),
        grant_keys: server::keys(),
        ..Default::default()
    }
}

async fn prepare(
    to: &FakeVm,
    request: v1::PrepareIncomingRequest,
) -> Result<v1::PrepareIncomingResponse, ApiError> {
    let answer = api(&endpoint(to))
        .prepare_incoming(Request::new(request))
        .await;
    Ok(answer?.into_inner())
}

#[tokio::test]
async fn a_repeated_request_is_answered_although_its_own_pages_are_gone() {
    // Four for each side.
    let reserved = match Reserved::take(8) {
        Ok(reserved) => reserved,
        Err(why) => {
            eprintln!("SKIPPED: {why}");
            return;
        }
    };
    let source = fake::empty();
    let spec = VmSpec {
        backing: MemoryBacking::Hugetlb2M,
        ..fake::spec()
    };
    source.machine.create(spec).unwrap();
    let destination = fake::empty();
    let api = api(&endpoint(&destination));
    let prepare = async |validate_only| {
        let request = announce(&source, validate_only);
        let answer = api.prepare_incoming(Request::new(request)).await;
        answer
            .map(tonic::Response::into_inner)
            .map_err(ApiError::from)
    };
    prepare(true).await.unwrap();
    let first = prepare(false).await.unwrap();
    let again = prepare(false).await.unwrap();
    assert_eq!(first.data_address, again.data_address);
    // Whoever had other pages on this machine may have left some free.
    if reserved.free() == 0 {
        let error = prepare(true).await.unwrap_err();
        assert_eq!(error.reason, Reason::NoHugePages);
        assert_eq!(error.metadata["vm_location"], "SOURCE");
    }
    let received = destination.machine.snapshot().unwrap();
    assert_eq!(
        received.spec.unwrap().backing(),
        v1::MemoryBacking::Hugetlb2m
    );
}

#[tokio::test]
async fn a_host_without_the_node_refuses_at_admission_and_on_trial() {
    let source = fake::created();
    for validate_only in [true, false] {
        let mut request = announce(&source, validate_only);
        let spec = request.vm.as_mut().unwrap().spec.as_mut().unwrap();
        spec.numa_node = Some(1000);
        let destination = fake::empty();
        let error = prepare(&destination, request).await.unwrap_err();
        assert_eq!(error.reason, Reason::NoSuchNode);
        assert_eq!(error.metadata["node"], "1000");
        assert_eq!(error.metadata["vm_location"], "SOURCE");
        assert_eq!(destination.machine.snapshot(), None);
    }
}
