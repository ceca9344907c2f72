//! What the directory of a dead VM process tells: whether a VM was lost with it, and how its
//! migration sides stand.
//!
//! The journal decides, the records only add figures. Nothing here is a guess: a source side is
//! RELINQUISHED exactly when the journal has that entry for that migration or the side was ever
//! seen so ([`super::sighting`]: the entry may have failed while the process was fenced for ever),
//! a destination side is COMPLETED exactly when the journal has its `Owned`. Memory died with the
//! process, so every other side that had not ended by itself is FAILED/VM_PROCESS_DIED — which at a
//! destination says nothing about the source: that one answers from its own journal.
//!
//! A journal that cannot be read answers nothing: every question about its sides is an error, so
//! that nobody resumes or commits on the strength of a missing line.

use std::{
    collections::{BTreeMap, btree_map},
    io,
};

use slat_proto::{
    ApiError, Reason,
    model::{HostName, MigrationName, Timeline, VmName},
    v1,
};

use super::{
    process::End,
    side::{Role, SideKey, is_terminal},
    sighting::{self, gave_away},
};
use slat_record::{
    dir::VmDir,
    journal::{self, Contents, Entry, JournalState, Ownership},
    standing::{self, Recorded},
};

/// What is left of a VM process.
#[derive(Clone, Debug)]
pub(super) struct Remains {
    vm: VmName,
    state: Option<JournalState>,
    history: Vec<Entry>,
    records: BTreeMap<SideKey, v1::Transfer>,
    /// The end of its log, for the error of a side it did not end itself.
    log: String,
    /// The last warning or error in it.
    fault: Option<String>,
}

impl Remains {
    /// Reads the directory. Its process is dead: nothing changes any more.
    ///
    /// # Errors
    /// JOURNAL when the journal or a record cannot be read or is corrupt.
    pub(super) fn read(vm: &VmName, dir: &VmDir) -> Result<Self, ApiError> {
        let unreadable = |error: io::Error| {
            ApiError::from_io(Reason::Journal, dir.path(), &error).with("vm", vm)
        };
        let refused = |error| ApiError::from(error).with("vm", vm);
        // Without its directory an empty journal would say that nothing was ever here.
        std::fs::metadata(dir.path()).map_err(unreadable)?;
        let mut contents = journal::contents(&dir.journal()).map_err(refused)?;
        if gives_away(&contents) {
            // A destination may run the VM on the strength of it: not before it is durable.
            contents = journal::settled_contents(&dir.journal()).map_err(refused)?;
        }
        let Contents { state, entries } = contents;
        let records = dir.transfers().map_err(unreadable)?;
        let records = records
            .into_iter()
            .filter_map(|record| Some((SideKey::of(&record)?, record)));
        let vm = state
            .as_ref()
            .and_then(|state| VmName::from_id(&state.vm).ok())
            .unwrap_or_else(|| vm.clone());
        let mut remains = Self {
            vm,
            state,
            history: entries,
            records: records.collect(),
            log: super::process::log_tail(dir),
            fault: super::process::last_fault(dir),
        };
        for side in sighting::load(dir).map_err(unreadable)? {
            if let Some(key) = SideKey::of(&side) {
                remains.add_seen(key, side);
            }
        }
        Ok(remains)
    }

    /// Adds what the agent saw of a side: better than a record from before its end, never better
    /// than one of its end. That it gave its VM away is better than anything but its completion.
    pub(super) fn add_seen(&mut self, key: SideKey, seen: v1::Transfer) {
        match self.records.entry(key) {
            btree_map::Entry::Vacant(entry) => {
                entry.insert(seen);
            }
            btree_map::Entry::Occupied(mut entry) => {
                let (known, new) = (entry.get().phase(), seen.phase());
                let better = match (gave_away(entry.key(), known), gave_away(entry.key(), new)) {
                    (true, true) => known != v1::TransferPhase::Completed,
                    (true, false) => false,
                    (false, true) => true,
                    (false, false) => !is_terminal(known),
                };
                if better {
                    entry.insert(seen);
                }
            }
        }
    }

    /// Forgets a side.
    pub(super) fn forget(&mut self, key: &SideKey) {
        let gone = self
            .records
            .remove(key)
            .is_some_and(|record| gave_away(key, record.phase()));
        let taken_back = standing::adopted(&self.history, key.migration.id());
        let of = |migration: &str| same(migration, &key.migration);
        // The server has stored this side's outcome: what named it in the journal has nothing to
        // tell any more.
        if let Some(state) = &mut self.state {
            let told = match (&state.ownership, key.role) {
                (Ownership::Relinquished { migration, .. }, Role::Source)
                | (
                    Ownership::Incoming { migration, .. }
                    | Ownership::Prepared { migration, .. }
                    | Ownership::Aborted { migration },
                    Role::Destination,
                ) => of(migration),
                (Ownership::Owner { .. }, Role::Source) => gone && !taken_back,
                _ => false,
            };
            if told {
                state.ownership = Ownership::Ended;
            }
        }
    }

    /// The epoch that this directory's process owned when it died: that VM is lost.
    pub(super) fn lost_epoch(&self) -> Option<u64> {
        standing::lost_epoch(self.state.as_ref(), self.given().is_some())
    }

    /// The epoch that it gave away, and by which migration, when nobody is known to have the VM
    /// since: the frozen memory, perhaps the last copy, died with the process.
    fn frozen(&self) -> Option<(u64, MigrationName)> {
        let relinquished = |migration: &MigrationName| {
            self.verdict(&SideKey::source(migration.clone()))
                .is_some_and(|side| side.phase() == v1::TransferPhase::Relinquished)
        };
        match &self.state.as_ref()?.ownership {
            Ownership::Relinquished { migration, epoch } => {
                let migration = MigrationName::parse(migration).ok()?;
                relinquished(&migration).then_some((*epoch, migration))
            }
            // Its entry failed, and it was fenced all the same.
            Ownership::Owner { epoch } if self.given().is_some() => {
                let mut given = self.records.iter().filter(|(key, record)| {
                    gave_away(key, record.phase())
                        && !standing::adopted(&self.history, key.migration.id())
                });
                let migration = &given.next()?.0.migration;
                relinquished(migration).then(|| (*epoch, migration.clone()))
            }
            _ => None,
        }
    }

    /// Whether what is lost is a copy that was given away: until its side is released.
    pub(super) fn is_frozen(&self) -> bool {
        self.frozen().is_some()
    }

    /// How far the source side stands that gave the VM away, when one was seen to.
    fn given(&self) -> Option<v1::TransferPhase> {
        self.records
            .iter()
            .map(|(key, record)| (key, record.phase()))
            .find(|(key, phase)| {
                gave_away(key, *phase) && !standing::adopted(&self.history, key.migration.id())
            })
            .map(|(_, phase)| phase)
    }

    /// Whether the directory may go without being released: nothing of it can matter to an
    /// ownership question that is still open, once its sides are kept elsewhere.
    pub(super) fn replaceable(&self) -> bool {
        match self.state.as_ref().map(|state| &state.ownership) {
            None
            | Some(
                Ownership::Ended
                | Ownership::Aborted { .. }
                | Ownership::Incoming { .. }
                | Ownership::Prepared { .. },
            ) => true,
            Some(Ownership::Relinquished { migration, .. }) => MigrationName::parse(migration)
                .is_ok_and(|migration| {
                    self.verdict(&SideKey::source(migration))
                        .is_some_and(|side| side.phase() == v1::TransferPhase::Completed)
                }),
            Some(Ownership::Owner { .. }) => self.given() == Some(v1::TransferPhase::Completed),
        }
    }

    /// The identity in its journal; empty when there was never a VM.
    fn uid(&self) -> String {
        let state = self.state.as_ref();
        state.map_or_else(String::new, |state| state.uid.clone())
    }

    /// The VM's name.
    pub(super) fn name(&self) -> &VmName {
        &self.vm
    }

    /// The last epoch that its journal names; 0 when it names none.
    pub(super) fn epoch(&self) -> u64 {
        match self.state.as_ref().map(|state| &state.ownership) {
            Some(
                Ownership::Owner { epoch }
                | Ownership::Incoming { epoch, .. }
                | Ownership::Prepared { epoch, .. }
                | Ownership::Relinquished { epoch, .. },
            ) => *epoch,
            _ => 0,
        }
    }

    /// Sides that nobody released, as they stand.
    pub(super) fn sides(&self) -> Vec<v1::Transfer> {
        let mut keys: Vec<SideKey> = self.records.keys().cloned().collect();
        if let Some(state) = &self.state {
            let named = match &state.ownership {
                Ownership::Relinquished { migration, .. } => {
                    MigrationName::parse(migration).map(SideKey::source).ok()
                }
                Ownership::Incoming { migration, .. } | Ownership::Prepared { migration, .. } => {
                    MigrationName::parse(migration)
                        .map(SideKey::destination)
                        .ok()
                }
                // Aborted without a record: ended and released. Owner: the record says whether it
                // is released.
                Ownership::Owner { .. } | Ownership::Aborted { .. } | Ownership::Ended => None,
            };
            keys.extend(named);
        }
        keys.sort();
        keys.dedup();
        keys.iter().filter_map(|key| self.verdict(key)).collect()
    }

    /// How a side stands; `None` when neither journal nor record knows of it.
    pub(super) fn verdict(&self, key: &SideKey) -> Option<v1::Transfer> {
        let record = self.records.get(key);
        let recorded = record.map(|record| recorded(record.phase()));
        let base = || self.base(key, record);
        let migration = key.migration.id();
        let mut side = match key.role {
            Role::Source => {
                let state = self.state.as_ref();
                Some(
                    match standing::source(state, &self.history, recorded, migration)? {
                        standing::SourceStands::Completed => base(),
                        standing::SourceStands::Relinquished => {
                            with_phase(base(), v1::TransferPhase::Relinquished)
                        }
                        standing::SourceStands::Ended => record.map(|_| base())?,
                        standing::SourceStands::Adopted => self.taken_back(base(), key),
                        standing::SourceStands::Stopped => self.stopped(base(), key),
                        standing::SourceStands::Died { .. } => {
                            let lost = self.lost_epoch().is_some();
                            let what = if lost {
                                "the VM's memory died with its process on the source"
                            } else {
                                "the source's process died after the VM had gone by another way"
                            };
                            self.died(base(), key, lost, what)
                        }
                    },
                )
            }
            Role::Destination => Some(
                match standing::destination(&self.history, recorded, migration)? {
                    standing::DestinationStands::Completed => self.owned(base(), key),
                    standing::DestinationStands::Ended => record.map(|_| base())?,
                    standing::DestinationStands::Died { prepared } => {
                        self.died_receiving(base(), key, prepared)
                    }
                },
            ),
        };
        if let Some(side) = &mut side {
            side.process_gone = true;
        }
        side
    }

    /// It took the VM over. Whether it still had it when it died is said too: a source that keeps
    /// its copy may be all that is left.
    fn owned(&self, side: v1::Transfer, key: &SideKey) -> v1::Transfer {
        let mut side = with_phase(side, v1::TransferPhase::Completed);
        if self.lost_epoch().is_some() {
            let what = "the VM's process died at the destination after it had taken the VM over";
            let mut error = ApiError::new(Reason::VmProcessDied, what)
                .with("vm", &self.vm)
                .with("migration", &key.migration)
                .with("side", key.role.as_str())
                .with("vm_location", "LOST");
            if !self.log.is_empty() {
                error = error.with("log", &self.log);
            }
            side.error =
                Some(error.to_migration_error(v1::MigrationPhase::Committed, key.role.as_str()));
            side.vm_lost = true;
        }
        side
    }

    /// The VM was ended here in mid-migration.
    fn stopped(&self, side: v1::Transfer, key: &SideKey) -> v1::Transfer {
        let error = ApiError::new(
            Reason::VmStoppedDuringMigration,
            "the VM was ended at its source, whose process was told to stop (SIGTERM)",
        )
        .with("vm", &self.vm)
        .with("migration", &key.migration)
        .with("side", key.role.as_str())
        .with("vm_location", "LOST")
        .to_migration_error(during(side.phase()), key.role.as_str());
        let mut side = with_phase(side, v1::TransferPhase::Failed);
        side.error = Some(error);
        side.vm_lost = true;
        side
    }

    /// An operator took the VM back: a destination in doubt that asks gives up.
    fn taken_back(&self, side: v1::Transfer, key: &SideKey) -> v1::Transfer {
        let error = ApiError::new(
            Reason::CancelledByUser,
            "an operator took the VM back at its source",
        )
        .with("vm", &self.vm)
        .with("migration", &key.migration)
        .to_migration_error(v1::MigrationPhase::Switchover, key.role.as_str());
        let mut side = with_phase(side, v1::TransferPhase::Cancelled);
        side.error = Some(error);
        side
    }

    fn died_receiving(&self, side: v1::Transfer, key: &SideKey, prepared: bool) -> v1::Transfer {
        if !prepared {
            let what = "the destination's process died while it received";
            return self.died(side, key, false, what);
        }
        let what = "the destination's process died after it had said READY, and the memory it received with it; \
                    the source's journal says whether the VM was handed over";
        let mut side = self.died(side, key, false, what);
        if let Some(error) = &mut side.error {
            error.advice = "ask the source's side: RELINQUISHED there means the VM is lost, anything else that it \
                            goes on there"
                .to_owned();
            let mut note = |key: &str, value: &str| {
                error.metadata.insert(key.to_owned(), value.to_owned());
            };
            note("prepared", "true");
            note("vm_location", "UNKNOWN");
        }
        side
    }

    /// The record, or what the journal alone knows.
    fn base(&self, key: &SideKey, record: Option<&v1::Transfer>) -> v1::Transfer {
        if let Some(record) = record {
            let mut record = record.clone();
            if record.vm_uid.is_empty() {
                // Written by an older version.
                record.vm_uid = self.uid();
            }
            return record;
        }
        let epoch = self
            .history
            .iter()
            .find_map(|entry| match (entry, key.role) {
                (
                    Entry::Relinquished {
                        migration, epoch, ..
                    },
                    Role::Source,
                )
                | (
                    Entry::Incoming {
                        migration, epoch, ..
                    },
                    Role::Destination,
                ) if same(migration, &key.migration) => Some(*epoch),
                _ => None,
            });
        v1::Transfer {
            migration: key.migration.to_string(),
            vm: self.vm.to_string(),
            vm_uid: self.uid(),
            role: key.role.to_message().into(),
            epoch: epoch.unwrap_or(0),
            ..Default::default()
        }
    }

    fn died(&self, side: v1::Transfer, key: &SideKey, vm_lost: bool, what: &str) -> v1::Transfer {
        let phase = during(side.phase());
        let mut error = ApiError::new(Reason::VmProcessDied, what)
            .with("vm", &self.vm)
            .with("migration", &key.migration)
            .with("side", key.role.as_str());
        if !self.log.is_empty() {
            error = error.with("log", &self.log);
        }
        if key.role == Role::Source {
            error = if vm_lost {
                error
                    .with("vm_location", "LOST")
                    .with("advice", "delete the VM and create it anew")
            } else {
                error
            };
        } else {
            error = error.with("advice", "migrate again");
        }
        let error = error.to_migration_error(phase, key.role.as_str());
        let mut side = with_phase(side, v1::TransferPhase::Failed);
        side.error = Some(error);
        side.vm_lost = vm_lost;
        side
    }

    /// The lost VM as it is shown until it is deleted; `seen` is what the agent last knew of it.
    /// `end`: how its process ended, where that is known.
    pub(super) fn lost_vm(
        &self,
        seen: Option<&v1::Vm>,
        host: &HostName,
        end: Option<End>,
    ) -> Option<v1::Vm> {
        let state = self.state.as_ref()?;
        let (epoch, mut message) = match (self.lost_epoch(), self.frozen()) {
            (Some(epoch), _) => (epoch, "its process died, and its memory with it".to_owned()),
            (None, Some((epoch, migration))) => (
                epoch,
                format!(
                    "{migration} gave it away and did not hear that the destination has it; then the frozen copy died \
                     with its process"
                ),
            ),
            (None, None) => return None,
        };
        if let Some(end) = end {
            message.push_str(": it ");
            message.push_str(&end.to_string());
        }
        if let Some(fault) = &self.fault {
            message.push_str("; its log's last warning: ");
            message.extend(fault.chars().take(200));
        }
        Some(lost(&self.vm, host, seen, &state.uid, epoch, message))
    }
}

/// A VM in state LOST, from what was last seen of it.
pub(super) fn lost(
    vm: &VmName,
    host: &HostName,
    seen: Option<&v1::Vm>,
    uid: &str,
    epoch: u64,
    message: String,
) -> v1::Vm {
    v1::Vm {
        name: vm.to_string(),
        uid: uid.to_owned(),
        host: host.to_string(),
        epoch,
        state: v1::vm::State::Lost.into(),
        state_message: message,
        migration: String::new(),
        mmu_stats: None,
        guest_counters: None,
        pid: 0,
        dirty_logging: false,
        ..seen.cloned().unwrap_or_default()
    }
}

/// The migration's phase while a side was in its own.
fn during(phase: v1::TransferPhase) -> v1::MigrationPhase {
    match phase {
        v1::TransferPhase::Precopy => v1::MigrationPhase::PrecopyActive,
        v1::TransferPhase::Switchover | v1::TransferPhase::Ready => v1::MigrationPhase::Switchover,
        _ => v1::MigrationPhase::Preparing,
    }
}

/// Whether a journal says that its process gave the VM away.
fn gives_away(contents: &Contents) -> bool {
    contents
        .entries
        .iter()
        .any(|entry| matches!(entry, Entry::Relinquished { .. }))
}

fn recorded(phase: v1::TransferPhase) -> Recorded {
    match phase {
        v1::TransferPhase::Relinquished => Recorded::Relinquished,
        v1::TransferPhase::Completed => Recorded::Completed,
        v1::TransferPhase::Cancelled | v1::TransferPhase::Failed => Recorded::Ended,
        _ => Recorded::Running,
    }
}

/// Sets the phase, with the time it was found when it is new.
fn with_phase(mut side: v1::Transfer, phase: v1::TransferPhase) -> v1::Transfer {
    if side.phase() != phase {
        side.set_phase(phase);
        // Not before what the process said last, whoever set the clock since.
        let last = side.phase_times.last().and_then(|entry| entry.time);
        side.phase_times.push(v1::TransferPhaseTime {
            phase: phase.into(),
            time: Some(Timeline::begin(last.as_ref()).now()),
        });
    }
    if phase != v1::TransferPhase::Failed {
        side.error = None;
        side.vm_lost = false;
    }
    side
}

/// Whether a journal's `{migration}` is this one.
fn same(written: &str, migration: &MigrationName) -> bool {
    MigrationName::parse(written).is_ok_and(|written| written == *migration)
}
