//! A running VM saved, restored and forked, with processes killed meanwhile: the guest checks its
//! own memory all along.

use anyhow::{Context as _, ensure};
use slat_proto::{
    ApiError, Reason,
    v1::{self, Backend, save::State},
};
use slat_tests::{Fleet, Layout, guest::busy, scene, wait::eventually};

/// A VM that writes its memory, where it can be watched; `None`, said aloud, where it cannot.
async fn watched(fleet: &mut Fleet) -> anyhow::Result<Option<v1::Vm>> {
    let spec = busy(Backend::Kvm, 64, 1, Some(32 << 20));
    let vm = fleet.run_vm("web", "host-a", spec).await?;
    if vm.capabilities().any(|one| one == v1::Capability::Paging) {
        return Ok(Some(vm));
    }
    println!("SKIPPED: this host has no userfaultfd for KVM's faults");
    Ok(None)
}

async fn save(fleet: &Fleet, vm: &str, save_id: &str, base: &str) -> anyhow::Result<v1::Save> {
    let request = v1::CreateSaveRequest {
        vm: vm.to_owned(),
        save_id: save_id.to_owned(),
        base: base.to_owned(),
        compression: Some(v1::Compression { zstd_level: 1 }),
        ..Default::default()
    };
    let begun = fleet
        .snapshots(&fleet.server())
        .create_save(request)
        .await?
        .into_inner();
    ensure!(begun.vm_ran && begun.pause_nanos > 0, "{begun:#?}");
    let save = eventually("the save is written", || async {
        let name = begun.name.clone();
        let request = v1::GetSaveRequest { name };
        let save = fleet
            .snapshots(&fleet.server())
            .get_save(request)
            .await?
            .into_inner();
        ensure!(save.state() != State::Writing, "{save:#?}");
        Ok(save)
    });
    let save = save.await?;
    ensure!(save.state() == State::Written, "{save:#?}");
    Ok(save)
}

async fn delete(fleet: &Fleet, vms: &[&str]) -> anyhow::Result<()> {
    for vm in vms {
        let request = v1::DeleteVmRequest {
            name: format!("vms/{vm}"),
            ..Default::default()
        };
        fleet.vms(&fleet.server()).delete_vm(request).await?;
    }
    Ok(())
}

/// Kills the pager that a VM has, and waits for the next one.
async fn kill_pager(fleet: &Fleet, vm: &str) -> anyhow::Result<()> {
    let pid = |vm: v1::Vm| vm.paging.map_or(0, |paging| paging.pager_pid);
    let first = pid(fleet.vm(&fleet.server(), vm).await?);
    if first == 0 {
        // It has all of its memory already.
        return Ok(());
    }
    let process = rustix::process::Pid::from_raw(first.cast_signed()).context("no pid")?;
    rustix::process::kill_process(process, rustix::process::Signal::KILL)?;
    eventually("another pager serves", || async {
        let vm = fleet.vm(&fleet.server(), vm).await?;
        let paging = vm.paging.clone().unwrap_or_default();
        // All of its memory may be there by now: then it needs none.
        let whole = vm.paging.is_none();
        ensure!(
            whole || (paging.pager_pid != 0 && paging.pager_pid != first),
            "{paging:#?}"
        );
        Ok(())
    })
    .await
}

#[test]
fn a_running_vm_is_saved_and_restored_at_once_and_lazily() {
    scene::run(Layout::two(Backend::Kvm), async |fleet: &mut Fleet| {
        let Some(vm) = watched(fleet).await? else {
            return Ok(());
        };
        let first = save(fleet, &vm.name, "s1", "").await?;
        let second = save(fleet, &vm.name, "s2", &first.name).await?;
        ensure!(second.base == first.name, "{second:#?}");
        fleet.runs_soundly_on(&vm.name, "host-a").await?;
        fleet.restore(&second.name, "whole", false).await?;
        fleet.restore(&second.name, "lazy", true).await?;
        kill_pager(fleet, "vms/lazy").await?;
        for copy in ["vms/whole", "vms/lazy"] {
            let copy = fleet.runs_soundly_on(copy, "host-a").await?;
            ensure!(copy.uid != vm.uid, "an identity of its own");
        }
        let verify = v1::VerifySaveRequest {
            name: second.name.clone(),
        };
        fleet.snapshots(&fleet.server()).verify_save(verify).await?;
        let taken = fleet.restore(&first.name, "web", false).await;
        let error = taken.err().context("its name is taken")?;
        let error = error.downcast::<tonic::Status>().map(ApiError::from)?;
        ensure!(error.reason == Reason::VmExists, "{error:?}");
        delete(fleet, &["web", "whole", "lazy"]).await?;
        for name in [second.name, first.name] {
            let request = v1::DeleteSaveRequest { name };
            fleet
                .snapshots(&fleet.server())
                .delete_save(request)
                .await?;
        }
        Ok(())
    });
}

#[test]
fn children_of_a_fork_see_what_their_parent_was_whoever_dies() {
    scene::run(Layout::two(Backend::Kvm), async |fleet: &mut Fleet| {
        let Some(vm) = watched(fleet).await? else {
            return Ok(());
        };
        let request = v1::ForkVmRequest {
            vm: vm.name.clone(),
            vm_ids: ["a", "b", "c"].map(str::to_owned).to_vec(),
            ..Default::default()
        };
        let forked = fleet
            .snapshots(&fleet.server())
            .fork_vm(request)
            .await?
            .into_inner();
        ensure!(
            forked.vms.len() == 3 && forked.pause_nanos > 0,
            "{forked:#?}"
        );
        kill_pager(fleet, "vms/b").await?;
        fleet.kill_agent("host-a");
        fleet.start_agent("host-a")?;
        fleet.hosts_ready().await?;
        for child in ["vms/a", "vms/b", "vms/c", &vm.name] {
            fleet.runs_soundly_on(child, "host-a").await?;
        }
        delete(fleet, &["web", "a", "b", "c"]).await
    });
}
