//! Slot changes as they are made, one after the other, and taken back when one fails.
//!
//! What one change costs does not grow with the number of slots: a batch is a thousand of them, and
//! the vCPUs may wait for it.

use std::{collections::BTreeMap, sync::Arc};

use slat_proto::{
    ApiError, Reason,
    model::{SlotChange, SlotSpec},
};

use super::super::Machine;
use crate::{
    backend::{Backend, BackendError},
    memory::{SlotMemory, SlotTable},
};

/// The slots that the backend has now, by number.
type Slots = BTreeMap<u32, Arc<SlotMemory>>;

/// One change as it was made, and what undoes it.
enum Step {
    Added(u32),
    Removed(Arc<SlotMemory>),
    Moved(SlotSpec),
    Flagged(SlotSpec),
    /// It asked for what was so already.
    Nothing,
}

impl Machine {
    /// A slot of the backend's and of the dirty log's.
    pub(in crate::machine) fn add_slot(
        &self,
        backend: &Arc<dyn Backend>,
        memory: &Arc<SlotMemory>,
    ) -> Result<(), BackendError> {
        let spec = memory.spec();
        self.dirty.add_slot(
            spec,
            || backend.add_slot(memory),
            || backend.remove_slot(spec.slot),
        )
    }

    fn remove_slot(&self, backend: &Arc<dyn Backend>, slot: u32) -> Result<(), BackendError> {
        self.dirty.remove_slot(slot, || backend.remove_slot(slot))
    }

    fn move_slot(&self, backend: &Arc<dyn Backend>, spec: SlotSpec) -> Result<(), BackendError> {
        self.dirty
            .move_slot(spec, || backend.move_slot(spec.slot, spec.base_gfn))
    }

    /// Makes a slot read-only or writable. The vCPUs are stopped.
    fn set_read_only(
        &self,
        backend: &Arc<dyn Backend>,
        now: &mut Slots,
        spec: SlotSpec,
    ) -> Result<(), ApiError> {
        let mut gone = false;
        let made = self.dirty.remake_slot(
            spec.slot,
            || backend.set_read_only(spec.slot, spec.read_only),
            |error| {
                gone = matches!(error, BackendError::SlotLost { .. });
                gone
            },
        );
        if gone {
            self.slot_went(spec.slot);
            now.remove(&spec.slot);
        }
        made
    }

    /// Makes the changes and publishes the table.
    pub(super) fn carry_out(
        &self,
        table: &SlotTable,
        changes: &[SlotChange],
        added: Vec<Arc<SlotMemory>>,
    ) -> Result<(), ApiError> {
        let by_number = |memory: &Arc<SlotMemory>| (memory.spec().slot, Arc::clone(memory));
        let mut now: Slots = table.slots().iter().map(by_number).collect();
        let mut done = Vec::with_capacity(changes.len());
        let mut added = added.into_iter();
        let backend = self.built_backend()?;
        for (index, change) in changes.iter().enumerate() {
            match self.step(&backend, &mut now, change, &mut added) {
                Ok(step) => done.push(step),
                Err(error) => {
                    let error = located(error, change).with("change", index);
                    return Err(self.undo(&backend, now, table, done, error));
                }
            }
        }
        self.memory.publish(now.into_values().collect());
        Ok(())
    }

    fn step(
        &self,
        backend: &Arc<dyn Backend>,
        now: &mut Slots,
        change: &SlotChange,
        added: &mut impl Iterator<Item = Arc<SlotMemory>>,
    ) -> Result<Step, ApiError> {
        let of = |now: &Slots, slot: u32| {
            now.get(&slot)
                .cloned()
                .ok_or(BackendError::NoSuchSlot { slot })
        };
        match *change {
            SlotChange::Create(spec) => {
                let memory = added
                    .next()
                    .ok_or(BackendError::NoSuchSlot { slot: spec.slot })?;
                self.slot_comes(&memory)?;
                self.add_slot(backend, &memory)
                    .inspect_err(|_| self.slot_went(spec.slot))?;
                now.insert(spec.slot, memory);
                Ok(Step::Added(spec.slot))
            }
            SlotChange::Delete { slot } => {
                let memory = of(now, slot)?;
                self.remove_slot(backend, slot)?;
                self.slot_went(slot);
                now.remove(&slot);
                Ok(Step::Removed(memory))
            }
            SlotChange::Move { slot, base_gfn } => {
                let memory = of(now, slot)?;
                let old = memory.spec();
                if old.base_gfn == base_gfn {
                    return Ok(Step::Nothing);
                }
                let new = SlotSpec { base_gfn, ..old };
                self.move_slot(backend, new)?;
                let moved = Arc::new(memory.moved(new));
                self.slot_moved(&moved);
                now.insert(slot, moved);
                Ok(Step::Moved(old))
            }
            SlotChange::SetFlags { slot, read_only } => {
                let memory = of(now, slot)?;
                let old = memory.spec();
                if old.read_only == read_only {
                    return Ok(Step::Nothing);
                }
                let new = SlotSpec { read_only, ..old };
                self.set_read_only(backend, now, new)?;
                let remade = Arc::new(memory.moved(new));
                self.slot_remade(&remade);
                now.insert(slot, remade);
                Ok(Step::Flagged(old))
            }
        }
    }

    /// Takes the steps back, last first, and returns the error to report. `table` is what was
    /// published before them.
    fn undo(
        &self,
        backend: &Arc<dyn Backend>,
        mut now: Slots,
        table: &SlotTable,
        done: Vec<Step>,
        cause: ApiError,
    ) -> ApiError {
        let put_back = |now: &mut Slots, old: SlotSpec| {
            if let Some(memory) = now.get_mut(&old.slot) {
                *memory = Arc::new(memory.moved(old));
                return Some(Arc::clone(memory));
            }
            None
        };
        for step in done.into_iter().rev() {
            let undone: Result<(), ApiError> = match step {
                Step::Added(slot) => {
                    self.remove_slot(backend, slot)
                        .map_err(Into::into)
                        .map(|()| {
                            self.slot_went(slot);
                            now.remove(&slot);
                        })
                }
                Step::Removed(memory) => self
                    .slot_comes(&memory)
                    .and_then(|()| Ok(self.add_slot(backend, &memory)?))
                    .map(|()| {
                        now.insert(memory.spec().slot, memory);
                    }),
                Step::Moved(old) => self.move_slot(backend, old).map_err(Into::into).map(|()| {
                    if let Some(memory) = put_back(&mut now, old) {
                        self.slot_moved(&memory);
                    }
                }),
                Step::Flagged(old) => {
                    let undone = self.set_read_only(backend, &mut now, old);
                    match undone {
                        Ok(()) => {
                            if let Some(memory) = put_back(&mut now, old) {
                                self.slot_remade(&memory);
                            }
                        }
                        Err(error) => return self.half_done(now, &cause, &error),
                    }
                    Ok(())
                }
                Step::Nothing => Ok(()),
            };
            if let Err(error) = undone {
                return self.half_done(now, &cause, &error);
            }
        }
        if now.len() < table.slots().len() {
            return self.half_done(now, &cause, &"a slot could not be put back");
        }
        cause
    }

    /// Publishes what the backend has, and says so.
    fn half_done(&self, now: Slots, cause: &ApiError, error: &dyn std::fmt::Display) -> ApiError {
        self.memory.publish(now.into_values().collect());
        ApiError::new(
            Reason::Internal,
            format!("{cause}; undoing the changes before it failed too: {error}"),
        )
        .with("vm", &self.shared.vm)
        .with(
            "advice",
            "list the slots: the table is what the backend has now",
        )
    }
}

/// Says which slot and which frames a failed change was for.
fn located(error: ApiError, change: &SlotChange) -> ApiError {
    let error = error.with("slot", change.slot());
    match *change {
        SlotChange::Create(spec) => error.with("gfn", spec.base_gfn).with("pages", spec.pages),
        SlotChange::Move { base_gfn, .. } => error.with("gfn", base_gfn),
        SlotChange::Delete { .. } | SlotChange::SetFlags { .. } => error,
    }
}
