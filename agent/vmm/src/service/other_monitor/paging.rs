//! Paging, snapshots and copies of a monitor that has none of them.

use super::*;

#[tokio::test]
async fn a_monitor_without_paging_says_so() {
    let adopted = Adopted::new(&[]);
    let mut served = serve(&adopted).await;
    let vm = || "vms/web".to_owned();
    let list = v1::ListMappingsRequest {
        name: vm(),
        ..Default::default()
    };
    let harvest_set = v1::HarvestWorkingSetRequest {
        name: vm(),
        ..Default::default()
    };
    let prefault = v1::PrefaultMemoryRequest {
        name: vm(),
        pages: 1,
        ..Default::default()
    };
    let retry = v1::RetryPageSourceRequest {
        name: vm(),
        ..Default::default()
    };
    let take = v1::TakeSnapshotRequest {
        name: vm(),
        may_pause: true,
        ..Default::default()
    };
    let build = v1::BuildCopyRequest {
        vm_id: "web".into(),
        manifest: Some(v1::PrepareIncomingRequest {
            vm: Some(v1::Vm::default()),
            slots: vec![v1::Slot {
                pages: 2048,
                ..Default::default()
            }],
            ..Default::default()
        }),
        ..Default::default()
    };
    for refused in [
        missing(served.paging.list_mappings(list).await),
        missing(served.paging.harvest_working_set(harvest_set).await),
        missing(served.paging.prefault_memory(prefault).await),
        missing(served.paging.retry_page_source(retry).await),
        missing(served.copies.take_snapshot(take).await),
        missing(served.copies.build_copy(build).await),
    ] {
        assert_eq!(refused, "CAPABILITY_PAGING");
    }
    // What is not whole is refused before a monitor hears of it.
    for (vm_id, manifest) in [
        ("other", Some(v1::PrepareIncomingRequest::default())),
        ("web", None),
        ("web", Some(v1::PrepareIncomingRequest::default())),
    ] {
        let build = v1::BuildCopyRequest {
            vm_id: vm_id.into(),
            manifest,
            ..Default::default()
        };
        let error = served.copies.build_copy(build).await.unwrap_err();
        assert_eq!(error.code(), Code::InvalidArgument, "{error:?}");
    }
    served.endpoint.stop().await;
}
