//! The rules of the protocol: by example here, for any inputs in [`random`].

mod fenced;
mod forgotten;
mod random;
mod world;

use slat_proto::v1::{MigrationPhase as Phase, TransferPhase as SidePhase, VmLocation as Location};

use super::{
    Action, Answer, Cause, Durable, Input, MigrationProtocol, Report, Side, Start, has_ended,
};

const OWNER: Answer = Answer::Absent { owner: true };
const NO_OWNER: Answer = Answer::Absent { owner: false };

/// A protocol whose writes reach the disk at once, and what it asked for since last looked.
#[derive(Clone)]
struct Rig {
    protocol: MigrationProtocol,
    asked: Vec<Action>,
}

impl Rig {
    fn new(durable: &Durable) -> Self {
        Self {
            protocol: MigrationProtocol::new(durable),
            asked: Vec::new(),
        }
    }

    fn fresh() -> Self {
        Self::new(&Durable::pending(false))
    }

    /// One input; what is asked for, without what is followed.
    fn step(&mut self, input: Input) -> Vec<Action> {
        let mut inputs = vec![input];
        let mut asked = Vec::new();
        while let Some(input) = inputs.pop() {
            for action in self.protocol.step(input) {
                match action {
                    Action::Persist => inputs.push(Input::Stored),
                    Action::FollowSource | Action::FollowDestination => {}
                    action => asked.push(action),
                }
            }
        }
        self.asked.extend(&asked);
        asked
    }

    fn answer(&mut self, action: Action, answer: Answer) -> Vec<Action> {
        assert!(
            self.protocol.is_in_flight(action),
            "{action:?} is not in flight"
        );
        self.step(Input::Answered(action, answer))
    }

    fn source(&mut self, phase: SidePhase) -> Vec<Action> {
        self.step(Input::Heard(Side::Source, Report::new(phase)))
    }

    fn destination(&mut self, phase: SidePhase) -> Vec<Action> {
        self.step(Input::Heard(Side::Destination, Report::new(phase)))
    }

    fn outcome(&self) -> (Phase, Location, Option<Cause>) {
        let durable = self.protocol.durable();
        (durable.phase, durable.location, self.protocol.cause())
    }

    /// Up to the call of StartOutgoing, which is in flight.
    fn starting() -> Self {
        let mut rig = Self::fresh();
        assert_eq!(rig.step(Input::Admitted), [Action::Describe]);
        assert_eq!(
            rig.answer(Action::Describe, Answer::Done),
            [Action::Prepare]
        );
        let side = Answer::Side(Report::new(SidePhase::Preparing));
        assert_eq!(rig.answer(Action::Prepare, side), [Action::Start]);
        assert_eq!(rig.protocol.stored().start, Start::Once);
        rig.asked.clear();
        rig
    }

    /// Up to pages that flow.
    fn precopy() -> Self {
        let mut rig = Self::starting();
        rig.answer(Action::Start, side(SidePhase::Preparing));
        rig.source(SidePhase::Precopy);
        rig
    }
}

fn side(phase: SidePhase) -> Answer {
    Answer::Side(Report::new(phase))
}

fn stored(phase: Phase) -> Durable {
    Durable {
        phase,
        start: if phase == Phase::Pending {
            Start::Never
        } else {
            Start::Once
        },
        ..Durable::pending(false)
    }
}

#[test]
fn a_source_that_went_back_to_precopy_is_shown_there_and_its_silence_is_doubt() {
    let mut rig = Rig::precopy();
    rig.source(SidePhase::Switchover);
    assert_eq!(rig.protocol.phase(), Phase::Switchover);
    rig.source(SidePhase::Precopy);
    assert_eq!(rig.protocol.phase(), Phase::PrecopyActive);
    assert!(
        rig.protocol.durable().switched,
        "it may begin another at any moment"
    );
    rig.source(SidePhase::Switchover);
    assert_eq!(rig.protocol.phase(), Phase::Switchover);
    // A late word of the source does not hide that the destination is READY.
    rig.step(Input::Heard(
        Side::Destination,
        Report::new(SidePhase::Ready),
    ));
    rig.source(SidePhase::Precopy);
    assert_eq!(rig.protocol.phase(), Phase::Switchover);
}

#[test]
fn a_migration_that_works() {
    let mut rig = Rig::starting();
    assert_eq!(rig.answer(Action::Start, side(SidePhase::Preparing)), []);
    assert_eq!(rig.source(SidePhase::Precopy), []);
    assert_eq!(rig.protocol.phase(), Phase::PrecopyActive);
    assert_eq!(rig.source(SidePhase::Switchover), []);
    assert_eq!(rig.destination(SidePhase::Ready), []);
    assert_eq!(rig.source(SidePhase::Relinquished), []);
    assert_eq!(rig.protocol.phase(), Phase::Committed);
    assert_eq!(rig.destination(SidePhase::Completed), []);
    assert!(rig.protocol.awaits_figures());
    assert_eq!(
        rig.source(SidePhase::Completed),
        [Action::ReleaseDestination, Action::ReleaseSource]
    );
    assert_eq!(
        rig.outcome(),
        (Phase::Completed, Location::Destination, None)
    );
    rig.answer(Action::ReleaseSource, Answer::Done);
    rig.answer(Action::ReleaseDestination, Answer::Done);
    assert!(rig.protocol.finished());
}

#[test]
fn nothing_is_done_on_a_state_that_is_not_on_disk() {
    let mut protocol = MigrationProtocol::new(&Durable::pending(false));
    assert_eq!(protocol.step(Input::Admitted), [Action::Persist]);
    assert_eq!(protocol.stored().phase, Phase::Pending);
    assert_eq!(protocol.step(Input::Retry), []);
    // While the disk is slow the cancel is taken in, and the write that began is followed by
    // another.
    assert_eq!(protocol.step(Input::CancelRequested), []);
    assert_eq!(protocol.phase(), Phase::Cancelled);
    assert_eq!(protocol.step(Input::Retry), []);
    assert_eq!(protocol.step(Input::Stored), [Action::Persist]);
    assert_eq!(protocol.stored().phase, Phase::Preparing);
    assert!(!protocol.finished());
    assert_eq!(protocol.step(Input::Stored), []);
    assert_eq!(protocol.stored().phase, Phase::Cancelled);
    assert!(protocol.finished());
}

#[test]
fn a_prepare_that_fails_leaves_the_vm_where_it_is() {
    for answer in [Answer::Refused { lost: false }, Answer::Silent] {
        let mut rig = Rig::fresh();
        rig.step(Input::Admitted);
        rig.answer(Action::Describe, Answer::Done);
        let asked = rig.answer(Action::Prepare, answer);
        assert_eq!(asked, [Action::CancelDestination]);
        let cause = Cause::Refused(Side::Destination);
        assert_eq!(
            rig.outcome(),
            (Phase::Failed, Location::Source, Some(cause))
        );
        rig.answer(Action::CancelDestination, NO_OWNER);
        rig.answer(Action::ReleaseDestination, Answer::Done);
        assert!(rig.protocol.finished());
    }
}

#[test]
fn a_description_that_fails_leaves_nothing_to_release() {
    let mut rig = Rig::fresh();
    rig.step(Input::Admitted);
    assert_eq!(rig.answer(Action::Describe, Answer::Silent), []);
    let cause = Cause::Refused(Side::Source);
    assert_eq!(
        rig.outcome(),
        (Phase::Failed, Location::Source, Some(cause))
    );
    assert!(rig.protocol.finished());
}

#[test]
fn a_vm_that_is_lost_before_its_migration_begins_is_not_said_to_be_at_the_source() {
    let lost = Answer::Refused { lost: true };
    let cause = Cause::Refused(Side::Source);
    let mut rig = Rig::fresh();
    rig.step(Input::Admitted);
    rig.answer(Action::Describe, lost);
    assert_eq!(rig.outcome(), (Phase::Failed, Location::Lost, Some(cause)));
    let mut rig = Rig::starting();
    rig.answer(Action::Start, lost);
    assert_eq!(rig.outcome(), (Phase::Failed, Location::Lost, Some(cause)));
}

#[test]
fn a_relinquished_source_resolves_a_ready_destination_only_when_it_hangs() {
    let mut rig = Rig::new(&stored(Phase::Switchover));
    rig.destination(SidePhase::Ready);
    rig.source(SidePhase::Relinquished);
    assert!(!rig.asked.contains(&Action::ResolveCommit));
    assert_eq!(rig.step(Input::Retry), [Action::ResolveCommit]);
}

#[test]
fn silence_after_the_switchover_is_doubt_and_the_journal_ends_it() {
    let mut rig = Rig::new(&stored(Phase::PrecopyActive));
    rig.step(Input::Retry);
    rig.source(SidePhase::Switchover);
    rig.destination(SidePhase::Ready);
    rig.step(Input::Answered(Action::FollowSource, Answer::Silent));
    let doubt = (Phase::InDoubt, Location::PausedBoth, Some(Cause::Doubt));
    assert_eq!(rig.outcome(), doubt);
    for _ in 0..50 {
        assert_eq!(rig.step(Input::Retry), []);
    }
    let mut failed = rig.clone();
    assert!(
        failed
            .source(SidePhase::Failed)
            .contains(&Action::ResolveAbort)
    );
    assert_eq!(failed.protocol.phase(), Phase::Failed);
    rig.source(SidePhase::Relinquished);
    assert_eq!(
        rig.outcome(),
        (Phase::Committed, Location::Destination, None)
    );
}

#[test]
fn silence_before_the_switchover_is_just_waiting() {
    let mut rig = Rig::new(&stored(Phase::PrecopyActive));
    rig.step(Input::Retry);
    rig.step(Input::Answered(Action::FollowSource, Answer::Silent));
    rig.step(Input::Answered(Action::FollowDestination, Answer::Silent));
    assert_eq!(rig.protocol.phase(), Phase::PrecopyActive);
}

#[test]
fn a_process_that_died_at_the_source_loses_the_vm() {
    let mut rig = Rig::new(&stored(Phase::PrecopyActive));
    let report = Report {
        vm_lost: true,
        ..Report::new(SidePhase::Failed)
    };
    rig.step(Input::Heard(Side::Source, report));
    let lost = (Phase::Failed, Location::Lost, Some(Cause::SourceDied));
    assert_eq!(rig.outcome(), lost);
}

fn died_after_the_commit() -> Rig {
    let mut rig = Rig::new(&Durable {
        committed: true,
        ..stored(Phase::Committed)
    });
    rig.source(SidePhase::Relinquished);
    rig.destination(SidePhase::Failed);
    rig
}

#[test]
fn the_frozen_copy_outlives_a_destination_that_died_after_the_commit() {
    let mut rig = died_after_the_commit();
    assert!(
        rig.asked.contains(&Action::AskSourceCopy),
        "{:?}",
        rig.asked
    );
    assert!(!has_ended(rig.protocol.phase()));
    rig.answer(Action::AskSourceCopy, Answer::Copy { gone: false });
    let died = (
        Phase::Failed,
        Location::Unknown,
        Some(Cause::DestinationDied),
    );
    assert_eq!(rig.outcome(), died);

    // Nothing that happens by itself releases the source, not even a new life of the server.
    let mut rig = Rig::new(rig.protocol.stored());
    rig.step(Input::Retry);
    rig.step(Input::Answered(Action::FollowSource, Answer::Silent));
    rig.source(SidePhase::Relinquished);
    rig.destination(SidePhase::Failed);
    rig.answer(Action::ReleaseDestination, Answer::Done);
    rig.step(Input::Retry);
    assert!(
        !rig.asked.contains(&Action::ReleaseSource),
        "{:?}",
        rig.asked
    );
    assert!(rig.protocol.keeps_source() && !rig.protocol.finished());

    // The user's wish does, and goes on doing so until it worked.
    assert_eq!(rig.step(Input::DeleteRequested), [Action::ReleaseSource]);
    rig.answer(Action::ReleaseSource, Answer::Silent);
    assert_eq!(rig.step(Input::Retry), [Action::ReleaseSource]);
    rig.answer(Action::ReleaseSource, Answer::Done);
    assert!(rig.protocol.finished() && !rig.protocol.keeps_source());
}

#[test]
fn a_frozen_copy_is_not_deleted_after_its_delete_was_refused() {
    let mut rig = died_after_the_commit();
    rig.answer(Action::AskSourceCopy, Answer::Copy { gone: false });
    rig.answer(Action::ReleaseDestination, Answer::Done);
    assert_eq!(rig.step(Input::DeleteRequested), [Action::ReleaseSource]);
    rig.answer(Action::ReleaseSource, Answer::Silent);
    rig.step(Input::DeleteWithdrawn);
    let again = rig.step(Input::Retry);
    assert!(!again.contains(&Action::ReleaseSource), "{again:?}");
    assert!(rig.protocol.keeps_source());
    assert_eq!(rig.step(Input::DeleteRequested), [Action::ReleaseSource]);
}

#[test]
fn a_frozen_copy_that_an_operator_took_back_ends_like_any_side() {
    let mut rig = died_after_the_commit();
    rig.answer(Action::AskSourceCopy, Answer::Copy { gone: false });
    assert!(rig.protocol.keeps_source());
    assert!(!rig.asked.contains(&Action::ReleaseSource));
    rig.source(SidePhase::Cancelled);
    assert!(
        rig.asked.contains(&Action::ReleaseSource),
        "a later migration of the VM waits for it: {:?}",
        rig.asked
    );
    rig.answer(Action::ReleaseSource, Answer::Done);
    rig.answer(Action::ReleaseDestination, Answer::Done);
    assert!(rig.protocol.finished() && !rig.protocol.keeps_source());
    assert_eq!(rig.protocol.phase(), Phase::Failed, "what was said stands");
}

/// The destination owned the VM and died, and its agent says so.
fn owner_died(source: SidePhase) -> Rig {
    let mut rig = Rig::new(&Durable {
        committed: true,
        ..stored(Phase::Committed)
    });
    rig.source(source);
    let report = Report {
        vm_lost: true,
        gone: true,
        ..Report::new(SidePhase::Completed)
    };
    rig.step(Input::Heard(Side::Destination, report));
    rig
}

#[test]
fn a_copy_outlives_an_owner_that_died_before_the_source_heard_of_it() {
    let mut rig = owner_died(SidePhase::Relinquished);
    assert!(!has_ended(rig.protocol.phase()) && !rig.protocol.awaits_figures());
    rig.answer(Action::AskSourceCopy, Answer::Copy { gone: false });
    let kept = Cause::OwnerDied { kept: true };
    let lost = (Phase::Completed, Location::Lost, Some(kept));
    assert_eq!(rig.outcome(), lost);
    rig.step(Input::Retry);
    assert!(rig.protocol.keeps_source() && !rig.asked.contains(&Action::ReleaseSource));

    // A new life of the server asks again, and keeps it too.
    let mut again = Rig::new(rig.protocol.stored());
    again.step(Input::Retry);
    again.answer(Action::AskSourceCopy, Answer::Copy { gone: false });
    again.source(SidePhase::Relinquished);
    again.step(Input::Retry);
    assert!(again.protocol.keeps_source() && !again.asked.contains(&Action::ReleaseSource));
    let mut gone = Rig::new(rig.protocol.stored());
    gone.step(Input::Retry);
    let asked = gone.answer(Action::AskSourceCopy, Answer::Copy { gone: true });
    assert_eq!(asked, [Action::ReleaseSource]);

    // A user's wish ends it, and so does an operator who took the VM back.
    let mut adopted = rig.clone();
    assert_eq!(
        adopted.source(SidePhase::Cancelled),
        [Action::ReleaseSource]
    );
    assert_eq!(rig.step(Input::DeleteRequested), [Action::ReleaseSource]);
}

/// The destination was heard to run the VM, died at once, and its watch was over: nothing but a
/// question tells why the source does not end.
#[test]
fn an_owner_that_dies_after_it_was_heard_of_is_asked_for_again_while_the_source_does_not_end() {
    let mut rig = Rig::precopy();
    rig.source(SidePhase::Switchover);
    rig.source(SidePhase::Relinquished);
    rig.destination(SidePhase::Completed);
    rig.step(Input::Answered(Action::FollowDestination, Answer::Nothing));
    assert!(!rig.protocol.is_in_flight(Action::FollowDestination));
    // Once for each retry: the answer of a side that has ended comes at once.
    rig.step(Input::Retry);
    assert!(rig.protocol.is_in_flight(Action::FollowDestination));
    rig.destination(SidePhase::Completed);
    rig.step(Input::Answered(Action::FollowDestination, Answer::Nothing));
    assert!(!rig.protocol.is_in_flight(Action::FollowDestination));
    rig.step(Input::Retry);
    let report = Report {
        vm_lost: true,
        gone: true,
        ..Report::new(SidePhase::Completed)
    };
    rig.step(Input::Heard(Side::Destination, report));
    rig.step(Input::Answered(Action::FollowDestination, Answer::Nothing));
    rig.answer(Action::AskSourceCopy, Answer::Copy { gone: false });
    let kept = Cause::OwnerDied { kept: true };
    assert_eq!(
        rig.outcome(),
        (Phase::Completed, Location::Lost, Some(kept))
    );
}

#[test]
fn an_owner_that_died_when_the_source_knew_that_it_ran_leaves_nothing_to_keep() {
    let mut rig = owner_died(SidePhase::Completed);
    let lost = Cause::OwnerDied { kept: false };
    assert_eq!(
        rig.outcome(),
        (Phase::Completed, Location::Lost, Some(lost))
    );
    assert!(
        rig.asked.contains(&Action::ReleaseSource),
        "{:?}",
        rig.asked
    );
    rig.answer(Action::ReleaseSource, Answer::Done);
    rig.answer(Action::ReleaseDestination, Answer::Done);
    assert!(rig.protocol.finished());
}

#[test]
fn a_vm_is_lost_when_the_sources_process_is_gone_too() {
    let mut asked = died_after_the_commit();
    asked.answer(Action::AskSourceCopy, Answer::Copy { gone: true });
    let mut absent = died_after_the_commit();
    absent.step(Input::Answered(Action::FollowSource, Answer::Nothing));
    absent.answer(Action::FollowSource, NO_OWNER);
    for rig in [asked, absent] {
        assert!(
            rig.asked.contains(&Action::ReleaseSource),
            "{:?}",
            rig.asked
        );
        let lost = (Phase::Failed, Location::Lost, Some(Cause::DestinationDied));
        assert_eq!(rig.outcome(), lost);
    }
}

#[test]
fn a_silent_source_does_not_end_a_verification_that_has_no_result() {
    let mut rig = Rig::new(&Durable {
        unverified: true,
        committed: true,
        ..stored(Phase::Committed)
    });
    rig.destination(SidePhase::Completed);
    let mut absent = rig.clone();
    rig.answer(Action::FollowSource, Answer::Silent);
    assert_eq!(rig.protocol.phase(), Phase::Committed);
    assert!(rig.protocol.awaits_figures() && rig.protocol.awaits_verdict());

    absent.answer(Action::FollowSource, NO_OWNER);
    assert_eq!(absent.protocol.phase(), Phase::Completed);

    let mut dead = rig.clone();
    let report = Report {
        gone: true,
        ..Report::new(SidePhase::Relinquished)
    };
    dead.step(Input::Heard(Side::Source, report));
    let arrived = (Phase::Completed, Location::Destination, None);
    assert_eq!(dead.outcome(), arrived, "nothing more is to be heard");

    let mut late = rig.clone();
    late.step(Input::FiguresOverdue);
    assert_eq!(late.protocol.phase(), Phase::Completed);
    assert!(late.protocol.awaits_verdict());

    // With the result known, silence is enough.
    let verified = Report {
        verified: true,
        ..Report::new(SidePhase::Relinquished)
    };
    rig.step(Input::Heard(Side::Source, verified));
    rig.answer(Action::FollowSource, Answer::Silent);
    assert_eq!(rig.protocol.phase(), Phase::Completed);
    assert!(!rig.protocol.awaits_verdict());
}

/// The answer of StartOutgoing is under way while the side that it began is followed already.
#[test]
fn an_answer_that_comes_late_takes_nothing_back_that_is_for_good() {
    let early = side(SidePhase::Precopy);
    let gone = Report {
        gone: true,
        ..Report::new(SidePhase::Relinquished)
    };
    let mut died = Rig::starting();
    died.step(Input::Heard(Side::Source, gone));
    died.answer(Action::Start, early);
    died.destination(SidePhase::Completed);
    assert_eq!(died.protocol.phase(), Phase::Completed, "at once");

    let mut failed = Rig::starting();
    failed.source(SidePhase::Failed);
    failed.answer(Action::Start, early);
    assert_eq!(failed.protocol.phase(), Phase::Failed);
}

#[test]
fn after_a_restart_the_source_is_asked_before_anything_is_begun_again() {
    let mut rig = Rig::new(&stored(Phase::Preparing));
    assert_eq!(rig.step(Input::Retry), []);
    assert_eq!(rig.answer(Action::FollowSource, OWNER), [Action::Describe]);
    rig.answer(Action::Describe, Answer::Done);
    rig.answer(Action::Prepare, Answer::Silent);
    assert_eq!(rig.protocol.phase(), Phase::Preparing);
    assert_eq!(rig.step(Input::Retry), [Action::Describe]);
    rig.answer(Action::Describe, Answer::Done);
    // Another StartOutgoing than the one that an earlier life may have made: that is on disk before
    // it is made.
    assert_eq!(
        rig.answer(Action::Prepare, side(SidePhase::Preparing)),
        [Action::Start]
    );
    assert_eq!(rig.protocol.stored().start, Start::Again);
}

#[test]
fn a_restart_before_the_source_was_told_asks_nobody_whether_it_began() {
    let durable = Durable {
        start: Start::Never,
        ..stored(Phase::Preparing)
    };
    assert_eq!(Rig::new(&durable).step(Input::Retry), [Action::Describe]);
    let mut cancelled = Rig::new(&durable);
    // The destination may have been told: that one is cleaned up.
    assert_eq!(
        cancelled.step(Input::CancelRequested),
        [Action::CancelDestination]
    );
    assert_eq!(cancelled.protocol.stored().phase, Phase::Cancelled);
}

#[test]
fn a_restarted_server_waits_for_a_silent_host_no_longer_than_its_patience() {
    let durable = Durable {
        start: Start::Never,
        ..stored(Phase::Preparing)
    };
    for (silent, side) in [
        (Action::Describe, Side::Source),
        (Action::Prepare, Side::Destination),
    ] {
        let mut rig = Rig::new(&durable);
        rig.step(Input::Retry);
        assert!(rig.protocol.awaits_hosts());
        for patient in [true, false] {
            if !patient {
                rig.step(Input::PatienceOver);
                assert_eq!(rig.protocol.phase(), Phase::Preparing);
            }
            if silent == Action::Prepare {
                rig.answer(Action::Describe, Answer::Done);
            }
            rig.answer(silent, Answer::Silent);
            if patient {
                assert_eq!(rig.protocol.phase(), Phase::Preparing, "{silent:?}");
                rig.step(Input::Retry);
            }
        }
        let stored = rig.protocol.stored();
        assert_eq!(
            (stored.phase, stored.location),
            (Phase::Failed, Location::Source)
        );
        assert_eq!(rig.protocol.cause(), Some(Cause::Refused(side)));
    }
    // A source that may have been told to begin is waited for: it may have handed the VM over.
    let mut started = Rig::new(&stored(Phase::Preparing));
    started.step(Input::Retry);
    started.step(Input::PatienceOver);
    started.answer(Action::FollowSource, Answer::Silent);
    assert_eq!(started.protocol.phase(), Phase::Preparing);
    assert!(started.protocol.is_silent(Side::Source));
}

#[test]
fn a_cancel_before_anything_was_begun_needs_no_one() {
    let mut rig = Rig::fresh();
    assert_eq!(rig.step(Input::CancelRequested), []);
    assert_eq!(rig.protocol.stored().phase, Phase::Cancelled);
    assert!(rig.protocol.finished());
    // What it waited for comes too late.
    assert_eq!(rig.step(Input::Admitted), []);
}

#[test]
fn a_cancel_does_not_wait_for_a_prepare_and_its_clean_up_does() {
    let mut rig = Rig::fresh();
    rig.step(Input::Admitted);
    rig.answer(Action::Describe, Answer::Done);
    assert_eq!(rig.step(Input::CancelRequested), []);
    assert_eq!(rig.protocol.stored().phase, Phase::Cancelled);
    assert_eq!(rig.step(Input::Retry), []);
    assert_eq!(
        rig.answer(Action::Prepare, side(SidePhase::Preparing)),
        [Action::CancelDestination]
    );
    rig.answer(Action::CancelDestination, side(SidePhase::Cancelled));
    rig.answer(Action::ReleaseDestination, Answer::Done);
    assert!(rig.protocol.finished());
}

#[test]
fn an_absence_from_before_a_prepare_releases_nothing_after_it() {
    let mut rig = Rig::new(&Durable {
        start: Start::Never,
        ..stored(Phase::Preparing)
    });
    rig.step(Input::Retry);
    rig.answer(Action::Describe, Answer::Done);
    rig.answer(Action::FollowDestination, NO_OWNER);
    rig.step(Input::CancelRequested);
    assert_eq!(
        rig.answer(Action::Prepare, Answer::Silent),
        [Action::CancelDestination]
    );
}

#[test]
fn a_cancel_while_a_start_is_under_way_takes_the_destination_away_first() {
    let mut rig = Rig::starting();
    assert_eq!(
        rig.step(Input::CancelRequested),
        [Action::CancelSource, Action::CancelDestination]
    );
    // It may come there yet: no end.
    assert_eq!(
        rig.answer(Action::CancelSource, OWNER),
        [Action::CancelSource]
    );
    assert_eq!(rig.protocol.stored().phase, Phase::Cancelling);
    // The question was asked while the destination still listened: it is asked again.
    rig.answer(Action::CancelDestination, side(SidePhase::Cancelled));
    assert_eq!(rig.protocol.stored().phase, Phase::Cancelling);
    assert_eq!(
        rig.answer(Action::CancelSource, OWNER),
        [Action::CancelSource]
    );
    assert_eq!(
        rig.answer(Action::CancelSource, OWNER),
        [Action::ReleaseDestination]
    );
    assert_eq!(rig.outcome(), (Phase::Cancelled, Location::Source, None));

    // It comes after all: it finds nobody, and is ended and released.
    rig.answer(Action::ReleaseDestination, Answer::Done);
    let late = rig.answer(Action::Start, side(SidePhase::Preparing));
    assert_eq!(late, [Action::CancelSource]);
    rig.answer(Action::CancelSource, side(SidePhase::Failed));
    rig.answer(Action::ReleaseSource, Answer::Done);
    assert!(rig.protocol.finished());
    assert_eq!(rig.protocol.phase(), Phase::Cancelled);
}

#[test]
fn a_source_that_fails_because_the_cancel_took_its_destination_is_cancelled() {
    let mut rig = Rig::starting();
    rig.step(Input::CancelRequested);
    rig.answer(Action::CancelSource, OWNER);
    rig.source(SidePhase::Failed);
    assert_eq!(rig.outcome(), (Phase::Cancelled, Location::Source, None));
}

#[test]
fn the_sources_record_stays_while_another_start_may_come() {
    let mut rig = Rig::starting();
    rig.answer(Action::Start, Answer::Silent);
    assert_eq!(rig.step(Input::Retry), [Action::Start]);
    rig.answer(Action::Start, side(SidePhase::Precopy));
    rig.step(Input::CancelRequested);
    let asked = rig.answer(Action::CancelSource, side(SidePhase::Cancelled));
    assert_eq!(asked, [Action::CancelDestination]);
    assert_eq!(rig.protocol.stored().phase, Phase::Cancelled);
    let asked = rig.answer(Action::CancelDestination, side(SidePhase::Cancelled));
    assert_eq!(asked, [Action::ReleaseDestination, Action::ReleaseSource]);
}

#[test]
fn a_start_that_is_refused_ends_it_and_another_one_that_may_come_is_waited_out() {
    let refused = Answer::Refused { lost: false };
    let failed = (
        Phase::Failed,
        Location::Source,
        Some(Cause::Refused(Side::Source)),
    );
    let mut rig = Rig::starting();
    let asked = rig.answer(Action::Start, refused);
    assert_eq!(asked, [Action::CancelDestination, Action::ReleaseSource]);
    assert_eq!(rig.outcome(), failed);

    let mut rig = Rig::starting();
    rig.answer(Action::Start, Answer::Silent);
    rig.step(Input::Retry);
    let asked = rig.answer(Action::Start, refused);
    assert_eq!(asked, [Action::FailSource, Action::CancelDestination]);
    assert_eq!(rig.protocol.phase(), Phase::Preparing);
    rig.answer(Action::FailSource, OWNER);
    rig.answer(Action::CancelDestination, side(SidePhase::Failed));
    rig.answer(Action::FailSource, OWNER);
    assert_eq!(rig.outcome(), failed);
}

#[test]
fn an_absence_from_before_a_side_was_heard_of_is_dropped() {
    let mut rig = Rig::starting();
    // The question was asked before StartOutgoing had its effect.
    rig.answer(Action::Start, side(SidePhase::Precopy));
    assert_eq!(rig.answer(Action::FollowSource, OWNER), []);
    assert_eq!(rig.protocol.phase(), Phase::PrecopyActive);
    // One that was asked since counts.
    rig.answer(Action::FollowSource, OWNER);
    let forgot = (Phase::Failed, Location::Source, Some(Cause::SourceForgot));
    assert_eq!(rig.outcome(), forgot);
}

#[test]
fn a_cancel_after_the_commit_changes_nothing() {
    let mut rig = Rig::precopy();
    rig.source(SidePhase::Relinquished);
    assert_eq!(rig.step(Input::CancelRequested), []);
    assert!(!rig.protocol.durable().cancel_requested);
}
