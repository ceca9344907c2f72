//! Each rule of the protocol, and that no order of inputs whatever breaks the two that matter most.

use proptest::prelude::*;

use super::{
    Settled, Why, Written,
    destination::{self, Decision, Destination, Standing},
    source::{self, Source},
};

const WHYS: [Why; 3] = [Why::Cancelled, Why::Elsewhere, Why::Fault];

fn source_inputs() -> Vec<source::Input> {
    use source::Input::{
        Adopt, AdoptionWritten, Cancel, Connected, Failed, JournalSettled, Journalled, LinkLost,
        Overran, ReadyHeard, ResumedHeard, StateSent, SwitchoverDecided, WentBack,
    };
    let mut inputs = vec![
        Connected,
        SwitchoverDecided,
        StateSent,
        Overran,
        WentBack,
        ReadyHeard,
        Journalled(Written::Durable),
        Journalled(Written::Refused),
        Journalled(Written::Unknown),
        JournalSettled(Settled::Present),
        JournalSettled(Settled::Absent),
        ResumedHeard,
        LinkLost,
        Adopt,
        AdoptionWritten(Written::Durable),
        AdoptionWritten(Written::Refused),
        AdoptionWritten(Written::Unknown),
    ];
    inputs.extend(WHYS.map(Failed));
    inputs.extend(WHYS.map(Cancel));
    inputs
}

fn destination_inputs() -> Vec<destination::Input> {
    use destination::Input::{
        AbortHeard, AbortedWritten, Cancel, Checked, CommitHeard, ControlSays, Failed, LinkLost,
        OwnedWritten, Populated, PreparedWritten, SourceSays, StateHeard, Tick,
    };
    let written = [Written::Durable, Written::Refused, Written::Unknown];
    let mut inputs = vec![
        Populated,
        StateHeard,
        Checked,
        CommitHeard,
        AbortHeard,
        LinkLost,
        SourceSays(Standing::Relinquished),
        SourceSays(Standing::Ended),
        SourceSays(Standing::Unknown),
        ControlSays(Decision::Commit),
        ControlSays(Decision::Abort),
        Tick,
        AbortedWritten,
    ];
    inputs.extend(written.map(PreparedWritten));
    inputs.extend(written.map(OwnedWritten));
    inputs.extend(WHYS.map(Failed));
    inputs.extend(WHYS.map(Cancel));
    inputs
}

/// The source after the first `steps` of what goes well.
fn source_after(steps: usize) -> Source {
    use source::Input::{Connected, Journalled, ReadyHeard, StateSent, SwitchoverDecided};
    let mut source = Source::new();
    let well = [
        Connected,
        SwitchoverDecided,
        StateSent,
        ReadyHeard,
        Journalled(Written::Durable),
    ];
    for input in &well[..steps] {
        assert!(!source.step(*input).is_empty(), "{input:?}");
    }
    source
}

/// The destination after the first `steps` of what goes well.
fn destination_after(steps: usize) -> Destination {
    use destination::Input::{Checked, CommitHeard, Populated, PreparedWritten, StateHeard};
    let mut destination = Destination::new();
    let well = [
        Populated,
        StateHeard,
        Checked,
        PreparedWritten(Written::Durable),
        CommitHeard,
    ];
    for input in &well[..steps] {
        assert!(!destination.step(*input).is_empty(), "{input:?}");
    }
    destination
}

const JOURNALLING: usize = 4;
const RELINQUISHED: usize = 5;
const READY: usize = 4;
const OWNING: usize = 5;

#[test]
fn a_switchover_that_takes_too_long_goes_back_until_the_state_is_sent() {
    use source::{Action, End, Input};
    let mut source = source_after(2);
    assert_eq!(source.step(Input::Overran), [Action::GoBack]);
    assert_eq!(source.step(Input::WentBack), [Action::Precopy]);
    // And again, as often as the driver wants.
    assert_eq!(source.step(Input::SwitchoverDecided), [Action::SwitchOver]);
    assert_eq!(source.step(Input::Overran), [Action::GoBack]);
    // vCPUs that do not run again end it, and so does a cancel.
    let mut cancelled = source.clone();
    assert_eq!(source.step(Input::Failed(Why::Fault))[0], Action::ResumeVm);
    assert_eq!(source.ended(), Some(End::Kept(Why::Fault)));
    assert!(cancelled.may_cancel());
    assert_eq!(
        cancelled.step(Input::Cancel(Why::Cancelled)),
        [Action::Interrupt]
    );
    assert_eq!(cancelled.step(Input::WentBack)[0], Action::ResumeVm);
    // Once the state is sent it is too late, whoever says so.
    for steps in 3..=RELINQUISHED {
        let mut source = source_after(steps);
        let before = source.clone();
        assert_eq!(source.step(Input::Overran), []);
        assert_eq!(source.step(Input::WentBack), []);
        assert_eq!(source, before);
    }
}

#[test]
fn a_handover_that_goes_well_has_one_order() {
    use source::{Action, End, Input};
    let mut source = Source::new();
    let said: Vec<Action> = [
        Input::Connected,
        Input::SwitchoverDecided,
        Input::StateSent,
        Input::ReadyHeard,
        Input::Journalled(Written::Durable),
        Input::ResumedHeard,
    ]
    .into_iter()
    .flat_map(|input| source.step(input))
    .collect();
    assert_eq!(
        said,
        [
            Action::Precopy,
            Action::SwitchOver,
            Action::AwaitReady,
            Action::JournalRelinquished,
            Action::PublishRelinquished,
            Action::Commit,
            Action::StopLogging,
            Action::RecordEnd(End::HandedOver),
        ]
    );
    assert_eq!(source.ended(), Some(End::HandedOver));

    use destination as there;
    let mut destination = Destination::new();
    let said: Vec<there::Action> = [
        there::Input::Populated,
        there::Input::StateHeard,
        there::Input::Checked,
        there::Input::PreparedWritten(Written::Durable),
        there::Input::CommitHeard,
        there::Input::OwnedWritten(Written::Durable),
    ]
    .into_iter()
    .flat_map(|input| destination.step(input))
    .collect();
    assert_eq!(
        said,
        [
            there::Action::Receive,
            there::Action::Check,
            there::Action::JournalPrepared,
            there::Action::SayReady,
            there::Action::JournalOwned,
            there::Action::RunVm,
            there::Action::RecordEnd(there::End::Owned),
            there::Action::PublishEnd(there::End::Owned),
        ]
    );
    assert_eq!(destination.ended(), Some(there::End::Owned));
}

#[test]
fn a_source_that_fails_before_relinquished_lets_its_vm_run_first_of_all() {
    use source::{Action, End, Input};
    for steps in 0..JOURNALLING {
        for failure in [Input::Failed(Why::Elsewhere), Input::LinkLost] {
            let mut source = source_after(steps);
            let why = match failure {
                Input::Failed(why) => why,
                _ => Why::Fault,
            };
            assert_eq!(
                source.step(failure),
                [
                    Action::ResumeVm,
                    Action::StopLogging,
                    Action::SayAbort(why),
                    Action::RecordEnd(End::Kept(why)),
                ]
            );
        }
    }
}

#[test]
fn an_append_that_may_be_durable_is_settled_before_anything_else() {
    use source::{Action, Input};
    let unknown = || {
        let mut source = source_after(JOURNALLING);
        let said = source.step(Input::Journalled(Written::Unknown));
        assert_eq!(said, [Action::SettleJournal]);
        for idle in [
            Input::LinkLost,
            Input::Failed(Why::Fault),
            Input::ReadyHeard,
        ] {
            assert!(source.step(idle).is_empty(), "{idle:?}");
        }
        source
    };
    let present = unknown().step(Input::JournalSettled(Settled::Present));
    assert_eq!(present, [Action::PublishRelinquished, Action::Commit]);
    let absent = unknown().step(Input::JournalSettled(Settled::Absent));
    assert_eq!(absent[0], Action::ResumeVm);
    let refused = source_after(JOURNALLING).step(Input::Journalled(Written::Refused));
    assert_eq!(refused[0], Action::ResumeVm);
}

#[test]
fn a_relinquished_source_without_an_answer_stays_so() {
    use source::Input;
    for silence in [Input::LinkLost, Input::Failed(Why::Fault)] {
        let mut source = source_after(RELINQUISHED);
        assert!(source.step(silence).is_empty());
        let order = |input: &source::Input| *input == Input::Adopt;
        for input in source_inputs().into_iter().filter(|input| !order(input)) {
            assert!(source.step(input).is_empty(), "{input:?}");
        }
        assert!(source.relinquished());
        assert_eq!(source.ended(), None);
    }
}

#[test]
fn a_cancel_and_the_point_of_no_return_exclude_each_other() {
    use source::{Action, End, Input};
    for steps in 0..=RELINQUISHED {
        let mut source = source_after(steps);
        let accepted = source.may_cancel();
        assert_eq!(accepted, steps < JOURNALLING);
        let said = source.step(Input::Cancel(Why::Cancelled));
        if accepted {
            assert_eq!(said, [Action::Interrupt]);
            // Even when the very next thing heard is READY.
            let undone = source.step(Input::ReadyHeard);
            assert_eq!(undone[0], Action::ResumeVm);
            assert_eq!(source.ended(), Some(End::Kept(Why::Cancelled)));
        } else {
            assert!(said.is_empty());
        }
    }
}

#[test]
fn a_destination_that_did_not_say_ready_ends_by_anything() {
    use destination::{Action, End, Input};
    for steps in 0..READY {
        for (input, why) in [
            (Input::Failed(Why::Fault), Why::Fault),
            (Input::LinkLost, Why::Fault),
            (Input::AbortHeard, Why::Elsewhere),
        ] {
            let mut destination = destination_after(steps);
            // Who hears of the end finds it in the record and in the journal.
            assert_eq!(
                destination.step(input),
                [
                    Action::SayAbort(why),
                    Action::RecordEnd(End::GivenUp(why)),
                    Action::JournalAborted,
                ]
            );
            let end = End::GivenUp(why);
            assert_eq!(
                destination.step(Input::AbortedWritten),
                [Action::PublishEnd(end)]
            );
            assert_eq!(destination.ended(), Some(end));
        }
    }
}

#[test]
fn a_cancel_before_ready_is_never_followed_by_ready() {
    use destination::{Action, Input};
    for steps in 0..READY {
        let mut destination = destination_after(steps);
        assert!(destination.may_cancel());
        let mut said = destination.step(Input::Cancel(Why::Cancelled));
        assert!(!said.is_empty());
        for input in destination_inputs() {
            said.extend(destination.step(input));
        }
        assert!(!said.contains(&Action::SayReady), "{said:?}");
        assert!(said.contains(&Action::JournalAborted), "{said:?}");
    }
    for steps in READY..=OWNING {
        let mut destination = destination_after(steps);
        assert!(!destination.may_cancel());
        assert!(destination.step(Input::Cancel(Why::Cancelled)).is_empty());
    }
}

#[test]
fn prepared_that_may_not_be_durable_is_no_ready() {
    use destination::{Action, Input};
    for written in [Written::Refused, Written::Unknown] {
        let mut destination = destination_after(READY - 1);
        let said = destination.step(Input::PreparedWritten(written));
        assert_eq!(said[0], Action::SayAbort(Why::Fault));
    }
}

#[test]
fn after_ready_only_knowledge_ends_the_destination() {
    use destination::{Action, End, Input};
    let in_doubt = || {
        let mut destination = destination_after(READY);
        assert_eq!(destination.step(Input::LinkLost), [Action::AskSource]);
        // One question at a time; an answer that decides nothing, then the clock: another question.
        assert!(destination.step(Input::Tick).is_empty());
        let unknown = Input::SourceSays(Standing::Unknown);
        assert!(destination.step(unknown).is_empty());
        assert_eq!(destination.step(Input::Tick), [Action::AskSource]);
        assert!(destination.step(unknown).is_empty());
        assert!(destination.in_doubt() && destination.needs_ticks());
        destination
    };
    for commits in [
        Input::SourceSays(Standing::Relinquished),
        Input::ControlSays(Decision::Commit),
    ] {
        assert_eq!(in_doubt().step(commits), [Action::JournalOwned]);
    }
    for aborts in [
        Input::SourceSays(Standing::Ended),
        Input::ControlSays(Decision::Abort),
    ] {
        let said = in_doubt().step(aborts);
        let end = End::GivenUp(Why::Elsewhere);
        assert_eq!(said[1], Action::RecordEnd(end));
    }
    // From a link that is lost nothing comes, whatever seems to.
    for lost in [Input::CommitHeard, Input::AbortHeard, Input::LinkLost] {
        assert!(in_doubt().step(lost).is_empty(), "{lost:?}");
    }
}

#[test]
fn owned_is_written_until_it_is_durable() {
    use destination::{Action, Input};
    let mut destination = destination_after(OWNING);
    for written in [Written::Unknown, Written::Refused] {
        assert!(destination.step(Input::OwnedWritten(written)).is_empty());
        let decided = Input::ControlSays(Decision::Abort);
        assert!(destination.step(decided).is_empty(), "the source is gone");
        assert_eq!(destination.step(Input::Tick), [Action::JournalOwned]);
    }
    let owned = destination.step(Input::OwnedWritten(Written::Durable));
    assert_eq!(owned[0], Action::RunVm);
}

#[test]
fn an_input_that_comes_too_late_changes_nothing() {
    let mut handed_over = source_after(RELINQUISHED);
    handed_over.step(source::Input::ResumedHeard);
    let mut kept = source_after(1);
    kept.step(source::Input::LinkLost);
    for ended in [handed_over, kept] {
        for input in source_inputs() {
            let mut source = ended.clone();
            assert!(source.step(input).is_empty(), "{input:?}");
            assert_eq!(source, ended);
        }
    }
    let mut owned = destination_after(OWNING);
    owned.step(destination::Input::OwnedWritten(Written::Durable));
    let mut given_up = destination_after(1);
    given_up.step(destination::Input::LinkLost);
    given_up.step(destination::Input::AbortedWritten);
    for ended in [owned, given_up] {
        for input in destination_inputs() {
            let mut destination = ended.clone();
            assert!(destination.step(input).is_empty(), "{input:?}");
            assert_eq!(destination, ended);
        }
    }
}

/// A prefix of what goes well, so that the late states are reached often, then anything.
fn run<I: Copy + std::fmt::Debug + 'static>(
    well: Vec<I>,
    all: Vec<I>,
) -> impl Strategy<Value = Vec<I>> {
    let anything = prop::collection::vec(prop::sample::select(all), 0..40);
    (0..=well.len(), anything).prop_map(move |(steps, rest)| {
        let mut inputs = well[..steps].to_vec();
        inputs.extend(rest);
        inputs
    })
}

fn source_run() -> impl Strategy<Value = Vec<source::Input>> {
    use source::Input::{Connected, Journalled, ReadyHeard, StateSent, SwitchoverDecided};
    let well = vec![
        Connected,
        SwitchoverDecided,
        StateSent,
        ReadyHeard,
        Journalled(Written::Unknown),
    ];
    run(well, source_inputs())
}

fn destination_run() -> impl Strategy<Value = Vec<destination::Input>> {
    use destination::Input::{Checked, CommitHeard, Populated, PreparedWritten, StateHeard};
    let well = vec![
        Populated,
        StateHeard,
        Checked,
        PreparedWritten(Written::Durable),
        CommitHeard,
    ];
    run(well, destination_inputs())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4096))]

    #[test]
    fn a_source_that_began_to_relinquish_runs_its_vm_only_when_the_journal_has_no_such_entry(
        inputs in source_run(),
    ) {
        use source::{Action, Input};
        let mut source = Source::new();
        let (mut begun, mut absent, mut durable) = (false, false, false);
        let mut resumed = false;
        for input in inputs {
            // What an input says counts while the machine waits for it: before it, it is noise.
            absent |= begun && matches!(
                input,
                Input::JournalSettled(Settled::Absent) | Input::Journalled(Written::Refused)
            );
            durable |= begun && matches!(
                input,
                Input::JournalSettled(Settled::Present) | Input::Journalled(Written::Durable)
            );
            for action in source.step(input) {
                match action {
                    Action::JournalRelinquished => {
                        prop_assert!(!begun && !resumed, "{input:?}");
                        begun = true;
                    }
                    Action::ResumeVm => {
                        prop_assert!(!begun || absent, "{input:?}");
                        prop_assert!(!resumed && !source.relinquished());
                        resumed = true;
                    }
                    Action::PublishRelinquished | Action::Commit => {
                        prop_assert!(durable && !resumed, "{input:?}");
                    }
                    _ => {}
                }
            }
        }
    }

    #[test]
    fn a_destination_runs_the_vm_only_when_it_owns_it_for_certain(inputs in destination_run()) {
        use destination::{Action, Input};
        let mut destination = Destination::new();
        let (mut prepared, mut ready, mut told, mut journalled) = (false, false, false, false);
        let (mut owned, mut aborted) = (false, false);
        for input in inputs {
            prepared |= input == Input::PreparedWritten(Written::Durable);
            told |= ready && matches!(
                input,
                Input::CommitHeard
                    | Input::SourceSays(Standing::Relinquished)
                    | Input::ControlSays(Decision::Commit)
            );
            owned |= journalled && input == Input::OwnedWritten(Written::Durable);
            for action in destination.step(input) {
                match action {
                    Action::SayReady => {
                        prop_assert!(prepared && !aborted, "{input:?}");
                        ready = true;
                    }
                    Action::JournalOwned => {
                        prop_assert!(told && !aborted, "{input:?}");
                        journalled = true;
                    }
                    Action::RunVm => prop_assert!(owned && !aborted, "{input:?}"),
                    Action::JournalAborted => {
                        prop_assert!(!journalled, "{input:?}");
                        aborted = true;
                    }
                    _ => {}
                }
            }
        }
    }

    #[test]
    fn a_cancel_that_was_accepted_is_never_followed_by_a_handover(
        before in source_run(),
        after in prop::collection::vec(prop::sample::select(source_inputs()), 0..40),
    ) {
        use source::{Action, End, Input};
        let mut source = Source::new();
        for input in before {
            source.step(input);
        }
        if !source.may_cancel() {
            return Ok(());
        }
        let mut said = source.step(Input::Cancel(Why::Cancelled));
        for input in after {
            said.extend(source.step(input));
        }
        prop_assert!(!said.contains(&Action::JournalRelinquished));
        prop_assert!(!said.contains(&Action::Commit));
        prop_assert_ne!(source.ended(), Some(End::HandedOver));
    }
}

#[test]
fn a_vm_is_taken_back_only_when_nothing_more_can_be_heard() {
    use source::{Action, End, Input};
    for steps in 0..=RELINQUISHED {
        let mut source = source_after(steps);
        assert_eq!(source.step(Input::Adopt), [], "after {steps}");
    }
    let mut heard = source_after(RELINQUISHED);
    heard.step(Input::ResumedHeard);
    assert_eq!(heard.step(Input::Adopt), [], "the destination has the VM");

    let mut source = source_after(RELINQUISHED);
    source.step(Input::LinkLost);
    for written in [Written::Refused, Written::Unknown] {
        assert_eq!(source.step(Input::Adopt), [Action::JournalAdopted]);
        assert_eq!(source.step(Input::AdoptionWritten(written)), []);
        assert!(source.relinquished(), "nothing runs before it is durable");
    }
    assert_eq!(source.step(Input::Adopt), [Action::JournalAdopted]);
    assert_eq!(source.step(Input::Adopt), [], "one order at a time");
    assert_eq!(
        source.step(Input::AdoptionWritten(Written::Durable)),
        [Action::StopLogging, Action::RecordEnd(End::TakenBack)]
    );
    assert!(!source.relinquished());
    assert_eq!(source.step(Input::Adopt), []);
}
