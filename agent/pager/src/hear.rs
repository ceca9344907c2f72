//! What a VM process says at any time that is no question: memories and snapshots that are added.
//!
//! Once the pager serves this is done by the thread of the quick requests, in the order of what was
//! said, and not by the one that hears: that one has to hear answers while others wait for them
//! with locks held that are needed here.

use std::{os::fd::OwnedFd, sync::Arc};

use slat_paging::wire::{self, ToPager};

use crate::{
    error::PagerError,
    guard::Guard,
    layout::Place,
    memory::Memory,
    shared::Shared,
    sync::{lock, read, write},
};

pub(crate) fn add_memory(
    shared: &Shared,
    message: &wire::Memory,
    fds: Vec<OwnedFd>,
) -> Result<(), PagerError> {
    let pfn = shared.frames.take(message.pages)?;
    let memory = Arc::new(Memory::new(message, fds, pfn)?);
    {
        let mut layout = write(&shared.layout);
        if let Some(mirror) = &shared.mirror {
            mirror.add(&memory, message.base_gfn, message.view)?;
        }
        let added = layout.add(Place {
            memory: Arc::clone(&memory),
            base_gfn: message.base_gfn,
            view: message.view,
            armed: None,
            guards: Vec::new(),
        });
        if !added {
            return Err(PagerError::Protocol(format!(
                "memory {} twice",
                message.memory
            )));
        }
    }
    if memory.origin.is_some() {
        shared.queue.add(memory);
    }
    shared.wake_strays();
    Ok(())
}

/// What may come at any time, and is no question.
pub(crate) fn hear(
    shared: &Shared,
    message: ToPager,
    mut fds: Vec<OwnedFd>,
) -> Result<(), PagerError> {
    match message {
        ToPager::Memory(memory) => {
            add_memory(shared, &memory, fds)?;
            shared.check_sources()
        }
        ToPager::Snapshot { snapshot, active } => {
            let lease = fds.pop();
            let lease = lease
                .ok_or_else(|| PagerError::Protocol("a snapshot without a lease".to_owned()))?;
            // What it is to guard comes with its memories.
            if !lock(&shared.snapshots).add(snapshot, lease, active) {
                return Err(PagerError::Protocol(format!(
                    "snapshot {snapshot}: one too many"
                )));
            }
            shared.bell.ring();
            Ok(())
        }
        ToPager::SnapshotMemory { snapshot, memory } => guard(shared, snapshot, memory, fds),
        other => unexpected(&other, "while serving"),
    }
}

fn guard(shared: &Shared, snapshot: u64, memory: u32, fds: Vec<OwnedFd>) -> Result<(), PagerError> {
    let mut snapshots = lock(&shared.snapshots);
    let pages = read(&shared.layout)
        .get(memory)
        .map(|place| place.memory.pages);
    let (Some(known), Some(pages)) = (snapshots.get_mut(snapshot), pages) else {
        // The lease has ended, or the memory is gone, which this crossed.
        tracing::info!(snapshot, memory, "a part of a snapshot that is not there");
        return Ok(());
    };
    let guard = Arc::new(Guard::new(snapshot, pages, fds)?);
    known.guards.push((memory, Arc::clone(&guard)));
    if known.active
        && let Some(place) = write(&shared.layout).get_mut(memory)
    {
        place.guards.push(guard);
    }
    Ok(())
}

pub(crate) fn unexpected<T>(message: &ToPager, when: &str) -> Result<T, PagerError> {
    Err(PagerError::Protocol(format!("{message:?} {when}")))
}
