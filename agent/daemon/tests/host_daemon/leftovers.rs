//! What lies on a host and is no VM: listed as what it is, taken back or ended by uid.

use slat_proto::{
    ApiError, Reason,
    v1::{self, TransferPhase as Phase, TransferRole as Role, leftover::Kind},
};
use slat_record::journal::{Entry, Journal, Ownership};

use crate::rig::{MIB, Rig, answer, freeze, kill, reason, until};

impl Rig {
    pub(crate) async fn leftovers(&self) -> Vec<v1::Leftover> {
        let request = v1::ListLeftoversRequest {
            host: "hosts/a".into(),
        };
        let listed = answer(self.hosts().list_leftovers(request).await).unwrap();
        listed.leftovers
    }

    async fn adopt(&self, uid: &str, give_up: bool, epoch: u64) -> Result<v1::Vm, ApiError> {
        let request = v1::AdoptLeftoverRequest {
            host: "hosts/a".into(),
            uid: uid.into(),
            give_up,
            epoch,
        };
        answer(self.hosts().adopt_leftover(request).await).map(|adopted| adopted.vm.unwrap())
    }

    async fn end(&self, uid: &str, give_up: bool) -> Result<(), ApiError> {
        let request = v1::DeleteLeftoverRequest {
            host: "hosts/a".into(),
            uid: uid.into(),
            give_up,
        };
        answer(self.hosts().delete_leftover(request).await).map(drop)
    }

    async fn host(&self) -> v1::Host {
        let request = v1::GetHostRequest {
            name: "hosts/a".into(),
        };
        answer(self.hosts().get_host(request).await).unwrap()
    }
}

/// Flips a byte of a VM's journal, or flips it back.
fn flip(rig: &Rig, folder: &str) {
    let path = rig.path_of(folder).join("journal");
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[3] ^= 1;
    std::fs::write(&path, bytes).unwrap();
}

#[tokio::test]
async fn a_vm_that_was_given_away_is_taken_back_on_an_order_that_says_what_it_gives_up() {
    let mut rig = Rig::started().await;
    let old = rig.given_away("web", "gone-1").await;
    let left = rig.leftovers().await.remove(0);
    assert_eq!(left.kind(), Kind::RelinquishedSource);
    assert_eq!((left.uid.as_str(), left.pid), (old.uid.as_str(), old.pid));
    assert_eq!(
        (left.vm.as_str(), left.migration.as_str(), left.epoch),
        ("vms/web", "migrations/gone-1", 1)
    );
    assert_eq!(left.memory_bytes, 16 * MIB);
    assert_eq!(rig.host().await.leftovers, 1);

    let refused = rig.adopt(&old.uid, false, 0).await.unwrap_err();
    assert_eq!(refused.reason, Reason::GiveUpRequired);
    assert_eq!(refused.metadata["gives_up"], left.adopt_gives_up);
    assert_eq!(
        reason(rig.adopt("nobody", true, 0).await),
        Reason::NoSuchLeftover
    );
    let adopted = rig.adopt(&old.uid, true, 0).await.unwrap();
    assert_eq!(
        (adopted.state(), adopted.epoch, adopted.uid.as_str()),
        (v1::vm::State::Paused, 3, old.uid.as_str()),
        "above the epoch that the destination may have"
    );
    for _ in 0..2 {
        assert!(rig.leftovers().await.is_empty());
        assert_eq!(rig.get("web").await.unwrap().epoch, 3);
        // A destination that is still in doubt asks, and gives up.
        let side = rig.side("gone-1", Role::Source).await.unwrap();
        assert_eq!(side.phase(), Phase::Cancelled);
        rig.stop().await;
        rig.start().await;
    }
    // It is this host's, so it is lost with its process, whatever was once seen of its side.
    kill(old.pid);
    let lost = rig.becomes("web", v1::vm::State::Lost).await;
    assert_eq!(lost.epoch, 3);
    let side = rig.side("gone-1", Role::Source).await.unwrap();
    assert_eq!(side.phase(), Phase::Cancelled);
    rig.release("gone-1", Role::Source).await.unwrap();
    assert_eq!(rig.get("web").await.unwrap().state(), v1::vm::State::Lost);
}

#[tokio::test]
async fn the_fleets_epoch_is_taken_and_another_vm_of_the_name_is_in_the_way() {
    let rig = Rig::started().await;
    let old = rig.given_away("web", "gone-1").await;
    let new = rig.create("web", 16 * MIB).await.unwrap();
    let refused = rig.adopt(&old.uid, true, 0).await.unwrap_err();
    assert_eq!(refused.reason, Reason::VmExists);
    assert_eq!(refused.metadata["uid"], new.uid);
    rig.delete("web").await.unwrap();
    assert_eq!(rig.adopt(&old.uid, true, 9).await.unwrap().epoch, 9);
    let state = Journal::read(&rig.dir("web").journal()).unwrap().unwrap();
    assert_eq!(state.ownership, Ownership::Owner { epoch: 9 });
}

#[tokio::test]
async fn leftovers_are_ended_by_uid() {
    let rig = Rig::started().await;
    // A frozen copy.
    let old = rig.given_away("web", "gone-1").await;
    assert_eq!(
        reason(rig.end(&old.uid, false).await),
        Reason::GiveUpRequired
    );
    rig.end(&old.uid, true).await.unwrap();
    assert!(!rig.path_of(&old.uid).exists());
    assert_eq!(
        reason(rig.side("gone-1", Role::Source).await),
        Reason::NoSuchMigration
    );
    // A destination that waits: nothing is given up.
    rig.prepare("m1", "db", 16 * MIB).await.unwrap();
    let left = rig.leftovers().await.remove(0);
    assert_eq!(left.kind(), Kind::IncomingDestination);
    assert!(!left.adoptable && left.delete_gives_up.is_empty());
    assert_eq!(reason(rig.adopt("u-db", true, 0).await), Reason::VmState);
    rig.end("u-db", false).await.unwrap();
    assert!(!rig.path_of("u-db").exists());
    // The record of a side whose process is gone.
    rig.prepare("m2", "db", 16 * MIB).await.unwrap();
    rig.cancel("m2", Role::Destination).await.unwrap();
    let ended = async || {
        let left = rig.leftovers().await;
        (left.len() == 1 && left[0].kind() == Kind::EndedSide).then(|| left[0].clone())
    };
    let left = until(ended).await;
    assert_eq!(left.migration, "migrations/m2");
    rig.end("u-db", false).await.unwrap();
    assert!(rig.leftovers().await.is_empty());
    assert_eq!(rig.used().await, 0);
    assert_eq!(reason(rig.end("u-db", true).await), Reason::NoSuchLeftover);
}

#[tokio::test]
async fn a_destination_in_doubt_is_told_what_became_of_its_source_by_an_operator() {
    let rig = Rig::started().await;
    for (migration, vm) in [("ready-1", "web"), ("ready-2", "db")] {
        rig.prepare(migration, vm, 16 * MIB).await.unwrap();
    }
    let left = rig.leftovers().await;
    assert_eq!(left.len(), 2);
    for left in &left {
        assert_eq!(
            (left.kind(), left.adoptable),
            (Kind::ReadyDestination, true)
        );
        assert!(!left.adopt_gives_up.is_empty() && !left.delete_gives_up.is_empty());
    }
    assert_eq!(
        reason(rig.adopt("u-web", false, 0).await),
        Reason::GiveUpRequired
    );
    let owned = rig.adopt("u-web", true, 0).await.unwrap();
    assert_eq!(
        (owned.state(), owned.epoch),
        (v1::vm::State::Running, 5),
        "the epoch that its source gave away, and one"
    );
    assert_eq!(
        rig.side("ready-1", Role::Destination)
            .await
            .unwrap()
            .phase(),
        Phase::Completed
    );
    assert_eq!(reason(rig.end("u-db", false).await), Reason::GiveUpRequired);
    rig.end("u-db", true).await.unwrap();
    assert!(!rig.path_of("u-db").exists());
    assert!(rig.leftovers().await.is_empty());
    assert_eq!(rig.names().await, ["vms/web"]);
}

#[tokio::test]
async fn the_records_of_a_vm_that_lives_here_are_ended_without_it() {
    let rig = Rig::started().await;
    rig.prepare("m1", "web", 16 * MIB).await.unwrap();
    rig.cancel("m1", Role::Destination).await.unwrap();
    until(async || (rig.used().await == 0).then_some(())).await;
    // The VM comes again: the first side's record outlives its directory.
    rig.prepare("ready-2", "web", 16 * MIB).await.unwrap();
    rig.adopt("u-web", true, 0).await.unwrap();
    let left = rig.leftovers().await;
    assert_eq!(left.len(), 1, "{left:#?}");
    assert_eq!(left[0].kind(), Kind::EndedSide);
    assert_eq!(left[0].migration, "migrations/m1");
    rig.end("u-web", true).await.unwrap();
    assert!(rig.leftovers().await.is_empty());
    assert_eq!(
        reason(rig.side("m1", Role::Destination).await),
        Reason::NoSuchMigration
    );
    assert_eq!(
        rig.get("web").await.unwrap().state(),
        v1::vm::State::Running
    );
}

#[tokio::test]
async fn a_stopped_leftover_is_ended_all_the_same() {
    let rig = Rig::started().await;
    let old = rig.given_away("web", "gone-1").await;
    freeze(old.pid).await;
    rig.end(&old.uid, true).await.unwrap();
    assert!(!rig.path_of(&old.uid).exists());
    assert!(rig.leftovers().await.is_empty());
}

#[tokio::test]
async fn a_directory_is_read_again_until_it_can_be() {
    let mut rig = Rig::new();
    let dir = rig.dead_dir("u-1");
    let mut journal = Journal::open(&dir.journal()).unwrap();
    let created = Entry::Created {
        vm: "web".into(),
        uid: "u-1".into(),
        epoch: 1,
    };
    let relinquished = Entry::Relinquished {
        uid: "u-1".into(),
        migration: "m1".into(),
        epoch: 1,
        grant: None,
    };
    journal.append(&created).unwrap();
    journal.append(&relinquished).unwrap();
    flip(&rig, "u-1");
    rig.start().await;
    let left = rig.leftovers().await.remove(0);
    assert_eq!((left.kind(), left.adoptable), (Kind::Unreadable, false));
    assert_eq!(reason(rig.side("m1", Role::Source).await), Reason::Journal);
    assert_eq!(rig.host().await.vms, 1, "it may have owned a VM");

    flip(&rig, "u-1");
    let side = until(async || rig.side("m1", Role::Source).await.ok()).await;
    assert_eq!(side.phase(), Phase::Relinquished);
    let lost = rig.get("web").await.unwrap();
    assert!(lost.state_message.contains("gave it away"), "{lost:?}");
    rig.release("m1", Role::Source).await.unwrap();
    assert!(!dir.path().exists());
    assert!(rig.names().await.is_empty());
}

#[tokio::test]
async fn what_was_only_ever_received_is_never_lost() {
    let mut rig = Rig::started().await;
    let prepared = rig.prepare("m1", "web", 16 * MIB).await.unwrap();
    let pid = u32::from_be_bytes(prepared.ticket.try_into().unwrap());
    flip(&rig, "u-web");
    kill(pid);
    let unreadable = async || {
        let left = rig.leftovers().await;
        let kind = left.first().map(v1::Leftover::kind);
        (kind == Some(Kind::Unreadable)).then_some(())
    };
    until(unreadable).await;
    assert!(rig.names().await.is_empty(), "nothing is lost here");
    // Its name is free, and the agent remembers over a restart.
    rig.create("web", 16 * MIB).await.unwrap();
    rig.stop().await;
    rig.start().await;
    assert_eq!(
        rig.get("web").await.unwrap().state(),
        v1::vm::State::Created
    );
    assert_eq!(
        reason(rig.end("u-web", false).await),
        Reason::GiveUpRequired
    );
    rig.end("u-web", true).await.unwrap();
    assert!(!rig.path_of("u-web").exists());
    assert_eq!(rig.names().await, ["vms/web"]);
}

#[tokio::test]
async fn what_has_arrived_may_be_lost() {
    let mut rig = Rig::started().await;
    for (migration, vm) in [("ready-1", "web"), ("ready-2", "db")] {
        let prepared = rig.prepare(migration, vm, 16 * MIB).await.unwrap();
        let pid = u32::from_be_bytes(prepared.ticket.try_into().unwrap());
        if vm == "web" {
            rig.adopt("u-web", true, 0).await.unwrap();
        } else {
            let commit = rig.commit("ready-2", ("u-db", 4)).await;
            answer(rig.transfers().resolve_transfer(commit).await).unwrap();
        }
        // Both in the agent's memory and beside the journal.
        until(async || {
            let kept = std::fs::read(rig.path_of(&format!("u-{vm}")).join("seen.pb")).ok()?;
            let kept: v1::Vm = prost::Message::decode(kept.as_slice()).ok()?;
            (kept.state() == v1::vm::State::Running).then_some(())
        })
        .await;
        flip(&rig, &format!("u-{vm}"));
        kill(pid);
        rig.becomes(vm, v1::vm::State::Lost).await;
    }
    rig.stop().await;
    rig.start().await;
    for vm in ["web", "db"] {
        let lost = rig.get(vm).await.unwrap();
        assert_eq!((lost.state(), lost.epoch), (v1::vm::State::Lost, 5));
        assert!(lost.state_message.contains("cannot be read"));
        // It may say who owns the VM: not ended by a plain delete.
        assert_eq!(reason(rig.delete(vm).await), Reason::GiveUpRequired);
    }
}

#[tokio::test]
async fn releases_and_questions_at_a_time_lose_nothing() {
    let rig = Rig::started().await;
    for round in 0..12 {
        let migration = format!("m{round}");
        rig.prepare(&migration, "web", 16 * MIB).await.unwrap();
        rig.cancel(&migration, Role::Destination).await.unwrap();
        let release = rig.release(&migration, Role::Destination);
        let ask = async {
            for _ in 0..10 {
                let list = v1::ListVmsRequest::default();
                let vms = answer(rig.vms().list_vms(list).await).unwrap().vms;
                let lost = vms.iter().find(|vm| vm.state() == v1::vm::State::Lost);
                assert!(lost.is_none(), "{lost:?}");
                if let Err(error) = rig.side(&migration, Role::Destination).await {
                    // Its process may be going just now; its directory is never unreadable.
                    assert!(
                        [Reason::NoSuchMigration, Reason::VmUnreachable].contains(&error.reason),
                        "{error}"
                    );
                }
            }
        };
        let (released, ()) = tokio::join!(release, ask);
        released.unwrap();
        until(async || (rig.used().await == 0).then_some(())).await;
        assert!(rig.leftovers().await.is_empty());
    }
}

/// Every way a journal can be unreadable: no order but the leftover's own removes it.
#[tokio::test]
async fn a_journal_that_cannot_be_read_is_not_deleted_with_its_vm() {
    let line = |json: &str| format!("{:08x} {json}\n", crc32fast::hash(json.as_bytes()));
    let spoil: [(&str, Vec<u8>); 3] = [
        (
            "unknown",
            line(r#"{"entry":"lent","uid":"x"}"#).into_bytes(),
        ),
        ("corrupt", b"00000000 {}\n00000000 {}\n".to_vec()),
        (
            "newer",
            line(r#"{"journal":"slat","version":99}"#).into_bytes(),
        ),
    ];
    let mut rig = Rig::started().await;
    let mut dirs = Vec::new();
    for (name, bytes) in &spoil {
        let made = rig.create(name, 16 * MIB).await.unwrap();
        let path = rig.path_of(&made.uid);
        let mut journal = std::fs::read(path.join("journal")).unwrap();
        if *name == "newer" {
            journal.clone_from(bytes);
        } else {
            journal.extend_from_slice(bytes);
        }
        std::fs::write(path.join("journal"), journal).unwrap();
        // Not even while its process lives.
        assert_eq!(reason(rig.delete(name).await), Reason::Journal, "{name}");
        kill(made.pid);
        rig.becomes(name, v1::vm::State::Lost).await;
        dirs.push((*name, made.uid, path));
    }
    for _ in 0..2 {
        for (name, uid, path) in &dirs {
            for (by_name, by_uid, force) in [(*name, "", false), ("", uid, false), ("", uid, true)]
            {
                let request = v1::DeleteVmRequest {
                    name: if by_name.is_empty() {
                        String::new()
                    } else {
                        format!("vms/{by_name}")
                    },
                    uid: by_uid.into(),
                    force,
                    ..Default::default()
                };
                let error = answer(rig.vms().delete_vm(request).await).unwrap_err();
                assert_eq!(error.reason, Reason::GiveUpRequired, "{name}: {error}");
                assert!(error.metadata["advice"].contains(uid.as_str()), "{error}");
                assert!(path.join("journal").exists());
            }
        }
        assert_eq!(rig.leftovers().await.len(), spoil.len());
        rig.stop().await;
        rig.start().await;
    }
    for (_, uid, path) in &dirs {
        assert_eq!(reason(rig.end(uid, false).await), Reason::GiveUpRequired);
        rig.end(uid, true).await.unwrap();
        assert!(!path.exists());
    }
    assert!(rig.names().await.is_empty());
}

#[tokio::test]
async fn a_frozen_copy_whose_process_dies_is_lost_until_it_is_deleted() {
    let mut rig = Rig::started().await;
    let old = rig.given_away("web", "gone-1").await;
    kill(old.pid);
    for _ in 0..2 {
        let lost = rig.becomes("web", v1::vm::State::Lost).await;
        assert_eq!((lost.epoch, lost.uid.as_str()), (1, old.uid.as_str()));
        assert_eq!((lost.pid, lost.migration.as_str()), (0, ""));
        assert!(lost.spec.is_some());
        let why = &lost.state_message;
        assert!(why.contains("migrations/gone-1 gave it away"), "{why}");
        let refused = rig.create("web", 16 * MIB).await.unwrap_err();
        assert_eq!(refused.reason, Reason::VmExists);
        let advice = &refused.metadata["advice"];
        assert!(advice.contains("by its uid"), "{advice}");
        rig.stop().await;
        rig.start().await;
    }
    rig.delete("web").await.unwrap();
    assert!(!rig.path_of(&old.uid).exists());
    // A destination that still asks is answered.
    let side = rig.side("gone-1", Role::Source).await.unwrap();
    assert_eq!(side.phase(), Phase::Relinquished);
    rig.create("web", 16 * MIB).await.unwrap();
    // Where it is known that another host has the VM, nothing is lost.
    let old = rig.given_away("db", "gone-2").await;
    kill(old.pid);
    rig.becomes("db", v1::vm::State::Lost).await;
    rig.release("gone-2", Role::Source).await.unwrap();
    assert_eq!(reason(rig.get("db").await), Reason::NoSuchVm);
    assert!(!rig.path_of(&old.uid).exists());
}
