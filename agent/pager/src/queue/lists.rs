//! The lists behind the queue, and in which order loaders take from them.
//!
//! What the VM process asked for stays in its list until whoever asked takes it out: also when all
//! of it is in somebody else's claim, which may fail. Whoever goes through a range remembers how
//! far it is, and goes back only to a claim that failed.
//!
//! *Locking*: all of it is behind the queue's lock.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    ops::Range,
    sync::Arc,
    time::Instant,
};

use slat_paging::uffd::FaultKind;

use super::todo::{Todo, free_around};
use crate::{error::Trouble, memory::Memory};

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
    pub(crate) retries: u64,
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

impl ForWhom {
    /// Whether nobody waits.
    fn is_idle(self) -> bool {
        matches!(self, Self::Ahead | Self::Background)
    }
}

/// Pages that the VM process asked for.
#[derive(Debug)]
pub(super) struct Asked {
    /// By whom.
    pub(super) number: u64,
    pub(super) todo: Todo,
    /// Why they do not come.
    pub(super) failed: Option<Trouble>,
}

type Key = (u32, u64);

#[derive(Debug, Default)]
pub(super) struct Inner {
    pub(super) ready: VecDeque<Wait>,
    pub(super) faults: VecDeque<(Arc<Memory>, u64)>,
    /// Threads by the page that has to be read for them, and how many that are.
    wanted: HashMap<Key, Vec<Waiter>>,
    waiters: usize,
    pub(super) asked: Vec<Asked>,
    pub(super) last_asked: u64,
    pub(super) ahead: VecDeque<(Arc<Memory>, Range<u64>)>,
    /// What is left of the pages that are read first, see `early`.
    pub(super) early: VecDeque<(Arc<Memory>, Range<u64>)>,
    /// No more than there are loaders.
    pub(super) claims: Vec<(u32, Range<u64>)>,
    /// Of these, those that are read for nobody who waits.
    idle: usize,
    /// Memories that are brought in the background.
    pub(super) loading: Vec<Todo>,
    pub(super) load_all: bool,
    /// Pages that are waited for and could not be read, and waits whose page could not be mapped.
    pub(super) failed: BTreeMap<Key, Arc<Memory>>,
    pub(super) unmapped: Vec<Wait>,
    /// The background failed: it goes on when somebody says so.
    pub(super) paused: bool,
    /// Something that was asked for could not be read. Nobody waits for it here.
    pub(super) refused: bool,
    pub(super) retries: u64,
    turns: u32,
    /// How often something came to an end: a claim, a wait.
    pub(super) ends: u64,
    pub(super) over: bool,
}

impl Inner {
    pub(super) fn waiting(&self) -> usize {
        self.waiters + self.ready.len() + self.unmapped.len()
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
            if self.failed.contains_key(&(memory.id, page)) {
                // It waits until somebody says to try again.
            } else if memory.is_there(page) {
                self.make_ready(&memory, page);
            } else if let Some(claim) = self.claim(&memory, page, &together(&memory, page)) {
                return Some(claim);
            }
        }
        if let Some(claim) = self.next_asked() {
            return Some(claim);
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
            if let Some(pages) = free_around(&self.claims, &memory, first, &wanted) {
                return Some(self.claim_all(&memory, pages, ForWhom::Ahead));
            }
        }
        self.for_nobody(together)
    }

    /// Somebody waits for a page that has to be read. Whether it is the first. A vCPU that is
    /// interrupted faults again: it waits since its first fault.
    pub(super) fn want(&mut self, memory: u32, page: u64, waiter: Waiter) -> bool {
        let waiters = self.wanted.entry((memory, page)).or_default();
        let known = waiters.iter_mut();
        if let Some(known) = known
            .filter(|known| known.thread == waiter.thread)
            .find(|_| waiter.thread != 0)
        {
            known.write |= waiter.write;
            return false;
        }
        waiters.push(waiter);
        self.waiters += 1;
        waiters.len() == 1
    }

    /// Who waits for the page waits for it no more.
    pub(super) fn take_wanted(&mut self, memory: u32, page: u64) -> Vec<Waiter> {
        let key = (memory, page);
        self.failed.remove(&key);
        let waiters = self.wanted.remove(&key).unwrap_or_default();
        self.waiters -= waiters.len();
        waiters
    }

    /// The page came by another way.
    pub(super) fn make_ready(&mut self, memory: &Arc<Memory>, page: u64) {
        for waiter in self.take_wanted(memory.id, page) {
            let memory = Arc::clone(memory);
            self.ready.push_back(Wait {
                memory,
                page,
                waiter,
            });
        }
    }

    /// What is not there and not claimed of `wanted` around a page; `None` when the page is there,
    /// or claimed: then whoever has it does the rest.
    fn claim(&mut self, memory: &Arc<Memory>, page: u64, wanted: &Range<u64>) -> Option<Claim> {
        let pages = free_around(&self.claims, memory, page, wanted)?;
        Some(self.claim_all(memory, pages, ForWhom::Guest))
    }

    pub(super) fn claim_all(
        &mut self,
        memory: &Arc<Memory>,
        pages: Range<u64>,
        for_whom: ForWhom,
    ) -> Claim {
        self.claims.push((memory.id, pages.clone()));
        self.idle += usize::from(for_whom.is_idle());
        Claim {
            memory: Arc::clone(memory),
            pages,
            for_whom,
            retries: self.retries,
        }
    }

    fn next_asked(&mut self) -> Option<Claim> {
        for at in 0..self.asked.len() {
            let Asked { todo, failed, .. } = &mut self.asked[at];
            if failed.is_none()
                && let Some(pages) = todo.next_free(&self.claims, RUN)
            {
                let memory = Arc::clone(&todo.memory);
                return Some(self.claim_all(&memory, pages, ForWhom::Asker));
            }
        }
        None
    }

    pub(super) fn background(&mut self) -> Option<Claim> {
        if !self.load_all || self.paused {
            return None;
        }
        for at in 0..self.loading.len() {
            let todo = &mut self.loading[at];
            if let Some(pages) = todo.next_free(&self.claims, RUN) {
                let memory = Arc::clone(&todo.memory);
                return Some(self.claim_all(&memory, pages, ForWhom::Background));
            }
        }
        self.loading.retain(|todo| !todo.memory.is_loaded());
        None
    }

    /// Pages of the claim are not there: whoever goes through them comes by again.
    pub(super) fn go_back(&mut self, claim: &Claim) {
        let asked = self.asked.iter_mut().map(|asked| &mut asked.todo);
        for todo in self.loading.iter_mut().chain(asked) {
            todo.go_back(claim.memory.id, &claim.pages);
        }
    }

    /// A claim of somebody who asked failed: so have all who asked for all of it. Who asked for
    /// a part may be luckier.
    pub(super) fn fail_asked(&mut self, claim: &Claim, trouble: &Trouble) {
        for asked in &mut self.asked {
            if asked.todo.covers(claim.memory.id, &claim.pages) {
                asked.failed.get_or_insert_with(|| trouble.clone());
            }
        }
    }

    pub(super) fn release(&mut self, claim: &Claim) {
        let own = (claim.memory.id, claim.pages.clone());
        self.claims.retain(|other| *other != own);
        self.idle -= usize::from(claim.for_whom.is_idle());
        self.ends += 1;
    }

    /// Pages of the claim that somebody waits for.
    pub(super) fn wanted_in(&self, claim: &Claim) -> Vec<u64> {
        if self.wanted.is_empty() {
            return Vec::new();
        }
        let wanted = |page: &u64| self.wanted.contains_key(&(claim.memory.id, *page));
        claim.pages.clone().filter(wanted).collect()
    }
}
