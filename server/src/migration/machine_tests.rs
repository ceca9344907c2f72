//! The rules of [`super::machine`], by example and by random interleavings.

use proptest::prelude::*;
use slat_proto::{
    ApiError, Reason,
    v1::{MigrationPhase as Phase, TransferPhase as Half, VmLocation as Location},
};

use super::machine::{Action, Durable, Input, Machine, Report, is_terminal};

fn fresh() -> Machine {
    Machine::new(&stored(Phase::Pending))
}

fn stored(phase: Phase) -> Durable {
    Durable {
        phase,
        location: Location::Source,
        cancel_requested: false,
        error: None,
        switched: false,
        committed: false,
        unverified: false,
        source_released: false,
        destination_released: false,
    }
}

fn report(phase: Half) -> Report {
    Report {
        phase,
        vm_lost: false,
        verified: false,
        error: None,
    }
}

fn source(phase: Half) -> Input {
    Input::SourceReport(report(phase))
}

fn destination(phase: Half) -> Input {
    Input::DestinationReport(report(phase))
}

fn run(machine: &mut Machine, inputs: impl IntoIterator<Item = Input>) -> Vec<Action> {
    inputs
        .into_iter()
        .flat_map(|input| machine.step(input))
        .collect()
}

fn outcome(machine: &Machine) -> (Phase, Location, Option<String>) {
    let durable = machine.durable();
    (
        durable.phase,
        durable.location,
        durable.error.map(|error| error.reason),
    )
}

#[test]
fn a_migration_that_works() {
    let mut machine = fresh();
    assert_eq!(
        machine.step(Input::Begin),
        [Action::Persist, Action::Prepare]
    );
    assert_eq!(machine.step(Input::PrepareAnswered), [Action::Start]);
    assert_eq!(machine.step(source(Half::Preparing)), []);
    assert_eq!(machine.step(source(Half::Precopy)), [Action::Persist]);
    assert_eq!(machine.phase(), Phase::PrecopyActive);
    assert_eq!(machine.step(source(Half::Switchover)), [Action::Persist]);
    assert_eq!(machine.step(destination(Half::Ready)), []);
    assert_eq!(machine.step(source(Half::Relinquished)), [Action::Persist]);
    assert_eq!(machine.phase(), Phase::Committed);
    assert_eq!(machine.step(destination(Half::Completed)), []);
    assert!(machine.awaits_figures());
    assert_eq!(
        machine.step(source(Half::Completed)),
        [
            Action::Persist,
            Action::ReleaseDestination,
            Action::ReleaseSource
        ]
    );
    assert_eq!(
        outcome(&machine),
        (Phase::Completed, Location::Destination, None)
    );
    run(
        &mut machine,
        [Input::SourceReleased, Input::DestinationReleased],
    );
    assert!(machine.finished());
}

#[test]
fn a_prepare_that_fails_leaves_the_vm_where_it_is() {
    let mut machine = fresh();
    machine.step(Input::Begin);
    let actions = machine.step(Input::PrepareFailed {
        error: ApiError::new(Reason::DstNoMemory, "full"),
        side: "destination",
        unreachable: false,
    });
    assert!(actions.contains(&Action::CancelDestination));
    assert_eq!(
        outcome(&machine),
        (
            Phase::Failed,
            Location::Source,
            Some("DST_NO_MEMORY".into())
        )
    );
}

#[test]
fn a_vm_that_is_lost_before_its_migration_begins_is_not_said_to_be_at_the_source() {
    let lost = || ApiError::new(Reason::VmUnreachable, "gone").with("state", "LOST");
    let inputs = [
        Input::PrepareFailed {
            error: lost(),
            side: "source",
            unreachable: true,
        },
        Input::StartFailed(lost()),
    ];
    for input in inputs {
        let mut machine = fresh();
        machine.step(Input::Begin);
        machine.step(input);
        assert_eq!(
            outcome(&machine),
            (
                Phase::Failed,
                Location::Lost,
                Some("VM_PROCESS_DIED".into())
            )
        );
    }
}

#[test]
fn a_relinquished_source_resolves_a_ready_destination_only_when_it_hangs() {
    let mut machine = Machine::new(&stored(Phase::Switchover));
    let quiet = run(
        &mut machine,
        [destination(Half::Ready), source(Half::Relinquished)],
    );
    assert!(!quiet.contains(&Action::ResolveCommit));
    assert!(machine.step(Input::Retry).contains(&Action::ResolveCommit));
}

#[test]
fn silence_after_the_switchover_is_doubt_and_the_journal_ends_it() {
    let begin = [source(Half::Switchover), destination(Half::Ready)];
    let mut machine = Machine::new(&stored(Phase::PrecopyActive));
    run(&mut machine, begin.clone());
    machine.step(Input::SourceUnreachable);
    assert_eq!(
        outcome(&machine),
        (
            Phase::InDoubt,
            Location::PausedBoth,
            Some("IN_DOUBT".into())
        )
    );
    for _ in 0..50 {
        assert_eq!(machine.step(Input::Retry), []);
    }
    let mut failed = machine.clone();
    let actions = failed.step(source(Half::Failed));
    assert_eq!(failed.phase(), Phase::Failed);
    assert!(actions.contains(&Action::ResolveAbort));
    machine.step(source(Half::Relinquished));
    assert_eq!(
        outcome(&machine),
        (Phase::Committed, Location::Destination, None)
    );
}

#[test]
fn silence_before_the_switchover_is_just_waiting() {
    let mut machine = Machine::new(&stored(Phase::PrecopyActive));
    run(
        &mut machine,
        [Input::SourceUnreachable, Input::DestinationUnreachable],
    );
    assert_eq!(machine.phase(), Phase::PrecopyActive);
}

#[test]
fn a_process_that_died_at_the_source_loses_the_vm() {
    let mut machine = Machine::new(&stored(Phase::PrecopyActive));
    machine.step(Input::SourceReport(Report {
        vm_lost: true,
        ..report(Half::Failed)
    }));
    assert_eq!(
        outcome(&machine),
        (
            Phase::Failed,
            Location::Lost,
            Some("VM_PROCESS_DIED".into())
        )
    );
}

fn died_after_the_commit() -> (Machine, Vec<Action>) {
    let mut machine = Machine::new(&stored(Phase::Committed));
    let actions = run(
        &mut machine,
        [source(Half::Relinquished), destination(Half::Failed)],
    );
    (machine, actions)
}

#[test]
fn the_frozen_copy_outlives_a_destination_that_died_after_the_commit() {
    let (mut machine, mut actions) = died_after_the_commit();
    assert!(actions.contains(&Action::AskSourceCopy), "{actions:?}");
    assert!(!is_terminal(machine.phase()));
    actions.extend(machine.step(Input::SourceCopy { gone: false }));
    assert_eq!(
        outcome(&machine),
        (
            Phase::Failed,
            Location::Unknown,
            Some("VM_PROCESS_DIED".into())
        )
    );
    let error = machine.durable().error.unwrap();
    assert!(error.advice.contains("slat delete vm"), "{error:?}");
    assert_eq!(error.metadata["vm_location"], "UNKNOWN");

    // Nothing that happens by itself releases the source, not even a new life of the server.
    let mut machine = Machine::new(&machine.durable());
    for input in [
        Input::Retry,
        Input::SourceUnreachable,
        source(Half::Relinquished),
        destination(Half::Failed),
        Input::DestinationReleased,
        Input::Retry,
    ] {
        actions.extend(machine.step(input));
    }
    assert!(!actions.contains(&Action::ReleaseSource), "{actions:?}");
    assert!(machine.keeps_source() && !machine.finished());

    // The user's wish does, and goes on doing so until it worked.
    assert_eq!(
        machine.step(Input::DeleteRequested),
        [Action::ReleaseSource]
    );
    assert_eq!(machine.step(Input::Retry), [Action::ReleaseSource]);
    machine.step(Input::SourceReleased);
    assert!(machine.finished() && !machine.keeps_source());
}

#[test]
fn a_vm_is_lost_when_the_sources_process_is_gone_too() {
    for gone in [
        Input::SourceCopy { gone: true },
        Input::SourceAbsent { owner: false },
    ] {
        let (mut machine, _) = died_after_the_commit();
        let actions = machine.step(gone);
        assert!(actions.contains(&Action::ReleaseSource), "{actions:?}");
        assert_eq!(
            outcome(&machine),
            (
                Phase::Failed,
                Location::Lost,
                Some("VM_PROCESS_DIED".into())
            )
        );
    }
}

#[test]
fn a_silent_source_does_not_end_a_verification_that_has_no_result() {
    let unverified = Durable {
        unverified: true,
        ..stored(Phase::Committed)
    };
    let mut machine = Machine::new(&unverified);
    run(
        &mut machine,
        [destination(Half::Completed), Input::SourceUnreachable],
    );
    assert_eq!(machine.phase(), Phase::Committed);
    assert!(machine.awaits_figures() && machine.awaits_verdict());

    let mut absent = machine.clone();
    absent.step(Input::SourceAbsent { owner: false });
    assert_eq!(absent.phase(), Phase::Completed);

    let mut late = machine.clone();
    late.step(Input::FiguresOverdue);
    assert_eq!(late.phase(), Phase::Completed);
    assert!(late.awaits_verdict());

    // With the result known, silence is enough.
    machine.step(Input::SourceReport(Report {
        verified: true,
        ..report(Half::Relinquished)
    }));
    machine.step(Input::SourceUnreachable);
    assert_eq!(machine.phase(), Phase::Completed);
    assert!(!machine.awaits_verdict());
}

#[test]
fn after_a_restart_the_source_is_asked_before_anything_is_begun_again() {
    let mut machine = Machine::new(&stored(Phase::Preparing));
    assert_eq!(machine.step(Input::Retry), []);
    assert_eq!(
        machine.step(Input::SourceAbsent { owner: true }),
        [Action::Prepare]
    );
    machine.step(Input::PrepareFailed {
        error: ApiError::new(Reason::PeerUnreachable, "not yet"),
        side: "destination",
        unreachable: true,
    });
    assert_eq!(machine.phase(), Phase::Preparing);
    assert!(machine.step(Input::Retry).contains(&Action::Prepare));
}

#[test]
fn a_cancel_before_anything_was_begun_needs_no_one() {
    let mut machine = fresh();
    assert_eq!(machine.step(Input::CancelRequested), [Action::Persist]);
    assert_eq!(machine.phase(), Phase::Cancelled);
    assert!(machine.finished());
}

#[test]
fn a_cancel_after_the_commit_changes_nothing() {
    let mut machine = Machine::new(&stored(Phase::Switchover));
    machine.step(source(Half::Relinquished));
    assert_eq!(machine.step(Input::CancelRequested), []);
    assert!(!machine.durable().cancel_requested);
}

fn halves() -> impl Strategy<Value = Report> {
    let phases = prop::sample::select(vec![
        Half::Preparing,
        Half::Precopy,
        Half::Switchover,
        Half::Ready,
        Half::Relinquished,
        Half::Completed,
        Half::Cancelled,
        Half::Failed,
    ]);
    (phases, any::<bool>()).prop_map(|(phase, vm_lost)| Report {
        phase,
        vm_lost,
        verified: false,
        error: None,
    })
}

fn inputs() -> impl Strategy<Value = Input> {
    prop_oneof![
        1 => Just(Input::Begin),
        1 => Just(Input::PrepareAnswered),
        1 => any::<bool>().prop_map(|unreachable| Input::PrepareFailed {
            error: ApiError::new(Reason::DstNoMemory, "x"),
            side: "destination",
            unreachable,
        }),
        1 => Just(Input::StartFailed(ApiError::new(Reason::StaleEpoch, "x"))),
        6 => halves().prop_map(Input::SourceReport),
        6 => halves().prop_map(Input::DestinationReport),
        1 => Just(Input::SourceUnreachable),
        1 => Just(Input::DestinationUnreachable),
        1 => any::<bool>().prop_map(|owner| Input::SourceAbsent { owner }),
        1 => Just(Input::DestinationAbsent),
        1 => Just(Input::CancelRequested),
        1 => Just(Input::FiguresOverdue),
        1 => any::<bool>().prop_map(|gone| Input::SourceCopy { gone }),
        1 => Just(Input::DeleteRequested),
        3 => Just(Input::Retry),
        1 => Just(Input::SourceReleased),
        1 => Just(Input::DestinationReleased),
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
    #![proptest_config(ProptestConfig::with_cases(800))]

    #[test]
    fn no_interleaving_breaks_the_rules(
        start in starts(),
        steps in prop::collection::vec((inputs(), prop::bool::weighted(0.05)), 1..60),
    ) {
        let mut machine = Machine::new(&start);
        // What the world said, kept apart from the machine: it survives the machine's restarts.
        let mut handed_over = false;
        let mut committed = false;
        // After a restart the stored commit stands for the source's word; a destination that completed implies it.
        let mut implied = false;
        let mut restarted = false;
        let mut terminal: Option<Durable> = None;
        // The user wants it gone, or the world said that nothing is left at the source.
        let mut may_end_copy = false;
        for (input, restart) in steps {
            if restart {
                machine = Machine::new(&machine.durable());
                restarted = true;
            }
            if let Input::SourceReport(report) = &input
                && matches!(report.phase, Half::Relinquished | Half::Completed)
            {
                handed_over = true;
            }
            may_end_copy |= matches!(
                &input,
                Input::DeleteRequested | Input::SourceCopy { gone: true } | Input::SourceAbsent { .. }
            ) || matches!(&input, Input::SourceReport(report) if report.vm_lost);
            implied |= matches!(&input, Input::DestinationReport(r) if r.phase == Half::Completed);
            let actions = machine.step(input);
            let durable = machine.durable();
            committed |= durable.phase == Phase::Committed || durable.phase == Phase::Completed;

            // What was stored is stored before anything else is done.
            let first = actions.iter().position(|action| *action == Action::Persist);
            prop_assert!(first.is_none_or(|at| at == 0));
            for action in &actions {
                match action {
                    Action::ResolveCommit => prop_assert!(handed_over || (restarted && implied)),
                    Action::ResolveAbort | Action::CancelDestination => {
                        prop_assert!(!handed_over, "{action:?} after the source handed over");
                    }
                    _ => {}
                }
                if matches!(action, Action::ReleaseSource | Action::ReleaseDestination) {
                    prop_assert!(is_terminal(durable.phase));
                }
                if *action == Action::ReleaseSource && durable.phase == Phase::Failed && handed_over {
                    prop_assert!(may_end_copy, "the last copy is ended by nobody's wish");
                }
            }
            if committed && !is_terminal(durable.phase) {
                prop_assert_eq!(durable.phase, Phase::Committed);
            }
            if handed_over && terminal.is_none() {
                prop_assert!(durable.phase != Phase::Cancelled);
                if durable.phase == Phase::Failed {
                    prop_assert!(matches!(durable.location, Location::Lost | Location::Unknown));
                }
            }
            if let Some(end) = &terminal {
                prop_assert_eq!(end.phase, durable.phase);
                prop_assert_eq!(end.location, durable.location);
                prop_assert_eq!(&end.error, &durable.error);
            } else if is_terminal(durable.phase) {
                prop_assert!(durable.location != Location::Unspecified);
                prop_assert!(
                    matches!(durable.location, Location::Source | Location::Destination | Location::Lost)
                        || (durable.location == Location::Unknown && durable.committed)
                );
                prop_assert!(actions.first() == Some(&Action::Persist));
                terminal = Some(durable);
            }
        }
    }
}
