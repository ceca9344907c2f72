//! Both services through a real endpoint on a Unix socket.

use std::time::Duration;

use slat_proto::{
    ApiError, Reason,
    model::CursorName,
    transport::{Address, Endpoint, EndpointHandle, TracedChannel, connect},
    v1::{
        self, memory_service_client::MemoryServiceClient, slot_change,
        vm_service_client::VmServiceClient,
    },
};
use tokio::net::UnixListener;
use tonic::{Code, Status};

use super::*;
use crate::fake::{self, FakeVm};

const PATIENCE: Duration = Duration::from_secs(20);

struct Served {
    vm: FakeVm,
    endpoint: EndpointHandle,
    vms: VmServiceClient<TracedChannel>,
    memory: MemoryServiceClient<TracedChannel>,
}

async fn serve(vm: FakeVm) -> Served {
    let socket = vm.machine.dir().socket();
    let endpoint = Endpoint::new()
        .service(vm_service(Arc::clone(&vm.machine)))
        .service(memory_service(Arc::clone(&vm.machine)))
        .serve_unix(UnixListener::bind(&socket).unwrap())
        .await;
    let channel = connect(&Address::Unix(socket)).unwrap();
    Served {
        vm,
        endpoint,
        vms: VmServiceClient::new(channel.clone()),
        memory: MemoryServiceClient::new(channel),
    }
}

fn create(id: &str) -> v1::CreateVmRequest {
    v1::CreateVmRequest {
        vm_id: id.into(),
        spec: Some(v1::VmSpec {
            memory_bytes: 8 << 20,
            vcpus: 1,
            ..v1::VmSpec::default()
        }),
        ..v1::CreateVmRequest::default()
    }
}

fn get(name: &str) -> v1::GetVmRequest {
    v1::GetVmRequest {
        name: name.into(),
        ..Default::default()
    }
}

fn refused<T: std::fmt::Debug>(result: Result<T, Status>, code: Code) -> ApiError {
    let status = result.unwrap_err();
    assert_eq!(status.code(), code, "{status:?}");
    ApiError::from(status)
}

/// The next message of a watch, within reason.
async fn next(watch: &mut tonic::Streaming<v1::Vm>) -> Option<v1::Vm> {
    tokio::time::timeout(PATIENCE, watch.message())
        .await
        .expect("the watch moves")
        .unwrap()
}

#[tokio::test]
async fn a_vm_lives_and_ends_through_its_endpoint() {
    let mut served = serve(fake::empty()).await;
    let vms = &mut served.vms;
    refused(vms.get_vm(get("vms/web")).await, Code::NotFound);
    let list = vms.list_vms(v1::ListVmsRequest::default()).await.unwrap();
    assert!(list.into_inner().vms.is_empty());
    let error = refused(vms.create_vm(create("other")).await, Code::InvalidArgument);
    assert_eq!(error.metadata["field"], "vm_id");
    let error = refused(vms.create_vm(create("../x")).await, Code::InvalidArgument);
    assert_eq!(error.reason, Reason::BadParameter);
    let missing = v1::CreateVmRequest {
        spec: None,
        ..create("web")
    };
    let error = refused(vms.create_vm(missing).await, Code::InvalidArgument);
    assert_eq!(error.metadata["field"], "spec");

    let planned = v1::CreateVmRequest {
        validate_only: true,
        ..create("web")
    };
    let planned = vms.create_vm(planned).await.unwrap().into_inner();
    assert_eq!(planned.spec.unwrap().format(), v1::Format::Ept4);
    refused(vms.get_vm(get("vms/web")).await, Code::NotFound);

    let built = vms.create_vm(create("web")).await.unwrap().into_inner();
    assert_eq!(built.state(), v1::vm::State::Created);
    refused(vms.create_vm(create("web")).await, Code::AlreadyExists);
    refused(vms.get_vm(get("vms/other")).await, Code::NotFound);
    let list = vms.list_vms(v1::ListVmsRequest::default()).await.unwrap();
    assert_eq!(list.into_inner().vms.len(), 1);

    let request = v1::WatchVmRequest {
        name: "vms/web".into(),
        ..Default::default()
    };
    let mut watch = vms.watch_vm(request).await.unwrap().into_inner();
    assert_eq!(
        next(&mut watch).await.unwrap().state(),
        v1::vm::State::Created
    );
    let name = || "vms/web".to_owned();
    let started = vms.start_vm(v1::StartVmRequest {
        name: name(),
        ..Default::default()
    });
    assert_eq!(
        started.await.unwrap().into_inner().state(),
        v1::vm::State::Running
    );
    assert_eq!(
        next(&mut watch).await.unwrap().state(),
        v1::vm::State::Running
    );
    // Nothing changes, and still it is heard of.
    assert_eq!(
        next(&mut watch).await.unwrap().state(),
        v1::vm::State::Running
    );
    let paused = vms.pause_vm(v1::PauseVmRequest {
        name: name(),
        ..Default::default()
    });
    assert_eq!(
        paused.await.unwrap().into_inner().state(),
        v1::vm::State::Paused
    );
    while next(&mut watch).await.unwrap().state() != v1::vm::State::Paused {}
    let resumed = vms.resume_vm(v1::ResumeVmRequest {
        name: name(),
        ..Default::default()
    });
    assert_eq!(
        resumed.await.unwrap().into_inner().state(),
        v1::vm::State::Running
    );
    vms.delete_vm(v1::DeleteVmRequest {
        name: name(),
        ..Default::default()
    })
    .await
    .unwrap();
    while next(&mut watch).await.is_some() {}
    refused(vms.get_vm(get("vms/web")).await, Code::NotFound);
    tokio::time::timeout(PATIENCE, served.vm.machine.exited())
        .await
        .expect("the process is told to end");
    served.endpoint.stop().await;
}

#[tokio::test]
async fn slots_change_through_the_endpoint() {
    let mut served = serve(fake::created()).await;
    let memory = &mut served.memory;
    let vm = || "vms/web".to_owned();
    let list = memory.list_slots(v1::ListSlotsRequest {
        vm: vm(),
        ..Default::default()
    });
    let list = list.await.unwrap().into_inner();
    assert_eq!((list.slots.len(), list.generation), (1, 1));
    let change = |slot: u32, base_gfn: u64| v1::SlotChange {
        change: Some(slot_change::Change::Create(slot_change::Create {
            slot: Some(v1::Slot {
                slot,
                base_gfn,
                pages: 4,
                ..v1::Slot::default()
            }),
        })),
    };
    let update = |changes: Vec<v1::SlotChange>, expected_generation| v1::UpdateSlotsRequest {
        vm: vm(),
        changes,
        expected_generation,
        ..Default::default()
    };
    let error = refused(
        memory.update_slots(update(vec![], 0)).await,
        Code::InvalidArgument,
    );
    assert_eq!(error.metadata["field"], "changes");
    let many = (0..1025).map(|slot| change(slot, 0)).collect();
    refused(
        memory.update_slots(update(many, 0)).await,
        Code::InvalidArgument,
    );
    let nothing = vec![v1::SlotChange { change: None }];
    refused(
        memory.update_slots(update(nothing, 0)).await,
        Code::InvalidArgument,
    );
    let error = refused(
        memory
            .update_slots(update(vec![change(5, 0x10_0000), change(32_767, 0)], 0))
            .await,
        Code::InvalidArgument,
    );
    assert_eq!(error.reason, Reason::BadSlotTable);
    assert_eq!(error.metadata["change"], "1");
    refused(
        memory
            .update_slots(update(vec![change(5, 0x10_0000)], 9))
            .await,
        Code::Aborted,
    );
    let table = memory
        .update_slots(update(vec![change(5, 0x10_0000)], 1))
        .await
        .unwrap()
        .into_inner();
    assert_eq!((table.slots.len(), table.generation), (2, 2));
    assert_eq!(table.slots[1].base_gfn, 0x10_0000);
    served.endpoint.stop().await;
}

#[tokio::test]
async fn dirty_pages_come_until_they_are_acknowledged() {
    let mut served = serve(fake::created()).await;
    let memory = &mut served.memory;
    let harvest = |acknowledge_batch| v1::HarvestDirtyPagesRequest {
        vm: "vms/web".into(),
        cursor: String::new(),
        acknowledge_batch,
        ..Default::default()
    };
    let bad = v1::HarvestDirtyPagesRequest {
        cursor: "No".into(),
        ..harvest(0)
    };
    refused(memory.harvest_dirty_pages(bad).await, Code::InvalidArgument);
    let first = memory.harvest_dirty_pages(harvest(0)).await.unwrap();
    let first = first.into_inner();
    assert!(first.created && first.ranges.is_empty());
    for page in [3, 4, 100] {
        served.vm.backend.guest_writes(0, page);
    }
    let expected = vec![
        v1::GfnRange { gfn: 3, pages: 2 },
        v1::GfnRange { gfn: 100, pages: 1 },
    ];
    let batch = memory.harvest_dirty_pages(harvest(first.batch)).await;
    let batch = batch.unwrap().into_inner();
    assert_eq!((batch.dirty_pages, batch.created), (3, false));
    assert_eq!(batch.ranges, expected);
    let again = memory.harvest_dirty_pages(harvest(0)).await.unwrap();
    let again = again.into_inner();
    assert_eq!(again.ranges, expected);
    refused(
        memory.harvest_dirty_pages(harvest(batch.batch)).await,
        Code::InvalidArgument,
    );
    let empty = memory.harvest_dirty_pages(harvest(again.batch)).await;
    assert_eq!(empty.unwrap().into_inner().dirty_pages, 0);

    let delete = || v1::DeleteDirtyCursorRequest {
        vm: "vms/web".into(),
        cursor: "default".into(),
        ..Default::default()
    };
    memory.delete_dirty_cursor(delete()).await.unwrap();
    assert!(!served.vm.machine.dirty().enabled());
    refused(memory.delete_dirty_cursor(delete()).await, Code::NotFound);
    // A cursor of the process is not a caller's to delete.
    let own = CursorName::parse("default").unwrap();
    served.vm.machine.dirty().attach(&own).unwrap();
    refused(memory.delete_dirty_cursor(delete()).await, Code::NotFound);
    assert!(served.vm.machine.dirty().enabled());
    served.endpoint.stop().await;
}

#[tokio::test]
async fn invalidation_and_digest_through_the_endpoint() {
    let mut served = serve(fake::created()).await;
    let memory = &mut served.memory;
    let vm = || "vms/web".to_owned();
    let invalidate = |range| v1::InvalidateMemoryRequest {
        vm: vm(),
        range,
        ..Default::default()
    };
    let all = memory.invalidate_memory(invalidate(None)).await.unwrap();
    assert_eq!(all.into_inner().pages, 2048);
    let beyond = v1::GfnRange {
        gfn: 2047,
        pages: 2,
    };
    let beyond = memory.invalidate_memory(invalidate(Some(beyond))).await;
    let error = refused(beyond, Code::InvalidArgument);
    assert_eq!(error.metadata["field"], "range");
    let discard = |ranges| v1::DiscardMemoryRequest {
        vm: vm(),
        ranges,
        ..Default::default()
    };
    let page = v1::GfnRange { gfn: 0, pages: 1 };
    let answer = memory.discard_memory(discard(vec![page; 1024])).await;
    let answer = answer.unwrap().into_inner();
    // The fake's guest is in that page, and it is there once.
    assert_eq!((answer.pages, answer.freed_bytes), (1024, 4096));
    let beyond = v1::GfnRange {
        gfn: 2048,
        pages: 1,
    };
    for (ranges, field) in [
        (vec![], "ranges"),
        (vec![page; 1025], "ranges"),
        (vec![page, beyond], "range"),
    ] {
        let refusal = memory.discard_memory(discard(ranges)).await;
        let error = refused(refusal, Code::InvalidArgument);
        assert_eq!(error.metadata["field"], field);
    }
    let digest = memory.digest_memory(v1::DigestMemoryRequest {
        vm: vm(),
        ..Default::default()
    });
    let digest = digest.await.unwrap().into_inner();
    assert_eq!(digest.digest.len(), 32);
    let local = served.vm.machine.digest().unwrap();
    assert_eq!(digest.digest, format!("{:032x}", local.total()));
    assert_eq!(digest.slots[0].pages, 2048);
    served.vm.machine.start().unwrap();
    let running = memory.digest_memory(v1::DigestMemoryRequest {
        vm: vm(),
        ..Default::default()
    });
    let error = refused(running.await, Code::FailedPrecondition);
    assert_eq!(error.reason, Reason::VmRunning);
    served.endpoint.stop().await;
}

#[tokio::test]
async fn a_call_means_one_vm_by_its_uid_and_every_answer_says_which() {
    let mut served = serve(fake::created()).await;
    let uid = served.vm.machine.uid().unwrap();
    let get = |name: &str, uid: &str, host: &str| v1::GetVmRequest {
        name: name.into(),
        uid: uid.into(),
        host: host.into(),
    };
    for asked in [
        get("vms/web", &uid, ""),
        get("", &uid, ""),
        get("vms/web", "", "hosts/a"),
    ] {
        let vm = served.vms.get_vm(asked).await.unwrap().into_inner();
        assert_eq!(vm.uid, uid);
    }
    let error = refused(
        served.vms.get_vm(get("vms/web", "another", "")).await,
        Code::NotFound,
    );
    assert_eq!(error.metadata["uid"], "another");
    assert_eq!(error.metadata["found_uid"], uid);
    refused(
        served.vms.get_vm(get("vms/other", &uid, "")).await,
        Code::NotFound,
    );
    refused(
        served.vms.get_vm(get("vms/web", "", "hosts/b")).await,
        Code::NotFound,
    );
    let delete = v1::DeleteVmRequest {
        name: "vms/web".into(),
        uid: "another".into(),
        ..Default::default()
    };
    refused(served.vms.delete_vm(delete).await, Code::NotFound);
    let list = v1::ListSlotsRequest {
        uid: uid.clone(),
        ..Default::default()
    };
    let slots = served.memory.list_slots(list).await.unwrap().into_inner();
    assert_eq!(slots.uid, uid);
    let digest = v1::DigestMemoryRequest {
        vm: "vms/web".into(),
        uid: "another".into(),
        ..Default::default()
    };
    refused(served.memory.digest_memory(digest).await, Code::NotFound);
}
