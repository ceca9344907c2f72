//! Mapping pages before the guest touches them.
//!
//! Contents come first, all of a request's at once, so that a file is read in its own pieces. Then
//! pages are mapped by tables, each under the layout's read lock as a fault is
//! ([`crate::resolve`]): so no snapshot begins and no memory moves between the judgement and the
//! mapping. What is mapped already stays as it is.
//!
//! # Leave to write
//! As after a read: a page that a snapshot guards is mapped protected, and so is every page while
//! a snapshot is armed. Where the host cannot protect, what is guarded is kept first, and what
//! becomes writable is noted. All else is writable.
//!
//! Progress is told before what is wrong: whoever asks again from where this ended hears of it
//! then.

use std::{ops::Range, sync::Arc, time::Duration};

use slat_mmu::{Access, Around, Fault, FaultOutcome, Gfn, GfnRange, Refused, Vcpu};
use slat_paging::wire::ProblemKind;

use crate::{
    error::Trouble,
    guard::{is_guarded, keep},
    layout::{Part, Place},
    memory::Memory,
    mirror::Mirror,
    owner::{Hint, hint},
    shared::Shared,
    sync::read,
};

/// Frames under one table of the mirror.
const TABLE: u64 = 512;
/// How often something that is under way is waited for, a moment each time.
const TRIES: u32 = 2000;
/// A moment.
const PAUSE: Duration = Duration::from_micros(50);
/// Mappings of one table: others may take away what was mapped just now, for as long as they like.
const MOST: u64 = 4 * TABLE;

/// What came of one look at a table's pages.
enum Step {
    /// All are mapped.
    Whole,
    /// Some were mapped.
    More,
    /// Something is under way there.
    Busy,
    /// The memory is gone, or elsewhere, or lacks contents again.
    Moved,
}

impl Shared {
    /// Maps pages from a frame on, of one memory. How many are mapped: 0 when there is no memory at
    /// that frame now.
    pub(super) fn prefault(&self, gfn: u64, pages: u64) -> Result<u64, Trouble> {
        let mirror = self.watching()?;
        self.wait_until_swept()?;
        let parts = read(&self.layout).parts(gfn, pages);
        let Some(part) = parts.into_iter().next().filter(|part| part.gfn == gfn) else {
            return Ok(0);
        };
        let first = part.pages.start;
        let there = self.bring_some(&part)?;
        let mut vcpu = mirror.mmu.vcpu();
        let mut at = first;
        while at < there {
            let table = ((gfn + at - first) / TABLE + 1) * TABLE - (gfn + at - first);
            let here = at..there.min(at + table);
            match self.map_table(mirror, &mut vcpu, &part, here.clone()) {
                Ok(true) => at = here.end,
                Ok(false) => break,
                Err(trouble) if at == first => return Err(trouble),
                Err(_) => break,
            }
        }
        Ok(at - first)
    }

    /// Brings contents of a part: up to which page. An error when the first page cannot be had;
    /// what is read together with a page that cannot is tried without it.
    fn bring_some(&self, part: &Part) -> Result<u64, Trouble> {
        let (first, end) = (part.pages.start, part.pages.end);
        let mut count = end - first;
        loop {
            let brought = self.bring_ahead(&part.memory, first..first + count);
            let there = part.memory.there_until(first..end);
            match brought {
                Err(trouble) if there == first => {
                    if count == 1 || trouble.kind == ProblemKind::SourceStalled || self.is_over() {
                        return Err(trouble);
                    }
                    count /= 2;
                }
                _ => return Ok(there),
            }
        }
    }

    /// Has loaders bring pages, and waits until they are there, or one of them cannot be had.
    fn bring_ahead(&self, memory: &Arc<Memory>, pages: Range<u64>) -> Result<(), Trouble> {
        let lacks = || memory.there_until(pages.clone());
        if lacks() == pages.end {
            return Ok(());
        }
        let range = (Arc::clone(memory), pages.clone());
        let asked = self.queue.ask(std::iter::once(range));
        let brought = self.queue.wait_until(|| {
            if lacks() == pages.end {
                return Some(Ok(()));
            }
            let failed = self.queue.ask_failed(asked);
            failed.or_else(|| self.problems.stalled()).map(Err)
        });
        self.queue.end_ask(asked);
        brought.unwrap_or_else(|| Err(Trouble::new(ProblemKind::Stopping, "the pager is ending")))
    }

    /// Maps pages under one table. Whether all are; not when the memory went or moved.
    fn map_table(
        &self,
        mirror: &Mirror,
        vcpu: &mut Vcpu,
        part: &Part,
        pages: Range<u64>,
    ) -> Result<bool, Trouble> {
        let (mut busy, mut made) = (0, 0);
        loop {
            if self.is_over() {
                return Err(Trouble::new(ProblemKind::Stopping, "the pager is ending"));
            }
            match self.map_run(mirror, vcpu, part, pages.clone())? {
                Step::Whole => return Ok(true),
                Step::Moved => return Ok(false),
                Step::More if made < MOST => made += 1,
                Step::Busy if busy < TRIES => {
                    busy += 1;
                    std::thread::sleep(PAUSE);
                }
                // Whoever asked asks again.
                Step::Busy => return Ok(false),
                Step::More => {
                    let what = "mappings are being changed all the time";
                    return Err(Trouble::new(ProblemKind::Kernel, what));
                }
            }
        }
    }

    /// Maps the first run of pages that are not mapped and that are to be mapped alike.
    fn map_run(
        &self,
        mirror: &Mirror,
        vcpu: &mut Vcpu,
        part: &Part,
        pages: Range<u64>,
    ) -> Result<Step, Trouble> {
        let layout = read(&self.layout);
        let base = part.gfn.checked_sub(part.pages.start);
        let place = layout.get(part.memory.id);
        let Some(place) = place.filter(|place| Some(place.base_gfn) == base) else {
            return Ok(Step::Moved);
        };
        let (memory, base) = (&place.memory, place.base_gfn);
        let seq = mirror.mmu.invalidate_seq();
        if memory.there_until(pages.clone()) < pages.end {
            return Ok(Step::Moved);
        }
        let Some(run) = next_run(mirror, place, pages, self.setup.can_protect) else {
            return Ok(Step::Whole);
        };
        let protected = run.protected;
        if !protected {
            // Guarded pages are among them where the host cannot protect.
            keep(memory, &place.guards, run.pages.clone(), &self.stats)?;
            if let Some(noted) = &place.armed {
                run.pages.clone().for_each(|page| noted.set(page));
            }
        }
        let count = run.pages.end - run.pages.start;
        let own = base + run.pages.start;
        let mut fault = Fault::new(Gfn(own), Access::Read)
            .with_mirror()
            .with_seq(seq);
        let mut beside = Around::new(GfnRange::new(Gfn(own), count));
        if protected {
            fault = fault.read_only();
            beside = beside.read_only();
        }
        hint(Hint {
            own: memory.pfn + run.pages.start,
            missing: false,
            ahead: true,
        });
        let result = mirror.mmu.fault_range(vcpu, fault, beside);
        hint(Hint::default());
        outcome(result.outcome, own)
    }
}

/// Pages that are to be mapped alike.
struct Run {
    pages: Range<u64>,
    protected: bool,
}

/// The first of them that is not mapped, and those after it.
fn next_run(mirror: &Mirror, place: &Place, pages: Range<u64>, can_protect: bool) -> Option<Run> {
    let base = place.base_gfn;
    let range = GfnRange::new(Gfn(base + pages.start), pages.end - pages.start);
    let mut leaves = mirror.space().mirror_leaves(range);
    let mut first = pages.start;
    let mut end = pages.end;
    for leaf in leaves.by_ref() {
        let page = leaf.gfn.0 - base;
        if page > first {
            end = page;
            break;
        }
        first = page + 1;
    }
    if first >= pages.end {
        return None;
    }
    let protects = |page| can_protect && (place.armed.is_some() || is_guarded(&place.guards, page));
    let protected = protects(first);
    let end = (first + 1..end)
        .find(|page| protects(*page) != protected)
        .unwrap_or(end);
    Some(Run {
        pages: first..end,
        protected,
    })
}

fn outcome(outcome: FaultOutcome, gfn: u64) -> Result<Step, Trouble> {
    let failed = |kind, why: String| {
        let what = format!("mapping frame {gfn:#x} of the guest: {why}");
        Err(Trouble::new(kind, what))
    };
    match outcome {
        FaultOutcome::Fixed { .. } | FaultOutcome::Spurious { .. } => Ok(Step::More),
        FaultOutcome::Retry | FaultOutcome::Refused(Refused::Busy | Refused::ContentsMissing) => {
            Ok(Step::Busy)
        }
        FaultOutcome::Refused(Refused::Gone) | FaultOutcome::NoSlot => Ok(Step::Moved),
        FaultOutcome::Refused(Refused::NoMemory) | FaultOutcome::OutOfMemory => {
            failed(ProblemKind::NoMemory, "no memory".to_owned())
        }
        FaultOutcome::Refused(why) => failed(ProblemKind::Kernel, why.to_string()),
        other => failed(ProblemKind::Kernel, format!("{other:?}")),
    }
}
