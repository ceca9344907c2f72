//! Counters.
//!
//! Each participant counts in its own cell, so counting costs no shared cache line; a snapshot sums
//! all cells. It is consistent figure by figure, not across figures. Counters only grow; `pages`,
//! `tables` and `roots` are gauges, and are 0 when nothing is mapped and every table has been given
//! back.

use crate::{
    addr::{Level, MAX_LEVELS},
    external::{Batch, ChangeKind},
    fault::FaultOutcome,
    flush::{Flush, FlushCause},
    rcu::{
        cell::{Cell, Counter},
        participants::Participants,
    },
    refused::Refused,
    sync::{Relaxed, Statistic},
};

/// Counts a fault. A prefetch is not a fault of the guest: only what it fixed counts, by itself.
#[inline(always)]
pub(crate) fn count_fault(cell: &Cell, outcome: &FaultOutcome, prefetch: bool) {
    let counter = match outcome {
        FaultOutcome::Fixed { .. } if prefetch => Counter::Prefetched,
        FaultOutcome::Fixed { .. } => Counter::Fixed,
        _ if prefetch => return,
        FaultOutcome::Spurious { .. } => Counter::Spurious,
        FaultOutcome::Retry | FaultOutcome::Refused(_) => Counter::Retried,
        FaultOutcome::NoSlot | FaultOutcome::ReadOnly => Counter::Emulated,
        FaultOutcome::OutOfRange
        | FaultOutcome::OutOfMemory
        | FaultOutcome::NoRoot
        | FaultOutcome::BadEntry { .. } => Counter::Failed,
    };
    cell.count(counter, 1);
}

/// Flushes by cause and scope. Rare beside faults, so shared.
#[derive(Debug)]
pub(crate) struct FlushCounters([ByScope; FlushCause::ALL.len()]);

#[derive(Debug)]
struct ByScope {
    ranges: Statistic,
    pages: Statistic,
    alls: Statistic,
}

impl FlushCounters {
    pub(crate) fn new() -> Self {
        Self(core::array::from_fn(|_| ByScope {
            ranges: Statistic::new(0),
            pages: Statistic::new(0),
            alls: Statistic::new(0),
        }))
    }

    pub(crate) fn count(&self, flush: Flush, cause: FlushCause) {
        let counters = &self.0[cause as usize];
        match flush {
            Flush::None => {}
            Flush::Range { pages, .. } => {
                counters.ranges.fetch_add(1, Relaxed);
                counters.pages.fetch_add(pages, Relaxed);
            }
            Flush::All => {
                counters.alls.fetch_add(1, Relaxed);
            }
        }
    }

    fn snapshot(&self) -> [FlushStats; FlushCause::ALL.len()] {
        core::array::from_fn(|cause| FlushStats {
            cause: FlushCause::ALL[cause],
            ranges: self.0[cause].ranges.load(Relaxed),
            pages: self.0[cause].pages.load(Relaxed),
            alls: self.0[cause].alls.load(Relaxed),
        })
    }
}

/// What the owner of mirrored tables was asked for. A call to it costs more than counting in a
/// common place.
#[derive(Debug)]
pub(crate) struct OwnerCounters {
    batches: Statistic,
    changes: [Statistic; ChangeKind::COUNT],
    pages: [Statistic; ChangeKind::COUNT],
    refused: [Refusals; Refused::COUNT],
}

#[derive(Debug)]
struct Refusals {
    changes: Statistic,
    pages: Statistic,
}

impl OwnerCounters {
    pub(crate) fn new() -> Self {
        Self {
            batches: Statistic::new(0),
            changes: core::array::from_fn(|_| Statistic::new(0)),
            pages: core::array::from_fn(|_| Statistic::new(0)),
            refused: core::array::from_fn(|_| Refusals {
                changes: Statistic::new(0),
                pages: Statistic::new(0),
            }),
        }
    }

    /// Counts a batch that was answered.
    pub(crate) fn count(&self, batch: &Batch) {
        self.batches.fetch_add(1, Relaxed);
        for change in batch.changes() {
            let kind = change.kind().index();
            self.changes[kind].fetch_add(1, Relaxed);
            self.pages[kind].fetch_add(change.done(), Relaxed);
            if let Some(why) = change.refused() {
                let refused = &self.refused[why.index()];
                refused.changes.fetch_add(1, Relaxed);
                let rest = change.gfns().pages() - change.done();
                refused.pages.fetch_add(rest, Relaxed);
            }
        }
    }

    fn snapshot(&self) -> OwnerStats {
        let load = |counter: &Statistic| counter.load(Relaxed);
        let [maps, protects, unmaps] = &self.changes;
        let [pages_mapped, pages_protected, pages_unmapped] = &self.pages;
        OwnerStats {
            batches: load(&self.batches),
            maps: load(maps),
            protects: load(protects),
            unmaps: load(unmaps),
            pages_mapped: load(pages_mapped),
            pages_protected: load(pages_protected),
            pages_unmapped: load(pages_unmapped),
            refused: core::array::from_fn(|reason| RefusalStats {
                reason: Refused::NAMES[reason],
                changes: load(&self.refused[reason].changes),
                pages: load(&self.refused[reason].pages),
            }),
        }
    }
}

pub(crate) fn snapshot(
    participants: &Participants,
    flushes: &FlushCounters,
    owner: &OwnerCounters,
    tables: u64,
    tables_retired: u64,
    roots: u64,
) -> MmuStats {
    let sum = |counter| participants.sum(|cell| cell.counted(counter));
    let (fixed, spurious) = (sum(Counter::Fixed), sum(Counter::Spurious));
    let (retried, emulated) = (sum(Counter::Retried), sum(Counter::Emulated));
    let failed = sum(Counter::Failed);
    MmuStats {
        // Each fault of the guest ends in exactly one of these.
        faults_taken: fixed + spurious + retried + emulated + failed,
        faults_fixed: fixed,
        faults_spurious: spurious,
        faults_retried: retried,
        faults_emulated: emulated,
        faults_failed: failed,
        prefetched: sum(Counter::Prefetched),
        faults_fast: sum(Counter::Fast),
        mmio_entries_created: sum(Counter::Mmio),
        splits: sum(Counter::Splits),
        recovered: sum(Counter::Recovered),
        nx_splits: sum(Counter::NxSplits),
        yields: sum(Counter::Yields),
        flushes: flushes.snapshot(),
        owner: owner.snapshot(),
        pages: core::array::from_fn(|slot| participants.sum(|cell| cell.pages(slot)) as i64),
        tables,
        tables_retired,
        roots,
    }
}

/// Flushes for one cause.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct FlushStats {
    /// The cause.
    pub cause: FlushCause,
    /// Ranged flushes requested.
    pub ranges: u64,
    /// Pages in all of them.
    pub pages: u64,
    /// Full flushes requested.
    pub alls: u64,
}

/// What the owner of mirrored tables was asked for, and what it refused.
///
/// Pages that lost a mapping or the leave to write are among the
/// [flushes](MmuStats::flushes) as well, with their cause: an owner's answer stands for the flush.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct OwnerStats {
    /// Batches: calls of [`ExternalTables::apply`](crate::ExternalTables::apply).
    pub batches: u64,
    /// Runs of pages to be mapped.
    pub maps: u64,
    /// Runs of pages to be made writable or not.
    pub protects: u64,
    /// Runs of pages to be unmapped.
    pub unmaps: u64,
    /// Pages that were mapped, again or for the first time.
    pub pages_mapped: u64,
    /// Pages that were made writable or not.
    pub pages_protected: u64,
    /// Pages that were unmapped.
    pub pages_unmapped: u64,
    /// What was refused, by reason.
    pub refused: [RefusalStats; Refused::COUNT],
}

/// Changes of mirrored tables that their owner refused for one reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct RefusalStats {
    /// [`Refused::name`].
    pub reason: &'static str,
    /// Changes that were refused, in whole or in part.
    pub changes: u64,
    /// Pages of them that were not done.
    pub pages: u64,
}

/// A snapshot of an MMU's counters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct MmuStats {
    /// Faults taken, without prefetches.
    pub faults_taken: u64,
    /// Faults that installed or upgraded a mapping.
    pub faults_fixed: u64,
    /// Faults that found the access already allowed.
    pub faults_spurious: u64,
    /// Faults that must be taken again.
    pub faults_retried: u64,
    /// Faults outside any slot, and writes to read-only slots.
    pub faults_emulated: u64,
    /// Faults that failed: beyond the format, no table memory, or a malformed entry.
    pub faults_failed: u64,
    /// Pages, or larger mappings, installed in advance.
    pub prefetched: u64,
    /// Of the fixed and spurious ones, those resolved without the MMU lock.
    pub faults_fast: u64,
    /// Entries that remember that a frame has no slot.
    pub mmio_entries_created: u64,
    /// Huge mappings split.
    pub splits: u64,
    /// Huge mappings recovered in place.
    pub recovered: u64,
    /// Huge mappings refused for the NX-huge-page mitigation.
    pub nx_splits: u64,
    /// Times a long operation let go of the lock for others.
    pub yields: u64,
    /// Flushes by cause, in the order of [`FlushCause::ALL`].
    pub flushes: [FlushStats; FlushCause::ALL.len()],
    /// What the owner of mirrored tables was asked for.
    pub owner: OwnerStats,
    /// Leaves installed now, by level, 4 KiB first; signed, so that a miscount shows as such.
    pub pages: [i64; MAX_LEVELS],
    /// Tables in memory now: linked, in a vCPU's cache, roots, and retired ones.
    pub tables: u64,
    /// Of these, tables that wait for readers.
    pub tables_retired: u64,
    /// Roots that exist, valid or not.
    pub roots: u64,
}

impl MmuStats {
    /// Leaves installed at `level`.
    pub fn pages_at(&self, level: Level) -> i64 {
        self.pages[level.index()]
    }

    /// Ranged flushes requested, for any cause.
    pub fn flush_ranges(&self) -> u64 {
        self.flushes.iter().map(|flush| flush.ranges).sum()
    }

    /// Full flushes requested, for any cause.
    pub fn flush_alls(&self) -> u64 {
        self.flushes.iter().map(|flush| flush.alls).sum()
    }
}
