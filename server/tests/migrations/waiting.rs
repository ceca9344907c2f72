//! What a migration waits for: it says so, and where nothing is at stake the wait has an end.

use slat_proto::v1::{
    self, MigrationPhase as Phase, TransferPhase as SidePhase, TransferRole as Role, VmLocation,
};

use super::{
    Fleet, VM, reason,
    support::{Agent, Fake, hand_over, until},
};

const POPULATE: &str = "hosts/b (destination) to populate its memory";

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
    let waits = fleet
        .clients
        .wait(&second, |migration| {
            migration.waiting_for.starts_with("hosts/b")
        })
        .await;
    assert_eq!(
        waits.waiting_for,
        format!("hosts/b (destination of {first}) to end its earlier side")
    );
    assert!(waits.waiting_since.is_some());
    let (b, b_at) = fleet.b.stop().await;
    let failed = fleet.clients.wait_phase(&second, Phase::Failed).await;
    assert_eq!(reason(&failed), "HOST_UNREACHABLE");
    assert_eq!(failed.vm_location(), VmLocation::Source);
    let error = failed.error.unwrap();
    assert_eq!(error.metadata["host"], "hosts/b");
    assert_eq!(error.metadata["migration"], first);
    assert!(!prepared(&b, &second));
    assert_eq!(
        (failed.waiting_for.as_str(), failed.waiting_since),
        ("", None)
    );
    fleet.b = Agent::serve_at(b, b_at).await;
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_migration_that_waits_for_a_side_that_its_host_keeps_fails_and_says_why() {
    let mut fleet = Fleet::start().await;
    let (first, second) = waits_for_b(&mut fleet).await;
    // b answers, and reports, all the time.
    let failed = fleet.clients.wait_phase(&second, Phase::Failed).await;
    assert_eq!(reason(&failed), "STORE");
    assert_eq!(failed.vm_location(), VmLocation::Source);
    let error = failed.error.unwrap();
    assert_eq!(error.metadata["migration"], first);
    assert!(error.message.contains("the disk is full"), "{error:?}");
    assert!(!prepared(&fleet.b.fake, &second));
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_server_fails_what_was_not_begun_when_its_host_does_not_come_back() {
    let mut fleet = Fleet::start().await;
    fleet.b.fake.hold("prepare");
    let name = fleet.clients.migrate(VM, "hosts/b").await.unwrap().name;
    fleet.b.fake.wait_call("held prepare").await;
    let asks = fleet
        .clients
        .wait(&name, |migration| {
            migration.waiting_for.contains("destination")
        })
        .await;
    assert_eq!(
        asks.waiting_for,
        "hosts/b (destination) to make an empty VM and listen"
    );
    fleet.server.stop().await;
    fleet.b.fake.let_go("prepare");
    let (b, b_at) = fleet.b.stop().await;
    fleet.server = super::server(fleet.state.path()).await;
    fleet.clients = super::Clients::new(fleet.server.address());
    fleet.a.report_to(fleet.server.address()).await;
    let failed = fleet.clients.wait_phase(&name, Phase::Failed).await;
    assert_eq!(failed.vm_location(), VmLocation::Source, "{failed:#?}");
    assert_eq!(failed.error.as_ref().unwrap().side, "destination");
    assert!(reason(&failed).ends_with("_UNREACHABLE"), "{failed:#?}");
    // Nobody told the source to begin.
    let calls = fleet.a.fake.calls();
    assert!(!calls.contains(&format!("start {name}")), "{calls:?}");
    fleet.b = Agent::serve_at(b, b_at).await;
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn preparing_says_what_it_waits_for_and_how_far_it_is() {
    let mut fleet = Fleet::start().await;
    let name = fleet.clients.migrate(VM, "hosts/b").await.unwrap().name;
    fleet.a.fake.wait_call(&format!("start {name}")).await;
    fleet.a.fake.set(&name, Role::Source, |side| {
        side.progress.get_or_insert_default().total_bytes = 64 << 20;
    });
    let tell = |fleet: &Fleet, bytes: u64| {
        fleet.b.fake.set(&name, Role::Destination, |side| {
            side.progress.get_or_insert_default().populated_bytes = bytes;
        });
    };
    let mut since = None;
    for mib in [3, 40] {
        tell(&fleet, mib << 20);
        let here = |m: &v1::Migration| m.populated_bytes == mib << 20;
        let shown = fleet.clients.wait(&name, here).await;
        assert_eq!(shown.phase(), Phase::Preparing);
        assert_eq!(shown.waiting_for, POPULATE);
        // It waits for the same all the time.
        since = since.or(shown.waiting_since);
        assert_eq!(shown.waiting_since, since);
        assert!(since.is_some());
    }
    tell(&fleet, 64 << 20);
    let ready = |m: &v1::Migration| m.waiting_for.starts_with("hosts/a (source) to turn");
    fleet.clients.wait(&name, ready).await;
    fleet.a.fake.phase(&name, Role::Source, SidePhase::Precopy);
    let sends = |m: &v1::Migration| m.phase() == Phase::PrecopyActive && m.waiting_for.is_empty();
    fleet.clients.wait(&name, sends).await;
    // The source's agent goes: that is what is waited for, and then what is in doubt.
    let (a, a_at) = fleet.a.stop().await;
    let silent = |m: &v1::Migration| m.waiting_for == "hosts/a (source) to answer";
    fleet.clients.wait(&name, silent).await;
    fleet
        .b
        .fake
        .phase(&name, Role::Destination, SidePhase::Ready);
    let doubt = fleet.clients.wait_phase(&name, Phase::InDoubt).await;
    assert!(
        doubt
            .waiting_for
            .starts_with("hosts/a (source) to answer: its journal"),
        "{}",
        doubt.waiting_for
    );
    fleet.a = Agent::serve_at(a, a_at).await;
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_journal_that_cannot_be_written_is_named_with_its_host() {
    let mut fleet = Fleet::start().await;
    let name = fleet.precopy().await;
    let words = "its journal to be written (OWNED): No space left on device";
    fleet
        .a
        .fake
        .phase(&name, Role::Source, SidePhase::Relinquished);
    fleet.b.fake.set(&name, Role::Destination, |side| {
        side.phase = SidePhase::Ready.into();
        side.waiting_for = words.into();
    });
    let told = fleet
        .clients
        .wait(&name, |migration| migration.waiting_for.contains("OWNED"))
        .await;
    assert_eq!(told.waiting_for, format!("hosts/b (destination) {words}"));
    assert!(told.waiting_since.is_some());
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

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_is_stopped_in_precopy_is_said_to_be_waited_for() {
    let mut fleet = Fleet::start().await;
    let name = fleet.precopy().await;
    // Its watch stays open and says nothing, and no other call is answered.
    fleet.a.fake.hold("get source");
    let waits = fleet
        .clients
        .wait(&name, |migration| !migration.waiting_for.is_empty())
        .await;
    assert_eq!(waits.waiting_for, "hosts/a (source) to answer");
    assert_eq!(waits.phase(), Phase::PrecopyActive);
    fleet.a.fake.let_go("get source");
    fleet
        .clients
        .wait(&name, |migration| migration.waiting_for.is_empty())
        .await;
    hand_over(&fleet.a.fake, &fleet.b.fake, &name, VM);
    fleet.clients.wait_phase(&name, Phase::Completed).await;
    fleet.stop().await;
}
