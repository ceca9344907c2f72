//! A migration waits for sides of earlier ones on its own two hosts, and for no others.

use slat_proto::v1::{
    MigrationPhase as Phase, TransferPhase as SidePhase, TransferRole as Role, VmLocation,
};

use super::{
    Fleet, VM, reason,
    support::{Agent, Fake, hand_over, until},
};

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_host_keeps_no_vm_from_moving_to_another() {
    let mut fleet = Fleet::start().await;
    let c = Agent::start(Fake::new("hosts/c"), fleet.server.address()).await;
    let name = fleet.precopy().await;
    let (b, b_at) = fleet.b.stop().await;
    fleet.a.fake.phase(&name, Role::Source, SidePhase::Failed);
    fleet.clients.wait_phase(&name, Phase::Failed).await;
    // Nobody released b's side, and nobody needs to.
    let next = fleet.clients.migrate(VM, "hosts/c").await.unwrap().name;
    fleet.a.fake.wait_call(&format!("start {next}")).await;
    assert!(b.side(&name, Role::Destination).is_some());
    hand_over(&fleet.a.fake, &c.fake, &next, VM);
    fleet.clients.wait_phase(&next, Phase::Completed).await;
    fleet.b = Agent::serve_at(b, b_at).await;
    c.stop().await;
    fleet.stop().await;
}

/// A second migration to b that waits there for the side of a first one, which was cancelled.
async fn waits_for_b(fleet: &mut Fleet) -> (String, String) {
    fleet.b.fake.keep_sides(true);
    let first = fleet.precopy().await;
    fleet.clients.cancel(&first).await.unwrap();
    fleet.clients.wait_phase(&first, Phase::Cancelled).await;
    let second = fleet.clients.migrate(VM, "hosts/b").await.unwrap().name;
    (first, second)
}

fn prepared(fake: &Fake, migration: &str) -> bool {
    let call = format!("prepare {migration}");
    fake.calls().contains(&call)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_migration_that_waits_for_a_dead_host_fails_and_names_it() {
    let mut fleet = Fleet::start().await;
    let (first, second) = waits_for_b(&mut fleet).await;
    let (b, b_at) = fleet.b.stop().await;
    let failed = fleet.clients.wait_phase(&second, Phase::Failed).await;
    assert_eq!(reason(&failed), "HOST_UNREACHABLE");
    assert_eq!(failed.vm_location(), VmLocation::Source);
    let error = failed.error.unwrap();
    assert_eq!(error.metadata["host"], "hosts/b");
    assert_eq!(error.metadata["migration"], first);
    assert!(!prepared(&b, &second));
    fleet.b = Agent::serve_at(b, b_at).await;
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_server_waits_for_the_same_sides() {
    let mut fleet = Fleet::start().await;
    let (_, second) = waits_for_b(&mut fleet).await;
    let released = |fake: &Fake| {
        let is_release = |call: &&String| call.starts_with("release TRANSFER_ROLE_DESTINATION");
        fake.calls().iter().filter(is_release).count()
    };
    let before = released(&fleet.b.fake);
    let mut fleet = fleet.restart_server().await;
    fleet.report_again().await;
    until("the new server tried to release b's side", async || {
        released(&fleet.b.fake) > before
    })
    .await;
    assert_eq!(
        fleet.clients.migration(&second).await.phase(),
        Phase::Pending
    );
    assert!(!prepared(&fleet.b.fake, &second));
    fleet.b.fake.keep_sides(false);
    fleet.b.fake.wait_call(&format!("prepare {second}")).await;
    fleet.stop().await;
}
