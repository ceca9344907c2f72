//! What a record takes over from the protocol and the sides, and what it never does.

use proptest::prelude::*;
use slat_proto::model::duration_nanos;

use super::*;

/// A new one, to host b.
fn fresh(params: v1::MigrationParams) -> Record {
    let vm = v1::Vm::default();
    Record::new("migrations/m".into(), &vm, "hosts/b".into(), params)
}

#[test]
fn a_comparison_that_was_given_up_is_stored_as_not_done() {
    for (verify, stored) in [
        (Verify::AfterCommit, Verification::Impossible),
        (Verify::BeforeCommit, Verification::Impossible),
        (Verify::None, Verification::Unspecified),
    ] {
        let params = v1::MigrationParams {
            verify: verify.into(),
            ..Default::default()
        };
        let mut record = fresh(params);
        assert_eq!(record.durable().unverified, verify != Verify::None);
        let completed = Durable {
            phase: Phase::Completed,
            committed: true,
            ..record.durable()
        };
        record.apply(&completed, None, &now());
        let told = record.migration().progress.clone().unwrap_or_default();
        assert_eq!(told.verification(), stored, "{verify:?}");
        let said = told.verification_message;
        assert_eq!(said.is_empty(), verify == Verify::None, "{said}");
        let late = v1::Transfer {
            progress: Some(v1::MigrationProgress {
                verification: Verification::None.into(),
                ..Default::default()
            }),
            ..Default::default()
        };
        record.source_figures(&late, &now());
        let told = record.migration().progress.clone().unwrap_or_default();
        assert_eq!(told.verification_message, said, "what was said stays");
    }
}

#[test]
fn histories_that_a_side_left_out_are_kept_and_those_without_bounds_are_bounded() {
    let mut record = fresh(v1::MigrationParams::default());
    let side = |progress| v1::Transfer {
        progress: Some(progress),
        ..Default::default()
    };
    let iteration = |iteration| v1::MigrationIteration {
        iteration,
        bytes_transferred: 1 << 20,
        ..Default::default()
    };
    record.source_figures(
        &side(v1::MigrationProgress {
            iterations: (0..100_000).map(iteration).collect(),
            ..Default::default()
        }),
        &Timestamp::default(),
    );
    let told = record.migration().progress.clone().unwrap();
    assert_eq!(told.iterations_done(), 100_000);
    let stored = prost::Message::encoded_len(&record.to_stored());
    assert!(stored < 64 << 10, "{stored}");
    let mut beat = v1::MigrationProgress {
        iteration: 100_000,
        ..Default::default()
    };
    beat.omit_histories();
    record.source_figures(&side(beat), &Timestamp::default());
    let now = record.migration().progress.clone().unwrap();
    assert_eq!(now.iteration, 100_000);
    assert!(!now.histories_omitted);
    assert_eq!(now.iterations, told.iterations);
    assert_eq!(now.iterations_between, told.iterations_between);
}

/// The answer to CancelTransfer may be read after the watch has told the end.
#[test]
fn an_answer_from_before_the_sources_end_takes_no_figures_back() {
    let mut record = fresh(v1::MigrationParams::default());
    let decided = v1::MigrationProgress {
        decisions: vec![v1::MigrationDecision::default()],
        ..Default::default()
    };
    let at = Timestamp::default();
    let told = |phase: v1::TransferPhase, progress| v1::Transfer {
        phase: phase.into(),
        progress: Some(progress),
        ..Default::default()
    };
    record.source_figures(&told(v1::TransferPhase::Cancelled, decided), &at);
    let before = v1::MigrationProgress::default();
    record.source_figures(&told(v1::TransferPhase::Precopy, before), &at);
    let progress = record.migration().progress.as_ref().unwrap();
    assert_eq!(progress.decisions.len(), 1);
}

#[test]
fn the_switchover_that_counts_is_the_last_and_precopy_the_first() {
    let mut record = fresh(v1::MigrationParams::default());
    let begin = record.migration.create_time.unwrap().seconds;
    let time = |seconds| Timestamp {
        seconds: begin + seconds,
        nanos: 0,
    };
    let at = |phase: SidePhase, seconds| v1::TransferPhaseTime {
        phase: phase.into(),
        time: Some(time(seconds)),
    };
    let said = [
        at(SidePhase::Precopy, 10),
        at(SidePhase::Switchover, 20),
        at(SidePhase::Precopy, 21),
        at(SidePhase::Switchover, 30),
    ];
    // Heard as they come: the first switchover is noted, and then another one.
    for (heard, now) in [(2, 25), (4, 40), (4, 50)] {
        let side = v1::Transfer {
            phase_times: said[..heard].to_vec(),
            ..Default::default()
        };
        record.source_figures(&side, &time(now));
    }
    let times = &record.migration().phase_times;
    let began = |phase: Phase| {
        let entry = times.iter().find(|entry| entry.phase() == phase);
        entry.unwrap().time.unwrap().seconds - begin
    };
    assert_eq!(
        (began(Phase::PrecopyActive), began(Phase::Switchover)),
        (10, 30)
    );
}

#[test]
fn a_record_that_does_not_say_whether_the_source_was_told_is_taken_for_one_that_was() {
    let stored = |phase: Phase, source_start: SourceStart| {
        let migration = v1::Migration {
            phase: phase.into(),
            ..Default::default()
        };
        let record = Record::from_stored(StoredMigration {
            migration: Some(migration),
            source_start: source_start.into(),
            ..Default::default()
        });
        let record = record.unwrap();
        assert_ne!(record.to_stored().source_start(), SourceStart::Unknown);
        record.durable().start
    };
    assert_eq!(stored(Phase::Pending, SourceStart::Unknown), Start::Never);
    assert_eq!(stored(Phase::Preparing, SourceStart::Unknown), Start::Again);
    assert_eq!(stored(Phase::Preparing, SourceStart::Never), Start::Never);
    assert_eq!(stored(Phase::Preparing, SourceStart::Once), Start::Once);
}

/// A moment of a migration: what is heard, and how far the source's clock is off then.
#[derive(Clone, Debug)]
enum Moment {
    Hear(usize, i128),
    Enter(Phase),
    Restart,
}

fn moment() -> impl Strategy<Value = Moment> {
    let hour = 3_600_000_000_000_i128;
    let phases = vec![
        Phase::Preparing,
        Phase::PrecopyActive,
        Phase::Switchover,
        Phase::Cancelling,
        Phase::InDoubt,
        Phase::Committed,
        Phase::Completed,
        Phase::Failed,
    ];
    prop_oneof![
        4 => (1..5_usize, -10 * hour..10 * hour).prop_map(|(n, off)| Moment::Hear(n, off)),
        4 => prop::sample::select(phases).prop_map(Moment::Enter),
        1 => Just(Moment::Restart),
    ]
}

proptest! {
    /// Whatever the hosts' clocks say, and whoever sets the server's: times follow each other
    /// as the phases do, none is later than the end, and no duration is negative.
    #[test]
    fn phases_never_run_backwards(
        moments in prop::collection::vec((moment(), 0..5_000_000_000_i128), 1..40),
    ) {
        let params = v1::MigrationParams::default();
        let mut record = fresh(params);
        let mut at = timestamp_nanos(record.migration.create_time.as_ref().unwrap());
        let mut ended = false;
        let sides = [SidePhase::Preparing, SidePhase::Precopy, SidePhase::Switchover,
            SidePhase::Relinquished, SidePhase::Completed];
        for (moment, passed) in moments {
            at += passed;
            let now = nanos_timestamp(at);
            match moment {
                Moment::Hear(count, off) => {
                    let entry = |(number, phase): (usize, &SidePhase)| v1::TransferPhaseTime {
                        phase: (*phase).into(),
                        // Its clock may be set at any time, between two phases too.
                        time: Some(nanos_timestamp(at + off * number as i128)),
                    };
                    let side = v1::Transfer {
                        phase_times: sides.iter().enumerate().take(count).map(entry).collect(),
                        ..Default::default()
                    };
                    record.source_figures(&side, &now);
                }
                Moment::Enter(phase) if !ended => {
                    ended = has_ended(phase);
                    let durable = Durable { phase, ..record.durable() };
                    record.apply(&durable, None, &now);
                }
                Moment::Enter(_) => {}
                Moment::Restart => {
                    record = Record::from_stored(record.to_stored()).unwrap();
                    prop_assert!(timestamp_nanos(&record.timeline().now())
                        >= timestamp_nanos(&record.latest().unwrap()));
                }
            }
            let migration = &record.migration;
            let nanos = |time: Option<&Timestamp>| timestamp_nanos(time.unwrap());
            let times: Vec<i128> =
                migration.phase_times.iter().map(|t| nanos(t.time.as_ref())).collect();
            prop_assert!(times.is_sorted(), "{:?}", migration.phase_times);
            let ranks: Vec<u8> =
                migration.phase_times.iter().filter_map(|t| rank(t.phase())).collect();
            prop_assert!(ranks.is_sorted(), "{:?}", migration.phase_times);
            prop_assert_eq!(times[0], nanos(migration.create_time.as_ref()));
            prop_assert!(*times.last().unwrap() <= at);
            if let (Some(end), Some(total)) = (&migration.end_time, &migration.total_time) {
                prop_assert!(*times.last().unwrap() <= timestamp_nanos(end));
                prop_assert_eq!(duration_nanos(total), timestamp_nanos(end) - times[0]);
            }
        }
    }
}

#[test]
fn what_the_source_says_moves_a_phase_back_to_its_true_beginning() {
    let second = 1_000_000_000;
    let params = v1::MigrationParams::default();
    let mut record = fresh(params);
    let begin = timestamp_nanos(record.migration.create_time.as_ref().unwrap());
    let at = |seconds: i128| nanos_timestamp(begin + seconds * second);
    for (seconds, phase) in [(1, Phase::Preparing), (9, Phase::PrecopyActive)] {
        let durable = Durable {
            phase,
            ..record.durable()
        };
        record.apply(&durable, None, &at(seconds));
    }
    let side = |precopy: i128| v1::Transfer {
        phase_times: vec![v1::TransferPhaseTime {
            phase: SidePhase::Precopy.into(),
            time: Some(at(precopy)),
        }],
        ..Default::default()
    };
    for (said, noted) in [(7, 7), (-7200, 1), (7200, 1)] {
        record.source_figures(&side(said), &at(9));
        let precopy = record.migration.phase_times[2];
        assert_eq!(precopy.phase(), Phase::PrecopyActive);
        assert_eq!(precopy.time, Some(at(noted)), "{said}");
    }
}

#[test]
fn a_downtime_that_the_source_did_not_hear_end_is_estimated() {
    let params = v1::MigrationParams::default();
    let mut record = fresh(params);
    let begin = timestamp_nanos(record.migration.create_time.as_ref().unwrap());
    let at = |seconds: i128| nanos_timestamp(begin + seconds * 1_000_000_000);
    let side = |phases: &[(SidePhase, i128)]| v1::Transfer {
        phase: phases.last().unwrap().0.into(),
        phase_times: phases
            .iter()
            .map(|(phase, seconds)| v1::TransferPhaseTime {
                phase: (*phase).into(),
                time: Some(at(*seconds)),
            })
            .collect(),
        progress: Some(v1::MigrationProgress::default()),
        ..Default::default()
    };
    let source = side(&[(SidePhase::Switchover, 10), (SidePhase::Relinquished, 11)]);
    record.source_figures(&source, &at(12));
    record.destination_figures(&side(&[(SidePhase::Ready, 11), (SidePhase::Completed, 17)]));
    let completed = Durable {
        phase: Phase::Completed,
        location: v1::VmLocation::Destination,
        switched: true,
        committed: true,
        ..record.durable()
    };
    record.apply(&completed, None, &at(18));
    // What the source says later takes nothing away.
    record.source_figures(&source, &at(19));
    let progress = record.migration().progress.clone().unwrap();
    assert_eq!(duration_nanos(&progress.downtime.unwrap()), 7_000_000_000);
    assert!(progress.downtime_estimated);

    // Of a source that told nothing of its pause nobody knows when it was.
    let mut silent = fresh(params);
    silent.source_figures(&side(&[(SidePhase::Precopy, 1)]), &at(2));
    silent.destination_figures(&side(&[(SidePhase::Ready, 11), (SidePhase::Completed, 17)]));
    silent.apply(&completed, None, &at(18));
    let progress = silent.migration().progress.clone().unwrap();
    assert_eq!(
        (progress.downtime, progress.downtime_estimated),
        (None, false)
    );
}
