//! What waits: faults whose pages are there but could not be mapped at once, faults whose pages
//! have to be read from the source, and reads that nobody waits for.
//!
//! Two kinds of threads take from it. *Handlers* map pages that are there. *Loaders* read the
//! source, which may block: so a stalled source holds no page up that is there.
//!
//! Loaders take faults first (and with a page those that are best read with it), then what the VM
//! process asked for, then reads ahead, then the background; every eighth time the background
//! first, so that it gets on beside a guest that faults all the time. A range that is being read is
//! *claimed*: who wants a page of it is told when the claim ends, so nothing is read twice.
//!
//! *Locking*: one lock, held for looks at lists. *Limits*: as many faults wait as the guest has
//! threads; whoever reads faults stops at [`MOST`]. Reads ahead are dropped beyond [`MOST_AHEAD`].
//! Each request of the VM process has one range a memory here, and its requests are bounded where
//! they come in.

mod early;
mod lists;
#[cfg(test)]
mod tests;
mod todo;

use std::{
    ops::Range,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

pub(crate) use self::{
    early::Runs as EarlyRuns,
    lists::{Claim, Wait, Waiter},
};
use self::{
    lists::{Asked, ForWhom, Inner},
    todo::Todo,
};
use crate::{
    error::Trouble,
    memory::Memory,
    sync::{lock, wait},
};

/// Faults that wait.
const MOST: usize = 4096;
const MOST_AHEAD: usize = 64;
/// Who waits for pages looks again after this: a read that takes too long is told by nobody.
const LOOK: Duration = Duration::from_millis(100);
/// Who has nothing to do is woken; this is against a wake-up that is lost.
const IDLE: Duration = Duration::from_secs(1);

#[derive(Debug, Default)]
pub(crate) struct Queue {
    inner: Mutex<Inner>,
    /// As in `inner`, written under its lock: for who looks without.
    retries: AtomicU64,
    /// All that is to be read first.
    first: OnceLock<EarlyRuns>,
    /// There is something for handlers.
    ready: Condvar,
    /// There is something for loaders.
    more: Condvar,
    /// Something came to an end: a claim, a wait.
    ended: Condvar,
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        lock(&self.inner)
    }

    /// A memory that has a source.
    pub(crate) fn add(&self, memory: Arc<Memory>) {
        let all = 0..memory.pages;
        self.lock().loading.push(Todo::new(memory, all));
        self.more.notify_all();
    }

    /// Waits until there is room for more faults. Whether it is to go on.
    pub(crate) fn wait_for_room(&self) -> bool {
        let mut inner = self.lock();
        while inner.waiting() >= MOST && !inner.over {
            inner = wait(&self.ended, inner, LOOK);
        }
        !inner.over
    }

    /// A page that is there is to be mapped by a handler.
    pub(crate) fn push_ready(&self, wait: Wait) {
        self.lock().ready.push_back(wait);
        self.ready.notify_one();
    }

    /// A page has to be read before it can be mapped.
    pub(crate) fn push_fault(&self, wait: Wait) {
        let mut inner = self.lock();
        if inner.want(wait.memory.id, wait.page, wait.waiter) {
            inner.faults.push_back((wait.memory, wait.page));
            self.more.notify_one();
        }
    }

    /// Pages are to be read, for somebody who waits with [`Queue::wait_until`], and says
    /// [`Queue::end_ask`] at the end. A number for it.
    pub(crate) fn ask(&self, ranges: impl Iterator<Item = (Arc<Memory>, Range<u64>)>) -> u64 {
        let mut inner = self.lock();
        inner.last_asked += 1;
        let number = inner.last_asked;
        let asked = ranges.map(|(memory, pages)| Asked {
            number,
            todo: Todo::new(memory, pages),
            failed: None,
        });
        inner.asked.extend(asked);
        self.more.notify_all();
        number
    }

    /// Why something that was asked for could not be read.
    pub(crate) fn ask_failed(&self, number: u64) -> Option<Trouble> {
        let inner = self.lock();
        let mut own = inner.asked.iter().filter(|asked| asked.number == number);
        own.find_map(|asked| asked.failed.clone())
    }

    /// Nobody waits any more for what was asked for.
    pub(crate) fn end_ask(&self, number: u64) {
        self.lock().asked.retain(|asked| asked.number != number);
    }

    /// Pages will be wanted soon.
    pub(crate) fn ahead(&self, memory: &Arc<Memory>, pages: Range<u64>) {
        let mut inner = self.lock();
        let pages = pages.start..pages.end.min(memory.pages);
        if inner.ahead.len() < MOST_AHEAD && !pages.is_empty() {
            inner.ahead.push_back((Arc::clone(memory), pages));
            self.more.notify_one();
        }
    }

    /// These pages are to be read first. Said once.
    pub(crate) fn read_first(&self, runs: EarlyRuns) {
        self.lock().early = runs.clone().into();
        // Twice is once.
        let _ = self.first.set(runs);
        self.more.notify_all();
    }

    /// Pages of them that are there, and all.
    pub(crate) fn first_progress(&self) -> (u64, u64) {
        let runs = self.first.get().into_iter().flatten();
        runs.fold((0, 0), |(there, all), (memory, pages)| {
            let count = pages.end - pages.start;
            (there + memory.there_in(pages.clone()), all + count)
        })
    }

    /// Everything is to be read.
    pub(crate) fn load_all(&self) {
        self.lock().load_all = true;
        self.more.notify_all();
    }

    /// For a handler: the next page that is there. `None`: nothing for a while, or the end.
    pub(crate) fn take_ready(&self) -> Option<Wait> {
        let mut inner = self.lock();
        if inner.ready.is_empty() && !inner.over {
            inner = wait(&self.ready, inner, IDLE);
        }
        inner.ready.pop_front()
    }

    /// For a loader: the next range to read. `together` says what is best read with a page. `None`:
    /// nothing for a while, or the end.
    pub(crate) fn take_load(&self, together: &dyn Fn(&Memory, u64) -> Range<u64>) -> Option<Claim> {
        let mut inner = self.lock();
        let mut claim = inner.next_load(together);
        if claim.is_none() && !inner.over {
            if !inner.ready.is_empty() {
                self.ready.notify_all();
            }
            inner = wait(&self.more, inner, IDLE);
            claim = inner.next_load(together);
        }
        if !inner.ready.is_empty() {
            self.ready.notify_all();
        }
        if claim.is_some() && !inner.faults.is_empty() {
            // Who was woken for a fault may have taken something else.
            self.more.notify_one();
        }
        claim.filter(|_| !inner.over)
    }

    /// The claimed pages are there: who waits for them.
    pub(crate) fn done(&self, claim: &Claim) -> Vec<Wait> {
        let mut inner = self.lock();
        inner.release(claim);
        let waits = inner.wanted_in(claim);
        let waits = waits.into_iter().flat_map(|page| {
            let memory = &claim.memory;
            let waiters = inner.take_wanted(memory.id, page).into_iter();
            waiters.map(move |waiter| Wait {
                memory: Arc::clone(memory),
                page,
                waiter,
            })
        });
        let waits = waits.collect();
        self.ended.notify_all();
        waits
    }

    /// Pages of a claim that somebody waits for.
    pub(crate) fn wanted(&self, claim: &Claim) -> Vec<u64> {
        self.lock().wanted_in(claim)
    }

    /// Not all of it could be read, and these pages could not be read alone either: who waits for
    /// them goes on waiting. Whether there is anything to be said: somebody waits, or nobody would
    /// have asked again.
    pub(crate) fn failed(&self, claim: &Claim, alone: &[u64], trouble: &Trouble) -> bool {
        let mut inner = self.lock();
        inner.release(claim);
        inner.go_back(claim);
        if claim.retries != inner.retries {
            // It was read before somebody said that the source is mended.
            for page in inner.wanted_in(claim) {
                inner.faults.push_back((Arc::clone(&claim.memory), page));
            }
            self.more.notify_all();
            self.ended.notify_all();
            return false;
        }
        inner.paused |= claim.for_whom == ForWhom::Background;
        if claim.for_whom == ForWhom::Asker {
            inner.refused = true;
            inner.fail_asked(claim, trouble);
        }
        let mut failed = matches!(claim.for_whom, ForWhom::Asker | ForWhom::Background);
        for page in inner.wanted_in(claim) {
            if claim.memory.is_there(page) {
                inner.make_ready(&claim.memory, page);
            } else if claim.pages.end - claim.pages.start > 1 && !alone.contains(&page) {
                // Wanted since a moment ago: it may be a neighbour that cannot be read.
                inner.faults.push_back((Arc::clone(&claim.memory), page));
            } else {
                let key = (claim.memory.id, page);
                inner.failed.insert(key, Arc::clone(&claim.memory));
                failed = true;
            }
        }
        self.ended.notify_all();
        self.ready.notify_all();
        // Who asked for pages of it reads them again.
        self.more.notify_all();
        failed
    }

    /// Pages are there by another way: who waits for one that could not be read goes on.
    pub(crate) fn came(&self, memory: &Arc<Memory>, pages: Range<u64>) {
        let mut inner = self.lock();
        let keys = (memory.id, pages.start)..(memory.id, pages.end);
        let failed: Vec<u64> = inner
            .failed
            .range(keys)
            .map(|((_, page), _)| *page)
            .collect();
        for page in failed {
            inner.make_ready(memory, page);
        }
        inner.ends += 1;
        self.ended.notify_all();
        self.ready.notify_all();
    }

    /// A page could not be mapped, in a try that began then: it is tried again when somebody says
    /// so, or at once if somebody has since.
    pub(crate) fn failed_to_map(&self, wait: Wait, began: u64) {
        let mut inner = self.lock();
        if began == self.retries() {
            inner.unmapped.push(wait);
        } else {
            inner.ready.push_back(wait);
            self.ready.notify_one();
        }
    }

    /// How often somebody has said to try again.
    pub(crate) fn retries(&self) -> u64 {
        self.retries.load(Ordering::Acquire)
    }

    /// What failed is tried again. How often that was said by now.
    pub(crate) fn retry(&self) -> u64 {
        let mut inner = self.lock();
        let retries = self.retries.fetch_add(1, Ordering::AcqRel) + 1;
        let (failed, unmapped) = (
            std::mem::take(&mut inner.failed),
            std::mem::take(&mut inner.unmapped),
        );
        let failed = failed.into_iter();
        let failed = failed.map(|((_, page), memory)| (memory, page));
        inner.faults.extend(failed);
        for asked in &mut inner.asked {
            asked.failed = None;
        }
        inner.ready.extend(unmapped);
        inner.retries = retries;
        inner.paused = false;
        inner.refused = false;
        drop(inner);
        self.more.notify_all();
        self.ready.notify_all();
        retries
    }

    /// Whether something failed and was not tried again.
    pub(crate) fn has_failed(&self) -> bool {
        let inner = self.lock();
        inner.paused || inner.refused || !inner.failed.is_empty() || !inner.unmapped.is_empty()
    }

    /// Threads that wait.
    pub(crate) fn waiting(&self) -> u64 {
        self.lock().waiting() as u64
    }

    /// Waits, looking again whenever a claim ends, until `done` says something.
    pub(crate) fn wait_until<T>(&self, mut done: impl FnMut() -> Option<T>) -> Option<T> {
        loop {
            let inner = self.lock();
            if inner.over {
                return None;
            }
            let ends = inner.ends;
            drop(inner);
            if let Some(result) = done() {
                return Some(result);
            }
            let inner = self.lock();
            // Unless something has ended since.
            if inner.ends == ends && !inner.over {
                drop(wait(&self.ended, inner, LOOK));
            }
        }
    }

    /// Nothing is taken any more, and nobody waits.
    pub(crate) fn end(&self) {
        self.lock().over = true;
        self.ready.notify_all();
        self.more.notify_all();
        self.ended.notify_all();
    }
}
