//! What is read before all else that nobody waits for: the working set that a source names.
//!
//! It is read in its order, with what is best read together, by the loaders that read for nobody.
//! What cannot be read of it pauses them, as a failure of the background does, and is not tried
//! again here: whoever needs it asks for it.
//!
//! *Locking*: what is left to read is behind the queue's lock. What there was in all does not
//! change once it is said.

use std::{ops::Range, sync::Arc};

use super::lists::{Claim, ForWhom, Inner, RUN};
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

    /// Whether pages of a range are claimed, or asked for.
    pub(super) fn is_coming(&self, memory: u32, pages: &Range<u64>) -> bool {
        let meets = |id: u32, other: &Range<u64>| {
            id == memory && other.start < pages.end && pages.start < other.end
        };
        let claimed = self.claims.iter().any(|(id, range)| meets(*id, range));
        claimed || self.asked.iter().any(|(of, range)| meets(of.id, range))
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
            let claim = self.claim(&memory, first, &wanted);
            // Who has claimed the page reads it.
            let next = claim.as_ref().map_or(first + 1, |claim| claim.pages.end);
            if next < pages.end {
                self.early
                    .push_front((Arc::clone(&memory), next..pages.end));
            }
            if let Some(claim) = claim {
                self.idle += 1;
                let for_whom = ForWhom::Background;
                return Some(Claim { for_whom, ..claim });
            }
        }
        None
    }
}
