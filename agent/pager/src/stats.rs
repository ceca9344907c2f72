//! What is counted. All of it is atomics that only grow; nothing is ordered by them.

use std::{
    collections::HashMap,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Duration,
};

use slat_paging::{
    uffd::FaultKind,
    wire::{Faults, Histogram},
};

/// Buckets of the histogram: the last begins at 2^30 us, a quarter of an hour.
const BUCKETS: usize = 32;

/// See the module.
#[derive(Debug)]
pub(crate) struct Stats {
    missing: AtomicU64,
    minor: AtomicU64,
    write_protect: AtomicU64,
    pub(crate) prefetched: AtomicU64,
    pub(crate) spurious: AtomicU64,
    pub(crate) kept: AtomicU64,
    buckets: [AtomicU64; BUCKETS],
    sum_nanos: AtomicU64,
    vcpus: HashMap<i32, usize>,
    blocked: Vec<AtomicU64>,
}

impl Stats {
    /// With the threads of the vCPUs, by index.
    pub(crate) fn new(vcpus: &[i32]) -> Self {
        let zero = AtomicU64::default;
        Self {
            missing: zero(),
            minor: zero(),
            write_protect: zero(),
            prefetched: zero(),
            spurious: zero(),
            kept: zero(),
            buckets: [const { AtomicU64::new(0) }; BUCKETS],
            sum_nanos: zero(),
            vcpus: vcpus.iter().copied().zip(0..).collect(),
            blocked: (0..=vcpus.len()).map(|_| zero()).collect(),
        }
    }

    pub(crate) fn fault(&self, kind: FaultKind) {
        let counter = match kind {
            FaultKind::Missing => &self.missing,
            FaultKind::Minor => &self.minor,
            FaultKind::WriteProtect => &self.write_protect,
        };
        counter.fetch_add(1, Relaxed);
    }

    /// A thread's fault was resolved, so long after it was read.
    pub(crate) fn resolved(&self, thread: i32, after: Duration) {
        let nanos = u64::try_from(after.as_nanos()).unwrap_or(u64::MAX);
        let bucket = 64 - (nanos / 1000).leading_zeros() as usize;
        self.buckets[bucket.min(BUCKETS - 1)].fetch_add(1, Relaxed);
        self.sum_nanos.fetch_add(nanos, Relaxed);
        let nobody = self.blocked.len() - 1;
        let vcpu = self.vcpus.get(&thread).copied().unwrap_or(nobody);
        self.blocked[vcpu].fetch_add(nanos, Relaxed);
    }

    pub(crate) fn faults(&self) -> Faults {
        Faults {
            missing: self.missing.load(Relaxed),
            minor: self.minor.load(Relaxed),
            write_protect: self.write_protect.load(Relaxed),
            prefetched: self.prefetched.load(Relaxed),
            spurious: self.spurious.load(Relaxed),
        }
    }

    pub(crate) fn latency(&self) -> Histogram {
        let mut buckets: Vec<u64> = self
            .buckets
            .iter()
            .map(|count| count.load(Relaxed))
            .collect();
        let used = buckets.iter().rposition(|count| *count > 0);
        buckets.truncate(used.map_or(0, |last| last + 1));
        Histogram {
            buckets,
            sum_nanos: self.sum_nanos.load(Relaxed),
        }
    }

    pub(crate) fn blocked(&self) -> Vec<u64> {
        self.blocked
            .iter()
            .map(|nanos| nanos.load(Relaxed))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_in_the_first_bucket_that_it_is_below() {
        let stats = Stats::new(&[7]);
        stats.resolved(7, Duration::from_nanos(999));
        stats.resolved(7, Duration::from_micros(1));
        stats.resolved(9, Duration::from_micros(5));
        assert_eq!(stats.latency().buckets, [1, 1, 0, 1]);
        assert_eq!(stats.blocked(), [1999, 5000]);
    }
}
