//! Snapshots that are kept: their files, marks and leases.
//!
//! A lease is a pipe. Its write end is kept here until an agent takes it for whoever reads the
//! snapshot, once, and no longer than [`UNTAKEN`]. When the last write end is closed the snapshot
//! ends: its pager sees that at the read end, or this process where no pager is.

use std::{
    collections::BTreeMap,
    io,
    os::fd::{AsFd as _, OwnedFd},
    sync::Arc,
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{MemfdFlags, ftruncate, memfd_create},
    pipe::{PipeFlags, pipe_with},
};
use slat_paging::{
    PAGE,
    bits::{Marks, SharedBits},
    wire::{Layer, LayerMemory, Problem, ProblemKind},
};

use super::layers::{Fd, KeptLayer, KeptMemory};
use crate::memory::{MemoryFile, SlotMemory};

/// A lease that nobody takes ends after this.
pub(super) const UNTAKEN: Duration = Duration::from_secs(10);

/// One memory of a snapshot.
pub(super) struct KeptSlot {
    slot: u32,
    pages: u64,
    pub(super) file: MemoryFile,
    origin: Option<(u32, Arc<SharedBits>)>,
    pub(super) kept: Arc<OwnedFd>,
    pub(super) marks: Arc<Marks>,
}

impl KeptSlot {
    fn new(memory: &SlotMemory) -> io::Result<Self> {
        let spec = memory.spec();
        let kept = memfd_create("slat-kept", MemfdFlags::CLOEXEC)?;
        ftruncate(&kept, spec.pages * PAGE as u64)?;
        let origin = memory.origin();
        Ok(Self {
            slot: spec.slot,
            pages: spec.pages,
            file: memory.file(),
            origin: origin.and_then(|origin| Some((origin.number(), origin.loaded()?))),
            kept: Arc::new(kept),
            marks: Arc::new(Marks::new(spec.pages)?),
        })
    }

    /// `unloaded`: the VM's own source is still needed.
    fn layer(&self, unloaded: bool) -> KeptMemory {
        let origin = self.origin.as_ref().filter(|_| unloaded);
        let mut fds: Vec<Fd> = vec![
            Arc::new(self.file.clone()),
            Arc::clone(&self.kept) as Fd,
            Arc::clone(&self.marks) as Fd,
        ];
        fds.extend(origin.map(|(_, loaded)| Arc::clone(loaded) as Fd));
        KeptMemory {
            memory: LayerMemory {
                number: self.slot,
                pages: self.pages,
                file_start: self.file.start(),
                origin: origin.map(|(number, _)| *number),
                has_loaded: origin.is_some(),
            },
            fds,
        }
    }
}

/// One snapshot.
pub(super) struct Snapshot {
    pub(super) slots: Vec<KeptSlot>,
    pub(super) lease: OwnedFd,
    /// Until it is taken.
    untaken: Option<OwnedFd>,
    since: Instant,
    pub(super) active: bool,
    /// The vCPUs stay stopped, and no pager knows of it.
    pub(super) still: bool,
}

impl Snapshot {
    /// Whether nobody has its lease any more.
    fn is_over(&self) -> bool {
        let mut polled = [PollFd::new(&self.lease, PollFlags::IN)];
        let none = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        poll(&mut polled, Some(&none)).is_ok() && polled[0].revents().contains(PollFlags::HUP)
    }
}

/// Those of a VM.
#[derive(Default)]
pub(super) struct Snapshots {
    last: u64,
    pub(super) all: BTreeMap<u64, Snapshot>,
}

impl Snapshots {
    /// A new one of these slots, which has not begun.
    pub(super) fn add<'a>(
        &mut self,
        slots: impl Iterator<Item = &'a SlotMemory>,
        still: bool,
    ) -> io::Result<u64> {
        let (lease, untaken) = pipe_with(PipeFlags::CLOEXEC)?;
        let snapshot = Snapshot {
            slots: slots.map(KeptSlot::new).collect::<io::Result<_>>()?,
            lease,
            untaken: Some(untaken),
            since: Instant::now(),
            active: still,
            still,
        };
        self.last += 1;
        self.all.insert(self.last, snapshot);
        Ok(self.last)
    }

    /// It has begun: from now on its lease can be taken.
    pub(super) fn begun(&mut self, number: u64) {
        if let Some(snapshot) = self.all.get_mut(&number) {
            snapshot.active = true;
            snapshot.since = Instant::now();
        }
    }

    /// The layer that it is, with its lease, which is gone from here.
    pub(super) fn take(
        &mut self,
        number: u64,
        name: &str,
        unloaded: bool,
    ) -> Result<KeptLayer, Problem> {
        let refused = |message: String| Problem {
            kind: ProblemKind::Refused,
            message,
        };
        let snapshot = self.all.get_mut(&number);
        let snapshot = snapshot.filter(|snapshot| snapshot.active);
        let snapshot = snapshot.ok_or_else(|| refused(format!("no snapshot {number}")))?;
        let lease = snapshot.untaken.take();
        let lease =
            lease.ok_or_else(|| refused(format!("snapshot {number}: its lease was taken")))?;
        let memories = snapshot.slots.iter().map(|slot| {
            slot.file.lend();
            slot.layer(unloaded)
        });
        let memories: Vec<KeptMemory> = memories.collect();
        Ok(KeptLayer {
            layer: Layer::Snapshot {
                // A VM has at most 32,767 slots.
                memories: memories.len() as u32,
                name: name.to_owned(),
                shared: false,
            },
            fds: vec![Arc::new(lease)],
            memories,
        })
    }

    /// Lets leases go that nobody took, and takes away what has ended where no pager says so
    /// (`pager`: there is one that does).
    pub(super) fn tend(&mut self, now: Instant, pager: bool) -> Vec<u64> {
        for (number, snapshot) in &mut self.all {
            let late = now.saturating_duration_since(snapshot.since) > UNTAKEN;
            if snapshot.active && late && snapshot.untaken.take().is_some() {
                tracing::warn!(snapshot = number, "nobody took a snapshot's lease: it ends");
            }
        }
        let over = self.all.iter().filter(|(_, snapshot)| {
            snapshot.active && (snapshot.still || !pager) && snapshot.is_over()
        });
        let over: Vec<u64> = over.map(|(number, _)| *number).collect();
        for number in &over {
            self.all.remove(number);
        }
        over
    }

    /// What a pager is told of a memory that is the same as this one: numbers, kept files, marks.
    pub(super) fn of<'a>(
        &'a self,
        file: &'a MemoryFile,
    ) -> impl Iterator<Item = (u64, &'a KeptSlot)> {
        let paged = self.all.iter().filter(|(_, snapshot)| !snapshot.still);
        paged.flat_map(move |(number, snapshot)| {
            let same = snapshot.slots.iter().filter(move |slot| slot.file.is(file));
            same.map(move |slot| (*number, slot))
        })
    }
}

impl KeptSlot {
    /// For a message about it.
    pub(super) fn fds(&self) -> [std::os::fd::BorrowedFd<'_>; 2] {
        [self.kept.as_fd(), self.marks.as_fd()]
    }
}

#[cfg(test)]
mod tests {
    use slat_proto::model::SlotSpec;

    use super::*;

    fn slot() -> SlotMemory {
        SlotMemory::new(SlotSpec::new(3, 0, 4, false).unwrap()).unwrap()
    }

    #[test]
    fn a_lease_is_taken_once_and_its_end_is_the_snapshots() {
        let (slot, mut snapshots) = (slot(), Snapshots::default());
        let number = snapshots.add([&slot].into_iter(), false).unwrap();
        assert!(snapshots.take(number, "web", false).is_err(), "not begun");
        snapshots.begun(number);
        let layer = snapshots.take(number, "web", false).unwrap();
        assert!(snapshots.take(number, "web", false).is_err());
        assert_eq!(layer.memories[0].memory.number, 3);
        let late = Instant::now() + 2 * UNTAKEN;
        assert!(snapshots.tend(late, false).is_empty(), "somebody has it");
        drop(layer);
        assert!(snapshots.tend(late, true).is_empty(), "its pager says so");
        assert_eq!(snapshots.tend(late, false), [number]);
        assert!(snapshots.all.is_empty());
    }

    #[test]
    fn one_that_nobody_takes_ends_after_a_while() {
        let (slot, mut snapshots) = (slot(), Snapshots::default());
        let number = snapshots.add([&slot].into_iter(), true).unwrap();
        assert!(snapshots.tend(Instant::now(), true).is_empty());
        let late = Instant::now() + 2 * UNTAKEN;
        assert_eq!(snapshots.tend(late, true), [number]);
    }
}
