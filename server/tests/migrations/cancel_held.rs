//! A cancel while a call to an agent hangs, for each call: it answers and takes effect within a
//! second, and what the call does when it goes on changes nothing.

use std::time::{Duration, Instant};

use slat_proto::{
    ApiError, Reason,
    v1::{
        self, MigrationPhase as Phase, TransferPhase as SidePhase, TransferRole as Role,
        VmLocation, vm::State,
    },
};

use super::{
    Fleet, VM,
    support::{Fake, until},
};

const SECOND: Duration = Duration::from_secs(1);

impl Fleet {
    /// A migration that stops at a call which is held.
    async fn migrate_until_held(&mut self, at: &Fake, call: &str) -> String {
        at.hold(call);
        let name = self.clients.migrate(VM, "hosts/b").await.unwrap().name;
        at.wait_call(&format!("held {call}")).await;
        name
    }

    /// Cancels, and sees that it is answered and done within a second.
    async fn cancel_at_once(&mut self, name: &str) {
        let begin = Instant::now();
        let answer = self.clients.cancel(name).await.unwrap();
        assert!(answer.cancel_requested);
        assert!(
            matches!(answer.phase(), Phase::Cancelling | Phase::Cancelled),
            "{answer:?}"
        );
        let done = self.clients.wait_phase(name, Phase::Cancelled).await;
        let took = begin.elapsed();
        assert!(took < SECOND, "{took:?}");
        assert_eq!(done.vm_location(), VmLocation::Source);
        assert!(done.error.is_none());
    }

    /// Nothing of a cancelled migration is left, and its VM moves as if it had never been.
    async fn leaves_nothing(mut self, name: &str) {
        let (a, b) = (self.a.fake.clone(), self.b.fake.clone());
        until("both sides are gone", async || {
            a.side(name, Role::Source).is_none() && b.side(name, Role::Destination).is_none()
        })
        .await;
        assert!(b.vm(VM).is_none());
        assert_eq!(a.vm(VM).unwrap().state(), State::Running);
        let next = self.precopy().await;
        let earlier = self.clients.migration(name).await;
        assert_eq!(earlier.phase(), Phase::Cancelled);
        super::hand_over(&a, &b, &next, VM);
        self.clients.wait_phase(&next, Phase::Completed).await;
        let earlier = self.clients.migration(name).await;
        assert_eq!(earlier.phase(), Phase::Cancelled);
        self.stop().await;
    }
}

fn asked(fake: &Fake, call: &str) -> bool {
    fake.calls().iter().any(|made| made.starts_with(call))
}

#[tokio::test(flavor = "multi_thread")]
async fn while_the_source_describes() {
    let mut fleet = Fleet::start().await;
    let (a, b) = (fleet.a.fake.clone(), fleet.b.fake.clone());
    let name = fleet.migrate_until_held(&a, "describe").await;
    fleet.cancel_at_once(&name).await;
    a.let_go("describe");
    a.wait_call("describe").await;
    assert!(!asked(&b, ""), "{:?}", b.calls());
    fleet.leaves_nothing(&name).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn while_the_destination_prepares() {
    for call in ["prepare", "after prepare"] {
        let mut fleet = Fleet::start().await;
        let b = fleet.b.fake.clone();
        let name = fleet.migrate_until_held(&b, call).await;
        fleet.cancel_at_once(&name).await;
        // Nothing overtakes the call: what it makes is taken away after it.
        assert!(
            !asked(&b, "cancel") && !asked(&b, "release"),
            "{:?}",
            b.calls()
        );
        b.let_go(call);
        b.wait_call(&format!("release TRANSFER_ROLE_DESTINATION {name}"))
            .await;
        assert!(!asked(&fleet.a.fake, "start"));
        fleet.leaves_nothing(&name).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn while_the_source_is_told_to_start() {
    for call in ["start", "after start"] {
        let mut fleet = Fleet::start().await;
        let (a, b) = (fleet.a.fake.clone(), fleet.b.fake.clone());
        let name = fleet.migrate_until_held(&a, call).await;
        fleet.cancel_at_once(&name).await;
        if call == "start" {
            // A source that begins now finds no listener, and its side ends and goes like any
            // other.
            let cancelled = format!("cancel TRANSFER_ROLE_DESTINATION {name}");
            assert!(asked(&b, &cancelled), "{:?}", b.calls());
        }
        a.let_go(call);
        a.wait_call(&format!("start {name}")).await;
        fleet.leaves_nothing(&name).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn while_the_source_is_told_to_start_and_the_server_restarts() {
    let mut fleet = Fleet::start().await;
    let a = fleet.a.fake.clone();
    let name = fleet.migrate_until_held(&a, "start").await;
    let mut fleet = fleet.restart_server().await;
    fleet.report_again().await;
    fleet.cancel_at_once(&name).await;
    // The earlier life's call comes when this one is done with the migration.
    a.let_go("start");
    a.wait_call(&format!("start {name}")).await;
    fleet.leaves_nothing(&name).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn while_sides_are_asked_or_watched() {
    for call in [
        "get source",
        "watch source",
        "get destination",
        "watch destination",
    ] {
        let mut fleet = Fleet::start().await;
        let (a, b) = (fleet.a.fake.clone(), fleet.b.fake.clone());
        let at = if call.ends_with("source") { &a } else { &b };
        let name = fleet.migrate_until_held(at, call).await;
        a.wait_call(&format!("start {name}")).await;
        fleet.cancel_at_once(&name).await;
        at.let_go(call);
        fleet.leaves_nothing(&name).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn while_an_earlier_migration_is_released() {
    let mut fleet = Fleet::start().await;
    let b = fleet.b.fake.clone();
    let first = fleet.precopy().await;
    b.hold("release destination");
    // The clean-up that hangs is not waited for.
    fleet.cancel_at_once(&first).await;
    b.wait_call("held release").await;
    let name = fleet.clients.migrate(VM, "hosts/b").await.unwrap().name;
    assert_eq!(fleet.clients.migration(&name).await.phase(), Phase::Pending);
    fleet.cancel_at_once(&name).await;
    b.let_go("release destination");
    assert!(!asked(&b, &format!("prepare {name}")));
    fleet.leaves_nothing(&name).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn while_the_source_is_told_of_the_cancel() {
    let mut fleet = Fleet::start().await;
    let a = fleet.a.fake.clone();
    let name = fleet.precopy().await;
    a.hold("cancel source");
    let begin = Instant::now();
    let answer = fleet.clients.cancel(&name).await.unwrap();
    assert!(begin.elapsed() < SECOND);
    // Without the source's word it is not cancelled.
    assert_eq!(answer.phase(), Phase::Cancelling);
    a.let_go("cancel source");
    fleet.clients.wait_phase(&name, Phase::Cancelled).await;
    fleet.leaves_nothing(&name).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn while_a_destination_in_doubt_is_told() {
    for (journal, end) in [
        (SidePhase::Relinquished, Phase::Completed),
        (SidePhase::Failed, Phase::Failed),
    ] {
        let mut fleet = Fleet::start().await;
        let (a, b) = (fleet.a.fake.clone(), fleet.b.fake.clone());
        let name = fleet.precopy().await;
        b.hold("resolve destination");
        b.phase(&name, Role::Destination, SidePhase::Ready);
        fleet.clients.wait_phase(&name, Phase::Switchover).await;
        a.phase(&name, Role::Source, journal);
        b.wait_call("held resolve").await;
        let begin = Instant::now();
        let answer: Result<v1::Migration, ApiError> = fleet.clients.cancel(&name).await;
        assert!(begin.elapsed() < SECOND);
        if end == Phase::Completed {
            assert_eq!(answer.unwrap_err().reason, Reason::PastPointOfNoReturn);
        } else {
            let answer = answer.unwrap();
            assert_eq!(
                (answer.phase(), answer.vm_location()),
                (end, VmLocation::Source)
            );
        }
        b.let_go("resolve destination");
        fleet.clients.wait_phase(&name, end).await;
        fleet.stop().await;
    }
}
