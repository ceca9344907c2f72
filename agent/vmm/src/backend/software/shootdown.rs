//! TLB shoot-down: how a flush reaches every vCPU, and how one knows that it has.
//!
//! # State
//! Each vCPU has a mailbox: the flushes it has yet to obey (merged into one), the number of the
//! last one posted, the number of the last one obeyed, and whether the vCPU is *inside the guest*,
//! which is the only time when it may use its TLB. Flushes are numbered in the order of posting;
//! every flush goes to every mailbox.
//!
//! # A vCPU
//! * *Enter*: `inside = true`; full fence; obey what was posted.
//! * *Each access*: look whether something was posted (one load); if so, obey: take the merged
//!   flush, drop what it covers from the TLB, then publish the number as obeyed. Then look the
//!   frame up. On a miss walk the tables, fill, and **begin anew**, so that a flush posted during
//!   the walk also hits the new entry.
//! * *Leave*: publish `inside = false`. A vCPU leaves before anything that may take long: resting,
//!   pacing, its own flush.
//!
//! # A sender
//! The MMU, through [`Host::flush`], when it has changed its tables and before it reuses what they
//! led to. Posts to every mailbox; full fence; then waits for each vCPU until it has obeyed that
//! number or is outside. It spins a little, then sleeps. *It holds the MMU's lock*, so a vCPU that
//! is inside does nothing that may wait for it: it walks and obeys. A walk takes no lock unless the
//! root was withdrawn; then it takes that of the list of roots and maybe that of tables to be given
//! back, whose holders never wait for a flush, a grace period or the MMU's lock
//! (`SecondStage::access`), so this sender's turn always comes. Faults are taken outside, roots
//! loaded outside. A vCPU whose own fault sends is outside too, so two senders never wait for one
//! another.
//!
//! # Why it is enough
//! 1. *Enter against post* is Dekker's: the vCPU stores `inside`, fences, loads `posted`; the
//!    sender stores `posted`, fences, loads `inside`. One of them sees the other: the sender waits,
//!    or the vCPU obeys before its first access.
//! 2. *Walk against post*: the tables change before `posted` is stored (release). A vCPU that has
//!    obeyed number `n` (acquire) and walks afterwards sees the change. One that walked before it
//!    obeyed drops what it filled when it obeys, because it looks at `posted` between filling and
//!    use.
//! 3. *Contents*: a vCPU's stores through a translation come before it publishes `obeyed` or
//!    `inside = false` (release), and the sender loads those (acquire). So after a flush the sender
//!    reads all that was written through what it revoked.
//!
//! # The check
//! A flush that is complete is noted in a log with its number. A TLB entry remembers the number
//! its vCPU had obeyed when the walk began. An entry that a complete flush of a *later* number
//! covers should be gone; whoever finds one in use has found a bug in all of the above, and the VM
//! is stopped ([`Shootdown::was_revoked`]). The check does not trust the vCPU's own book-keeping,
//! runs always, and costs one load where nothing was flushed.
//!
//! The log is a ring of atomics, so that vCPUs look without a lock: an entry is read, then the
//! number of completions; if that shows that the entry may have been used again meanwhile, what was
//! read is not believed.
//!
//! *Locking*: below the MMU's lock: `order` while posting, and one mailbox's lock at a time;
//! `writer` alone, while noting. None is held while waiting but a mailbox's, by its condition
//! variable.

use std::{
    hint,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{
            AtomicBool, AtomicU64, AtomicUsize,
            Ordering::{Acquire, Relaxed, Release, SeqCst},
            fence,
        },
    },
};

use slat_mmu::{Flush, FlushRequest, Gfn, GfnRange, Host};

use super::port::Port;

/// Looks at a mailbox before the sender sleeps.
const SPINS: u32 = 200;
/// Complete flushes that are remembered. An entry that was not used for longer is not used again
/// but walked anew.
pub(super) const REMEMBERED: u64 = 64;

#[derive(Debug, Default)]
struct Pending {
    flush: Flush,
    number: u64,
}

#[derive(Debug, Default)]
#[repr(align(128))] // no false sharing between vCPUs: each looks into its own at every access
struct Mailbox {
    posted: AtomicU64,
    obeyed: AtomicU64,
    inside: AtomicBool,
    sleepers: AtomicUsize,
    pending: Mutex<Pending>,
    changed: Condvar,
}

impl Mailbox {
    fn pending(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn settled(&self, number: u64) -> bool {
        !self.inside.load(SeqCst) || self.obeyed.load(Acquire) >= number
    }

    /// Waits until flush `number` was obeyed or the vCPU is outside; true when it had to be told.
    fn wait(&self, number: u64) -> bool {
        if self.settled(number) {
            // Obeyed already means that it was inside a moment ago.
            return self.obeyed.load(Relaxed) >= number;
        }
        for _ in 0..SPINS {
            hint::spin_loop();
            if self.settled(number) {
                return true;
            }
        }
        let mut pending = self.pending();
        self.sleepers.fetch_add(1, SeqCst);
        while !self.settled(number) {
            pending = self
                .changed
                .wait(pending)
                .unwrap_or_else(PoisonError::into_inner);
        }
        self.sleepers.fetch_sub(1, SeqCst);
        true
    }

    /// Called after `obeyed` or `inside` changed. The lock makes it come after a sleeper's look or
    /// before its sleep.
    fn wake(&self) {
        if self.sleepers.load(SeqCst) > 0 {
            drop(self.pending());
            self.changed.notify_all();
        }
    }
}

/// A complete flush. A full one is a range that holds every frame.
#[derive(Debug, Default)]
struct CompleteFlush {
    number: AtomicU64,
    gfn: AtomicU64,
    pages: AtomicU64,
}

/// The last complete flushes. Flush `i` is at index `i % REMEMBERED`.
#[derive(Debug)]
struct FlushLog {
    notes: [CompleteFlush; REMEMBERED as usize],
    /// Notes written. Alone on its lines: every vCPU reads it at every access.
    complete: Complete,
    writer: Mutex<()>,
}

#[derive(Debug, Default)]
#[repr(align(128))]
struct Complete(AtomicU64);

impl FlushLog {
    fn new() -> Self {
        Self {
            notes: std::array::from_fn(|_| CompleteFlush::default()),
            complete: Complete::default(),
            writer: Mutex::new(()),
        }
    }

    fn note(&self, number: u64, flush: Flush) {
        let (gfn, pages) = match flush {
            Flush::None => return,
            Flush::Range { gfn, pages } => (gfn.0, pages),
            Flush::All => (0, u64::MAX),
        };
        let _writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        let at = self.complete.0.load(Relaxed);
        let note = &self.notes[(at % REMEMBERED) as usize];
        // Who reads a word of the new note also sees `complete` at `at` or higher, and that the old
        // one is gone.
        fence(Release);
        note.number.store(number, Relaxed);
        note.gfn.store(gfn, Relaxed);
        note.pages.store(pages, Relaxed);
        self.complete.0.store(at + 1, Release);
    }

    /// Whether one of the notes from `from` to `to` is of a flush later than `walked` that touches
    /// `span`.
    fn any(&self, span: GfnRange, walked: u64, from: u64, to: u64) -> Option<bool> {
        let mut found = false;
        for at in from..to {
            let note = &self.notes[(at % REMEMBERED) as usize];
            let (number, gfn, pages) = (
                note.number.load(Relaxed),
                note.gfn.load(Relaxed),
                note.pages.load(Relaxed),
            );
            found |= number > walked && GfnRange::new(Gfn(gfn), pages).overlaps(span);
        }
        fence(Acquire);
        // The slot of `from` is the first to be used again, when `complete` is a whole round
        // further.
        (self.complete.0.load(Relaxed) - from < REMEMBERED).then_some(found)
    }
}

/// How often what happened.
#[derive(Debug, Default)]
struct FlushCounters {
    requests: AtomicU64,
    reached: AtomicU64,
    obeyed: AtomicU64,
}

/// The mailboxes of a VM's vCPUs.
#[derive(Debug)]
pub(super) struct Shootdown {
    order: Mutex<u64>,
    mailboxes: Vec<Mailbox>,
    log: FlushLog,
    counters: FlushCounters,
    port: Arc<dyn Port>,
}

/// Flush requests, requests that reached a vCPU, and flushes done by vCPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FlushCounts {
    pub(super) requests: u64,
    pub(super) reached: u64,
    pub(super) by_vcpus: u64,
}

impl Shootdown {
    pub(super) fn new(vcpus: u32, port: Arc<dyn Port>) -> Self {
        Self {
            order: Mutex::new(0),
            mailboxes: (0..vcpus).map(|_| Mailbox::default()).collect(),
            log: FlushLog::new(),
            counters: FlushCounters::default(),
            port,
        }
    }

    /// Carries out a flush. Returns when no vCPU uses what it covers. Never called by a vCPU inside
    /// the guest.
    pub(super) fn shoot(&self, flush: Flush) {
        self.counters.requests.fetch_add(1, Relaxed);
        let number = self.post(flush);
        fence(SeqCst);
        let mut reached = false;
        for mailbox in &self.mailboxes {
            reached |= mailbox.wait(number);
        }
        if reached {
            self.counters.reached.fetch_add(1, Relaxed);
        }
        if self.port.notes() {
            self.log.note(number, flush);
        }
    }

    fn post(&self, flush: Flush) -> u64 {
        let mut order = self.order.lock().unwrap_or_else(PoisonError::into_inner);
        *order += 1;
        for mailbox in &self.mailboxes {
            let mut pending = mailbox.pending();
            pending.flush = pending.flush.merge(flush);
            pending.number = *order;
            mailbox.posted.store(*order, Release);
        }
        *order
    }

    /// vCPU: may use the TLB from here on, once it has obeyed what is posted.
    pub(super) fn enter(&self, vcpu: usize) {
        self.mailboxes[vcpu].inside.store(true, SeqCst);
        fence(SeqCst);
    }

    /// vCPU: does not use the TLB until it enters again.
    pub(super) fn leave(&self, vcpu: usize) {
        let mailbox = &self.mailboxes[vcpu];
        mailbox.inside.store(false, SeqCst);
        mailbox.wake();
    }

    /// vCPU: the number of the last flush posted to it.
    pub(super) fn posted(&self, vcpu: usize) -> u64 {
        self.mailboxes[vcpu].posted.load(Acquire)
    }

    /// vCPU: what it must drop now, and the number to acknowledge it with.
    pub(super) fn take(&self, vcpu: usize) -> (u64, Flush) {
        let mut pending = self.mailboxes[vcpu].pending();
        (pending.number, std::mem::take(&mut pending.flush))
    }

    /// vCPU: has dropped what [`Shootdown::take`] said.
    pub(super) fn acknowledge(&self, vcpu: usize, number: u64) {
        self.counters.obeyed.fetch_add(1, Relaxed);
        let mailbox = &self.mailboxes[vcpu];
        mailbox.obeyed.store(number, SeqCst);
        mailbox.wake();
    }

    /// How many flushes are complete.
    pub(super) fn completions(&self) -> u64 {
        self.log.complete.0.load(Acquire)
    }

    /// Whether a translation of `span`, walked after its vCPU had obeyed flush `walked`, was
    /// revoked by a flush that is complete. `None` when that many flushes ago (`checked`
    /// completions) are not remembered.
    pub(super) fn was_revoked(&self, span: GfnRange, walked: u64, checked: u64) -> Option<bool> {
        let complete = self.completions();
        if complete - checked >= REMEMBERED {
            return None;
        }
        self.log.any(span, walked, checked, complete)
    }

    pub(super) fn counts(&self) -> FlushCounts {
        FlushCounts {
            requests: self.counters.requests.load(Relaxed),
            reached: self.counters.reached.load(Relaxed),
            by_vcpus: self.counters.obeyed.load(Relaxed),
        }
    }
}

impl Host for Shootdown {
    fn flush(&self, request: &FlushRequest) {
        // There is one address space, and translations do not remember why they went.
        if !request.flush.is_none() {
            self.shoot(request.flush);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use slat_mmu::Gfn;

    use super::{super::port::Direct, *};

    fn shootdown(vcpus: u32) -> Arc<Shootdown> {
        Arc::new(Shootdown::new(vcpus, Arc::new(Direct)))
    }

    fn page(gfn: u64) -> Flush {
        Flush::range(GfnRange::new(Gfn(gfn), 1))
    }

    #[test]
    fn a_vcpu_outside_is_not_waited_for_and_finds_everything_when_it_enters() {
        let shootdown = shootdown(1);
        shootdown.shoot(page(5));
        shootdown.shoot(page(9));
        shootdown.enter(0);
        assert_eq!(shootdown.posted(0), 2);
        let (number, flush) = shootdown.take(0);
        assert_eq!((number, flush), (2, Flush::range(GfnRange::new(Gfn(5), 5))));
        let counts = shootdown.counts();
        assert_eq!((counts.requests, counts.reached), (2, 0));
    }

    #[test]
    fn a_sender_sleeps_until_a_vcpu_inside_obeys_or_leaves() {
        for leaves in [false, true] {
            let shootdown = shootdown(1);
            shootdown.enter(0);
            let sender = {
                let shootdown = Arc::clone(&shootdown);
                thread::spawn(move || shootdown.shoot(Flush::All))
            };
            while shootdown.posted(0) == 0 || shootdown.mailboxes[0].sleepers.load(SeqCst) == 0 {
                thread::yield_now();
            }
            assert_eq!(shootdown.completions(), 0);
            if leaves {
                shootdown.leave(0);
            } else {
                let (number, _) = shootdown.take(0);
                shootdown.acknowledge(0, number);
            }
            sender.join().unwrap();
            assert_eq!(
                (shootdown.completions(), shootdown.counts().reached),
                (1, 1)
            );
        }
    }

    #[test]
    fn the_log_knows_what_was_revoked() {
        let shootdown = shootdown(0);
        let span = |gfn| GfnRange::new(Gfn(gfn), 1);
        shootdown.shoot(page(5));
        assert_eq!(shootdown.was_revoked(span(5), 0, 0), Some(true));
        assert_eq!(shootdown.was_revoked(span(6), 0, 0), Some(false));
        // Walked after it had obeyed that flush: a new translation.
        assert_eq!(shootdown.was_revoked(span(5), 1, 0), Some(false));
        for _ in 2..REMEMBERED {
            shootdown.shoot(page(1));
        }
        assert_eq!(shootdown.was_revoked(span(5), 0, 0), Some(true));
        shootdown.shoot(Flush::All);
        assert_eq!(shootdown.was_revoked(span(6), 0, 0), None, "forgotten");
        assert_eq!(shootdown.was_revoked(span(6), 0, 1), Some(true));
        assert_eq!(shootdown.was_revoked(span(6), REMEMBERED, 1), Some(false));
    }

    #[test]
    fn what_is_read_while_it_is_overwritten_is_not_believed() {
        let shootdown = shootdown(0);
        let span = |gfn| GfnRange::new(Gfn(gfn), 1);
        let writer = {
            let shootdown = Arc::clone(&shootdown);
            thread::spawn(move || (0..20_000).for_each(|_| shootdown.shoot(page(1))))
        };
        // Every flush is of frame 1: frame 2 never was, frame 1 always.
        while shootdown.completions() < 20_000 {
            let now = shootdown.completions();
            let checked = now.saturating_sub(REMEMBERED - 2).max(1) - 1;
            assert_ne!(shootdown.was_revoked(span(2), 0, checked), Some(true));
            if now > 0 {
                assert_ne!(shootdown.was_revoked(span(1), 0, checked), Some(false));
            }
        }
        writer.join().unwrap();
    }
}
