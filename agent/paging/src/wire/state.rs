//! What a pager says of itself.

use serde::{Deserialize, Serialize};

use super::problem::Problem;

/// Faults since the pager began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Faults {
    /// The page was not in the memory file.
    pub missing: u64,
    /// It was, and not mapped.
    pub minor: u64,
    /// It was mapped and protected.
    pub write_protect: u64,
    /// Pages mapped beside those that were asked for.
    pub prefetched: u64,
    /// Resolved by another thread before they were looked at.
    pub spurious: u64,
}

/// A histogram of times by powers of two.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Histogram {
    /// Bucket `i` counts times of less than `2^i` microseconds that are in no bucket before it.
    pub buckets: Vec<u64>,
    /// Their sum, nanoseconds.
    pub sum_nanos: u64,
}

/// How far the pages of a source have been brought.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Load {
    /// Pages that are there.
    pub loaded: u64,
    /// Pages of all memories that have a source.
    pub all: u64,
}

/// A pager's state, sent when it has changed, at most four times a second.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PagerState {
    /// Faults by kind.
    pub faults: Faults,
    /// From reading a fault to the guest's being woken.
    pub latency: Histogram,
    /// Nanoseconds that each vCPU waited for faults, from their being read; by vCPU index. The
    /// last is of threads that are no vCPU.
    pub blocked_nanos: Vec<u64>,
    /// Faults that wait now.
    pub waiting: u64,
    /// How far the source has been read.
    pub load: Load,
    /// The same of the working set that the source names; a pager of an older program says nothing
    /// of it.
    #[serde(default)]
    pub working_set: Load,
    /// Pages copied for snapshots.
    pub kept_pages: u64,
    /// Mappings that the mirror has now, by level, the finest first.
    pub mapped_pages: Vec<u64>,
    /// Page-table pages of the mirror now.
    pub table_pages: u64,
    /// Bytes of memory that the mirror takes: tables and what describes them.
    pub mirror_bytes: u64,
    /// Batches that were carried out.
    pub batches: u64,
    /// Changes in them.
    pub changes: u64,
    /// Changes that the kernel refused.
    pub refused: u64,
    /// What is wrong with the source now; `None`: nothing.
    pub problem: Option<Problem>,
}
