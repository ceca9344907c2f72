//! A watch of a VM through a handover: what is passing is not shown, what lasts is.

use std::time::Duration;

use slat_proto::v1::{
    self, MigrationPhase as Phase, TransferPhase as SidePhase, TransferRole as Role, vm::State,
};
use tokio::time::timeout;
use tonic::Streaming;

use super::{
    Fleet, VM,
    ends::destination_dies_after_the_commit,
    support::{Agent, Clients, Fake, PATIENCE, answer, hand_over, until},
};

async fn watch(clients: &mut Clients) -> Streaming<v1::Vm> {
    let request = v1::WatchVmRequest {
        name: VM.into(),
        ..Default::default()
    };
    answer(clients.vms.watch_vm(request).await).unwrap()
}

/// The VM at its source as it is from the commit on.
fn freeze(source: &Fake) {
    let mut frozen = source.vm(VM).unwrap();
    frozen.state = State::Relinquished.into();
    source.put_vm(frozen);
}

/// Hosts and states in the order they came, without repetitions, up to `last`.
async fn told(updates: &mut Streaming<v1::Vm>, last: (&str, State)) -> Vec<(String, State)> {
    let mut told = Vec::new();
    let read = async {
        while told.last() != Some(&(last.0.to_owned(), last.1)) {
            let vm = updates.message().await.unwrap().expect("the watch ended");
            told.push((vm.host.clone(), vm.state()));
            told.dedup();
        }
    };
    let read = timeout(PATIENCE, read).await;
    assert!(read.is_ok(), "{last:?} never came, only {told:?}");
    told
}

#[tokio::test(flavor = "multi_thread")]
async fn the_last_copy_is_shown_to_who_watched_before_and_to_who_watches_now() {
    let mut fleet = Fleet::start().await;
    let mut before = watch(&mut fleet.clients).await;
    destination_dies_after_the_commit(&mut fleet).await;
    let last = ("hosts/a", State::Relinquished);
    let shown = told(&mut before, last).await;
    let running = ("hosts/a".to_owned(), State::Running);
    assert_eq!(shown, [running, ("hosts/a".to_owned(), last.1)]);
    let mut now = watch(&mut fleet.clients).await;
    let shown = told(&mut now, last).await;
    assert_eq!(shown, [("hosts/a".to_owned(), last.1)]);

    // Given up, it is gone for both.
    let delete = v1::DeleteVmRequest {
        name: VM.into(),
        ..Default::default()
    };
    answer(fleet.clients.vms.delete_vm(delete).await).unwrap();
    let end = async {
        while before.message().await.unwrap().is_some() {}
        while now.message().await.unwrap().is_some() {}
    };
    timeout(PATIENCE, end).await.unwrap();
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_handover_is_not_shown_and_the_watch_does_not_wait_for_the_source() {
    let mut fleet = Fleet::start().await;
    let mut updates = watch(&mut fleet.clients).await;
    let name = fleet.precopy().await;
    fleet
        .b
        .fake
        .phase(&name, Role::Destination, SidePhase::Ready);
    freeze(&fleet.a.fake);
    fleet
        .a
        .fake
        .phase(&name, Role::Source, SidePhase::Relinquished);
    fleet.clients.wait_phase(&name, Phase::Committed).await;
    // Long enough for a watch to look at it again and again; were it too short, the test would only
    // see less.
    tokio::time::sleep(Duration::from_millis(500)).await;
    // The source stays, frozen, with its side.
    fleet.a.fake.keep_sides(true);
    hand_over(&fleet.a.fake, &fleet.b.fake, &name, VM);
    let shown = told(&mut updates, ("hosts/b", State::Running)).await;
    assert!(
        shown.iter().all(|(_, state)| *state == State::Running),
        "{shown:?}"
    );
    assert_eq!(fleet.a.fake.vm(VM).unwrap().state(), State::Relinquished);
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_in_doubt_is_shown() {
    let mut fleet = Fleet::start().await;
    let name = fleet.precopy().await;
    fleet
        .b
        .fake
        .phase(&name, Role::Destination, SidePhase::Ready);
    fleet.clients.wait_phase(&name, Phase::Switchover).await;
    // After its restart the server hears of the VM from the destination alone; what it knows of the
    // source is old.
    let mut fleet = fleet.restart_server().await;
    let (a, a_at) = fleet.a.stop().await;
    fleet.b.report_to(fleet.server.address()).await;
    fleet.clients.wait_phase(&name, Phase::InDoubt).await;
    let mut updates = watch(&mut fleet.clients).await;
    // The source's host may still have it, and only that host can say: this is shown as old.
    let first = updates.message().await.unwrap().unwrap();
    assert_eq!((first.host.as_str(), first.stale), ("hosts/a", true));
    assert_eq!(first.migration, name);

    // Back with its journal, it goes on as if nothing had been.
    fleet.a = Agent::serve_at(a, a_at).await;
    fleet.a.report_to(fleet.server.address()).await;
    fleet
        .a
        .fake
        .phase(&name, Role::Source, SidePhase::Relinquished);
    freeze(&fleet.a.fake);
    until("the destination is told", async || {
        fleet.b.fake.vm(VM).unwrap().state() == State::Running
    })
    .await;
    // Until the server has asked its source, a VM in doubt is shown as it lies there.
    told(&mut updates, ("hosts/b", State::Running)).await;
    fleet.stop().await;
}
