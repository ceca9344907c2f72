//! Sides whose answers are no messages that the server can take: an answer, never a silence.

use slat_proto::{
    ApiError, Reason,
    codec::MAX_MESSAGE,
    v1::{
        self, MigrationPhase as Phase, TransferPhase as SidePhase, TransferRole as Role, VmLocation,
    },
};

use super::{Fleet, VM, support::hand_over};

/// The source's histories grow beyond what one message can hold.
fn swell(fleet: &Fleet, name: &str) {
    fleet.a.fake.set(name, Role::Source, |side| {
        side.progress = Some(v1::MigrationProgress {
            decisions: vec![v1::MigrationDecision {
                cause: "x".repeat(MAX_MESSAGE),
                ..Default::default()
            }],
            ..Default::default()
        });
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn a_side_too_large_for_a_message_can_be_cancelled_and_its_vm_moves_again() {
    let mut fleet = Fleet::start().await;
    let name = fleet.precopy().await;
    swell(&fleet, &name);
    fleet.clients.cancel(&name).await.unwrap();
    let done = fleet.clients.wait_phase(&name, Phase::Cancelled).await;
    assert_eq!(done.vm_location(), VmLocation::Source);
    fleet.a.fake.wait_call("release TRANSFER_ROLE_SOURCE").await;
    fleet.precopy().await;
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_side_too_large_for_a_message_is_seen_to_complete() {
    let mut fleet = Fleet::start().await;
    let name = fleet.precopy().await;
    swell(&fleet, &name);
    fleet
        .b
        .fake
        .phase(&name, Role::Destination, SidePhase::Ready);
    fleet
        .a
        .fake
        .phase(&name, Role::Source, SidePhase::Relinquished);
    hand_over(&fleet.a.fake, &fleet.b.fake, &name, VM);
    fleet.clients.wait_phase(&name, Phase::Completed).await;
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_is_no_message_ends_the_migration_with_that_reason() {
    for reason in [Reason::MessageTooLarge, Reason::MessageUndecodable] {
        let mut fleet = Fleet::start().await;
        let error = ApiError::new(reason, "so the client says").with("limit_bytes", MAX_MESSAGE);
        fleet.a.fake.refuse_describe(error.into());
        let name = fleet.clients.migrate(VM, "hosts/b").await.unwrap().name;
        let failed = fleet.clients.wait_phase(&name, Phase::Failed).await;
        let error = failed.error.unwrap();
        assert_eq!(error.reason, reason.as_str());
        assert_eq!(error.side, "source");
        assert_eq!(failed.vm_location, i32::from(VmLocation::Source));
        fleet.stop().await;
    }
}
