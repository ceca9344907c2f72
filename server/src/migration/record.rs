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

use super::protocol::{Durable, Report, Side, Start};
use crate::{
    phase::{has_ended, side_ended},
    store::{SourceStart, StoredMigration},
};

/// One migration's record. See the module.
#[derive(Clone, Debug)]
pub(crate) struct Record {
    migration: v1::Migration,
    start: Start,
    source_released: bool,
    destination_released: bool,
    source_fenced: bool,
    destination_fenced: bool,
    /// The last fences of source and destination before it began.
    fences_before: [String; 2],
    /// The source's process was said to be gone, in this life of the server.
    source_gone: bool,
    /// The source's side was heard to have ended, in this life of the server.
    source_ended: bool,
    /// When the destination said that it had the VM, by the server's clock.
    destination_ran: Option<Timestamp>,
    /// The source itself told when it paused the VM, in this life of the server.
    pause_told: bool,
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
            source_fenced: false,
            destination_fenced: false,
            fences_before: Default::default(),
            source_gone: false,
            source_ended: false,
            destination_ran: None,
            pause_told: false,
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
            source_fenced: stored.source_fenced,
            destination_fenced: stored.destination_fenced,
            fences_before: [stored.source_fence_before, stored.destination_fence_before],
            source_gone: false,
            source_ended: false,
            destination_ran: None,
            pause_told: false,
        })
    }

    /// For the store.
    pub(crate) fn to_stored(&self) -> StoredMigration {
        let mut migration = self.migration.clone();
        migration.waiting_for.clear();
        migration.waiting_since = None;
        let [source_fence_before, destination_fence_before] = self.fences_before.clone();
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
            source_fenced: self.source_fenced,
            destination_fenced: self.destination_fenced,
            source_fence_before,
            destination_fence_before,
        }
    }

    /// The last fences of source and destination, by their ids, before it begins.
    pub(crate) fn begin_after(&mut self, fences: [String; 2]) {
        self.fences_before = fences;
    }

    /// Whether a host's last fence came after this had begun.
    pub(crate) fn is_cut_by(&self, side: Side, fence: Option<&v1::Fence>) -> bool {
        let id = fence.map_or("", |fence| fence.id.as_str());
        !id.is_empty() && self.fences_before[side as usize] != id
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
            source_fenced: self.source_fenced,
            destination_fenced: self.destination_fenced,
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
        // A doubt may get another reason: its source's host is deleted or
        // fenced.
        if entered || (durable.phase == Phase::InDoubt && error.is_some()) {
            self.migration.error = error;
        }
        self.start = durable.start;
        self.source_released = durable.source_released;
        self.destination_released = durable.destination_released;
        self.source_gone |= durable.source_fenced;
        self.source_fenced = durable.source_fenced;
        self.destination_fenced = durable.destination_fenced;
        self.migration.generation += 1;
        // The times double as durable facts: a switchover or commit that was seen must be found
        // again.
        if durable.switched {
            self.mark(Phase::Switchover, None, now);
        }
        if durable.committed {
            self.mark(Phase::Committed, None, now);
        }
        if durable.phase == Phase::Completed {
            self.estimate_downtime();
        }
        if durable.phase == Phase::Completed && self.unverified() {
            // Given up: a record that says nothing would read as if nobody had asked.
            let why = if durable.location == v1::VmLocation::Lost {
                "the VM's process died at the destination"
            } else if self.source_gone {
                "the source's process, and the frozen memory with it, is gone"
            } else {
                "the source told no result in time"
            };
            let progress = self.migration.progress.get_or_insert_default();
            progress.verification = Verification::Impossible.into();
            why.clone_into(&mut progress.verification_message);
        }
        if entered {
            self.mark(durable.phase, None, now);
            if has_ended(durable.phase) {
                self.migration.end_time = Some(*now);
                self.migration.total_time = Some(since(&self.migration, now));
            }
        }
    }

    /// The source told no downtime: it lasted from its pause until the destination had the VM. Not
    /// known where it told no pause either; what the server saw of a switchover begins later.
    fn estimate_downtime(&mut self) {
        if !self.pause_told {
            return;
        }
        let mut times = self.migration.phase_times.iter();
        let paused = times
            .find(|entry| entry.phase() == Phase::Switchover)
            .and_then(|entry| entry.time);
        let (Some(paused), Some(ran)) = (paused, self.destination_ran) else {
            return;
        };
        let progress = self.migration.progress.get_or_insert_default();
        // With a breakdown the source did hear: of a VM that does not run there.
        if progress.downtime.is_some() || progress.downtime_breakdown.is_some() {
            return;
        }
        let nanos = timestamp_nanos(&ran) - timestamp_nanos(&paused);
        progress.downtime = Some(nanos_duration(nanos.max(0)));
        progress.downtime_estimated = true;
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

    /// Names the cause of an end that is known better now.
    pub(crate) fn refine_error(&mut self, better: v1::MigrationError) {
        self.migration.error = Some(better);
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
        let ended = side_ended(side.phase());
        if self.source_ended && !ended {
            // The answer to a call, under way while the side ended: it says what was before.
            return;
        }
        self.source_ended = ended;
        self.source_gone |= side.process_gone;
        if let Some(progress) = &side.progress {
            let known = self.migration.progress.as_ref();
            let verification = known.map(|p| (p.verification(), p.verification_message.clone()));
            let mut progress = progress.clone();
            progress.restore_histories(self.migration.progress.as_ref());
            progress.bound_histories();
            if let Some(known) = known
                && known.downtime_estimated
                && progress.downtime.is_none()
            {
                progress.downtime = known.downtime;
                progress.downtime_estimated = true;
            }
            // What was given up was said to be so: it stays, whatever comes later.
            if let Some((earlier, message)) = verification
                && is_result(earlier)
                && (earlier == Verification::Impossible || !is_result(progress.verification()))
            {
                progress.verification = earlier.into();
                progress.verification_message = message;
            }
            self.migration.progress = Some(progress);
        }
        let mut precopy_seen = false;
        let is_switchover = |entry: &&v1::TransferPhaseTime| entry.phase() == SidePhase::Switchover;
        let mut switchovers = side.phase_times.iter().filter(is_switchover).count();
        let again = switchovers > 1;
        for entry in &side.phase_times {
            let phase = match entry.phase() {
                // A switchover may go back to precopy: that began with the first, and the
                // switchover that counts is the last.
                SidePhase::Precopy if std::mem::replace(&mut precopy_seen, true) => continue,
                SidePhase::Precopy => Phase::PrecopyActive,
                SidePhase::Switchover => {
                    switchovers -= 1;
                    if switchovers > 0 {
                        continue;
                    }
                    Phase::Switchover
                }
                SidePhase::Relinquished => Phase::Committed,
                _ => continue,
            };
            if let Some(said) = &entry.time {
                if again && phase == Phase::Switchover {
                    // What was noted is one that went back.
                    let times = &mut self.migration.phase_times;
                    times.retain(|entry| entry.phase() != Phase::Switchover);
                }
                self.pause_told |= phase == Phase::Switchover;
                self.mark(phase, Some(said), now);
            }
        }
    }

    /// Takes the destination's figures over: its CPU time, and its verdict on the digest when the
    /// source has none.
    pub(crate) fn destination_figures(&mut self, side: &v1::Transfer) {
        // With an error it has the VM and could not run it.
        if side.phase() == SidePhase::Completed && side.error.is_none() && !side.process_gone {
            let ran = |entry: &&v1::TransferPhaseTime| entry.phase() == SidePhase::Completed;
            self.destination_ran = side.phase_times.iter().find(ran).and_then(|ran| ran.time);
        }
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
                (Some(theirs), Some(ours)) if theirs > ours => latest = latest.min(time),
                // A switchover that went back to precopy is followed by another, which counts.
                _ if entry.phase() == phase && phase != Phase::Switchover => {
                    latest = latest.min(time);
                }
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
    use Verification::{Impossible, Match, Mismatch};
    matches!(verification, Match | Mismatch | Impossible)
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
mod tests;
