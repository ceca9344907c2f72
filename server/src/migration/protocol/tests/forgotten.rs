//! A host is deleted by order while a migration has a side there.

use slat_proto::v1::{MigrationPhase as Phase, TransferPhase as SidePhase, VmLocation as Location};

use super::{
    super::{Action, Answer, Cause, Durable, Input, MigrationProtocol, Side},
    Rig, side,
};

const DESTINATION: Input = Input::HostForgotten(Side::Destination);
const SOURCE: Input = Input::HostForgotten(Side::Source);

const fn cause(side: Side, kept: bool) -> Option<Cause> {
    Some(Cause::HostForgotten { side, kept })
}

#[test]
fn before_anything_was_begun_it_ends_at_once() {
    for (host, location) in [
        (Side::Source, Location::Lost),
        (Side::Destination, Location::Source),
    ] {
        let mut rig = Rig::fresh();
        rig.step(Input::HostForgotten(host));
        assert_eq!(rig.outcome(), (Phase::Failed, location, cause(host, false)));
        assert!(rig.protocol.finished());
    }
}

#[test]
fn a_source_whose_destination_is_deleted_is_ended_and_keeps_its_vm() {
    let mut rig = Rig::precopy();
    assert_eq!(rig.step(DESTINATION), [Action::FailSource]);
    assert!(rig.protocol.is_forgotten(Side::Destination));
    rig.answer(Action::FailSource, side(SidePhase::Failed));
    let failed = (Phase::Failed, Location::Source, Some(Cause::SourceFailed));
    assert_eq!(rig.outcome(), failed);
    rig.answer(Action::ReleaseSource, Answer::Done);
    assert!(
        rig.protocol.finished(),
        "nobody is asked at the deleted host"
    );
}

#[test]
fn after_the_commit_the_frozen_copy_of_a_deleted_destination_is_kept() {
    let mut rig = Rig::precopy();
    rig.source(SidePhase::Switchover);
    rig.source(SidePhase::Relinquished);
    assert_eq!(rig.step(DESTINATION), [Action::AskSourceCopy]);
    rig.answer(Action::AskSourceCopy, Answer::Copy { gone: false });
    let kept = cause(Side::Destination, true);
    assert_eq!(rig.outcome(), (Phase::Failed, Location::Unknown, kept));
    assert!(rig.protocol.keeps_source() && !rig.protocol.finished());
    assert_eq!(rig.step(Input::DeleteRequested), [Action::ReleaseSource]);
}

#[test]
fn a_vm_that_ran_at_a_deleted_destination_is_lost_with_it() {
    let mut rig = Rig::precopy();
    rig.source(SidePhase::Relinquished);
    rig.destination(SidePhase::Completed);
    rig.step(DESTINATION);
    rig.source(SidePhase::Completed);
    let lost = cause(Side::Destination, false);
    assert_eq!(rig.outcome(), (Phase::Completed, Location::Lost, lost));
    rig.answer(Action::ReleaseSource, Answer::Done);
    assert!(rig.protocol.finished());
}

#[test]
fn the_destination_of_a_deleted_source_is_ended_and_its_vm_is_lost() {
    let mut rig = Rig::precopy();
    assert_eq!(rig.step(SOURCE), [Action::CancelDestination]);
    assert_eq!(rig.protocol.phase(), Phase::PrecopyActive);
    rig.answer(Action::CancelDestination, side(SidePhase::Cancelled));
    let lost = cause(Side::Source, false);
    assert_eq!(rig.outcome(), (Phase::Failed, Location::Lost, lost));
    rig.answer(Action::ReleaseDestination, Answer::Done);
    assert!(rig.protocol.finished());
}

#[test]
fn a_destination_that_waits_for_the_commit_of_a_deleted_source_is_left_to_an_operator() {
    let mut rig = Rig::precopy();
    rig.source(SidePhase::Switchover);
    rig.destination(SidePhase::Ready);
    assert_eq!(rig.step(SOURCE), []);
    let doubt = cause(Side::Source, false);
    assert_eq!(rig.outcome(), (Phase::InDoubt, Location::PausedBoth, doubt));
    for _ in 0..3 {
        assert_eq!(rig.step(Input::Retry), [], "nothing here decides it");
    }
    let mut adopted = MigrationProtocol::new(rig.protocol.stored());
    assert!(
        adopted.is_forgotten(Side::Source),
        "a restart forgets it not"
    );
    adopted.step(Input::Retry);
    for protocol in [&mut rig.protocol, &mut adopted] {
        let report = super::Report::new(SidePhase::Completed);
        protocol.step(Input::Heard(Side::Destination, report));
        protocol.step(Input::Stored);
        assert!(matches!(
            protocol.phase(),
            Phase::Committed | Phase::Completed
        ));
        protocol.step(Input::FiguresOverdue);
        protocol.step(Input::Stored);
        let end = (protocol.phase(), protocol.durable().location);
        assert_eq!(end, (Phase::Completed, Location::Destination));
    }
}

#[test]
fn both_deleted_is_the_end_whatever_was_under_way() {
    for phase in [SidePhase::Precopy, SidePhase::Switchover] {
        let mut rig = Rig::precopy();
        rig.source(phase);
        rig.destination(SidePhase::Ready);
        rig.step(SOURCE);
        rig.step(DESTINATION);
        assert_eq!(rig.protocol.phase(), Phase::Failed);
        assert_eq!(rig.protocol.durable().location, Location::Lost);
        assert!(rig.protocol.finished());
    }
}

#[test]
fn after_the_end_a_deleted_host_has_nothing_to_release() {
    let mut protocol = MigrationProtocol::new(&Durable {
        source_released: true,
        switched: true,
        committed: true,
        location: Location::Destination,
        ..super::stored(Phase::Completed)
    });
    assert!(
        protocol
            .step(Input::Retry)
            .contains(&Action::ReleaseDestination)
    );
    protocol.step(DESTINATION);
    for call in [Action::ReleaseDestination, Action::FollowDestination] {
        protocol.step(Input::Answered(call, Answer::Silent));
    }
    protocol.step(Input::Stored);
    assert!(protocol.finished());
}
