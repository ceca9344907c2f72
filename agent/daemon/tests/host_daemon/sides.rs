//! Migration sides: routed while their process lives, answered from what it left when it is dead.

use slat_proto::{
    Reason,
    v1::{self, TransferPhase as Phase, TransferRole as Role},
};
use slat_record::journal::{Entry, Journal};

use crate::rig::{MIB, Rig, SOON, kill, reason, until};

/// The uid of a VM of that name.
fn uid(vm: &str) -> String {
    format!("u-{vm}")
}

fn incoming(vm: &str, migration: &str) -> Entry {
    Entry::Incoming {
        vm: vm.into(),
        uid: uid(vm),
        migration: migration.into(),
        epoch: 4,
    }
}

fn prepared(migration: &str) -> Entry {
    Entry::Prepared {
        uid: uid(migration),
        migration: migration.into(),
        epoch: 5,
        grant: None,
    }
}

fn record(vm: &str, migration: &str, role: Role, phase: Phase) -> v1::Transfer {
    v1::Transfer {
        migration: format!("migrations/{migration}"),
        vm: format!("vms/{vm}"),
        role: role.into(),
        phase: phase.into(),
        epoch: 4,
        progress: Some(v1::MigrationProgress {
            iteration: 2,
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// Writes what a dead process left.
fn leave(rig: &Rig, vm: &str, entries: &[Entry], records: &[v1::Transfer]) {
    let dir = rig.dead_dir(vm);
    let mut journal = Journal::open(&dir.journal()).unwrap();
    for entry in entries {
        journal.append(entry).unwrap();
    }
    for record in records {
        dir.save_transfer(record).unwrap();
    }
}

#[tokio::test]
async fn a_vm_that_cannot_live_here_takes_nothing() {
    let rig = Rig::started().await;
    let refused = rig.prepare_from("other", "m1", "web", 16 * MIB).await;
    let error = refused.unwrap_err();
    assert_eq!(error.reason, Reason::IsaMismatch);
    assert_eq!(error.metadata["host"], "hosts/a");
    assert_eq!(rig.used().await, 0);
    assert!(!rig.path("web").exists(), "no process was started");
    assert!(rig.side("m1", Role::Destination).await.is_err());
    rig.prepare("m1", "web", 16 * MIB).await.unwrap();
}

#[tokio::test]
async fn a_source_describes_itself_at_the_epoch_that_is_asked_for() {
    let rig = Rig::started().await;
    rig.create("web", 16 * MIB).await.unwrap();
    let described = rig.describe("m1", "web", 1).await.unwrap();
    assert_eq!(described.vm.unwrap().name, "vms/web");
    assert_eq!(described.preamble.unwrap().architecture, "fake");
    assert_eq!(
        reason(rig.describe("m1", "web", 2).await),
        Reason::StaleEpoch
    );
    assert_eq!(
        reason(rig.describe("m1", "none", 1).await),
        Reason::NoSuchVm
    );
}

#[tokio::test]
async fn a_side_is_prepared_once() {
    let rig = Rig::started().await;
    let first = rig.prepare("m1", "web", 16 * MIB).await.unwrap();
    assert_eq!(
        first.ticket,
        rig.prepare("m1", "web", 16 * MIB).await.unwrap().ticket,
        "the same process answers"
    );
    assert_eq!(
        rig.get("web").await.unwrap().state(),
        v1::vm::State::Incoming
    );
    assert_eq!(rig.used().await, 16 * MIB);
    assert_eq!(
        reason(rig.prepare("m2", "web", 16 * MIB).await),
        Reason::VmExists
    );
    assert_eq!(reason(rig.create("web", 16 * MIB).await), Reason::VmExists);
    let error = rig.prepare("m3", "db", 300 * MIB).await.unwrap_err();
    assert_eq!(error.reason, Reason::DstNoMemory);
    assert_eq!(error.metadata["free_bytes"], (240 * MIB).to_string());
    assert_eq!(
        reason(rig.prepare("refused", "db", 16 * MIB).await),
        Reason::BadSlotTable
    );
    assert_eq!(
        reason(rig.prepare("m4", "quits", 16 * MIB).await),
        Reason::Internal
    );
    assert!(
        !rig.path("db").exists() && !rig.path("quits").exists(),
        "nothing is left of a refusal"
    );
    assert_eq!(rig.used().await, 16 * MIB);
}

#[tokio::test]
async fn two_preparations_at_a_time_are_one() {
    let rig = Rig::started().await;
    let (first, second) = tokio::join!(
        rig.prepare("m1", "web", 200 * MIB),
        rig.prepare("m1", "web", 200 * MIB)
    );
    assert_eq!(first.unwrap().ticket, second.unwrap().ticket);
    assert_eq!(rig.used().await, 200 * MIB);
}

#[tokio::test]
async fn a_cancelled_destination_leaves_its_answer_until_it_is_released() {
    let mut rig = Rig::started().await;
    rig.prepare("m1", "web", 16 * MIB).await.unwrap();
    assert_eq!(
        rig.cancel("m1", Role::Destination).await.unwrap().phase(),
        Phase::Cancelled
    );
    until(async || (rig.used().await == 0).then_some(())).await;
    assert_eq!(reason(rig.get("web").await), Reason::NoSuchVm);
    for _ in 0..2 {
        assert_eq!(
            rig.side("m1", Role::Destination).await.unwrap().phase(),
            Phase::Cancelled
        );
        assert_eq!(
            rig.cancel("m1", Role::Destination).await.unwrap().phase(),
            Phase::Cancelled,
            "idempotent"
        );
        rig.stop().await;
        rig.start().await;
    }
    assert_eq!(
        reason(rig.prepare("m1", "web", 16 * MIB).await),
        Reason::MigrationExists
    );
    // A retry needs the name; the first one's answer stays.
    rig.prepare("m2", "web", 16 * MIB).await.unwrap();
    assert_eq!(
        rig.side("m1", Role::Destination).await.unwrap().phase(),
        Phase::Cancelled
    );
    rig.release("m1", Role::Destination).await.unwrap();
    rig.release("m1", Role::Destination).await.unwrap();
    assert_eq!(
        reason(rig.side("m1", Role::Destination).await),
        Reason::NoSuchMigration
    );
    assert_eq!(
        rig.side("m2", Role::Destination).await.unwrap().phase(),
        Phase::Preparing
    );
}

#[tokio::test]
async fn a_destination_that_gave_up_and_stays_is_seen_off() {
    let rig = Rig::started().await;
    rig.prepare("stays", "web", 16 * MIB).await.unwrap();
    rig.cancel("stays", Role::Destination).await.unwrap();
    until(async || (rig.used().await == 0).then_some(())).await;
    assert_eq!(
        rig.side("stays", Role::Destination).await.unwrap().phase(),
        Phase::Cancelled
    );
    rig.release("stays", Role::Destination).await.unwrap();
    assert!(!rig.path("web").exists());
}

#[tokio::test]
async fn a_released_source_is_gone_when_the_vm_comes_back() {
    let rig = Rig::started().await;
    rig.create("web", 16 * MIB).await.unwrap();
    rig.send("commit-1", "web").await.unwrap();
    assert_eq!(
        rig.side("commit-1", Role::Source).await.unwrap().phase(),
        Phase::Completed
    );
    rig.release("commit-1", Role::Source).await.unwrap();
    assert!(!rig.path("web").exists(), "with the answer");
    rig.prepare("m2", "web", 16 * MIB).await.unwrap();
}

#[tokio::test]
async fn an_ended_side_is_told_although_its_process_has_begun_another() {
    let mut rig = Rig::started().await;
    rig.create("web", 16 * MIB).await.unwrap();
    assert_eq!(reason(rig.send("refused", "web").await), Reason::StaleEpoch);
    assert!(
        rig.dir("web").transfers().unwrap().is_empty(),
        "a refusal leaves no record"
    );
    rig.send("m1", "web").await.unwrap();
    rig.cancel("m1", Role::Source).await.unwrap();
    until(async || {
        let scraped = rig.scrape("/metrics").await;
        (!scraped.contains("slat_migration_")).then_some(())
    })
    .await;
    rig.send("m2", "web").await.unwrap();
    for _ in 0..2 {
        assert_eq!(
            rig.side("m1", Role::Source).await.unwrap().phase(),
            Phase::Cancelled
        );
        assert_eq!(
            rig.cancel("m1", Role::Source).await.unwrap().phase(),
            Phase::Cancelled
        );
        assert_eq!(
            rig.side("m2", Role::Source).await.unwrap().phase(),
            Phase::Precopy
        );
        rig.stop().await;
        rig.start().await;
    }
    rig.release("m1", Role::Source).await.unwrap();
    assert_eq!(
        reason(rig.side("m1", Role::Source).await),
        Reason::NoSuchMigration
    );
    assert_eq!(
        rig.side("m2", Role::Source).await.unwrap().phase(),
        Phase::Precopy
    );
}

#[tokio::test]
async fn a_host_that_dies_mid_precopy_still_answers_for_its_source() {
    let mut rig = Rig::started().await;
    let made = rig.create("web", 16 * MIB).await.unwrap();
    rig.send("m1", "web").await.unwrap();
    rig.stop().await;
    // Nobody saw the process end, and it had written no record.
    kill(made.pid);
    until(async || rig.dir("web").living_pid().unwrap().is_none().then_some(())).await;
    rig.start().await;
    let side = rig.side("m1", Role::Source).await.unwrap();
    assert_eq!((side.phase(), side.vm_lost), (Phase::Failed, true));
    assert_eq!(rig.get("web").await.unwrap().state(), v1::vm::State::Lost);
}

#[tokio::test]
async fn a_source_that_dies_in_precopy_has_lost_its_vm() {
    let rig = Rig::started().await;
    let made = rig.create("web", 16 * MIB).await.unwrap();
    rig.send("m1", "web").await.unwrap();
    let request = v1::WatchTransferRequest {
        migration: "migrations/m1".into(),
        role: Role::Source.into(),
    };
    let mut watch = rig
        .transfers()
        .watch_transfer(request)
        .await
        .unwrap()
        .into_inner();
    assert_eq!(
        watch.message().await.unwrap().unwrap().phase(),
        Phase::Precopy
    );
    kill(made.pid);
    let last = tokio::time::timeout(SOON, watch.message())
        .await
        .unwrap()
        .unwrap()
        .unwrap();
    assert_eq!(
        last.phase(),
        Phase::Failed,
        "the watch goes on with what is left"
    );
    assert!(last.vm_lost);
    assert!(
        tokio::time::timeout(SOON, watch.message())
            .await
            .unwrap()
            .unwrap()
            .is_none()
    );
    let side = rig.side("m1", Role::Source).await.unwrap();
    assert_eq!(side.error.unwrap().reason, Reason::VmProcessDied.as_str());
    assert_eq!(
        side.progress.unwrap().remaining_bytes,
        77,
        "the last figures seen"
    );
    // The VM is deleted before the server released the side: its answer stays.
    rig.delete("web").await.unwrap();
    assert!(rig.side("m1", Role::Source).await.unwrap().vm_lost);
    rig.release("m1", Role::Source).await.unwrap();
    assert_eq!(
        reason(rig.side("m1", Role::Source).await),
        Reason::NoSuchMigration
    );
}

#[tokio::test]
async fn dead_sides_stand_as_their_journals_say() {
    let mut rig = Rig::new();
    let created = |vm: &str| Entry::Created {
        vm: vm.into(),
        uid: uid(vm),
        epoch: 4,
    };
    let relinquished = |migration: &str| Entry::Relinquished {
        uid: uid(migration),
        migration: migration.into(),
        epoch: 4,
        grant: None,
    };
    let owned = |migration: &str| Entry::Owned {
        uid: uid(migration),
        migration: migration.into(),
        epoch: 5,
    };
    let (source, destination) = (Role::Source, Role::Destination);

    leave(
        &rig,
        "s1",
        &[created("s1"), relinquished("s1")],
        &[record("s1", "s1", source, Phase::Switchover)],
    );
    leave(
        &rig,
        "s2",
        &[created("s2"), relinquished("s2")],
        &[record("s2", "s2", source, Phase::Completed)],
    );
    leave(&rig, "s3", &[created("s3"), relinquished("s3")], &[]);
    leave(
        &rig,
        "s4",
        &[created("s4")],
        &[record("s4", "s4", source, Phase::Cancelled)],
    );
    leave(
        &rig,
        "s5",
        &[created("s5")],
        &[record("s5", "s5", source, Phase::Precopy)],
    );
    leave(
        &rig,
        "s6",
        &[created("s6")],
        &[record("s6", "s6", source, Phase::Relinquished)],
    );
    leave(
        &rig,
        "d1",
        &[incoming("d1", "d1"), prepared("d1"), owned("d1")],
        &[record("d1", "d1", destination, Phase::Ready)],
    );
    leave(
        &rig,
        "d2",
        &[incoming("d2", "d2"), prepared("d2")],
        &[record("d2", "d2", destination, Phase::Ready)],
    );
    leave(
        &rig,
        "d3",
        &[incoming("d3", "d3")],
        &[record("d3", "d3", destination, Phase::Precopy)],
    );
    leave(
        &rig,
        "d4",
        &[
            incoming("d4", "d4"),
            Entry::Aborted {
                uid: uid("d4"),
                migration: "d4".into(),
            },
        ],
        &[record("d4", "d4", destination, Phase::Failed)],
    );
    leave(&rig, "d5", &[incoming("d5", "d5")], &[]);
    leave(
        &rig,
        "gone",
        &[created("gone"), Entry::Ended { uid: uid("gone") }],
        &[],
    );
    leave(&rig, "none", &[], &[]);
    leave(
        &rig,
        "told",
        &[
            incoming("told", "told"),
            Entry::Aborted {
                uid: uid("told"),
                migration: "told".into(),
            },
        ],
        &[],
    );
    rig.start().await;

    for vm in ["gone", "none", "told"] {
        assert!(!rig.path(vm).exists(), "{vm} has nothing left to tell");
    }
    // Of a VM that went elsewhere or never was here there is none; what was owned is lost, and so
    // is what was given away and not heard of since.
    assert_eq!(
        rig.names().await,
        ["vms/d1", "vms/s1", "vms/s3", "vms/s4", "vms/s5", "vms/s6"]
    );
    assert_eq!(rig.get("d1").await.unwrap().epoch, 5);
    assert_eq!(rig.used().await, 0);

    let stands = [
        ("s1", source, Phase::Relinquished, false),
        ("s2", source, Phase::Completed, false),
        ("s3", source, Phase::Relinquished, false),
        ("s4", source, Phase::Cancelled, false),
        ("s5", source, Phase::Failed, true),
        ("s6", source, Phase::Relinquished, false),
        // It owned the VM when it died: the VM is lost here.
        ("d1", destination, Phase::Completed, true),
        ("d2", destination, Phase::Failed, false),
        ("d3", destination, Phase::Failed, false),
        ("d4", destination, Phase::Failed, false),
        ("d5", destination, Phase::Failed, false),
    ];
    for (migration, role, phase, vm_lost) in stands {
        let side = rig.side(migration, role).await.unwrap();
        assert!(side.process_gone, "{migration}");
        assert_eq!(
            (side.phase(), side.vm_lost, side.epoch),
            (phase, vm_lost, 4),
            "{migration}"
        );
        let cancelled = rig.cancel(migration, role).await;
        match phase {
            Phase::Relinquished | Phase::Completed => {
                assert_eq!(
                    reason(cancelled),
                    Reason::PastPointOfNoReturn,
                    "{migration}"
                );
            }
            _ => assert_eq!(cancelled.unwrap().phase(), phase, "{migration}"),
        }
    }
    let in_doubt = rig.side("d2", destination).await.unwrap();
    let in_doubt_uid = in_doubt.vm_uid.clone();
    let in_doubt = in_doubt.error.unwrap();
    assert_eq!(in_doubt.reason, Reason::VmProcessDied.as_str());
    assert_eq!(
        in_doubt.metadata["vm_location"], "UNKNOWN",
        "only the source's journal knows"
    );
    let resolve = rig.commit("d2", (&in_doubt_uid, 4)).await;
    let resolved = rig
        .transfers()
        .resolve_transfer(resolve)
        .await
        .unwrap()
        .into_inner();
    assert_eq!(
        resolved.phase(),
        Phase::Failed,
        "its memory is gone, whatever is decided"
    );

    // The proof of an open handover does not make way; an ended one's does.
    assert_eq!(
        reason(rig.prepare("new", "s1", 16 * MIB).await),
        Reason::VmExists
    );
    assert_eq!(
        reason(rig.prepare("new", "s5", 16 * MIB).await),
        Reason::VmExists
    );
    rig.prepare("new", "s2", 16 * MIB).await.unwrap();
    assert_eq!(
        rig.side("s2", source).await.unwrap().phase(),
        Phase::Completed,
        "still told"
    );

    for (migration, role, ..) in stands {
        rig.release(migration, role).await.unwrap();
    }
    for vm in ["s1", "s3", "s6", "d2", "d3", "d4", "d5"] {
        assert!(!rig.path(vm).exists(), "{vm}");
    }
    assert_eq!(
        rig.names().await,
        ["vms/d1", "vms/s2", "vms/s4", "vms/s5"],
        "lost ones stay until deleted"
    );
    assert_eq!(
        reason(rig.side("s1", source).await),
        Reason::NoSuchMigration
    );
}

#[tokio::test]
async fn a_broken_journal_answers_nothing() {
    let mut rig = Rig::new();
    let created = Entry::Created {
        vm: "web".into(),
        uid: "u".into(),
        epoch: 4,
    };
    let relinquished = Entry::Relinquished {
        uid: "u".into(),
        migration: "m1".into(),
        epoch: 4,
        grant: None,
    };
    leave(
        &rig,
        "web",
        &[created, relinquished],
        &[record("web", "m1", Role::Source, Phase::Precopy)],
    );
    let path = rig.dir("web").journal();
    let mut text = std::fs::read(&path).unwrap();
    text[3] ^= 1;
    std::fs::write(&path, text).unwrap();
    rig.start().await;
    assert_eq!(reason(rig.side("m1", Role::Source).await), Reason::Journal);
    assert_eq!(
        reason(rig.side("unknown", Role::Source).await),
        Reason::Journal,
        "it may have known"
    );
    let shown = rig.get("web").await.unwrap();
    assert_eq!(shown.state(), v1::vm::State::Lost);
    assert!(
        shown.state_message.contains("corrupt"),
        "{}",
        shown.state_message
    );
}

#[tokio::test]
async fn a_side_seen_to_give_its_vm_away_never_takes_it_back() {
    let mut rig = Rig::started().await;
    let vm = rig.create("web", 16 * MIB).await.unwrap();
    // Its journal lacks the entry, as after an append that failed.
    let side = rig.send("undurable", "web").await.unwrap();
    assert_eq!(side.phase(), Phase::Relinquished);
    // The agent that saw it and the process end, in this order: only what is on disk can tell.
    rig.stop().await;
    kill(vm.pid);
    until(async || matches!(rig.dir("web").living_pid(), Ok(None)).then_some(())).await;
    for _ in 0..2 {
        rig.start().await;
        let side = rig.side("undurable", Role::Source).await.unwrap();
        assert_eq!((side.phase(), side.vm_lost), (Phase::Relinquished, false));
        assert_eq!(side.error, None);
        let copy = rig.get("web").await.unwrap();
        assert_eq!(
            (copy.state(), copy.epoch),
            (v1::vm::State::Lost, 1),
            "it is the destination's, unless that never had it"
        );
        rig.stop().await;
    }
    rig.start().await;
    rig.release("undurable", Role::Source).await.unwrap();
    assert!(!rig.path("web").exists());
}

#[tokio::test]
async fn a_preparation_is_repeated_after_the_agent_has_ended_in_it() {
    let mut rig = Rig::started().await;
    // INCOMING is written, and the process has no side yet when the agent ends.
    {
        let preparing = rig.prepare("slow", "web", 16 * MIB);
        let waited = rig.path_of("u-web").join("waited");
        let written = until(async || waited.exists().then_some(()));
        tokio::select! {
            answer = preparing => panic!("{answer:?}"),
            () = written => {}
        }
    }
    rig.abandon();
    rig.start().await;
    // Its process says that it knows no such side: that is no reason to forget it.
    tokio::time::sleep(std::time::Duration::from_millis(300)).await;
    let first = rig.prepare("slow", "web", 16 * MIB).await.unwrap();
    let again = rig.prepare("slow", "web", 16 * MIB).await.unwrap();
    assert_eq!(first.ticket, again.ticket);
    assert_eq!(rig.used().await, 16 * MIB);
    let side = rig.side("slow", Role::Destination).await.unwrap();
    assert_eq!(side.phase(), Phase::Preparing);
    // Another migration of it does not advise to delete the VM.
    let other = rig.prepare("m2", "web", 16 * MIB).await.unwrap_err();
    assert_eq!(other.reason, Reason::VmExists);
    assert!(!other.metadata["advice"].contains("delete it"), "{other}");
}
