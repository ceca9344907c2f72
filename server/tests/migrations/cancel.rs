//! CancelMigration before and after the point of no return.

use slat_proto::{
    Reason,
    v1::{MigrationPhase as Phase, TransferPhase as SidePhase, TransferRole as Role, VmLocation},
};

use super::{Fleet, VM, support::hand_over};

#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_before_the_commit_keeps_the_vm_at_its_source() {
    let mut fleet = Fleet::start().await;
    let name = fleet.precopy().await;
    fleet.clients.cancel(&name).await.unwrap();
    let done = fleet.clients.wait_phase(&name, Phase::Cancelled).await;
    assert_eq!(done.vm_location(), VmLocation::Source);
    assert!(done.cancel_requested);
    fleet
        .b
        .fake
        .wait_call("release TRANSFER_ROLE_DESTINATION")
        .await;
    assert!(fleet.b.fake.vm(VM).is_none());
    // Idempotent, and nothing is left that keeps the VM from moving.
    assert_eq!(
        fleet.clients.cancel(&name).await.unwrap().phase(),
        Phase::Cancelled
    );
    fleet.precopy().await;
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_after_the_commit_is_refused_and_the_migration_completes() {
    let mut fleet = Fleet::start().await;
    let name = fleet.precopy().await;
    fleet
        .b
        .fake
        .phase(&name, Role::Destination, SidePhase::Ready);
    fleet
        .a
        .fake
        .phase(&name, Role::Source, SidePhase::Relinquished);
    // Whether or not the server has heard of it yet, the source's word counts.
    let error = fleet.clients.cancel(&name).await.unwrap_err();
    assert_eq!(error.reason, Reason::PastPointOfNoReturn);
    assert_eq!(error.metadata["vm_location"], "DESTINATION");
    hand_over(&fleet.a.fake, &fleet.b.fake, &name, VM);
    fleet.clients.wait_phase(&name, Phase::Completed).await;
    let error = fleet.clients.cancel(&name).await.unwrap_err();
    assert_eq!(error.reason, Reason::PastPointOfNoReturn);
    fleet.stop().await;
}
