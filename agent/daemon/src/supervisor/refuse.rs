//! Refusals, with what is in the way and what to do.

use slat_proto::{
    ApiError, Reason,
    model::{PAGE_SIZE, VmName},
    v1,
};

use crate::{
    living::LiveVm,
    registry::{Held, Refusal, Work},
    side::SideKey,
};

/// Bytes of a slot table.
pub(crate) fn slot_bytes(slots: &[v1::Slot]) -> u64 {
    slots.iter().fold(0, |sum, slot| {
        sum.saturating_add(slot.pages.saturating_mul(PAGE_SIZE))
    })
}

/// VM_EXISTS, with what holds the name.
pub(super) fn exists(vm: &VmName, held: &Held) -> ApiError {
    let (state, advice) = match held {
        Held::Busy {
            work: Work::Creating,
            ..
        } => ("being created", "wait for it or take another name"),
        Held::Busy {
            work: Work::Preparing(_),
            ..
        } => ("being received", "wait for the migration"),
        Held::Busy {
            work: Work::Clearing,
            ..
        } => ("being removed", "try again"),
        // Deleting it is no way out: it may be the last copy.
        Held::Live(live) if live.snapshot().is_some_and(|vm| is_side(&vm)) => (
            "there as a side of a migration",
            "wait for that migration or cancel it; what stays is a leftover of this host",
        ),
        Held::Live(_) => ("a VM of this host", "take another name or delete it"),
        Held::Dead(dead) if dead.lost().is_some() => (
            "LOST: its process died here",
            "delete it on this host first, by its uid: as a VM, or as a leftover when the VM lives elsewhere",
        ),
        Held::Dead(_) => (
            "there as what is left of a migration",
            "try again when the server has stored how it ended, or delete the leftover of this host",
        ),
    };
    let error = ApiError::new(Reason::VmExists, format!("{vm} is here already: {state}"))
        .with("vm", vm)
        .with("state", state)
        .with("advice", advice);
    match held {
        Held::Live(live) => error.with("uid", live.uid()),
        Held::Dead(dead) => error.with("uid", dead.uid()),
        Held::Busy { .. } => error,
    }
}

/// Whether what is here is a side of a migration, and no VM of this host's.
pub(super) fn is_side(vm: &v1::Vm) -> bool {
    matches!(
        vm.state(),
        v1::vm::State::Incoming | v1::vm::State::Relinquished
    )
}

/// The VM that is to be received is this host's already.
pub(super) fn is_here(live: &LiveVm) -> ApiError {
    ApiError::new(
        Reason::VmExists,
        format!("{} is this host's already, the very VM", live.name()),
    )
    .with("vm", live.name())
    .with("uid", live.uid())
    .with("state", "a VM of this host")
    .with(
        "advice",
        "look where it runs before anything is deleted: slat get vms",
    )
}

pub(super) fn refused(vm: &VmName, reason: Reason, refusal: Refusal) -> ApiError {
    match refusal {
        Refusal::Held(held) => exists(vm, &held),
        Refusal::Name(uid, held) => exists(vm, &held).with("uid", uid),
        Refusal::NoMemory { needed, free } => no_memory(vm, reason, needed, free),
    }
}

/// NO_MEMORY or DST_NO_MEMORY with the figures.
pub(crate) fn no_memory(vm: &VmName, reason: Reason, needed: u64, free: u64) -> ApiError {
    ApiError::new(
        reason,
        format!("{vm} needs {needed} bytes, {free} are free on this host"),
    )
    .with("vm", vm)
    .with("needed_bytes", needed)
    .with("free_bytes", free)
    .with(
        "advice",
        "delete a VM here, take less memory or another host",
    )
}

/// A side that has ended cannot be prepared again.
pub(super) fn side_ended(key: &SideKey, side: &v1::Transfer) -> ApiError {
    let cause = side
        .error
        .as_ref()
        .map(|error| error.message.clone())
        .unwrap_or_default();
    ApiError::new(
        Reason::MigrationExists,
        format!(
            "the {} side of {} has ended ({}) {cause}",
            key.role.as_str(),
            key.migration,
            side.phase().as_str_name()
        )
        .trim_end()
        .to_owned(),
    )
    .with("migration", &key.migration)
    .with("phase", side.phase().as_str_name())
    .with("advice", "release it and begin a new migration")
}
