//! A migration in doubt whose source never comes back: what it left is shown, and ended by order.

use slat_proto::{
    Reason,
    v1::{
        self, MigrationPhase as Phase, TransferPhase as SidePhase, TransferRole as Role,
        VmLocation, leftover::Kind,
    },
};

use super::{
    Fleet,
    support::{answer, until},
};

#[tokio::test(flavor = "multi_thread")]
async fn the_destination_of_a_migration_in_doubt_can_be_adopted_by_order() {
    let mut fleet = Fleet::start().await;
    let name = fleet.precopy().await;
    fleet.b.fake.put_leftover(v1::Leftover {
        uid: "uid-vms/web".into(),
        vm: super::VM.into(),
        kind: Kind::ReadyDestination.into(),
        migration: name.clone(),
        epoch: 1,
        adoptable: true,
        ..Default::default()
    });
    let list = v1::ListLeftoversRequest::default();
    let adopt = |give_up| v1::AdoptLeftoverRequest {
        host: "hosts/b".into(),
        uid: "uid-vms/web".into(),
        give_up,
        epoch: 0,
    };
    // While the migration goes on it is the migration's.
    let mut hosts = fleet.clients.hosts.clone();
    fleet.b.report_to(fleet.server.address()).await;
    let shown = answer(hosts.list_leftovers(list.clone()).await).unwrap();
    assert_eq!(shown.leftovers, []);
    let refused = answer(hosts.adopt_leftover(adopt(true)).await).unwrap_err();
    assert_eq!(refused.reason, Reason::MigrationInProgress);
    assert_eq!(refused.metadata["migration"], name);

    fleet
        .b
        .fake
        .phase(&name, Role::Destination, SidePhase::Ready);
    fleet.clients.wait_phase(&name, Phase::Switchover).await;
    let mut fleet = fleet.restart_server().await;
    fleet.a.stop().await;
    fleet.b.report_to(fleet.server.address()).await;
    fleet.clients.wait_phase(&name, Phase::InDoubt).await;
    let mut hosts = fleet.clients.hosts.clone();
    until("it is shown", async || {
        let mut hosts = fleet.clients.hosts.clone();
        let shown = hosts.list_leftovers(v1::ListLeftoversRequest::default());
        answer(shown.await).unwrap().leftovers.len() == 1
    })
    .await;
    let refused = answer(hosts.adopt_leftover(adopt(false)).await).unwrap_err();
    assert_eq!(refused.reason, Reason::GiveUpRequired);
    assert!(refused.metadata["gives_up"].contains("hosts/a"));
    let adopted = answer(hosts.adopt_leftover(adopt(true)).await).unwrap();
    assert_eq!(adopted.vm.unwrap().epoch, 2);
    // As its agent does when it is told to commit.
    let destination = &fleet.b.fake;
    destination.phase(&name, Role::Destination, SidePhase::Completed);
    let done = fleet.clients.wait_phase(&name, Phase::Completed).await;
    assert_eq!(done.vm_location(), VmLocation::Destination);
    assert_eq!(fleet.clients.vm(super::VM).await.unwrap().host, "hosts/b");
    fleet.server.stop().await;
    fleet.b.stop().await;
}
