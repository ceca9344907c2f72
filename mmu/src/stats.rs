//! Counters.
//!
//! All are relaxed atomics, read without a lock: a snapshot is consistent field by field, not across fields. Counters
//! only grow; `pages` and `tables` are gauges and are 0 when nothing is mapped and every table has been given back.

use core::sync::atomic::{AtomicI64, AtomicU64, Ordering::Relaxed};

use crate::{
    addr::{Level, MAX_LEVELS},
    fault::FaultOutcome,
    flush::Flush,
};

#[derive(Debug, Default)]
pub(crate) struct Stats {
    faults_taken: AtomicU64,
    faults_fixed: AtomicU64,
    faults_spurious: AtomicU64,
    faults_retried: AtomicU64,
    faults_emulated: AtomicU64,
    faults_failed: AtomicU64,
    flush_ranges: AtomicU64,
    flush_alls: AtomicU64,
    flush_pages: AtomicU64,
    splits: AtomicU64,
    pages: [AtomicI64; MAX_LEVELS],
}

impl Stats {
    /// Counts a fault. A prefetch is not a fault of the guest: only what it fixed counts.
    pub(crate) fn fault(&self, outcome: &FaultOutcome, prefetch: bool) {
        if !prefetch {
            self.faults_taken.fetch_add(1, Relaxed);
        }
        let counter = match outcome {
            FaultOutcome::Fixed { .. } => &self.faults_fixed,
            _ if prefetch => return,
            FaultOutcome::Spurious { .. } => &self.faults_spurious,
            FaultOutcome::Retry => &self.faults_retried,
            FaultOutcome::NoSlot | FaultOutcome::ReadOnly => &self.faults_emulated,
            FaultOutcome::OutOfRange
            | FaultOutcome::OutOfMemory
            | FaultOutcome::BadEntry { .. } => &self.faults_failed,
        };
        counter.fetch_add(1, Relaxed);
    }

    /// Counts a request and hands it on.
    pub(crate) fn flush(&self, flush: Flush) -> Flush {
        match flush {
            Flush::None => {}
            Flush::Range { pages, .. } => {
                self.flush_ranges.fetch_add(1, Relaxed);
                self.flush_pages.fetch_add(pages, Relaxed);
            }
            Flush::All => {
                self.flush_alls.fetch_add(1, Relaxed);
            }
        }
        flush
    }

    pub(crate) fn split(&self) {
        self.splits.fetch_add(1, Relaxed);
    }

    pub(crate) fn add_leaves(&self, level: Level, count: i64) {
        self.pages[level.slot()].fetch_add(count, Relaxed);
    }

    pub(crate) fn snapshot(&self, tables: u64, tables_retired: u64) -> MmuStats {
        MmuStats {
            faults_taken: self.faults_taken.load(Relaxed),
            faults_fixed: self.faults_fixed.load(Relaxed),
            faults_spurious: self.faults_spurious.load(Relaxed),
            faults_retried: self.faults_retried.load(Relaxed),
            faults_emulated: self.faults_emulated.load(Relaxed),
            faults_failed: self.faults_failed.load(Relaxed),
            flush_ranges: self.flush_ranges.load(Relaxed),
            flush_alls: self.flush_alls.load(Relaxed),
            flush_pages: self.flush_pages.load(Relaxed),
            splits: self.splits.load(Relaxed),
            pages: core::array::from_fn(|i| self.pages[i].load(Relaxed)),
            tables,
            tables_retired,
        }
    }
}

/// A snapshot of an MMU's counters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct MmuStats {
    /// Faults taken, without prefetches.
    pub faults_taken: u64,
    /// Faults and prefetches that installed or upgraded a mapping.
    pub faults_fixed: u64,
    /// Faults that found the access already allowed.
    pub faults_spurious: u64,
    /// Faults that must be taken again.
    pub faults_retried: u64,
    /// Faults outside any slot, and writes to read-only slots.
    pub faults_emulated: u64,
    /// Faults that failed: beyond the format, no table memory, or a malformed entry.
    pub faults_failed: u64,
    /// Ranged flushes requested.
    pub flush_ranges: u64,
    /// Full flushes requested.
    pub flush_alls: u64,
    /// Pages in all ranged flushes.
    pub flush_pages: u64,
    /// Huge mappings split.
    pub splits: u64,
    /// Leaves installed now, by level, 4 KiB first; signed, so that a miscount shows as such.
    pub pages: [i64; MAX_LEVELS],
    /// Tables in memory now, roots and retired ones included.
    pub tables: u64,
    /// Of these, tables that wait for readers.
    pub tables_retired: u64,
}

impl MmuStats {
    /// Leaves installed at `level`.
    pub fn pages_at(&self, level: Level) -> i64 {
        self.pages[level.slot()]
    }
}
