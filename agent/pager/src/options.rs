//! What a pager is told beside its connection: numbers to be tuned, and, in tests, a source.

use std::{fmt, sync::Arc, time::Duration};

use crate::source::Source;

/// How a pager works.
#[derive(Clone, Copy, Debug)]
pub struct Tuning {
    /// Of a random fault: the aligned group of so many pages that it is in is mapped with it, as
    /// far as they are there beside it. 16.
    pub around: u64,
    /// Most pages that a sequential fault takes; a batch has at most 512.
    pub most: u64,
    /// Most pages of zeroes that a sequential fault makes ahead.
    pub zeroes: u64,
    /// Threads that read the source.
    pub loaders: usize,
    /// Threads that map what could not be mapped at once.
    pub handlers: usize,
    /// Of faults that come together: so many are served one after the other by the thread that
    /// reads them, the rest by handlers. 16, which is all that it reads at once: to wake a handler
    /// costs more than several mappings.
    pub in_turn: usize,
    /// How long after a fault the next is looked for before the thread that reads them sleeps: 50
    /// us. It looks at nothing when none came for so long.
    pub look_again: Duration,
    /// A read of the source that takes longer is stalled.
    pub stalled_after: Duration,
}

impl Default for Tuning {
    fn default() -> Self {
        Self {
            around: 16,
            most: 512,
            zeroes: 64,
            loaders: 4,
            handlers: 2,
            in_turn: 16,
            look_again: Duration::from_micros(50),
            stalled_after: Duration::from_secs(10),
        }
    }
}

/// See the module.
#[derive(Clone, Default)]
pub struct Options {
    /// See there.
    pub tuning: Tuning,
    /// Instead of the layers that are handed over.
    pub source: Option<Arc<dyn Source>>,
}

impl fmt::Debug for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Options")
            .field("tuning", &self.tuning)
            .finish_non_exhaustive()
    }
}
