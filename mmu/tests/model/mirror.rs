//! Mirrors. The mirror's map is the owner's (`host`); here is what the owner must have been asked
//! for, page by page, and what its answers make of each operation.

use proptest::{prelude::*, test_runner::TestCaseResult};
use slat_mmu::{Access, Around, ChangeKind, Fault, FaultOutcome, Gfn, GfnRange, Level, Refused};

use crate::{
    host::{Asked, Page},
    op::HUGE,
    state::{Slot, World},
};

/// What an operation on a range came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Sum {
    pub(crate) pages: u64,
    kept: u64,
    refused: Option<Refused>,
}

impl Sum {
    fn of(asked: &[Asked]) -> Self {
        let kept = asked.iter().filter(|asked| asked.refused.is_some()).count() as u64;
        Self {
            pages: asked.len() as u64 - kept,
            kept,
            refused: asked.iter().find_map(|asked| asked.refused),
        }
    }

    fn is(self, change: slat_mmu::MirrorChange) -> TestCaseResult {
        prop_assert_eq!((change.pages, change.kept), (self.pages, self.kept));
        prop_assert_eq!(change.refused, self.refused);
        Ok(())
    }
}

const UNMAP: ChangeKind = ChangeKind::Unmap;

/// What the fault makes of its own page. `Err`: nothing.
fn own(slot: &Slot, page: Option<Page>, fault: &Fault) -> Option<ChangeKind> {
    let write = fault.access == Access::Write;
    let again = fault.again;
    let Some(page) = page else {
        return Some(ChangeKind::Map {
            writable: !slot.readonly() && (write || fault.map_writable),
            again: false,
        });
    };
    if page.pfn != slot.pfn(fault.gfn.0) || page.w && slot.readonly() {
        return Some(UNMAP);
    }
    let grants = write && !fault.prefetch && !page.w;
    match (again, grants) {
        (true, _) => Some(ChangeKind::Map {
            writable: page.w || grants,
            again,
        }),
        (false, true) => Some(ChangeKind::Protect { writable: true }),
        (false, false) => None,
    }
}

impl World {
    /// What the owner was asked for, without its answers.
    fn take_asked(&mut self) -> Vec<Asked> {
        std::mem::take(&mut self.host.mirror.lock().unwrap().asked)
    }

    /// The pages that the owner has over `range`, from before an operation that made `asked`.
    fn before(&self, asked: &[Asked], range: GfnRange) -> Vec<(u64, Page)> {
        let mirror = self.host.mirror.lock().unwrap();
        let mut pages = mirror.pages.clone();
        drop(mirror);
        for asked in asked.iter().filter(|asked| asked.refused.is_none()) {
            // Only unmapping is undone here; whether it was writable does not matter.
            let (pfn, w, lost) = (asked.pfn, false, false);
            pages.insert(asked.gfn, Page { pfn, w, lost });
        }
        let over = pages
            .into_iter()
            .filter(|&(gfn, _)| range.contains(Gfn(gfn)));
        over.collect()
    }

    /// Each page over `range` was asked to go, once, and none beside.
    pub(crate) fn mirror_unmapped(
        &mut self,
        as_id: u8,
        range: GfnRange,
    ) -> Result<Sum, TestCaseError> {
        let asked = self.take_asked();
        if as_id != 0 {
            prop_assert!(asked.is_empty(), "another space's mirror: {asked:?}");
            return Ok(Sum::default());
        }
        prop_assert!(asked.iter().all(|asked| asked.kind == UNMAP));
        let wanted = self.before(&asked, range);
        let wanted: Vec<_> = wanted.iter().map(|(gfn, _)| *gfn).collect();
        let gfns: Vec<_> = asked.iter().map(|asked| asked.gfn).collect();
        prop_assert_eq!(gfns, wanted, "what is unmapped is what was mapped");
        Ok(Sum::of(&asked))
    }

    pub(crate) fn mirror_zap(&mut self, as_id: u8, range: GfnRange) -> TestCaseResult {
        let change = self.mmu.space(as_id).zap_mirror(range);
        self.mirror_unmapped(as_id, range)?.is(change)
    }

    pub(crate) fn mirror_age(&mut self, as_id: u8, range: GfnRange) -> TestCaseResult {
        // No more are mapped than one call looks at.
        let mut rest = range;
        let mut young = vec![];
        let mut sum = slat_mmu::MirrorChange::default();
        while !rest.is_empty() {
            let aged = self.mmu.space(as_id).age_mirror(rest);
            prop_assert!(aged.rest.pages() < rest.pages());
            rest = aged.rest;
            for run in aged.young {
                young.extend(run.start.0..run.end.0);
            }
            sum.pages += aged.change.pages;
            sum.kept += aged.change.kept;
            sum.refused = sum.refused.or(aged.change.refused);
        }
        let asked = self.host.mirror.lock().unwrap().asked.clone();
        let asked: Vec<_> = asked.iter().map(|asked| asked.gfn).collect();
        prop_assert_eq!(young, asked);
        self.mirror_unmapped(as_id, range)?.is(sum)
    }

    pub(crate) fn mirror_protect(&mut self, as_id: u8, range: GfnRange) -> TestCaseResult {
        let mirror = self.host.mirror.lock().unwrap();
        let writable = mirror.pages.iter().filter(|(_, page)| page.w);
        let writable: Vec<_> = writable
            .map(|(&gfn, _)| gfn)
            .filter(|&gfn| as_id == 0 && range.contains(Gfn(gfn)))
            .collect();
        drop(mirror);
        let change = self.mmu.space(as_id).write_protect_mirror(range);
        let asked = self.take_asked();
        let gfns: Vec<_> = asked.iter().map(|asked| asked.gfn).collect();
        prop_assert_eq!(gfns, writable);
        let kind = ChangeKind::Protect { writable: false };
        prop_assert!(asked.iter().all(|asked| asked.kind == kind));
        Sum::of(&asked).is(change)
    }

    /// The pages for which the owner is asked, in their order. `Err`: the fault ends before.
    fn expect_mirror(
        &self,
        fault: &Fault,
        around: &Around,
    ) -> Result<Vec<(u64, u64, ChangeKind)>, FaultOutcome> {
        let gfn = fault.gfn.0;
        let slot = self.spaces[0].slot_at(gfn).ok_or(FaultOutcome::NoSlot)?;
        let taken = |range| !self.pending.is_empty() && self.hull.overlaps(range);
        if taken(GfnRange::new(fault.gfn, 1)) {
            return Err(FaultOutcome::Retry);
        }
        if fault.access == Access::Write && slot.readonly() {
            return Err(FaultOutcome::ReadOnly);
        }
        let mirror = self.host.mirror.lock().unwrap();
        let mut wanted = vec![];
        if let Some(kind) = own(slot, mirror.pages.get(&gfn).copied(), fault) {
            let pfn = mirror
                .pages
                .get(&gfn)
                .map_or(slot.pfn(gfn), |page| page.pfn);
            wanted.push((gfn, pfn, kind));
        }
        let table = GfnRange::new(Gfn(gfn & !(HUGE - 1)), HUGE);
        let spec = slot.spec.range();
        let beside = GfnRange {
            start: around.range.start.max(table.start).max(spec.start),
            end: around.range.end.min(table.end).min(spec.end),
        };
        if !taken(beside) {
            let writable = around.map_writable && !slot.readonly();
            let again = false;
            let kind = ChangeKind::Map { writable, again };
            let empty = (beside.start.0..beside.end.0)
                .filter(|other| *other != gfn && !mirror.pages.contains_key(other));
            wanted.extend(empty.map(|gfn| (gfn, slot.pfn(gfn), kind)));
        }
        wanted.sort_by_key(|(gfn, ..)| *gfn);
        Ok(wanted)
    }

    pub(crate) fn mirror_fault(
        &mut self,
        vcpu: usize,
        fault: Fault,
        around: Around,
    ) -> TestCaseResult {
        let as_id = self.vcpus[vcpu].as_id();
        if as_id == 1 {
            return Ok(());
        }
        let expected = self.expect_mirror(&fault, &around);
        let result = if around == Around::none() {
            let outcome = self.mmu.fault(&mut self.vcpus[vcpu], fault);
            (outcome, None)
        } else {
            let range = self.mmu.fault_range(&mut self.vcpus[vcpu], fault, around);
            (range.outcome, Some((range.mapped, range.refused)))
        };
        let (outcome, range) = result;
        let asked = self.take_asked();
        let refused_table = std::mem::take(&mut self.host.mirror.lock().unwrap().refused_table);
        if outcome == FaultOutcome::OutOfMemory {
            prop_assert!(self.tight);
            return Ok(());
        }
        let early = if as_id != 0 || !self.host.mirrors.load(std::sync::atomic::Ordering::SeqCst) {
            Some(FaultOutcome::NoRoot)
        } else if let Err(early) = expected {
            Some(early)
        } else if refused_table {
            Some(FaultOutcome::Refused(Refused::NoMemory))
        } else {
            None
        };
        if let Some(early) = early {
            prop_assert_eq!(outcome, early);
            prop_assert!(asked.is_empty());
            return Ok(());
        }
        let pages: Vec<_> = asked.iter().map(|of| (of.gfn, of.pfn, of.kind)).collect();
        prop_assert_eq!(Ok(pages), expected, "what the owner was asked for");
        let own = asked.iter().find(|asked| asked.gfn == fault.gfn.0);
        let level = Level::SIZE_4K;
        let expected = match own {
            None => FaultOutcome::Spurious { level },
            Some(asked) => match asked.refused {
                Some(why) => FaultOutcome::Refused(why),
                None if asked.kind == UNMAP => FaultOutcome::Retry,
                None => FaultOutcome::Fixed { level },
            },
        };
        prop_assert_eq!(outcome, expected);
        let done = asked.iter().filter(|asked| asked.refused.is_none());
        if let Some(range) = range {
            let again = false;
            let new = [true, false].map(|writable| ChangeKind::Map { writable, again });
            let mapped = done
                .clone()
                .filter(|asked| new.contains(&asked.kind))
                .count();
            let refused = asked.iter().find_map(|asked| asked.refused);
            prop_assert_eq!(range, (mapped as u64, refused));
        }
        for asked in done {
            match asked.kind {
                ChangeKind::Map { writable: true, .. } | ChangeKind::Protect { writable: true } => {
                    self.spaces[0].mark(asked.gfn);
                }
                _ => {}
            }
        }
        Ok(())
    }
}
