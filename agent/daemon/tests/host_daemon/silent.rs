//! A VM's process that is stopped: every call ends, and the VM can be deleted by force.

use std::time::{Duration, Instant};

use slat_proto::{
    ApiError, Reason,
    v1::{self, TransferPhase as Phase, TransferRole as Role, vm::State},
};

use crate::rig::{MIB, Rig, answer, freeze, reason, until};

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
async fn calls_that_a_vm_does_not_outlive_say_how_it_stands() {
    let rig = Rig::started().await;
    let made = rig.create("web", 16 * MIB).await.unwrap();
    freeze(made.pid).await;
    let vm = || "vms/web".to_owned();
    let pause = async {
        let request = v1::PauseVmRequest {
            name: vm(),
            ..Default::default()
        };
        answer(rig.vms().pause_vm(request).await).unwrap_err()
    };
    let digest = async {
        let request = v1::DigestMemoryRequest {
            vm: vm(),
            ..Default::default()
        };
        answer(rig.memory().digest_memory(request).await).unwrap_err()
    };
    // They wait in the socket of the stopped process when it is killed.
    let end = async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        crate::rig::kill(made.pid);
    };
    let (pause, digest, got, ()) = tokio::join!(pause, digest, rig.get("web"), end);
    for error in [pause, digest] {
        assert_eq!(error.reason, Reason::VmState, "{error}");
        assert_eq!(error.metadata["state"], "LOST", "{error}");
    }
    assert_eq!(got.unwrap().state(), State::Lost);
    rig.delete("web").await.unwrap();

    // Of a process that ends while it is told to delete its VM, the directory is what counts.
    let made = rig.create("web", 16 * MIB).await.unwrap();
    freeze(made.pid).await;
    let end = async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        crate::rig::kill(made.pid);
    };
    let (deleted, ()) = tokio::join!(rig.delete("web"), end);
    deleted.unwrap();
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
    let sending = rig.sending("m1", "web").await;
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
    let send = async { reason(answer(rig.transfers().start_outgoing(sending).await)) };
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
    // What was refused waits in the process's socket, and is not begun from there.
    let after = rig.becomes("web", State::Created).await;
    assert_eq!((after.pid, after.migration.as_str()), (made.pid, ""));
    assert_eq!(
        rig.get("web").await.unwrap().state(),
        State::Created,
        "the start that was refused came late"
    );
}

/// The VM of that uid, as this host lists it.
async fn listed(rig: &Rig, uid: &str) -> Option<v1::Vm> {
    let list = answer(rig.vms().list_vms(v1::ListVmsRequest::default()).await).unwrap();
    list.vms.into_iter().find(|vm| vm.uid == uid)
}

#[tokio::test]
async fn a_vm_whose_process_falls_silent_is_unresponsive_until_it_answers() {
    let rig = Rig::started().await;
    let made = rig.create("web", 16 * MIB).await.unwrap();
    let start = v1::StartVmRequest {
        name: "vms/web".into(),
        ..Default::default()
    };
    answer(rig.vms().start_vm(start).await).unwrap();
    freeze(made.pid).await;
    let silent = until(async || {
        listed(&rig, &made.uid)
            .await
            .filter(|vm| vm.state() == State::Unresponsive)
    })
    .await;
    assert_eq!((silent.epoch, silent.pid), (1, made.pid));
    let why = &silent.state_message;
    assert!(why.contains("has not answered since 20"), "{why}");
    assert!(why.contains("stopped by a signal"), "{why}");
    assert_eq!(silent.mmu_stats, None, "nobody knows them");
    assert_eq!(rig.get("web").await.unwrap(), silent);
    let watch = v1::WatchVmRequest {
        uid: made.uid.clone(),
        ..Default::default()
    };
    let mut watch = rig.vms().watch_vm(watch).await.unwrap().into_inner();
    assert_eq!(watch.message().await.unwrap(), Some(silent.clone()));
    let metrics = rig.scrape("/metrics").await;
    assert!(metrics.contains(r#"state="unresponsive""#), "{metrics}");
    // It is a VM: its name is taken, and calls say how it stands.
    assert_eq!(reason(rig.create("web", 16 * MIB).await), Reason::VmExists);
    let error = rig.send("m1", "web").await.unwrap_err();
    assert_eq!(error.reason, Reason::VmUnreachable);
    assert!(error.metadata["advice"].contains("--force"), "{error}");
    go_on(made.pid);
    rig.becomes("web", State::Running).await;
    let end = tokio::time::timeout(BOUND, watch.message()).await.unwrap();
    assert_eq!(end.unwrap(), None, "watched anew from here");
    assert_eq!(rig.get("web").await.unwrap().state_message, "");
}

#[tokio::test]
async fn what_an_agent_finds_silent_is_shown_as_its_journal_has_it() {
    let mut rig = Rig::started().await;
    // Seen CREATED, INCOMING and CREATED; what they are by now only their journals say.
    let runs = rig.create("runs", 16 * MIB).await.unwrap();
    let given = rig.create("given", 16 * MIB).await.unwrap();
    let prepared = rig.prepare("ready-1", "came", 16 * MIB).await.unwrap();
    let came = u32::from_be_bytes(prepared.ticket.try_into().unwrap());
    let came_dir = rig.path_of("u-came");
    let seen = std::fs::read(came_dir.join("seen.pb")).unwrap();
    let waits = rig.prepare("ready-2", "waits", 16 * MIB).await.unwrap();
    let waits = u32::from_be_bytes(waits.ticket.try_into().unwrap());
    let start = v1::StartVmRequest {
        name: "vms/runs".into(),
        ..Default::default()
    };
    answer(rig.vms().start_vm(start).await).unwrap();
    rig.send("gone-1", "given").await.unwrap();
    let commit = rig.commit("ready-1", ("u-came", 4)).await;
    answer(rig.transfers().resolve_transfer(commit).await).unwrap();
    until(async || {
        let kept = std::fs::read(came_dir.join("seen.pb")).ok()?;
        (kept != seen).then_some(())
    })
    .await;
    rig.stop().await;
    // It arrived while no agent looked.
    std::fs::write(came_dir.join("seen.pb"), &seen).unwrap();
    for pid in [runs.pid, given.pid, came, waits] {
        freeze(pid).await;
    }
    let begun = Instant::now();
    rig.start().await;
    assert!(
        begun.elapsed() < Duration::from_secs(2),
        "stopped processes hold the agent up: {:?}",
        begun.elapsed()
    );
    for (uid, state, epoch, migration) in [
        (runs.uid.as_str(), State::Unresponsive, 1, ""),
        (&given.uid, State::Relinquished, 1, "migrations/gone-1"),
        ("u-came", State::Unresponsive, 5, ""),
        ("u-waits", State::Incoming, 4, "migrations/ready-2"),
    ] {
        let vm = listed(&rig, uid).await.unwrap();
        assert_eq!(
            (vm.state(), vm.epoch, vm.migration.as_str()),
            (state, epoch, migration),
            "{uid}"
        );
    }
    let kinds: Vec<_> = rig
        .leftovers()
        .await
        .iter()
        .map(v1::Leftover::kind)
        .collect();
    assert_eq!(kinds.len(), 2, "{kinds:?}");
    // What arrived unseen and dies unseen is lost, even when its journal is spoiled then.
    let journal = came_dir.join("journal");
    let mut bytes = std::fs::read(&journal).unwrap();
    bytes[3] ^= 1;
    std::fs::write(&journal, bytes).unwrap();
    crate::rig::kill(came);
    assert_eq!(rig.becomes("came", State::Lost).await.epoch, 5);
    for pid in [runs.pid, given.pid, waits] {
        go_on(pid);
    }
    rig.becomes("runs", State::Running).await;
}

/// A question about a side that is nowhere is answered from disks: no process holds it up.
#[tokio::test]
async fn one_silent_process_delays_no_other_vm_s_migration() {
    let mut rig = Rig::started().await;
    let silent = rig.create("silent", 16 * MIB).await.unwrap();
    rig.create("web", 16 * MIB).await.unwrap();
    freeze(silent.pid).await;
    // Whoever waits for the silent one waits in each round; a busy machine is slow in some.
    let mut fastest = Duration::MAX;
    for _ in 0..3 {
        let asked = Instant::now();
        assert_eq!(
            reason(rig.side("m1", Role::Source).await),
            Reason::NoSuchMigration
        );
        rig.describe("m1", "web", 1).await.unwrap();
        rig.send("m1", "web").await.unwrap();
        rig.side("m1", Role::Source).await.unwrap();
        rig.cancel("m1", Role::Source).await.unwrap();
        rig.release("m1", Role::Source).await.unwrap();
        fastest = fastest.min(asked.elapsed());
        rig.stop().await;
        rig.start().await;
    }
    assert!(fastest < Duration::from_secs(1), "{fastest:?}");
}

/// The VM is seen to migrate before its process has the side: "no such side" from that moment is
/// told when it is there.
#[tokio::test]
async fn a_side_is_not_forgotten_for_what_was_said_before_it_was_begun() {
    let rig = Rig::started().await;
    rig.create("web", 16 * MIB).await.unwrap();
    rig.send("slow-1", "web").await.unwrap();
    // Longer than the fake holds that answer back.
    tokio::time::sleep(Duration::from_secs(1)).await;
    rig.side("slow-1", Role::Source).await.unwrap();
    let list = v1::ListVmsRequest::default();
    let vms = answer(rig.vms().list_vms(list).await).unwrap().vms;
    assert_eq!(vms[0].migration, "migrations/slow-1");
    rig.cancel("slow-1", Role::Source).await.unwrap();
    rig.release("slow-1", Role::Source).await.unwrap();
    assert_eq!(
        reason(rig.side("slow-1", Role::Source).await),
        Reason::NoSuchMigration
    );
}
