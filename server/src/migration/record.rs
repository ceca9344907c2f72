//! The stored and shown form of a migration: the protocol's state and the sides' figures, folded
//! into `v1::Migration`.
//!
//! Phase times: the source's own clock where it says when (it sees PRECOPY, SWITCHOVER and the
//! commit happen), the server's clock otherwise. `generation` grows by one at each stored change;
//! figures alone are shown, not stored.

use std::time::Duration;

use slat_proto::{
    model::{now, proto_duration},
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
        StoredMigration {
            migration: Some(self.migration.clone()),
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
    pub(crate) fn apply(&mut self, durable: &Durable, error: Option<v1::MigrationError>) {
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
            self.mark(Phase::Switchover, now(), false);
        }
        if durable.committed {
            self.mark(Phase::Committed, now(), false);
        }
        if durable.phase == Phase::Completed && self.unverified() {
            // Given up: a record that says nothing would read as if nobody had asked.
            let progress = self.migration.progress.get_or_insert_default();
            progress.verification = Verification::Pending.into();
        }
        if entered {
            self.mark(durable.phase, now(), false);
            if has_ended(durable.phase) {
                let end = now();
                self.migration.end_time = Some(end);
                self.migration.total_time = Some(proto_duration(between(
                    self.migration.create_time.as_ref(),
                    &end,
                )));
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

    /// Takes the source's figures over.
    pub(crate) fn source_figures(&mut self, side: &v1::Transfer) {
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
            if let Some(time) = entry.time {
                self.mark(phase, time, true);
            }
        }
    }

    /// Takes the destination's figures over: its CPU time, and its verdict on the digest when the
    /// source has none.
    pub(crate) fn destination_figures(&mut self, side: &v1::Transfer) {
        let Some(theirs) = &side.progress else { return };
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

    /// Sets a phase's beginning; an earlier entry stays unless `better`.
    fn mark(&mut self, phase: Phase, time: prost_types::Timestamp, better: bool) {
        let times = &mut self.migration.phase_times;
        if let Some(entry) = times.iter_mut().find(|entry| entry.phase() == phase) {
            if better {
                entry.time = Some(time);
            }
            return;
        }
        times.push(v1::PhaseTime {
            phase: phase.into(),
            time: Some(time),
        });
        times.sort_by_key(|entry| rank(entry.phase()));
    }
}

/// The protocol's view of a side.
pub(crate) fn report(side: &v1::Transfer) -> Report {
    Report {
        phase: side.phase(),
        vm_lost: side.vm_lost,
        verified: side
            .progress
            .as_ref()
            .is_some_and(|progress| is_result(progress.verification())),
    }
}

/// `migration` with `total_time` up to now while it runs.
pub(crate) fn shown(mut migration: v1::Migration) -> v1::Migration {
    if migration.end_time.is_none() {
        migration.total_time = Some(proto_duration(between(
            migration.create_time.as_ref(),
            &now(),
        )));
    }
    migration
}

fn is_result(verification: Verification) -> bool {
    matches!(verification, Verification::Match | Verification::Mismatch)
}

/// Order of phases in time.
fn rank(phase: Phase) -> u8 {
    match phase {
        Phase::Unspecified => 0,
        Phase::Pending => 1,
        Phase::Preparing => 2,
        Phase::PrecopyActive => 3,
        Phase::Switchover => 4,
        Phase::InDoubt => 5,
        Phase::Cancelling => 6,
        Phase::Committed => 7,
        Phase::Completed | Phase::Cancelled | Phase::Failed => 8,
    }
}

fn between(from: Option<&prost_types::Timestamp>, to: &prost_types::Timestamp) -> Duration {
    let nanos =
        |t: &prost_types::Timestamp| i128::from(t.seconds) * 1_000_000_000 + i128::from(t.nanos);
    let span = from.map_or(0, |from| nanos(to) - nanos(from));
    Duration::from_nanos(u64::try_from(span).unwrap_or_default())
}

#[cfg(test)]
mod tests {
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
            record.apply(&completed, None);
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
        record.source_figures(&side(v1::MigrationProgress {
            iterations: (0..100_000).map(iteration).collect(),
            ..Default::default()
        }));
        let told = record.migration().progress.clone().unwrap();
        assert_eq!(told.iterations_done(), 100_000);
        let stored = prost::Message::encoded_len(&record.to_stored());
        assert!(stored < 64 << 10, "{stored}");
        let mut beat = v1::MigrationProgress {
            iteration: 100_000,
            ..Default::default()
        };
        beat.omit_histories();
        record.source_figures(&side(beat));
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
        record.source_figures(&v1::Transfer {
            phase_times: vec![
                at(SidePhase::Precopy, 10),
                at(SidePhase::Switchover, 20),
                at(SidePhase::Precopy, 21),
                at(SidePhase::Switchover, 30),
            ],
            ..Default::default()
        });
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
}
