//! What is read before all else that nobody waits for: the working set that a source names.
//!
//! It is read in its order, with what is best read together, by the loaders that read for nobody.
//! What cannot be read of it pauses them, as a failure of the background does, and is not tried
//! again here: whoever needs it asks for it.
//!
//! *Locking*: what is left to read is behind the queue's lock. What there was in all does not
//! change once it is said.

use std::{ops::Range, sync::Arc};

use super::{
    lists::{Claim, ForWhom, Inner, RUN},
    todo::free_around,
};
use crate::memory::Memory;

/// Pages of memories, in an order.
pub(crate) type Runs = Vec<(Arc<Memory>, Range<u64>)>;

impl Inner {
    /// For a loader that reads for nobody.
    pub(super) fn for_nobody(
        &mut self,
        together: &dyn Fn(&Memory, u64) -> Range<u64>,
    ) -> Option<Claim> {
        self.early(together).or_else(|| self.background())
    }

    fn early(&mut self, together: &dyn Fn(&Memory, u64) -> Range<u64>) -> Option<Claim> {
        if self.paused {
            return None;
        }
        while let Some((memory, pages)) = self.early.pop_front() {
            let first = memory.there_until(pages.clone());
            if first >= pages.end {
                continue;
            }
            let last = pages.end.min(first + RUN);
            let wanted = together(&memory, first).start..together(&memory, last - 1).end.max(last);
            let free = free_around(&self.claims, &memory, first, &wanted);
            // Who has claimed the page reads it.
            let next = free.as_ref().map_or(first + 1, |pages| pages.end);
            if next < pages.end {
                self.early
                    .push_front((Arc::clone(&memory), next..pages.end));
            }
            if let Some(pages) = free {
                return Some(self.claim_all(&memory, pages, ForWhom::Background));
            }
        }
        None
    }
}
