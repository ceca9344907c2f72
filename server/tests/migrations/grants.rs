//! Leave for each step: what the server signs, and by which key.

use std::time::{Duration, SystemTime};

use slat_proto::{
    ApiError, Reason,
    v1::{self, MigrationPhase as Phase, TransferPhase as SidePhase, TransferRole as Role},
};
use slat_trust::grant::{Checked, Purpose};

use super::{
    Fleet, VM,
    support::{hand_over, until},
};

const UID: &str = "uid-vms/web";

#[tokio::test(flavor = "multi_thread")]
async fn each_side_gets_leave_for_its_own_step() {
    let mut fleet = Fleet::start().await;
    fleet.a.fake.set_channel_key([3; 32]);
    fleet.b.fake.set_channel_key([4; 32]);
    let name = fleet.precopy().await;
    let id = name.strip_prefix("migrations/").unwrap();
    let [receive] = <[_; 1]>::try_from(fleet.b.fake.leave()).unwrap();
    let [send] = <[_; 1]>::try_from(fleet.a.fake.leave()).unwrap();
    for (grant, purpose) in [(&receive, Purpose::Receive), (&send, Purpose::Send)] {
        let right = Checked {
            purpose: Some(purpose),
            migration: Some(id),
            vm_uid: Some(UID),
            epoch: Some(1),
            source: Some(("a", Some("1"))),
            destination: Some(("b", Some("1"))),
        };
        grant.check(&right).unwrap();
        // The default of max_total_time, and five minutes.
        let left = grant.not_after().duration_since(SystemTime::now()).unwrap();
        let hour = Duration::from_secs(3600);
        assert!(
            (hour..=hour + Duration::from_secs(300)).contains(&left),
            "{left:?}"
        );
    }
    assert_ne!(receive.id, send.id);
    assert_eq!(
        (receive.source_key, receive.destination_key),
        ([3; 32], [0; 32])
    );
    assert_eq!((send.source_key, send.destination_key), ([3; 32], [4; 32]));
    assert_eq!(fleet.a.fake.channels(), [i32::from(v1::PageChannel::Tls)]);
    hand_over(&fleet.a.fake, &fleet.b.fake, &name, VM);
    fleet.clients.wait_phase(&name, Phase::Completed).await;
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_has_just_started_or_not_heard_of_a_key_is_asked_again() {
    let mut fleet = Fleet::start().await;
    let behind = ApiError::new(Reason::GrantInvalid, "the grant is refused")
        .with("field", "destination_incarnation");
    fleet.b.fake.refuse_prepare(behind);
    let unknown = ApiError::new(Reason::GrantKeyUnknown, "the grant is refused");
    fleet.a.fake.refuse_start(unknown);
    let name = fleet.clients.migrate(VM, "hosts/b").await.unwrap().name;
    until("both were asked again", async || {
        fleet.a.fake.side(&name, Role::Source).is_some()
    })
    .await;
    hand_over(&fleet.a.fake, &fleet.b.fake, &name, VM);
    fleet.clients.wait_phase(&name, Phase::Completed).await;
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn another_refusal_ends_the_migration_by_its_name() {
    let mut fleet = Fleet::start().await;
    let refused = ApiError::new(
        Reason::GrantInvalid,
        "the grant is refused: its epoch is 1, not 2",
    )
    .with("field", "epoch");
    fleet.b.fake.refuse_prepare(refused);
    let name = fleet.clients.migrate(VM, "hosts/b").await.unwrap().name;
    let failed = fleet.clients.wait_phase(&name, Phase::Failed).await;
    assert_eq!(super::reason(&failed), "GRANT_INVALID");
    assert_eq!(failed.vm_location(), v1::VmLocation::Source);
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_is_taken_away_in_mid_migration_is_followed_by_another() {
    let mut fleet = Fleet::start().await;
    let name = fleet.precopy().await;
    let before = fleet.b.fake.keys();
    assert_eq!(before.len(), 1);
    let keys = fleet.state.path().join("grant-keys");
    for entry in std::fs::read_dir(&keys).unwrap() {
        std::fs::remove_file(entry.unwrap().path()).unwrap();
    }
    until("the new key is announced", async || {
        let now = fleet.b.fake.keys();
        now.len() == 1 && now != before
    })
    .await;
    // A decision by the new key: the source relinquished, and its COMMIT is lost.
    let (a, b) = (&fleet.a.fake, &fleet.b.fake);
    b.phase(&name, Role::Destination, SidePhase::Ready);
    a.phase(&name, Role::Source, SidePhase::Switchover);
    a.phase(&name, Role::Source, SidePhase::Relinquished);
    b.wait_call("resolve").await;
    fleet.clients.wait_phase(&name, Phase::Completed).await;
    let told = fleet.b.fake.leave().pop().unwrap();
    assert_eq!(
        (told.purpose, told.ground.as_str()),
        (Purpose::Commit, "journal")
    );
    let left = told.not_after().duration_since(SystemTime::now()).unwrap();
    assert!(left <= Duration::from_secs(120), "{left:?}");
    fleet.stop().await;
}
