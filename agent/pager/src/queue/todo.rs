//! Going through ranges of pages, past what is there and past what somebody is reading.
//!
//! *Locking*: behind the queue's lock, and so no step is longer than the claims there are and the
//! pages of one read.

use std::{ops::Range, sync::Arc};

use crate::memory::Memory;

/// A range of which all that is not there is to be read, and how far that is.
#[derive(Debug)]
pub(super) struct Todo {
    pub(super) memory: Arc<Memory>,
    pages: Range<u64>,
    /// All before it are there, or have been in a claim since.
    next: u64,
}

impl Todo {
    pub(super) fn new(memory: Arc<Memory>, pages: Range<u64>) -> Self {
        let next = pages.start;
        Self {
            memory,
            pages,
            next,
        }
    }

    /// The next run of at most `most` pages that is not there and not claimed. Whoever takes it
    /// claims it.
    pub(super) fn next_free(
        &mut self,
        claims: &[(u32, Range<u64>)],
        most: u64,
    ) -> Option<Range<u64>> {
        let end = self.pages.end;
        while self.next < end {
            let at = self.memory.there_until(self.next..end);
            if at >= end {
                self.next = end;
                break;
            }
            if let Some(claim) = holder(claims, self.memory.id, at) {
                self.next = claim.end;
                continue;
            }
            let wanted = at..end.min(at + most);
            let Some(run) = free_around(claims, &self.memory, at, &wanted) else {
                // It came just now.
                continue;
            };
            self.next = run.end;
            return Some(run);
        }
        None
    }

    /// A claim of these pages failed.
    pub(super) fn go_back(&mut self, memory: u32, pages: &Range<u64>) {
        if self.memory.id == memory && pages.end > self.pages.start {
            self.next = self.next.min(pages.start.max(self.pages.start));
        }
    }

    /// Whether all of these pages are in the range.
    pub(super) fn covers(&self, memory: u32, pages: &Range<u64>) -> bool {
        self.memory.id == memory && self.pages.start <= pages.start && pages.end <= self.pages.end
    }
}

fn holder(claims: &[(u32, Range<u64>)], memory: u32, page: u64) -> Option<&Range<u64>> {
    let mut of_memory = claims.iter().filter(|(id, _)| *id == memory);
    let found = of_memory.find(|(_, pages)| pages.contains(&page));
    found.map(|(_, pages)| pages)
}

/// What is not there and not claimed of `wanted` around a page; `None` when the page is either.
pub(super) fn free_around(
    claims: &[(u32, Range<u64>)],
    memory: &Memory,
    page: u64,
    wanted: &Range<u64>,
) -> Option<Range<u64>> {
    if memory.is_there(page) || holder(claims, memory.id, page).is_some() {
        return None;
    }
    let mut from = wanted.start.min(page);
    let mut to = wanted.end.min(memory.pages).max(page + 1);
    for (_, claim) in claims.iter().filter(|(id, _)| *id == memory.id) {
        if claim.end <= page {
            from = from.max(claim.end);
        } else {
            to = to.min(claim.start);
        }
    }
    let missing = |at: &u64| !memory.is_there(*at);
    let before = (from..page).rev().take_while(missing).count() as u64;
    let after = (page + 1..to).take_while(missing).count() as u64;
    Some(page - before..page + 1 + after)
}
