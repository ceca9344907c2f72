//! A host is deleted by order while migrations have sides there: they end, or say what is left.

use slat_proto::{
    Reason,
    v1::{
        self, MigrationPhase as Phase, TransferPhase as SidePhase, TransferRole as Role, VmLocation,
    },
};

use super::{
    Fleet, VM, reason,
    support::{Agent, Clients, Fake, answer, until},
};

async fn silent(clients: &Clients, host: &str) {
    until("the host is silent", async || {
        let request = v1::GetHostRequest { name: host.into() };
        let host = answer(clients.hosts.clone().get_host(request).await).unwrap();
        host.state() != v1::host::State::Ready
    })
    .await;
}

async fn delete(
    clients: &Clients,
    host: &str,
    give_up_vms: bool,
) -> Result<(), slat_proto::ApiError> {
    let request = v1::DeleteHostRequest {
        name: host.into(),
        give_up_vms,
    };
    answer(clients.hosts.clone().delete_host(request).await).map(drop)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_migration_to_a_deleted_host_ends_and_its_vm_may_go_elsewhere() {
    let mut fleet = Fleet::start().await;
    let name = fleet.precopy().await;
    fleet.b.stop().await;
    silent(&fleet.clients, "hosts/b").await;
    let refused = delete(&fleet.clients, "hosts/b", false).await.unwrap_err();
    assert_eq!(refused.reason, Reason::HostInUse);
    assert_eq!(refused.metadata["migrations"], name);
    assert_eq!(
        fleet.clients.migration(&name).await.phase(),
        Phase::PrecopyActive
    );
    delete(&fleet.clients, "hosts/b", true).await.unwrap();
    let failed = fleet.clients.wait_phase(&name, Phase::Failed).await;
    assert_eq!(reason(&failed), "HOST_DELETED");
    assert_eq!(failed.vm_location(), VmLocation::Source);
    let message = &failed.error.as_ref().unwrap().message;
    assert!(
        message.contains("hosts/b was deleted by order"),
        "{message}"
    );
    fleet.a.fake.wait_call("release TRANSFER_ROLE_SOURCE").await;

    let c = Agent::start(Fake::new("hosts/c"), fleet.server.address()).await;
    let next = fleet.clients.migrate(VM, "hosts/c").await.unwrap().name;
    fleet.a.fake.wait_call(&format!("start {next}")).await;
    fleet.server.stop().await;
    fleet.a.stop().await;
    c.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_deleted_source_was_sending_is_lost_and_its_destination_ended() {
    let mut fleet = Fleet::start().await;
    let name = fleet.precopy().await;
    fleet.a.stop().await;
    silent(&fleet.clients, "hosts/a").await;
    delete(&fleet.clients, "hosts/a", true).await.unwrap();
    let failed = fleet.clients.wait_phase(&name, Phase::Failed).await;
    assert_eq!(reason(&failed), "HOST_DELETED");
    assert_eq!(failed.vm_location(), VmLocation::Lost);
    fleet.b.fake.wait_call("cancel").await;
    fleet
        .b
        .fake
        .wait_call("release TRANSFER_ROLE_DESTINATION")
        .await;
    fleet.server.stop().await;
    fleet.b.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_destination_in_doubt_outlives_the_order_and_a_restart_of_the_server() {
    let mut fleet = Fleet::start().await;
    let name = fleet.precopy().await;
    fleet
        .b
        .fake
        .phase(&name, Role::Destination, SidePhase::Ready);
    fleet.clients.wait_phase(&name, Phase::Switchover).await;
    fleet.a.stop().await;
    silent(&fleet.clients, "hosts/a").await;
    delete(&fleet.clients, "hosts/a", true).await.unwrap();
    let doubt = fleet.clients.wait_phase(&name, Phase::InDoubt).await;
    assert_eq!(doubt.vm_location(), VmLocation::PausedBoth);
    let of_order = fleet
        .clients
        .wait(&name, |migration| reason(migration) == "HOST_DELETED")
        .await;
    let advice = &of_order.error.as_ref().unwrap().advice;
    assert!(advice.contains("--host b --give-up"), "{advice}");

    fleet.server.stop().await;
    fleet.server = super::server(fleet.state.path()).await;
    fleet.clients = Clients::new(fleet.server.address());
    fleet.b.report_to(fleet.server.address()).await;
    assert_eq!(fleet.clients.migration(&name).await.phase(), Phase::InDoubt);
    // As after an adoption.
    fleet
        .b
        .fake
        .phase(&name, Role::Destination, SidePhase::Completed);
    let done = fleet.clients.wait_phase(&name, Phase::Completed).await;
    assert_eq!(done.vm_location(), VmLocation::Destination);
    let calls = fleet.b.fake.calls();
    assert!(
        !calls.iter().any(|call| call.starts_with("resolve")),
        "nobody decided for the source: {calls:?}"
    );
    fleet.server.stop().await;
    fleet.b.stop().await;
}
