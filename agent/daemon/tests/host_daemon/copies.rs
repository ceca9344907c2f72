//! Saves, restores, forks and pagers at the agent.

use slat_proto::{ApiError, Reason, v1};
use tokio_stream::StreamExt as _;

use crate::rig::{MIB, Rig, answer, kill, reason, until};

impl Rig {
    async fn save(&self, vm: &str, save: &str) -> Result<v1::Save, ApiError> {
        self.save_on(vm, save, "").await
    }

    async fn save_on(&self, vm: &str, save: &str, base: &str) -> Result<v1::Save, ApiError> {
        let request = v1::CreateSaveRequest {
            vm: format!("vms/{vm}"),
            save_id: save.into(),
            base: base.into(),
            ..Default::default()
        };
        answer(self.snapshots().create_save(request).await)
    }

    async fn saved(&self, save: &str) -> Result<v1::Save, ApiError> {
        let name = format!("hosts/a/saves/{save}");
        answer(self.snapshots().get_save(v1::GetSaveRequest { name }).await)
    }

    /// A save that has ended.
    async fn ended(&self, save: &str) -> v1::Save {
        let going = |save: &v1::Save| save.state() == v1::save::State::Writing;
        until(async || self.saved(save).await.ok().filter(|save| !going(save))).await
    }

    async fn delete_save(&self, save: &str) -> Result<(), ApiError> {
        let name = format!("hosts/a/saves/{save}");
        let request = v1::DeleteSaveRequest { name };
        answer(self.snapshots().delete_save(request).await).map(drop)
    }

    async fn restore(&self, save: &str, vm: &str, lazy: bool) -> Result<v1::Vm, ApiError> {
        let request = v1::RestoreVmRequest {
            save: format!("hosts/a/saves/{save}"),
            vm_id: vm.into(),
            lazy,
            ..Default::default()
        };
        let answer = answer(self.snapshots().restore_vm(request).await)?;
        Ok(answer.vm.unwrap())
    }

    async fn fork(&self, vm: &str, children: &[&str]) -> Result<v1::ForkVmResponse, ApiError> {
        let request = v1::ForkVmRequest {
            vm: format!("vms/{vm}"),
            vm_ids: children.iter().map(ToString::to_string).collect(),
            ..Default::default()
        };
        answer(self.snapshots().fork_vm(request).await)
    }

    async fn start_vm(&self, vm: &str) {
        let request = v1::StartVmRequest {
            name: format!("vms/{vm}"),
            ..Default::default()
        };
        answer(self.vms().start_vm(request).await).unwrap();
        self.becomes(vm, v1::vm::State::Running).await;
    }

    fn files(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.state().join("saves")).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<String> = names.collect();
        names.sort();
        names
    }
}

#[tokio::test]
async fn a_vm_is_saved_restored_and_its_file_kept_while_it_is_needed() {
    let mut rig = Rig::started().await;
    rig.create("web", 16 * MIB).await.unwrap();
    rig.start_vm("web").await;
    let begun = rig.save("web", "s1").await.unwrap();
    assert_eq!(begun.name, "hosts/a/saves/s1");
    assert!(begun.vm_ran);
    assert_eq!(begun.pause_nanos, 5_000_000);
    let written = rig.ended("s1").await;
    assert_eq!(written.state(), v1::save::State::Written, "{written:?}");
    assert_eq!(written.memory_bytes, 16 * MIB);
    assert_eq!(rig.files(), ["s1.slatsave"]);
    // What is shown of it is in the file: another agent shows the same.
    rig.stop().await;
    rig.start().await;
    let again = until(async || rig.saved("s1").await.ok()).await;
    assert_eq!(
        (
            again.vm.as_str(),
            again.pages,
            again.pause_nanos,
            again.file_bytes
        ),
        ("vms/web", 1, 5_000_000, written.file_bytes)
    );
    assert_eq!(reason(rig.save("web", "s1").await), Reason::SaveExists);

    let copy = rig.restore("s1", "copy", true).await.unwrap();
    assert_ne!(copy.uid, begun.vm_uid);
    assert_eq!(copy.state(), v1::vm::State::Paused);
    let error = rig.delete_save("s1").await.unwrap_err();
    assert_eq!(error.reason, Reason::SaveInUse);
    assert_eq!(error.metadata["users"], "vms/copy");
    // Once all of its memory is there it needs the file no more.
    let request = v1::RetryPageSourceRequest {
        name: "vms/copy".into(),
        ..Default::default()
    };
    answer(rig.pagings().retry_page_source(request).await).unwrap();
    until(async || rig.delete_save("s1").await.ok()).await;
    assert_eq!(rig.files(), [""; 0]);
    assert_eq!(reason(rig.saved("s1").await), Reason::NoSuchSave);
}

#[tokio::test]
async fn a_save_builds_on_another_of_the_same_vm_which_then_stays() {
    let rig = Rig::started().await;
    rig.create("web", 16 * MIB).await.unwrap();
    rig.create("db", 16 * MIB).await.unwrap();
    rig.save("web", "s1").await.unwrap();
    rig.ended("s1").await;
    let base = "hosts/a/saves/s1";
    assert_eq!(
        reason(rig.save_on("db", "d", base).await),
        Reason::BadParameter
    );
    rig.save_on("web", "s2", base).await.unwrap();
    let second = rig.ended("s2").await;
    assert_eq!(second.base, base, "{second:?}");
    let error = rig.delete_save("s1").await.unwrap_err();
    assert_eq!(error.metadata["users"], "hosts/a/saves/s2");
    let request = v1::VerifySaveRequest {
        name: "hosts/a/saves/s2".into(),
    };
    let verified = answer(rig.snapshots().verify_save(request.clone()).await).unwrap();
    assert_eq!(verified.pages, 2, "the base is read, too");
    rig.restore("s2", "copy", false).await.unwrap();
    // Damaged where a page is.
    let path = rig.state().join("saves/s1.slatsave");
    let mut bytes = std::fs::read(&path).unwrap();
    let at = bytes.windows(64).position(|some| some == [7; 64]).unwrap();
    bytes[at] = 8;
    std::fs::write(&path, bytes).unwrap();
    let error = answer(rig.snapshots().verify_save(request).await).unwrap_err();
    assert_eq!(error.reason, Reason::SaveCorrupt);
    // What it builds on is gone: it is no save that could be restored.
    std::fs::remove_file(&path).unwrap();
    assert_eq!(
        reason(rig.restore("s2", "late", false).await),
        Reason::SaveCorrupt
    );
    assert_eq!(rig.names().await, ["vms/copy", "vms/db", "vms/web"]);
}

#[tokio::test]
async fn a_save_that_fails_leaves_no_file_and_its_vm_goes_on() {
    let rig = Rig::started().await;
    rig.create("web", 16 * MIB).await.unwrap();
    for (save, expected) in [("full", Reason::DiskFull), ("dies", Reason::Internal)] {
        rig.save("web", save).await.unwrap();
        let failed = rig.ended(save).await;
        assert_eq!(failed.state(), v1::save::State::Failed);
        assert_eq!(failed.reason, expected.as_str(), "{failed:?}");
        assert_eq!(
            reason(rig.restore(save, "x", false).await),
            Reason::SaveNotWritten
        );
    }
    // Given up while it is written: a watch ends with it.
    rig.save("web", "slow").await.unwrap();
    assert_eq!(reason(rig.save("web", "slow").await), Reason::SaveExists);
    let request = v1::WatchSaveRequest {
        name: "hosts/a/saves/slow".into(),
    };
    let mut watch = answer(rig.snapshots().watch_save(request).await).unwrap();
    let first = watch.next().await.unwrap().unwrap();
    assert_eq!(first.state(), v1::save::State::Writing);
    rig.delete_save("slow").await.unwrap();
    while let Some(Ok(save)) = watch.next().await {
        assert_eq!(save.state(), v1::save::State::Writing);
    }
    assert_eq!(reason(rig.saved("slow").await), Reason::NoSuchSave);
    rig.delete_save("full").await.unwrap();
    let request = v1::ListSavesRequest::default();
    let list = answer(rig.snapshots().list_saves(request).await).unwrap();
    let names: Vec<&str> = list.saves.iter().map(|save| save.name.as_str()).collect();
    assert_eq!(names, ["hosts/a/saves/dies"]);
    assert_eq!(rig.files(), [""; 0]);
    // A snapshot whose layers cannot be had is no save at all.
    rig.create("lost", 16 * MIB).await.unwrap();
    assert_eq!(reason(rig.save("lost", "s").await), Reason::VmState);
    assert_eq!(reason(rig.saved("s").await), Reason::NoSuchSave);
    assert_eq!(
        rig.get("web").await.unwrap().state(),
        v1::vm::State::Created
    );
}

#[tokio::test]
async fn a_restore_that_fails_leaves_nothing() {
    let rig = Rig::started().await;
    rig.create("web", 16 * MIB).await.unwrap();
    rig.create("other", 16 * MIB).await.unwrap();
    for vm in ["web", "other"] {
        rig.save(vm, vm).await.unwrap();
        rig.ended(vm).await;
    }
    let before = rig.used().await;
    assert_eq!(
        reason(rig.restore("web", "web", false).await),
        Reason::VmExists
    );
    assert_eq!(
        reason(rig.restore("web", "refuses", false).await),
        Reason::StateLoad
    );
    assert_eq!(
        reason(rig.restore("web", "dies", false).await),
        Reason::VmProcessDied
    );
    assert_eq!(
        reason(rig.restore("other", "x", false).await),
        Reason::IsaMismatch
    );
    assert_eq!(
        reason(rig.restore("none", "x", false).await),
        Reason::NoSuchSave
    );
    let elsewhere = v1::RestoreVmRequest {
        save: "hosts/b/saves/web".into(),
        ..Default::default()
    };
    let elsewhere = rig.snapshots().restore_vm(elsewhere).await;
    assert_eq!(reason(answer(elsewhere)), Reason::NoSuchHost);
    let dry = v1::RestoreVmRequest {
        save: "hosts/a/saves/web".into(),
        vm_id: "dry".into(),
        validate_only: true,
        ..Default::default()
    };
    let dry = answer(rig.snapshots().restore_vm(dry).await).unwrap();
    assert_eq!(dry.vm.unwrap().name, "vms/dry");
    assert_eq!(rig.used().await, before);
    assert_eq!(rig.names().await, ["vms/other", "vms/web"]);
    let dirs = std::fs::read_dir(rig.state().join("vms")).unwrap().count();
    assert_eq!(dirs, 2);
}

#[tokio::test]
async fn children_of_a_fork_stand_or_fall_alone() {
    let rig = Rig::started().await;
    rig.create("web", 16 * MIB).await.unwrap();
    rig.start_vm("web").await;
    let forked = rig.fork("web", &["a", "b"]).await.unwrap();
    let names: Vec<&str> = forked.vms.iter().map(|vm| vm.name.as_str()).collect();
    assert_eq!(names, ["vms/a", "vms/b"]);
    assert_eq!(forked.vms[0].state(), v1::vm::State::Running);
    assert_eq!(forked.pause_nanos, 5_000_000);
    // What one has read the other may have yet to read.
    assert!(
        forked
            .vms
            .iter()
            .all(|vm| vm.state_message == "shared: true")
    );
    let alone = rig.fork("web", &["alone"]).await.unwrap();
    assert_eq!(alone.vms[0].state_message, "shared: false");
    rig.delete("alone").await.unwrap();
    assert_eq!(rig.used().await, 48 * MIB);
    // A name that is taken is refused before the parent stops for it.
    assert_eq!(reason(rig.fork("web", &["c", "a"]).await), Reason::VmExists);
    let error = rig.fork("web", &["refuses", "d"]).await.unwrap_err();
    assert_eq!(error.reason, Reason::StateLoad);
    assert_eq!(error.metadata["made"], "vms/d");
    assert_eq!(rig.names().await, ["vms/a", "vms/b", "vms/d", "vms/web"]);
    assert_eq!(rig.used().await, 64 * MIB);
    assert_eq!(reason(rig.fork("web", &[]).await), Reason::BadParameter);
    assert_eq!(
        reason(rig.fork("web", &["x"; 2]).await),
        Reason::BadParameter
    );
    rig.create("still", 16 * MIB).await.unwrap();
    assert_eq!(
        reason(rig.fork("still", &["x"]).await),
        Reason::CapabilityMissing
    );
    // A save of it may stop it.
    let save = rig.save("still", "s").await.unwrap();
    assert_eq!(save.vm_paused, "says the fake");
    assert_eq!(rig.ended("s").await.vm_paused, "says the fake");
}

#[tokio::test]
async fn a_pager_that_dies_is_replaced_found_again_and_ends_with_its_vm() {
    let mut rig = Rig::started().await;
    let request = v1::CreateVmRequest {
        vm_id: "web".into(),
        spec: Some(v1::VmSpec {
            memory_bytes: 16 * MIB,
            vcpus: 1,
            paging: v1::Paging::Agent.into(),
            ..Default::default()
        }),
        ..Default::default()
    };
    answer(rig.vms().create_vm(request).await).unwrap();
    let pager = async |rig: &Rig, not: u32| {
        let pid = |vm: v1::Vm| vm.paging.map_or(0, |paging| paging.pager_pid);
        until(async || {
            rig.get("web")
                .await
                .ok()
                .map(pid)
                .filter(|pid| *pid != 0 && *pid != not)
        })
        .await
    };
    let first = pager(&rig, 0).await;
    kill(first);
    let second = pager(&rig, first).await;
    // The next agent finds it, and replaces it as well.
    rig.abandon();
    rig.start().await;
    assert_eq!(pager(&rig, 0).await, second);
    kill(second);
    let third = pager(&rig, second).await;
    let metrics = rig.scrape("/metrics").await;
    assert!(
        metrics.contains("slat_vm_pager_restarts_total{vm=\"web\"} 2"),
        "{metrics}"
    );
    rig.delete("web").await.unwrap();
    let gone = std::path::PathBuf::from(format!("/proc/{third}"));
    let is_over = || {
        let stat = std::fs::read_to_string(gone.join("stat")).unwrap_or_default();
        !gone.exists() || stat.contains(") Z ")
    };
    until(async || is_over().then_some(())).await;
}
