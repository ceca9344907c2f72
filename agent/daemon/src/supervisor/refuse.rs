//! Refusals, with what is in the way and what to do.

use slat_proto::{
    ApiError, Reason,
    model::{PAGE_SIZE, VmName},
    v1,
};

use crate::{
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
        Held::Live(_) => ("there", "take another name or delete it"),
        Held::Dead(dead) if dead.lost().is_some() => ("lost with its process", "delete it first"),
        Held::Dead(_) => (
            "in a migration that was not released yet",
            "try again when the server has stored its outcome",
        ),
    };
    ApiError::new(Reason::VmExists, format!("{vm} is here already: {state}"))
        .with("vm", vm)
        .with("state", state)
        .with("advice", advice)
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
