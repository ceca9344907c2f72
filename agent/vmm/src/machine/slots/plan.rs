//! Slot changes before they are made: checked, their memory mapped, and whether the vCPUs have to
//! stop for them.
//!
//! # When vCPUs stop
//! KVM makes one change at a time, and neither a move nor a change of flags is one step for a vCPU:
//! in between the guest would find nothing where it has memory before and after, and such an access
//! ends it. So the vCPUs stop once for the whole batch, unless it only creates slots, or deletes
//! one as its last change: nobody can rely on memory that is not there yet, or any more. A batch
//! whose delete is followed by something that could fail stops them too, since undoing it brings
//! the slot back, and the guest is not to notice.

use std::sync::Arc;

use slat_proto::{
    ApiError, Reason,
    model::{SlotChange, SlotPlan, SlotSpec},
};

use super::super::{
    build::{map_all, may_have},
    room::check_free,
};
use crate::{
    backend::Backend,
    memory::{Mode, SlotMemory, SlotTable, check_room},
};

/// Changes that can be made.
#[derive(Debug)]
pub(super) struct Plan {
    /// Memory of the slots that are created, in order.
    pub(super) added: Vec<Arc<SlotMemory>>,
    /// Whether no vCPU may run meanwhile.
    pub(super) stops: bool,
}

/// Checks every change and maps the new slots in the VM's mode; nothing is changed yet. `own` are
/// the slots that the VM was created with.
pub(super) fn plan(
    backend: &dyn Backend,
    table: &SlotTable,
    changes: &[SlotChange],
    own: &[SlotSpec],
    mode: Mode,
) -> Result<Plan, ApiError> {
    let mut plan = SlotPlan::new(table.slots().iter().map(|slot| slot.spec()));
    let mut needed = 0_u64;
    for (index, change) in changes.iter().enumerate() {
        check(backend, &mut plan, change, own).map_err(|error| error.with("change", index))?;
        if let SlotChange::Create(spec) = change {
            needed = needed.saturating_add(spec.bytes());
        }
    }
    // What needs no memory is not refused for want of it.
    if needed > 0 {
        check_free(mode.backing.ordinary_bytes(needed), Reason::NoMemory)?;
        check_room(mode, needed)?;
    }
    let created = changes
        .iter()
        .enumerate()
        .filter_map(|(index, change)| match change {
            SlotChange::Create(spec) => Some((index, *spec)),
            _ => None,
        });
    let (indices, specs): (Vec<usize>, Vec<SlotSpec>) = created.unzip();
    let added = map_all(&specs, mode, Reason::NoMemory)
        .map_err(|(at, error)| error.with("change", indices[at]))?;
    Ok(Plan {
        added,
        stops: stops(changes),
    })
}

fn check(
    backend: &dyn Backend,
    plan: &mut SlotPlan,
    change: &SlotChange,
    own: &[SlotSpec],
) -> Result<(), ApiError> {
    let slot = change.slot();
    let read_only = match *change {
        SlotChange::Create(spec) => spec.read_only,
        SlotChange::SetFlags { read_only, .. } => read_only,
        SlotChange::Delete { .. } | SlotChange::Move { .. } => false,
    };
    let creates = matches!(change, SlotChange::Create(_));
    if !creates && own.iter().any(|spec| spec.slot == slot) {
        return Err(ApiError::new(
            Reason::BadSlotTable,
            format!("slot {slot} is memory the VM was created with; its guest lives there"),
        )
        .with("slot", slot)
        .with(
            "advice",
            "other slots can be changed; this one goes with the VM",
        ));
    }
    let others = creates.then(|| plan.len());
    may_have(backend, slot, read_only, others)?;
    plan.apply(change)
}

/// Whether every change asks for what is so already, of slots that may be changed: nothing is done
/// then, and no vCPU stops for it.
pub(super) fn is_as_it_is(table: &SlotTable, changes: &[SlotChange], own: &[SlotSpec]) -> bool {
    let so = |change: &SlotChange| {
        let Some(slot) = table.slot(change.slot()) else {
            return false;
        };
        match *change {
            SlotChange::Move { base_gfn, .. } => slot.spec().base_gfn == base_gfn,
            SlotChange::SetFlags { read_only, .. } => slot.spec().read_only == read_only,
            SlotChange::Create(_) | SlotChange::Delete { .. } => false,
        }
    };
    let is_own = |change: &SlotChange| own.iter().any(|spec| spec.slot == change.slot());
    !changes.is_empty() && changes.iter().all(|change| so(change) && !is_own(change))
}

/// See the module.
pub(super) fn stops(changes: &[SlotChange]) -> bool {
    let last = changes.len().saturating_sub(1);
    changes
        .iter()
        .enumerate()
        .any(|(index, change)| match change {
            SlotChange::Create(_) => false,
            SlotChange::Delete { .. } => index < last,
            SlotChange::Move { .. } | SlotChange::SetFlags { .. } => true,
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_so_already_stops_nobody_and_changes_nothing() {
        let vm = crate::fake::created();
        let create = SlotChange::Create(SlotSpec::new(5, 0x10_0000, 1, false).unwrap());
        let before = vm.machine.update_slots(&[create], 0).unwrap();
        vm.machine.start().unwrap();
        let same = [
            SlotChange::Move {
                slot: 5,
                base_gfn: 0x10_0000,
            },
            SlotChange::SetFlags {
                slot: 5,
                read_only: false,
            },
        ];
        let after = vm.machine.update_slots(&same, 0).unwrap();
        assert_eq!(after.table.generation(), before.table.generation());
        assert!(after.paused.is_zero());
        let differs = SlotChange::SetFlags {
            slot: 5,
            read_only: true,
        };
        let changed = vm.machine.update_slots(&[differs], 0).unwrap();
        assert!(changed.table.generation() > before.table.generation());
    }

    #[test]
    fn a_host_without_room_refuses_new_memory_alone() {
        let vm = crate::fake::created();
        let backend = &*vm.backend;
        let nowhere = Mode {
            node: Some(4000),
            ..Mode::default()
        };
        let create = SlotChange::Create(SlotSpec::new(5, 0x10_0000, 1, false).unwrap());
        let table = vm.machine.memory().table();
        let refused = plan(backend, &table, &[create], &[], nowhere).unwrap_err();
        assert_eq!(refused.reason, Reason::NoSuchNode);
        vm.machine.update_slots(&[create], 0).unwrap();
        let table = vm.machine.memory().table();
        let delete = SlotChange::Delete { slot: 5 };
        plan(backend, &table, &[delete], &[], nowhere).unwrap();
    }

    #[test]
    fn only_what_nobody_can_rely_on_changes_under_running_vcpus() {
        let create = SlotChange::Create(SlotSpec::new(5, 9, 1, false).unwrap());
        let delete = SlotChange::Delete { slot: 5 };
        let move_it = SlotChange::Move {
            slot: 5,
            base_gfn: 7,
        };
        let protect = SlotChange::SetFlags {
            slot: 5,
            read_only: true,
        };
        for runs in [
            &[create][..],
            &[create, create],
            &[delete],
            &[create, delete],
        ] {
            assert!(!stops(runs), "{runs:?}");
        }
        for stop in [
            &[move_it][..],
            &[protect],
            &[delete, create],
            &[delete, delete],
            &[create, delete, create],
        ] {
            assert!(stops(stop), "{stop:?}");
        }
    }
}
