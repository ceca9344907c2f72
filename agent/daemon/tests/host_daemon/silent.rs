//! A VM's process that is stopped: every call ends, and the VM can be deleted by force.

use std::time::{Duration, Instant};

use slat_proto::{
    ApiError, Reason,
    v1::{self, TransferPhase as Phase, TransferRole as Role},
};

use crate::rig::{MIB, Rig, answer, freeze, reason};

/// What an operator waits for at most.
const BOUND: Duration = Duration::from_secs(10);

fn go_on(pid: u32) {
    let pid = rustix::process::Pid::from_raw(pid.cast_signed()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::CONT).unwrap();
}

async fn delete(rig: &Rig, uid: &str, force: bool) -> Result<(), ApiError> {
    let request = v1::DeleteVmRequest {
        name: "vms/web".into(),
        uid: uid.into(),
        force,
        ..Default::default()
    };
    answer(rig.vms().delete_vm(request).await).map(drop)
}

#[tokio::test]
async fn a_stopped_vm_is_deleted_by_force_and_not_otherwise() {
    let rig = Rig::started().await;
    let made = rig.create("web", 16 * MIB).await.unwrap();
    freeze(made.pid).await;
    let asked = Instant::now();
    let error = delete(&rig, "", false).await.unwrap_err();
    assert!(asked.elapsed() < BOUND, "{:?}", asked.elapsed());
    assert_eq!(error.reason, Reason::VmUnreachable);
    assert!(error.message.contains("stopped by a signal"), "{error}");
    let advice = &error.metadata["advice"];
    assert!(advice.contains("--force"), "{advice}");
    assert!(advice.contains(&made.uid), "{advice}");
    // The refusal holds: the order does not wait in the process's socket.
    go_on(made.pid);
    assert_eq!(rig.get("web").await.unwrap().pid, made.pid);

    freeze(made.pid).await;
    assert_eq!(
        reason(delete(&rig, "", true).await),
        Reason::BadParameter,
        "force needs the uid"
    );
    assert_eq!(
        reason(delete(&rig, "another", true).await),
        Reason::NoSuchVm
    );
    let asked = Instant::now();
    delete(&rig, &made.uid, true).await.unwrap();
    assert!(asked.elapsed() < BOUND, "{:?}", asked.elapsed());
    assert!(!rig.path_of(&made.uid).exists());
    assert!(rig.names().await.is_empty());
    assert_eq!(rig.used().await, 0);
    rig.create("web", 16 * MIB).await.unwrap();
}

#[tokio::test]
async fn a_stopped_source_is_deleted_once_its_migration_was_cancelled_and_still_answers() {
    let rig = Rig::started().await;
    let made = rig.create("web", 16 * MIB).await.unwrap();
    rig.send("m1", "web").await.unwrap();
    freeze(made.pid).await;
    let busy = delete(&rig, &made.uid, true).await.unwrap_err();
    assert_eq!(busy.reason, Reason::MigrationInProgress);
    assert_eq!(busy.metadata["migration"], "migrations/m1");
    let cancelled = rig.cancel("m1", Role::Source).await;
    assert_eq!(reason(cancelled), Reason::VmUnreachable);
    delete(&rig, &made.uid, true).await.unwrap();
    let side = rig.side("m1", Role::Source).await.unwrap();
    assert_eq!((side.phase(), side.vm_lost), (Phase::Failed, true));
    rig.release("m1", Role::Source).await.unwrap();
    assert!(!rig.path_of(&made.uid).exists());
}

#[tokio::test]
async fn calls_to_a_stopped_vm_that_may_take_long_end_as_well() {
    let rig = Rig::started().await;
    let made = rig.create("web", 16 * MIB).await.unwrap();
    let watch = v1::WatchVmRequest {
        uid: made.uid.clone(),
        ..Default::default()
    };
    let mut watch = rig.vms().watch_vm(watch).await.unwrap().into_inner();
    watch.message().await.unwrap().unwrap();
    freeze(made.pid).await;
    let asked = Instant::now();
    let vm = || "vms/web".to_owned();
    let digest = async {
        let request = v1::DigestMemoryRequest {
            vm: vm(),
            ..Default::default()
        };
        reason(answer(rig.memory().digest_memory(request).await))
    };
    let harvest = async {
        let request = v1::HarvestDirtyPagesRequest {
            vm: vm(),
            ..Default::default()
        };
        reason(answer(rig.memory().harvest_dirty_pages(request).await))
    };
    let invalidate = async {
        let request = v1::InvalidateMemoryRequest {
            vm: vm(),
            ..Default::default()
        };
        reason(answer(rig.memory().invalidate_memory(request).await))
    };
    let send = async { reason(rig.send("m1", "web").await) };
    let start = async {
        let request = v1::StartVmRequest {
            name: vm(),
            ..Default::default()
        };
        reason(answer(rig.vms().start_vm(request).await))
    };
    let (a, b, c, d, e) = tokio::join!(digest, harvest, invalidate, send, start);
    assert_eq!([a, b, c, d, e], [Reason::VmUnreachable; 5]);
    assert!(
        asked.elapsed() < BOUND + Duration::from_secs(2),
        "{:?}",
        asked.elapsed()
    );
    // A watch hears nothing for a while first.
    let end = tokio::time::timeout(BOUND * 2, watch.message())
        .await
        .unwrap();
    let end = ApiError::from(end.unwrap_err());
    assert_eq!(end.reason, Reason::VmUnreachable);
    go_on(made.pid);
    assert_eq!(rig.get("web").await.unwrap().pid, made.pid);
}
