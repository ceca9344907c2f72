//! What is done to a VM's memory as a whole: slot changes, invalidation, digest.

use std::{
    num::NonZero,
    sync::Arc,
    time::{Duration, Instant},
};

use slat_proto::{
    ApiError, Reason,
    model::{SlotChange, SlotSpec, slots_for_memory},
    v1,
};

use super::{
    Machine,
    build::map,
    view::{Participation, State},
};
use crate::{
    backend::{Backend, BackendError},
    memory::{MemoryDigest, SlotMemory, SlotTable},
};

/// One change as it is carried out, and what undoes it.
enum Step {
    Added(u32),
    Removed(Arc<SlotMemory>),
    Moved(SlotSpec),
}

impl Machine {
    /// Changes slots, all or none, in order. `expected_generation`: 0 or the table's present
    /// generation.
    ///
    /// # Errors
    /// MIGRATION_IN_PROGRESS while the VM migrates; STALE_EPOCH; STALE_GENERATION; BAD_SLOT_TABLE,
    /// NO_SUCH_SLOT with the `change` at fault (from 0); BAD_SLOT_TABLE also for a change to the
    /// memory the VM was created with, where its guest lives; NO_MEMORY; the backend's. The table
    /// is then as it was; should undoing fail too, INTERNAL says so and the published table is what
    /// the backend has.
    pub(crate) fn update_slots(
        &self,
        changes: &[SlotChange],
        expected_generation: u64,
    ) -> Result<Arc<SlotTable>, ApiError> {
        let _control = self.control();
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
        let own = slots_for_memory(identity.spec.memory_bytes)?;
        let added = plan(&table, changes, &own)?;
        self.carry_out(&table, changes, added)?;
        Ok(self.memory.table())
    }

    /// A slot of the backend's and of the dirty log's.
    pub(super) fn add_slot(
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

    fn carry_out(
        &self,
        table: &SlotTable,
        changes: &[SlotChange],
        added: Vec<Arc<SlotMemory>>,
    ) -> Result<(), ApiError> {
        let mut now: Vec<Arc<SlotMemory>> = table.slots().to_vec();
        let mut done = Vec::with_capacity(changes.len());
        let mut added = added.into_iter();
        let backend = self.built_backend()?;
        for (index, change) in changes.iter().enumerate() {
            match self.step(&backend, &mut now, change, &mut added) {
                Ok(step) => done.push(step),
                Err(error) => {
                    let error = ApiError::from(error).with("change", index);
                    return Err(self.undo(&backend, now, done, error));
                }
            }
        }
        self.memory.publish(now);
        Ok(())
    }

    fn step(
        &self,
        backend: &Arc<dyn Backend>,
        now: &mut Vec<Arc<SlotMemory>>,
        change: &SlotChange,
        added: &mut impl Iterator<Item = Arc<SlotMemory>>,
    ) -> Result<Step, BackendError> {
        let position = |now: &[Arc<SlotMemory>], slot: u32| {
            now.iter()
                .position(|memory| memory.spec().slot == slot)
                .ok_or(BackendError::NoSuchSlot { slot })
        };
        match *change {
            SlotChange::Create(spec) => {
                let memory = added
                    .next()
                    .ok_or(BackendError::NoSuchSlot { slot: spec.slot })?;
                self.add_slot(backend, &memory)?;
                now.push(memory);
                Ok(Step::Added(spec.slot))
            }
            SlotChange::Delete { slot } => {
                let at = position(now, slot)?;
                self.remove_slot(backend, slot)?;
                Ok(Step::Removed(now.remove(at)))
            }
            SlotChange::Move { slot, base_gfn } => {
                let at = position(now, slot)?;
                let old = now[at].spec();
                let new = SlotSpec { base_gfn, ..old };
                self.move_slot(backend, new)?;
                now[at] = Arc::new(now[at].moved(new));
                Ok(Step::Moved(old))
            }
        }
    }

    /// Takes the steps back, last first, and returns the error to report.
    fn undo(
        &self,
        backend: &Arc<dyn Backend>,
        mut now: Vec<Arc<SlotMemory>>,
        done: Vec<Step>,
        cause: ApiError,
    ) -> ApiError {
        for step in done.into_iter().rev() {
            let undone = match step {
                Step::Added(slot) => self.remove_slot(backend, slot).map(|()| {
                    now.retain(|memory| memory.spec().slot != slot);
                }),
                Step::Removed(memory) => self.add_slot(backend, &memory).map(|()| now.push(memory)),
                Step::Moved(old) => self.move_slot(backend, old).map(|()| {
                    for memory in now
                        .iter_mut()
                        .filter(|memory| memory.spec().slot == old.slot)
                    {
                        *memory = Arc::new(memory.moved(old));
                    }
                }),
            };
            if let Err(error) = undone {
                self.memory.publish(now);
                return ApiError::new(
                    Reason::Internal,
                    format!("{cause}; undoing the changes before it failed too: {error}"),
                )
                .with("vm", &self.shared.vm)
                .with(
                    "advice",
                    "list the slots: the table is what the backend has now",
                );
            }
        }
        cause
    }

    /// Drops the second-stage mappings of guest frames (first, pages), or of every slot. Contents
    /// stay. Returns the pages in the range and how long the backend took.
    ///
    /// # Errors
    /// NO_SUCH_VM; STALE_EPOCH; CAPABILITY_MISSING; BAD_PARAMETER when the range is empty or not
    /// all of it lies in slots; the backend's.
    pub(crate) fn invalidate(
        &self,
        range: Option<(u64, u64)>,
    ) -> Result<(u64, Duration), ApiError> {
        let view = self.shared.view();
        self.shared.identity(&view)?;
        if view.state == State::Relinquished {
            return Err(self.shared.stale_epoch(&view));
        }
        let backend = self.built_backend()?;
        if !backend.capabilities().contains(&v1::Capability::Invalidate) {
            return Err(ApiError::capability_missing(
                &self.shared.vm,
                v1::Capability::Invalidate,
            ));
        }
        let table = self.memory.table();
        let pieces = match range {
            Some((gfn, pages)) => within_slots(&table, gfn, pages)?,
            None => table
                .slots()
                .iter()
                .map(|slot| (slot.spec().base_gfn, slot.spec().pages))
                .collect(),
        };
        let started = Instant::now();
        let mut pages = 0;
        for (gfn, len) in pieces {
            backend.invalidate(gfn, len)?;
            pages += len;
        }
        Ok((pages, started.elapsed()))
    }

    /// Digest of all guest memory. Life-cycle calls wait until it is done, so that nothing writes
    /// meanwhile.
    ///
    /// # Errors
    /// NO_SUCH_VM; VM_RUNNING; MIGRATION_IN_PROGRESS during the switchover, which it would
    /// lengthen.
    pub(crate) fn digest(&self) -> Result<MemoryDigest, ApiError> {
        let _control = self.control();
        // Under the lock: the switchover may have begun while this waited for it.
        self.refuse_at_once("be digested")?;
        let view = self.shared.view();
        self.shared.identity(&view)?;
        if view.state == State::Running {
            return Err(ApiError::new(
                Reason::VmRunning,
                format!(
                    "{} runs: its memory changes while it is read",
                    self.shared.vm
                ),
            )
            .with("vm", &self.shared.vm)
            .with("advice", "pause the VM"));
        }
        let threads = std::thread::available_parallelism().map_or(1, NonZero::get);
        Ok(MemoryDigest::of(&self.memory.table(), threads))
    }

    /// The slots as the API shows them.
    ///
    /// # Errors
    /// NO_SUCH_VM.
    pub(crate) fn list_slots(&self) -> Result<(Vec<v1::Slot>, u64), ApiError> {
        self.shared.identity(&self.shared.view())?;
        Ok(self.show_slots(&self.memory.table()))
    }

    /// A table as the API shows it, and its generation.
    pub(crate) fn show_slots(&self, table: &SlotTable) -> (Vec<v1::Slot>, u64) {
        let slots = table
            .slots()
            .iter()
            .map(|slot| v1::Slot {
                dirty_logging: self.dirty.slot_enabled(slot.spec().slot),
                ..slot.spec().to_message()
            })
            .collect();
        (slots, table.generation())
    }

    /// Whether callers may read dirty pages now.
    ///
    /// # Errors
    /// NO_SUCH_VM; STALE_EPOCH when handed over; VM_STATE while the VM is received;
    /// CAPABILITY_MISSING.
    pub(crate) fn check_dirty_readable(&self) -> Result<(), ApiError> {
        let view = self.shared.view();
        self.shared.identity(&view)?;
        if view.state == State::Relinquished {
            return Err(self.shared.stale_epoch(&view));
        }
        if let Participation::Incoming { migration, .. } = &view.participation {
            return Err(self
                .shared
                .bad_state(&view, "report dirty pages")
                .with("migration", migration));
        }
        let capabilities = self.built_backend()?.capabilities();
        if capabilities.contains(&v1::Capability::DirtyLog) {
            return Ok(());
        }
        Err(ApiError::capability_missing(
            &self.shared.vm,
            v1::Capability::DirtyLog,
        ))
    }
}

/// Checks every change and maps the new slots; nothing is changed yet.
fn plan(
    table: &SlotTable,
    changes: &[SlotChange],
    own: &[SlotSpec],
) -> Result<Vec<Arc<SlotMemory>>, ApiError> {
    let mut specs: Vec<SlotSpec> = table.slots().iter().map(|slot| slot.spec()).collect();
    let mut needed = 0_u64;
    for (index, change) in changes.iter().enumerate() {
        let touched = match *change {
            SlotChange::Create(spec) => {
                needed = needed.saturating_add(spec.bytes());
                None
            }
            SlotChange::Delete { slot } | SlotChange::Move { slot, .. } => Some(slot),
        };
        if let Some(slot) = touched.filter(|slot| own.iter().any(|spec| spec.slot == *slot)) {
            return Err(ApiError::new(
                Reason::BadSlotTable,
                format!("slot {slot} is memory the VM was created with; its guest lives there"),
            )
            .with("slot", slot)
            .with("change", index)
            .with("advice", "delete the VM instead"));
        }
        specs = change
            .apply(&specs)
            .map_err(|error| error.with("change", index))?;
    }
    check_free(needed, Reason::NoMemory)?;
    changes
        .iter()
        .filter_map(|change| match change {
            SlotChange::Create(spec) => Some(map(*spec, Reason::NoMemory)),
            _ => None,
        })
        .collect()
}

/// `no_memory` when the host could not hold new slots of so many bytes now. Where the kernel does
/// not say, it is not checked.
pub(super) fn check_free(needed: u64, no_memory: Reason) -> Result<(), ApiError> {
    let free = std::fs::read_to_string("/proc/meminfo")
        .ok()
        .as_deref()
        .and_then(available_bytes);
    match free {
        Some(free) if needed > free => Err(ApiError::new(
            no_memory,
            format!("the new slots need {needed} bytes, the host has {free}"),
        )
        .with("needed_bytes", needed)
        .with("free_bytes", free)),
        _ => Ok(()),
    }
}

/// MemAvailable of /proc/meminfo.
fn available_bytes(meminfo: &str) -> Option<u64> {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// `[gfn, gfn + pages)` cut at slot boundaries, when all of it lies in slots.
fn within_slots(table: &SlotTable, gfn: u64, pages: u64) -> Result<Vec<(u64, u64)>, ApiError> {
    let bad = |message: String| {
        ApiError::bad_parameter("range", message)
            .with("gfn", gfn)
            .with("pages", pages)
    };
    let end = gfn
        .checked_add(pages)
        .filter(|_| pages > 0)
        .ok_or_else(|| bad(format!("{pages} pages from frame {gfn:#x} are no range")))?;
    let mut pieces = Vec::new();
    let mut at = gfn;
    while at < end {
        let (slot, _) = table
            .find(at)
            .ok_or_else(|| bad(format!("frame {at:#x} is in no slot")))?;
        let to = slot.spec().end_gfn().min(end);
        pieces.push((at, to - at));
        at = to;
    }
    Ok(pieces)
}

#[cfg(test)]
mod tests {
    use super::available_bytes;

    #[test]
    fn meminfo_is_read_in_bytes() {
        let text = "MemTotal:  100 kB\nMemAvailable:     42 kB\n";
        assert_eq!(available_bytes(text), Some(42 << 10));
        assert_eq!(available_bytes("MemTotal: 1 kB\n"), None);
    }
}
