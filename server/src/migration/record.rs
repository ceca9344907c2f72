//! The stored and shown form of a migration: the protocol's state and the sides' figures, folded
//! into `v1::Migration`.
//!
//! # Phase times
//! A phase began no later than the server heard of it, by the migration's own time
//! ([`Timeline`]): that is what is noted. The source sees PRECOPY, SWITCHOVER and the commit happen
//! and says when, by its own clock, which comes here as far corrected as its offset is known. That
//! moves a phase back, towards its true beginning, and never before the phase that came before it:
//! whatever a host's clock says, phases do not run backwards and none begins after its end.
//!
//! `generation` grows by one at each stored change; figures alone are shown, not stored.

use prost_types::Timestamp;
use slat_proto::{
    model::{Timeline, nanos_duration, nanos_timestamp, now, timestamp_nanos},
    v1::{
        self, MigrationPhase as Phase, TransferPhase as SidePhase, Verification,
        migration_params::Verify,
    },
};

use super::protocol::{Durable, Report, Start};
use crate::{
    phase::has_ended,
    store::{SourceStart, StoredMigration},
};

/// One migration's record. See the module.
#[derive(Clone, Debug)]
pub(crate) struct Record {
    migration: v1::Migration,
    start: Start,
    source_released: bool,
    destination_released: bool,
}

impl Record {
    /// A new migration, PENDING.
    pub(crate) fn new(
        name: String,
        vm: &v1::Vm,
        destination: String,
        params: v1::MigrationParams,
    ) -> Self {
        let create_time = Some(now());
        Self {
            migration: v1::Migration {
                name,
                vm: vm.name.clone(),
                vm_uid: vm.uid.clone(),
                source: vm.host.clone(),
                destination,
                params: Some(params),
                phase: Phase::Pending.into(),
                vm_location: v1::VmLocation::Source.into(),
                epoch: vm.epoch,
                phase_times: vec![v1::PhaseTime {
                    phase: Phase::Pending.into(),
                    time: create_time,
                }],
                create_time,
                ..Default::default()
            },
            start: Start::Never,
            source_released: false,
            destination_released: false,
        }
    }

    /// From the store; `None` when the record is empty.
    pub(crate) fn from_stored(stored: StoredMigration) -> Option<Self> {
        let start = match stored.source_start() {
            SourceStart::Never => Start::Never,
            SourceStart::Once => Start::Once,
            SourceStart::Again => Start::Again,
            // Written by a version that did not note it.
            SourceStart::Unknown => {
                let pending = stored.migration.as_ref()?.phase() == Phase::Pending;
                if pending { Start::Never } else { Start::Again }
            }
        };
        Some(Self {
            migration: stored.migration?,
            start,
            source_released: stored.source_released,
            destination_released: stored.destination_released,
        })
    }

    /// For the store.
    pub(crate) fn to_stored(&self) -> StoredMigration {
        let mut migration = self.migration.clone();
        migration.waiting_for.clear();
        migration.waiting_since = None;
        StoredMigration {
            migration: Some(migration),
            source_released: self.source_released,
            destination_released: self.destination_released,
            source_start: match self.start {
                Start::Never => SourceStart::Never,
                Start::Once => SourceStart::Once,
                Start::Again => SourceStart::Again,
            }
            .into(),
        }
    }

    /// As shown now.
    pub(crate) fn migration(&self) -> &v1::Migration {
        &self.migration
    }

    /// What the protocol starts from.
    pub(crate) fn durable(&self) -> Durable {
        let seen = |phase: Phase| {
            let number = i32::from(phase);
            self.migration.phase_times.iter().any(|t| t.phase == number)
        };
        Durable {
            phase: self.migration.phase(),
            location: self.migration.vm_location(),
            cancel_requested: self.migration.cancel_requested,
            switched: seen(Phase::Switchover),
            committed: seen(Phase::Committed),
            unverified: self.unverified(),
            start: self.start,
            source_released: self.source_released,
            destination_released: self.destination_released,
        }
    }

    /// Takes the protocol's state over; the caller stores it next. `error`: why, of a phase that is
    /// entered.
    pub(crate) fn apply(
        &mut self,
        durable: &Durable,
        error: Option<v1::MigrationError>,
        now: &Timestamp,
    ) {
        let entered = self.migration.phase() != durable.phase;
        self.migration.phase = durable.phase.into();
        self.migration.vm_location = durable.location.into();
        self.migration.cancel_requested = durable.cancel_requested;
        if entered {
            self.migration.error = error;
        }
        self.start = durable.start;
        self.source_released = durable.source_released;
        self.destination_released = durable.destination_released;
        self.migration.generation += 1;
        // The times double as durable facts: a switchover or commit that was seen must be found
        // again.
        if durable.switched {
            self.mark(Phase::Switchover, None, now);
        }
        if durable.committed {
            self.mark(Phase::Committed, None, now);
        }
        if durable.phase == Phase::Completed && self.unverified() {
            // Given up: a record that says nothing would read as if nobody had asked.
            let progress = self.migration.progress.get_or_insert_default();
            progress.verification = Verification::Pending.into();
        }
        if entered {
            self.mark(durable.phase, None, now);
            if has_ended(durable.phase) {
                self.migration.end_time = Some(*now);
                self.migration.total_time = Some(since(&self.migration, now));
            }
        }
    }

    /// A comparison of digests was asked for and has no result.
    fn unverified(&self) -> bool {
        let verify = self
            .migration
            .params
            .as_ref()
            .map_or(Verify::None, v1::MigrationParams::verify);
        let asked = matches!(verify, Verify::BeforeCommit | Verify::AfterCommit);
        let progress = self.migration.progress.as_ref();
        asked && !progress.is_some_and(|progress| is_result(progress.verification()))
    }

    /// What it waits for, and since when: shown, never stored.
    pub(crate) fn set_waiting(&mut self, words: &str, since: Option<Timestamp>) {
        words.clone_into(&mut self.migration.waiting_for);
        self.migration.waiting_since = since;
    }

    /// When its own time begins or, after a restart of the server, goes on.
    pub(crate) fn timeline(&self) -> Timeline {
        Timeline::begin(self.latest().as_ref())
    }

    /// The last time that was noted.
    fn latest(&self) -> Option<Timestamp> {
        let noted = self.migration.phase_times.iter().filter_map(|t| t.time);
        noted
            .chain(self.migration.create_time)
            .max_by_key(timestamp_nanos)
    }

    /// Takes the source's figures over, its times by the server's clock, at `now`.
    pub(crate) fn source_figures(&mut self, side: &v1::Transfer, now: &Timestamp) {
        if let Some(progress) = &side.progress {
            let verification = self.migration.progress.as_ref().map(|p| p.verification());
            let mut progress = progress.clone();
            progress.restore_histories(self.migration.progress.as_ref());
            progress.bound_histories();
            if !is_result(progress.verification())
                && let Some(earlier) = verification.filter(|v| is_result(*v))
            {
                progress.verification = earlier.into();
            }
            self.migration.progress = Some(progress);
        }
        let mut precopy_seen = false;
        for entry in &side.phase_times {
            let phase = match entry.phase() {
                // A switchover may go back to precopy: that began with the first, and the
                // switchover that counts is the last.
                SidePhase::Precopy if std::mem::replace(&mut precopy_seen, true) => continue,
                SidePhase::Precopy => Phase::PrecopyActive,
                SidePhase::Switchover => Phase::Switchover,
                SidePhase::Relinquished => Phase::Committed,
                _ => continue,
            };
            if let Some(said) = &entry.time {
                self.mark(phase, Some(said), now);
            }
        }
    }

    /// Takes the destination's figures over: its CPU time, and its verdict on the digest when the
    /// source has none.
    pub(crate) fn destination_figures(&mut self, side: &v1::Transfer) {
        let Some(theirs) = &side.progress else { return };
        let populated = &mut self.migration.populated_bytes;
        *populated = theirs.populated_bytes.max(*populated);
        if theirs.cpu_time.is_some() {
            self.migration.destination_cpu_time = theirs.cpu_time;
        }
        if is_result(theirs.verification()) {
            let ours = self.migration.progress.get_or_insert_default();
            if !is_result(ours.verification()) {
                ours.verification = theirs.verification;
            }
        }
    }

    /// Notes a phase's beginning: it is known of at `now`; `said`: when a side says that it was.
    /// See the module.
    fn mark(&mut self, phase: Phase, said: Option<&Timestamp>, now: &Timestamp) {
        let times = &mut self.migration.phase_times;
        let noted = |entry: &v1::PhaseTime| entry.time.as_ref().map(timestamp_nanos);
        let at = times.iter().position(|entry| entry.phase() == phase);
        if at.is_some() && said.is_none() {
            return;
        }
        let (mut earliest, mut latest) = (i128::MIN, timestamp_nanos(now));
        for entry in times.iter() {
            let Some(time) = noted(entry) else { continue };
            match (rank(entry.phase()), rank(phase)) {
                (Some(theirs), Some(ours)) if theirs < ours => earliest = earliest.max(time),
                (Some(_), Some(_)) => latest = latest.min(time),
                _ if entry.phase() == phase => latest = latest.min(time),
                _ => {}
            }
        }
        let said = said.map_or(latest, timestamp_nanos);
        let time = Some(nanos_timestamp(said.min(latest).max(earliest)));
        match at {
            Some(at) => times[at].time = time,
            None => times.push(v1::PhaseTime {
                phase: phase.into(),
                time,
            }),
        }
        times.sort_by_key(|entry| (noted(entry), rank(entry.phase())));
    }
}

/// The protocol's view of a side.
pub(crate) fn report(side: &v1::Transfer) -> Report {
    Report {
        phase: side.phase(),
        vm_lost: side.vm_lost,
        gone: side.process_gone,
        verified: side
            .progress
            .as_ref()
            .is_some_and(|progress| is_result(progress.verification())),
    }
}

/// `migration` with `total_time` up to now while it runs.
pub(crate) fn shown(mut migration: v1::Migration, timeline: &Timeline) -> v1::Migration {
    if migration.end_time.is_none() {
        migration.total_time = Some(since(&migration, &timeline.now()));
    }
    migration
}

fn is_result(verification: Verification) -> bool {
    matches!(verification, Verification::Match | Verification::Mismatch)
}

/// Order in time of the phases that every migration goes through; the others come when they come.
fn rank(phase: Phase) -> Option<u8> {
    Some(match phase {
        Phase::Pending => 1,
        Phase::Preparing => 2,
        Phase::PrecopyActive => 3,
        Phase::Switchover => 4,
        Phase::Committed => 5,
        Phase::Completed | Phase::Cancelled | Phase::Failed => 6,
        Phase::InDoubt | Phase::Cancelling | Phase::Unspecified => return None,
    })
}

/// From the migration's creation to `end`.
fn since(migration: &v1::Migration, end: &Timestamp) -> prost_types::Duration {
    let begin = migration.create_time.as_ref().map(timestamp_nanos);
    let end = timestamp_nanos(end);
    nanos_duration((end - begin.unwrap_or(end)).max(0))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use slat_proto::model::duration_nanos;

    use super::*;

    #[test]
    fn a_comparison_that_was_given_up_is_stored_as_not_done() {
        for (verify, stored) in [
            (Verify::AfterCommit, Verification::Pending),
            (Verify::BeforeCommit, Verification::Pending),
            (Verify::None, Verification::Unspecified),
        ] {
            let params = v1::MigrationParams {
                verify: verify.into(),
                ..Default::default()
            };
            let mut record = Record::new(
                "migrations/m".into(),
                &v1::Vm::default(),
                "hosts/b".into(),
                params,
            );
            assert_eq!(record.durable().unverified, verify != Verify::None);
            let completed = Durable {
                phase: Phase::Completed,
                committed: true,
                ..record.durable()
            };
            record.apply(&completed, None, &now());
            let told = record.migration().progress.clone().unwrap_or_default();
            assert_eq!(told.verification(), stored, "{verify:?}");
        }
    }

    #[test]
    fn histories_that_a_side_left_out_are_kept_and_those_without_bounds_are_bounded() {
        let mut record = Record::new(
            "migrations/m".into(),
            &v1::Vm::default(),
            "hosts/b".into(),
            v1::MigrationParams::default(),
        );
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

    #[test]
    fn the_switchover_that_counts_is_the_last_and_precopy_the_first() {
        let at = |phase: SidePhase, seconds| v1::TransferPhaseTime {
            phase: phase.into(),
            time: Some(prost_types::Timestamp { seconds, nanos: 0 }),
        };
        let mut record = Record::new(
            "migrations/m".into(),
            &v1::Vm::default(),
            "hosts/b".into(),
            v1::MigrationParams::default(),
        );
        record.source_figures(
            &v1::Transfer {
                phase_times: vec![
                    at(SidePhase::Precopy, 10),
                    at(SidePhase::Switchover, 20),
                    at(SidePhase::Precopy, 21),
                    at(SidePhase::Switchover, 30),
                ],
                ..Default::default()
            },
            &Timestamp {
                seconds: 40,
                nanos: 0,
            },
        );
        let times = &record.migration().phase_times;
        let began = |phase: Phase| {
            let entry = times.iter().find(|entry| entry.phase() == phase);
            entry.unwrap().time.unwrap().seconds
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
            let mut record = Record::new("migrations/m".into(), &v1::Vm::default(), "hosts/b".into(), params);
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
        let mut record = Record::new(
            "migrations/m".into(),
            &v1::Vm::default(),
            "hosts/b".into(),
            params,
        );
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
}
