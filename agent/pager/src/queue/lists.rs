//! The lists behind the queue, and in which order loaders take from them.
//!
//! *Locking*: all of it is behind the queue's lock.

use std::{
    collections::{HashMap, VecDeque},
    ops::Range,
    sync::Arc,
    time::Instant,
};

use slat_paging::uffd::FaultKind;

use crate::memory::Memory;

/// Loaders that read for nobody: a source that stalls there leaves the others to the guest.
const MOST_IDLE: usize = 2;
/// Pages that are read at once for nobody.
pub(super) const RUN: u64 = 64;

/// A thread that waits for a page.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Waiter {
    pub(crate) thread: i32,
    pub(crate) write: bool,
    pub(crate) kind: Option<FaultKind>,
    pub(crate) since: Instant,
}

/// A page that a thread waits for.
#[derive(Clone, Debug)]
pub(crate) struct Wait {
    pub(crate) memory: Arc<Memory>,
    pub(crate) page: u64,
    pub(crate) waiter: Waiter,
}

/// A range that is read by whoever has this.
#[derive(Clone, Debug)]
pub(crate) struct Claim {
    pub(crate) memory: Arc<Memory>,
    pub(crate) pages: Range<u64>,
    pub(super) for_whom: ForWhom,
    /// How often somebody had said to try again.
    pub(super) retries: u64,
}

impl Claim {
    pub(crate) fn is_of_the_guest(&self) -> bool {
        self.for_whom == ForWhom::Guest
    }
}

/// Who is told when a claim cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ForWhom {
    /// Whoever faulted.
    Guest,
    /// The VM process, which asked.
    Asker,
    /// Nobody: it is not wanted yet.
    Ahead,
    /// Nobody: it fails again when it is wanted, but the background pauses.
    Background,
}

type Key = (u32, u64);

#[derive(Debug, Default)]
pub(super) struct Inner {
    pub(super) ready: VecDeque<Wait>,
    pub(super) faults: VecDeque<(Arc<Memory>, u64)>,
    pub(super) wanted: HashMap<Key, Vec<Waiter>>,
    pub(super) asked: VecDeque<(Arc<Memory>, Range<u64>)>,
    pub(super) ahead: VecDeque<(Arc<Memory>, Range<u64>)>,
    /// What is left of the pages that are read first, see `early`.
    pub(super) early: VecDeque<(Arc<Memory>, Range<u64>)>,
    pub(super) claims: Vec<(u32, Range<u64>)>,
    /// Of these, those that are read for nobody who waits.
    pub(super) idle: usize,
    /// Memories that are brought in the background, and how far.
    pub(super) loading: Vec<(Arc<Memory>, u64)>,
    pub(super) load_all: bool,
    /// Waits whose page could not be read, and those whose page could not be mapped.
    pub(super) failed: Vec<(Arc<Memory>, u64)>,
    pub(super) unmapped: Vec<Wait>,
    /// The background failed: it goes on when somebody says so.
    pub(super) paused: bool,
    /// Something that was asked for could not be read. Nobody waits for it here.
    pub(super) refused: bool,
    pub(super) retries: u64,
    pub(super) turns: u32,
    pub(super) over: bool,
}

impl Inner {
    pub(super) fn waiting(&self) -> usize {
        let wanted: usize = self.wanted.values().map(Vec::len).sum();
        wanted + self.ready.len() + self.unmapped.len()
    }

    pub(super) fn next_load(
        &mut self,
        together: &dyn Fn(&Memory, u64) -> Range<u64>,
    ) -> Option<Claim> {
        let idle = self.idle < MOST_IDLE;
        self.turns = (self.turns + 1) % 8;
        if self.turns == 0
            && idle
            && let Some(claim) = self.for_nobody(together)
        {
            return Some(claim);
        }
        while let Some((memory, page)) = self.faults.pop_front() {
            if memory.is_there(page) {
                self.make_ready(&memory, page);
            } else if let Some(claim) = self.claim(&memory, page, &together(&memory, page)) {
                return Some(claim);
            }
        }
        while let Some((memory, pages)) = self.asked.pop_front() {
            if let Some(claim) = self.claim_first(&memory, pages.clone()) {
                let rest = claim.pages.end..pages.end;
                if !rest.is_empty() {
                    self.asked.push_front((memory, rest));
                }
                let for_whom = ForWhom::Asker;
                return Some(Claim { for_whom, ..claim });
            }
        }
        if !idle {
            return None;
        }
        while let Some((memory, pages)) = self.ahead.pop_front() {
            let first = memory.there_until(pages.clone());
            if first >= pages.end {
                continue;
            }
            // By what is best read together, so that a page that fails takes no others along.
            let wanted = together(&memory, first);
            let rest = wanted.end.max(first + 1)..pages.end;
            if !rest.is_empty() {
                self.ahead.push_front((Arc::clone(&memory), rest));
            }
            if let Some(claim) = self.claim(&memory, first, &wanted) {
                self.idle += 1;
                let for_whom = ForWhom::Ahead;
                return Some(Claim { for_whom, ..claim });
            }
        }
        self.for_nobody(together)
    }

    /// The page came by another way.
    pub(super) fn make_ready(&mut self, memory: &Arc<Memory>, page: u64) {
        let waiters = self.wanted.remove(&(memory.id, page));
        for waiter in waiters.into_iter().flatten() {
            let memory = Arc::clone(memory);
            self.ready.push_back(Wait {
                memory,
                page,
                waiter,
            });
        }
    }

    /// What is not there and not claimed of `wanted` around a page; `None` when the page is
    /// claimed: then whoever has it does the rest.
    pub(super) fn claim(
        &mut self,
        memory: &Arc<Memory>,
        page: u64,
        wanted: &Range<u64>,
    ) -> Option<Claim> {
        let free = |page: u64| {
            let claimed =
                |(id, pages): &(u32, Range<u64>)| *id == memory.id && pages.contains(&page);
            !memory.is_there(page) && !self.claims.iter().any(claimed)
        };
        if !free(page) {
            return None;
        }
        let mut pages = page..page + 1;
        while pages.start > wanted.start && free(pages.start - 1) {
            pages.start -= 1;
        }
        while pages.end < wanted.end.min(memory.pages) && free(pages.end) {
            pages.end += 1;
        }
        self.claims.push((memory.id, pages.clone()));
        Some(Claim {
            memory: Arc::clone(memory),
            pages,
            for_whom: ForWhom::Guest,
            retries: self.retries,
        })
    }

    /// The first run of a range that is not there and not claimed.
    pub(super) fn claim_first(&mut self, memory: &Arc<Memory>, pages: Range<u64>) -> Option<Claim> {
        let mut at = pages.start;
        loop {
            at = memory.there_until(at..pages.end);
            if at >= pages.end {
                return None;
            }
            let wanted = at..pages.end.min(at + RUN);
            if let Some(claim) = self.claim(memory, at, &wanted) {
                return Some(claim);
            }
            at += 1;
        }
    }

    pub(super) fn background(&mut self) -> Option<Claim> {
        if !self.load_all || self.paused {
            return None;
        }
        for at in 0..self.loading.len() {
            let (memory, from) = (Arc::clone(&self.loading[at].0), self.loading[at].1);
            if let Some(claim) = self.claim_first(&memory, from..memory.pages) {
                self.loading[at].1 = claim.pages.start;
                self.idle += 1;
                let for_whom = ForWhom::Background;
                return Some(Claim { for_whom, ..claim });
            }
            // What a claim has may fail and be free again.
            self.loading[at].1 = 0;
        }
        self.loading.retain(|(memory, _)| !memory.is_loaded());
        None
    }

    pub(super) fn release(&mut self, claim: &Claim) {
        let own = (claim.memory.id, claim.pages.clone());
        self.claims.retain(|other| *other != own);
        let idle = matches!(claim.for_whom, ForWhom::Ahead | ForWhom::Background);
        self.idle -= usize::from(idle);
    }

    /// Pages of the claim that somebody waits for.
    pub(super) fn wanted_in(&self, claim: &Claim) -> Vec<u64> {
        let wanted = |page: &u64| self.wanted.contains_key(&(claim.memory.id, *page));
        claim.pages.clone().filter(wanted).collect()
    }
}
