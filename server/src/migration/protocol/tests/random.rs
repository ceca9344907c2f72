//! Whatever comes in, in whatever order, even what contradicts itself: nothing is done before it is
//! on disk, nothing twice at a time, and what was shown as final stays.

use proptest::prelude::*;
use slat_proto::v1::{MigrationPhase as Phase, TransferPhase as SidePhase, VmLocation as Location};

use super::{
    super::{Action, Answer, Durable, Input, MigrationProtocol, Report, Side, Start, has_ended},
    stored,
};

fn reports() -> impl Strategy<Value = Report> {
    let phases = prop::sample::select(vec![
        SidePhase::Preparing,
        SidePhase::Precopy,
        SidePhase::Switchover,
        SidePhase::Ready,
        SidePhase::Relinquished,
        SidePhase::Completed,
        SidePhase::Cancelled,
        SidePhase::Failed,
    ]);
    (phases, any::<bool>(), any::<bool>()).prop_map(|(phase, vm_lost, gone)| Report {
        phase,
        vm_lost,
        gone,
        verified: false,
    })
}

fn answers() -> impl Strategy<Value = Answer> {
    prop_oneof![
        4 => Just(Answer::Done),
        4 => reports().prop_map(Answer::Side),
        2 => any::<bool>().prop_map(|owner| Answer::Absent { owner }),
        1 => any::<bool>().prop_map(|lost| Answer::Refused { lost }),
        2 => Just(Answer::Silent),
        1 => Just(Answer::Nothing),
        1 => any::<bool>().prop_map(|gone| Answer::Copy { gone }),
    ]
}

fn inputs() -> impl Strategy<Value = Input> {
    let calls = prop::sample::select(Action::CALLS.to_vec());
    prop_oneof![
        2 => Just(Input::Admitted),
        1 => Just(Input::Barred),
        8 => Just(Input::Stored),
        5 => reports().prop_map(|report| Input::Heard(Side::Source, report)),
        5 => reports().prop_map(|report| Input::Heard(Side::Destination, report)),
        16 => (calls, answers()).prop_map(|(call, answer)| Input::Answered(call, answer)),
        1 => Just(Input::CancelRequested),
        1 => Just(Input::FiguresOverdue),
        1 => Just(Input::PatienceOver),
        1 => Just(Input::DeleteRequested),
        1 => Just(Input::DeleteWithdrawn),
        1 => Just(Input::HostForgotten(Side::Source)),
        1 => Just(Input::HostForgotten(Side::Destination)),
        1 => Just(Input::HostFenced(Side::Source)),
        1 => Just(Input::HostFenced(Side::Destination)),
        3 => Just(Input::Retry),
    ]
}

fn starts() -> impl Strategy<Value = Durable> {
    prop::sample::select(vec![
        Phase::Pending,
        Phase::Pending,
        Phase::Preparing,
        Phase::PrecopyActive,
        Phase::Switchover,
        Phase::InDoubt,
        Phase::Cancelling,
    ])
    .prop_map(stored)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn no_input_breaks_the_order_of_things(
        start in starts(),
        steps in prop::collection::vec((inputs(), prop::bool::weighted(0.05)), 1..80),
    ) {
        let mut protocol = MigrationProtocol::new(&start);
        let mut shown_commit = false;
        let mut shown_end: Option<Durable> = None;
        for (input, restart) in steps {
            if restart {
                protocol = MigrationProtocol::new(protocol.stored());
            }
            let before = protocol;
            let actions = protocol.step(input);
            let stored = *protocol.stored();

            // What was decided is stored before anything else is done.
            if actions.contains(&Action::Persist) {
                prop_assert_eq!(&actions, &[Action::Persist]);
            } else if !actions.is_empty() {
                prop_assert!(protocol.is_stored());
            }
            for action in &actions {
                let ended = match input {
                    Input::Answered(ended, _) => ended == *action,
                    Input::Stored => *action == Action::Persist,
                    _ => false,
                };
                prop_assert!(ended || !before.is_in_flight(*action), "{action:?} twice");
                match action {
                    Action::Start => prop_assert!(stored.start != Start::Never),
                    Action::ReleaseSource | Action::ReleaseDestination => {
                        prop_assert!(has_ended(stored.phase));
                    }
                    _ => {}
                }
                if action.side() == Some(Side::Destination) && *action != Action::FollowDestination {
                    prop_assert!(*action == Action::Prepare || !protocol.is_in_flight(Action::Prepare));
                }
                if *action == Action::ReleaseSource {
                    prop_assert!(!protocol.is_in_flight(Action::Start));
                }
            }
            shown_commit |= matches!(stored.phase, Phase::Committed | Phase::Completed);
            if shown_commit && !has_ended(stored.phase) {
                prop_assert_eq!(stored.phase, Phase::Committed);
            }
            if let Some(end) = &shown_end {
                prop_assert_eq!((end.phase, end.location), (stored.phase, stored.location));
            } else if has_ended(stored.phase) {
                let known = matches!(
                    stored.location,
                    Location::Source | Location::Destination | Location::Lost
                );
                prop_assert!(known || (stored.location == Location::Unknown && stored.committed));
                shown_end = Some(stored);
            }
        }
    }
}
