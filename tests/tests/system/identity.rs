//! A VM is its uid: two of one name are two VMs, and what was seen of them outlives the server
//! while their host is silent.

use anyhow::ensure;
use slat_proto::{ApiError, Reason, v1};
use slat_tests::{Fleet, guest::usual, on_each_backend, wait::eventually};

const WEB: &str = "vms/web";

on_each_backend!(twins_are_told_apart_and_remembered);

async fn list(fleet: &Fleet) -> anyhow::Result<v1::ListVmsResponse> {
    let mut vms = fleet.vms(&fleet.server());
    let list = vms.list_vms(v1::ListVmsRequest::default()).await?;
    Ok(list.into_inner())
}

async fn twins_are_told_apart_and_remembered(fleet: &mut Fleet) -> anyhow::Result<()> {
    let mut uids = Vec::new();
    for host in ["host-a", "host-b"] {
        // Behind the server's back, as its agents allow.
        let request = v1::CreateVmRequest {
            vm_id: "web".into(),
            spec: Some(usual(fleet.backend())),
            ..Default::default()
        };
        let made = fleet.vms(&fleet.agent(host)).create_vm(request).await?;
        uids.push(made.into_inner().uid);
    }
    eventually("both are shown, in conflict", || async {
        let vms = list(fleet).await?.vms;
        ensure!(vms.len() == 2, "{vms:?}");
        ensure!(vms.iter().all(|vm| vm.conflicts.len() == 1), "{vms:?}");
        Ok(())
    })
    .await?;
    let delete = v1::DeleteVmRequest {
        name: WEB.into(),
        ..Default::default()
    };
    let refused = fleet.vms(&fleet.server()).delete_vm(delete).await;
    let refused = refused.map_err(ApiError::from).expect_err("a conflict");
    ensure!(refused.reason == Reason::NameConflict, "{refused:?}");
    let start = v1::StartVmRequest {
        uid: uids[1].clone(),
        ..Default::default()
    };
    let started = fleet.vms(&fleet.server()).start_vm(start).await?;
    ensure!(started.get_ref().host == "hosts/host-b", "{started:?}");

    // Both crash. What was seen is still there, and said to be old.
    fleet.kill_agent("host-a");
    fleet.kill_server();
    fleet.start_server()?;
    let shown = list(fleet).await?;
    let known: Vec<&String> = shown.vms.iter().map(|vm| &vm.uid).collect();
    ensure!(known.len() == 2 && uids.iter().all(|uid| known.contains(&uid)));
    ensure!(shown.unreported.contains(&"hosts/host-a".to_owned()));
    let on_a = shown.vms.iter().find(|vm| vm.host == "hosts/host-a");
    ensure!(on_a.is_some_and(|vm| vm.stale && vm.last_seen_time.is_some()));

    // One twin is deleted; the name is the silent host's all the same.
    fleet.hosts_ready().await?;
    let delete = v1::DeleteVmRequest {
        uid: uids[1].clone(),
        ..Default::default()
    };
    fleet.vms(&fleet.server()).delete_vm(delete).await?;
    let request = v1::CreateVmRequest {
        vm_id: "web".into(),
        spec: Some(usual(fleet.backend())),
        ..Default::default()
    };
    let taken = fleet.vms(&fleet.server()).create_vm(request).await;
    let taken = taken
        .map_err(ApiError::from)
        .expect_err("the name is taken");
    ensure!(taken.reason == Reason::VmExists, "{taken:?}");
    ensure!(taken.metadata["host"] == "hosts/host-a", "{taken:?}");
    ensure!(taken.metadata["uid"] == uids[0], "{taken:?}");

    fleet.start_agent("host-a")?;
    fleet.hosts_ready().await?;
    eventually("the other is back", || async {
        let vm = fleet.vm(&fleet.server(), WEB).await?;
        ensure!(vm.uid == uids[0] && !vm.stale, "{vm:?}");
        Ok(())
    })
    .await
}
