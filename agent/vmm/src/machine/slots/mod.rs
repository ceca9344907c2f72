//! A VM's memory slots: changed ([`plan`], [`steps`]), read ([`look`]), and what is done to ranges
//! of frames in them ([`range`]).
//!
//! Changes are made under the machine's control lock: checked and mapped while the guest runs, then
//! made, with the vCPUs stopped once for all of them where that is needed.

mod look;
mod plan;
mod range;
mod steps;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use slat_proto::{
    ApiError, Reason,
    model::{SlotChange, slots_for_memory},
};

use super::{Control, Machine, view::State};
use crate::memory::{BLOCK_BYTES, Mode, SlotTable};

/// Changes that are made at once.
const FEW: usize = 8;

/// Slots of a table whose looking over takes no time worth a thread.
const MODEST: usize = 1024;

/// What became of a batch of changes.
#[derive(Debug)]
pub(crate) struct SlotUpdate {
    /// The table afterwards.
    pub(crate) table: Arc<SlotTable>,
    /// How long no vCPU ran; 0 when none was stopped.
    pub(crate) paused: Duration,
    /// How long it took in all.
    pub(crate) took: Duration,
}

impl Machine {
    /// Changes slots, all or none, in order. `expected_generation`: 0 or the table's present
    /// generation.
    ///
    /// # Errors
    /// MIGRATION_IN_PROGRESS while the VM migrates; STALE_EPOCH; STALE_GENERATION; BAD_SLOT_TABLE,
    /// NO_SUCH_SLOT, LIMIT_REACHED, CAPABILITY_MISSING with the `change` at fault (from 0);
    /// BAD_SLOT_TABLE also for a change to the memory the VM was created with, where its guest
    /// lives; NO_MEMORY, NO_HUGE_PAGES; SOURCE_PAUSE; the backend's. The table is then as it was;
    /// should undoing fail too, INTERNAL says so and the published table is what the backend has.
    /// When the vCPUs cannot run again afterwards, the VM is PAUSED, the changes may have been
    /// made, and the error says to list the slots.
    pub(crate) fn update_slots(
        &self,
        changes: &[SlotChange],
        expected_generation: u64,
    ) -> Result<SlotUpdate, ApiError> {
        self.update_slots_held(&self.control(), changes, expected_generation)
    }

    /// The same, where it waits for nobody and is over in a moment: a few changes, which stop no
    /// vCPU, of small slots, while nobody reads dirty pages. `None`, having done nothing, where it
    /// could be otherwise. A reader of dirty pages that comes in the same moment is waited for.
    ///
    /// # Errors
    /// As [`Machine::update_slots`].
    pub(crate) fn update_slots_at_once(
        &self,
        changes: &[SlotChange],
        expected_generation: u64,
    ) -> Option<Result<SlotUpdate, ApiError>> {
        if changes.len() > FEW || self.is_watched() {
            return None;
        }
        let control = self.control_if_free()?;
        if self.is_watched() {
            // Since a moment ago.
            return None;
        }
        let view = self.shared.view();
        let spec = view.identity.as_ref().map(|identity| &identity.spec);
        let populates = spec.is_some_and(|spec| {
            spec.prefault || spec.backing.reserved_page().is_some() || spec.numa_node.is_some()
        });
        let table = self.memory.table();
        if table.slots().len() > MODEST {
            return None;
        }
        let small = |change: &SlotChange| match change {
            SlotChange::Create(spec) => spec.bytes() < BLOCK_BYTES,
            _ => table
                .slot(change.slot())
                .is_none_or(|memory| memory.spec().bytes() < BLOCK_BYTES),
        };
        let stops = view.state == State::Running && plan::stops(changes);
        if populates || stops || !self.dirty.is_idle() || !changes.iter().all(small) {
            return None;
        }
        drop((view, table));
        Some(self.update_slots_held(&control, changes, expected_generation))
    }

    fn update_slots_held(
        &self,
        control: &Control,
        changes: &[SlotChange],
        expected_generation: u64,
    ) -> Result<SlotUpdate, ApiError> {
        let view = self.shared.view();
        let identity = self.shared.identity(&view)?;
        if view.state == State::Relinquished {
            return Err(self.shared.stale_epoch(&view));
        }
        if let Some(migration) = view.participation.migration() {
            return Err(self.shared.migrating(migration, "change its slots"));
        }
        let table = self.memory.table();
        if expected_generation != 0 && expected_generation != table.generation() {
            return Err(ApiError::new(
                Reason::StaleGeneration,
                format!(
                    "the slot table is at generation {}, not {expected_generation}",
                    table.generation()
                ),
            )
            .with("vm", &self.shared.vm)
            .with("generation", table.generation())
            .with("advice", "list the slots again and retry"));
        }
        let begun = Instant::now();
        let own = slots_for_memory(identity.spec.memory_bytes)?;
        if plan::is_as_it_is(&table, changes, &own) {
            return Ok(SlotUpdate {
                table,
                paused: Duration::ZERO,
                took: begun.elapsed(),
            });
        }
        let mode = Mode::from(&identity.spec);
        let plan = plan::plan(&*self.built_backend()?, &table, changes, &own, mode)?;
        if identity.spec.prefault || mode.backing.reserved_page().is_some() {
            self.populate_now(&plan.added, mode)?;
        }
        let change = || self.carry_out(&table, changes, plan.added);
        let (changed, paused) = if plan.stops {
            self.while_stopped(control, change)?
        } else {
            (change(), Duration::ZERO)
        };
        changed?;
        Ok(SlotUpdate {
            table: self.memory.table(),
            paused,
            took: begun.elapsed(),
        })
    }
}
