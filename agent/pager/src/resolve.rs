//! Resolving a fault whose page is there.
//!
//! The order is ADR 9's: the invalidation sequence, then a look at the contents, then the mirror
//! with that sequence. Under the layout's read lock throughout: so no snapshot begins and no memory
//! moves between the judgement and the mapping.
//!
//! # Leave to write
//! A page that a snapshot guards is kept before it becomes writable. A read maps it protected;
//! where the host cannot protect, it is kept at the first access of either kind. All else becomes
//! writable at its first fault, which spares the second one. While a snapshot is armed, what is
//! only read is mapped protected, and what becomes writable is noted ([`crate::noted`]).

use std::{ops::Range, sync::Arc, sync::atomic::Ordering::Relaxed};

use slat_mmu::{Access, Around, Fault, FaultOutcome, Gfn, GfnRange, Refused, Vcpu};
use slat_paging::{PAGE, uffd::FaultKind, wire::ProblemKind};

use crate::{
    error::Trouble,
    guard::{is_guarded, keep},
    layout::Place,
    memory::{Memory, STRIPE},
    mirror::Mirror,
    owner::{Hint, hint},
    queue::Waiter,
    shared::Shared,
    sync::read,
    window::Window,
};

/// What came of it.
#[derive(Debug)]
pub(crate) enum Resolved {
    /// Whoever waited goes on.
    Done,
    /// The page has to be read from the source first.
    NotThere,
    /// Something is under way there.
    Again,
    /// There is no such memory any more.
    Gone,
    /// It cannot be.
    Failed(Trouble),
}

impl Shared {
    /// Maps a page for a thread that waits for it. Never blocks on a source.
    pub(crate) fn resolve(
        &self,
        vcpu: &mut Vcpu,
        memory: &Arc<Memory>,
        page: u64,
        waiter: &Waiter,
    ) -> Resolved {
        let Some(mirror) = &self.mirror else {
            return Resolved::Gone;
        };
        let layout = read(&self.layout);
        let Some(place) = layout.get(memory.id) else {
            return Resolved::Gone;
        };
        let seq = mirror.mmu.invalidate_seq();
        if !memory.is_there(page) {
            return Resolved::NotThere;
        }
        let one = One {
            shared: self,
            mirror,
            place,
            page,
            write: waiter.write && !memory.read_only,
            kind: waiter.kind,
            seq,
        };
        match one.kind {
            Some(FaultKind::WriteProtect) => one.grant(vcpu),
            _ => one.map(vcpu),
        }
        .unwrap_or_else(Resolved::Failed)
    }
}

/// A fault that is being resolved.
struct One<'a> {
    shared: &'a Shared,
    mirror: &'a Mirror,
    place: &'a Place,
    page: u64,
    write: bool,
    kind: Option<FaultKind>,
    seq: u64,
}

impl One<'_> {
    /// Maps a page that is not mapped.
    fn map(&self, vcpu: &mut Vcpu) -> Result<Resolved, Trouble> {
        let (memory, guards) = (&self.place.memory, &self.place.guards[..]);
        let tuning = &self.shared.tuning;
        let base = self.place.base_gfn;
        let window = memory
            .windows
            .at(self.page, memory.pages, base, tuning.around, tuning.most);
        memory.aged.touched(self.page);
        let mut around = memory.aged.trim(self.page, self.beside(&window));
        let mut protected = false;
        if self.place.armed.is_some() {
            // Each page that becomes writable is one to be protected again.
            protected = !self.write && self.shared.setup.can_protect;
            if !protected {
                around = self.page..self.page + 1;
            }
        }
        if !guards.is_empty() && is_guarded(guards, self.page) {
            if self.write || !self.shared.setup.can_protect {
                let wide = window.sequential || !self.write;
                let run = if wide {
                    &around
                } else {
                    &(self.page..self.page + 1)
                };
                let run = self.page..run.end.min(self.page + STRIPE).max(self.page + 1);
                keep(memory, guards, run, &self.shared.stats)?;
            } else {
                protected = true;
            }
        }
        if !protected {
            around = unguarded(self.place, self.page, around);
        }
        let access = if self.write {
            Access::Write
        } else {
            Access::Read
        };
        let mut fault = Fault::new(Gfn(base + self.page), access)
            .with_mirror()
            .with_seq(self.seq);
        if self.kind.is_some() {
            fault = fault.again();
        }
        if protected {
            fault = fault.read_only();
        } else {
            self.note(around.start.min(self.page)..around.end.max(self.page + 1));
        }
        let missing = self.kind == Some(FaultKind::Missing);
        let mut ask = |around: &Range<u64>| {
            let range = GfnRange::new(Gfn(base + around.start), around.end - around.start);
            let beside = Around::new(range);
            hint(Hint {
                own: memory.pfn + self.page,
                missing,
                ahead: missing && window.sequential,
            });
            let beside = if protected {
                beside.read_only()
            } else {
                beside
            };
            let result = self.mirror.mmu.fault_range(vcpu, fault, beside);
            hint(Hint::default());
            result
        };
        let mut result = ask(&around);
        if around.start < self.page
            && result.outcome == FaultOutcome::Refused(Refused::ContentsMissing)
        {
            // A page before it is not in the file, and ended the mapping there.
            memory.windows.had_holes();
            around.start = self.page;
            result = ask(&around);
        }
        let ended = match result.refused {
            // At a page that is not in the file.
            Some(_) => (around.start + result.mapped).max(self.page + 1),
            None => around.end,
        };
        if ended < window.pages.end {
            memory.windows.ended(window.pages.end, ended);
        }
        self.shared
            .stats
            .prefetched
            .fetch_add(result.mapped.saturating_sub(1), Relaxed);
        self.outcome(result.outcome)
    }

    /// Gives leave to write to a page that is mapped and protected, and to those after it where the
    /// guest writes one after the other.
    fn grant(&self, vcpu: &mut Vcpu) -> Result<Resolved, Trouble> {
        let memory = &self.place.memory;
        let base = self.place.base_gfn;
        let window = memory.written.at(self.page, memory.pages, base, 1, STRIPE);
        let mut end = memory
            .there_until(self.page..window.pages.end)
            .max(self.page + 1);
        if self.place.armed.is_some() {
            end = self.page + 1;
            self.note(self.page..end);
        }
        keep(
            memory,
            &self.place.guards,
            self.page..end,
            &self.shared.stats,
        )?;
        let fault = |page| {
            Fault::new(Gfn(base + page), Access::Write)
                .with_mirror()
                .with_seq(self.seq)
        };
        // It may have been discarded since it was protected.
        hint(Hint {
            own: memory.pfn + self.page,
            ..Hint::default()
        });
        let own = self
            .mirror
            .mmu
            .fault_range(vcpu, fault(self.page), Around::none());
        hint(Hint::default());
        for page in self.page + 1..end {
            // As a courtesy: what is mapped protected becomes writable, whatever else is left
            // alone.
            let mapped = self
                .mirror
                .space()
                .mirror_leaf_batch(GfnRange::new(Gfn(base + page), 1));
            if mapped.leaves.iter().any(|found| !found.leaf.writable) {
                let _ = self
                    .mirror
                    .mmu
                    .fault_range(vcpu, fault(page), Around::none());
            }
        }
        self.outcome(own.outcome)
    }

    /// Before pages become writable: a snapshot that is to begin protects them then.
    fn note(&self, pages: Range<u64>) {
        if let Some(noted) = &self.place.armed {
            pages.for_each(|page| noted.set(page));
        }
    }

    /// What can be mapped with the page: those around it that are there. The mapping ends at the
    /// first that is not in the file, unless zeroes are to be made ahead.
    fn beside(&self, window: &Window) -> Range<u64> {
        let (memory, page) = (&self.place.memory, self.page);
        let end = memory.there_until(page..window.pages.end).max(page + 1);
        if self.kind != Some(FaultKind::Missing) {
            let before = (window.pages.start..page).rev();
            let before = before.take_while(|page| memory.is_there(*page)).count();
            return page - before as u64..end;
        }
        let ahead = if window.sequential {
            self.shared.tuning.zeroes.max(1)
        } else {
            1
        };
        page..end.min(page + ahead)
    }

    fn outcome(&self, outcome: FaultOutcome) -> Result<Resolved, Trouble> {
        let kernel = |what: String| Err(Trouble::new(ProblemKind::Kernel, what));
        match outcome {
            FaultOutcome::Fixed { .. } => Ok(Resolved::Done),
            FaultOutcome::Spurious { .. } => {
                self.shared.stats.spurious.fetch_add(1, Relaxed);
                let address = self.place.view + self.page * PAGE as u64;
                // Who waits was woken by whoever was faster. To be sure.
                let _ = self.mirror.uffd.wake(address, PAGE as u64);
                Ok(Resolved::Done)
            }
            FaultOutcome::Retry
            | FaultOutcome::Refused(Refused::Busy | Refused::ContentsMissing) => {
                Ok(Resolved::Again)
            }
            FaultOutcome::Refused(Refused::Gone) | FaultOutcome::NoSlot => Ok(Resolved::Gone),
            FaultOutcome::Refused(Refused::NoMemory) | FaultOutcome::OutOfMemory => {
                let what = format!("no memory to map page {} of the guest", self.page);
                Err(Trouble::new(ProblemKind::NoMemory, what))
            }
            FaultOutcome::Refused(why) => kernel(format!("mapping a page of the guest: {why}")),
            other => kernel(format!("mapping a page of the guest: {other:?}")),
        }
    }
}

/// The neighbours of a page that is not guarded that are not guarded either.
fn unguarded(place: &Place, page: u64, around: Range<u64>) -> Range<u64> {
    if place.guards.is_empty() {
        return around;
    }
    let free = |page: &u64| !is_guarded(&place.guards, *page);
    let before = (around.start..page).rev().take_while(free).count() as u64;
    let after = (page + 1..around.end).take_while(free).count() as u64;
    page - before..page + 1 + after
}
