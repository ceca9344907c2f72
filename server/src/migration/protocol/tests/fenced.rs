//! A host is fenced while a migration has a side there.

use slat_proto::v1::{MigrationPhase as Phase, TransferPhase as SidePhase, VmLocation as Location};

use super::{
    super::{Action, Answer, Cause, Input, MigrationProtocol, Report, Side},
    Rig, side,
};

const DESTINATION: Input = Input::HostFenced(Side::Destination);
const SOURCE: Input = Input::HostFenced(Side::Source);

const fn cause(side: Side, kept: bool) -> Option<Cause> {
    Some(Cause::HostFenced { side, kept })
}

/// The source died before the commit, as its agent says when the host is back.
fn died() -> Input {
    let report = Report {
        vm_lost: true,
        ..Report::new(SidePhase::Failed)
    };
    Input::Heard(Side::Source, report)
}

/// A destination that waits for a commit that may have happened.
fn doubt() -> Rig {
    let mut rig = Rig::precopy();
    rig.source(SidePhase::Switchover);
    rig.destination(SidePhase::Ready);
    rig.step(Input::Answered(Action::FollowSource, Answer::Silent));
    assert_eq!(rig.protocol.phase(), Phase::InDoubt);
    rig
}

#[test]
fn before_anything_was_begun_it_ends_at_once() {
    for (host, location) in [
        (Side::Source, Location::Lost),
        (Side::Destination, Location::Source),
    ] {
        let mut rig = Rig::fresh();
        rig.step(Input::HostFenced(host));
        assert_eq!(rig.outcome(), (Phase::Failed, location, cause(host, false)));
        assert!(rig.protocol.finished());
    }
}

#[test]
fn a_doubt_is_decided_for_the_destination_once_its_source_is_fenced() {
    let mut rig = doubt();
    for _ in 0..3 {
        assert!(!rig.step(Input::Retry).contains(&Action::ResolveCommit));
    }
    assert_eq!(rig.step(SOURCE), [Action::ResolveCommit]);
    let doubt = (
        Phase::InDoubt,
        Location::Unknown,
        cause(Side::Source, false),
    );
    assert_eq!(rig.outcome(), doubt, "until the destination has it");
    rig.answer(Action::ResolveCommit, side(SidePhase::Completed));
    let done = (Phase::Completed, Location::Destination, None);
    assert_eq!(
        rig.outcome(),
        done,
        "nobody waits for the figures of the fenced"
    );
}

#[test]
fn the_fence_is_on_disk_before_anything_is_decided_by_it() {
    let mut rig = doubt();
    assert_eq!(rig.protocol.step(SOURCE), [Action::Persist]);
    assert!(rig.protocol.durable().source_fenced);
    // A crash before that: who starts again finds the fence with the host, and feeds it again.
    let mut again = Rig::new(rig.protocol.stored());
    again.step(SOURCE);
    again.step(Input::Retry);
    assert_eq!(again.destination(SidePhase::Ready), [Action::ResolveCommit]);
    // And after it.
    assert_eq!(rig.protocol.step(Input::Stored), [Action::ResolveCommit]);
    let mut later = Rig::new(rig.protocol.stored());
    later.step(Input::Retry);
    assert_eq!(later.destination(SidePhase::Ready), [Action::ResolveCommit]);
}

#[test]
fn what_a_fenced_source_says_later_does_not_end_what_its_destination_may_have() {
    let mut rig = doubt();
    rig.step(SOURCE);
    rig.answer(Action::ResolveCommit, Answer::Silent);
    for word in [
        died(),
        Input::Heard(Side::Source, Report::new(SidePhase::Precopy)),
    ] {
        rig.step(word);
        assert_eq!(rig.protocol.phase(), Phase::InDoubt);
    }
    assert!(!rig.asked.contains(&Action::ResolveAbort));
    rig.destination(SidePhase::Completed);
    let done = (Phase::Completed, Location::Destination, None);
    assert_eq!(rig.outcome(), done);
}

#[test]
fn a_destination_that_had_given_up_leaves_nothing_of_the_vm() {
    let mut rig = doubt();
    rig.step(SOURCE);
    rig.answer(Action::ResolveCommit, side(SidePhase::Failed));
    let lost = (Phase::Failed, Location::Lost, cause(Side::Source, false));
    assert_eq!(rig.outcome(), lost);
}

#[test]
fn the_destination_of_a_fenced_source_that_was_not_ready_is_ended() {
    let mut rig = Rig::precopy();
    rig.destination(SidePhase::Precopy);
    assert_eq!(rig.step(SOURCE), [Action::CancelDestination]);
    assert_eq!(rig.protocol.phase(), Phase::PrecopyActive);
    rig.answer(Action::CancelDestination, side(SidePhase::Cancelled));
    let lost = (Phase::Failed, Location::Lost, cause(Side::Source, false));
    assert_eq!(rig.outcome(), lost);
    rig.answer(Action::ReleaseDestination, Answer::Done);
    rig.answer(Action::FollowSource, Answer::Silent);
    assert!(
        rig.protocol.is_in_flight(Action::ReleaseSource),
        "its agent may come back with a record"
    );
    rig.answer(Action::ReleaseSource, Answer::Done);
    assert!(rig.protocol.finished());
}

#[test]
fn one_that_became_ready_before_it_could_be_ended_is_told_to_commit() {
    let mut rig = Rig::precopy();
    assert_eq!(rig.step(SOURCE), [Action::CancelDestination]);
    assert_eq!(
        rig.answer(Action::CancelDestination, side(SidePhase::Ready)),
        [Action::ResolveCommit]
    );
    rig.answer(Action::ResolveCommit, side(SidePhase::Completed));
    assert_eq!(rig.protocol.phase(), Phase::Completed);
}

#[test]
fn a_cancel_changes_nothing_of_that() {
    let mut rig = doubt();
    rig.step(Input::CancelRequested);
    assert_eq!(rig.step(SOURCE), [Action::ResolveCommit]);
    let mut rig = Rig::precopy();
    rig.step(SOURCE);
    rig.step(Input::CancelRequested);
    rig.answer(Action::CancelDestination, side(SidePhase::Cancelled));
    let lost = (Phase::Failed, Location::Lost, cause(Side::Source, false));
    assert_eq!(
        rig.outcome(),
        lost,
        "CANCELLED would say that the VM runs on"
    );
}

#[test]
fn a_preparation_under_way_is_waited_for() {
    let mut rig = Rig::fresh();
    rig.step(Input::Admitted);
    rig.answer(Action::Describe, Answer::Done);
    assert_eq!(rig.step(SOURCE), []);
    let asked = rig.answer(Action::Prepare, side(SidePhase::Preparing));
    assert_eq!(asked, [Action::CancelDestination], "and no start");
}

#[test]
fn a_source_whose_destination_is_fenced_is_ended_and_keeps_its_vm() {
    let mut rig = Rig::precopy();
    assert_eq!(rig.step(DESTINATION), [Action::FailSource]);
    rig.answer(Action::FailSource, side(SidePhase::Failed));
    let failed = (Phase::Failed, Location::Source, Some(Cause::SourceFailed));
    assert_eq!(rig.outcome(), failed);
    let mut again = MigrationProtocol::new(rig.protocol.stored());
    again.step(Input::Retry);
    assert!(
        again.is_in_flight(Action::CancelDestination),
        "a late call may have made another when it is back"
    );
}

#[test]
fn a_source_that_is_silent_and_whose_destination_is_fenced_stays_in_doubt() {
    let mut rig = doubt();
    rig.step(DESTINATION);
    assert_eq!(rig.protocol.phase(), Phase::InDoubt);
    rig.source(SidePhase::Relinquished);
    rig.answer(Action::AskSourceCopy, Answer::Copy { gone: false });
    let kept = cause(Side::Destination, true);
    assert_eq!(rig.outcome(), (Phase::Failed, Location::Unknown, kept));
    assert!(rig.protocol.keeps_source());
}

#[test]
fn a_vm_that_ran_at_a_fenced_destination_is_lost_with_it() {
    let mut rig = Rig::precopy();
    rig.source(SidePhase::Relinquished);
    rig.destination(SidePhase::Completed);
    rig.step(DESTINATION);
    rig.source(SidePhase::Completed);
    let lost = cause(Side::Destination, false);
    assert_eq!(rig.outcome(), (Phase::Completed, Location::Lost, lost));
}

#[test]
fn after_the_commit_a_fenced_source_has_no_copy_to_give() {
    let mut rig = Rig::precopy();
    rig.source(SidePhase::Relinquished);
    rig.step(SOURCE);
    rig.destination(SidePhase::Failed);
    let lost = (Phase::Failed, Location::Lost, Some(Cause::DestinationDied));
    assert_eq!(rig.outcome(), lost);
}

#[test]
fn both_fenced_is_the_end_whatever_was_under_way() {
    for first in [SOURCE, DESTINATION] {
        let mut rig = doubt();
        rig.step(first);
        rig.step(if first == SOURCE { DESTINATION } else { SOURCE });
        assert_eq!(rig.protocol.phase(), Phase::Failed);
        assert_eq!(rig.protocol.durable().location, Location::Lost);
    }
}
