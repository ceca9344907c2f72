//! A vCPU's TLB: direct mapped, one array for each page size.
//!
//! Only the vCPU's thread touches it. An entry keeps its mapping alive, so that a slot's memory
//! goes when the last TLB has dropped it. An entry allows what hardware would do with it without a
//! walk: a read, or a write if it is writable *and* its Dirty bit was set; otherwise the write
//! walks again, which sets Dirty and tells the dirty log. Ageing takes nothing from a TLB. What may
//! be used when is `shootdown`'s protocol; an entry used against it is [`Stale`].
//!
//! # Tags
//! An entry is tagged with the address space and the root that it was walked from ([`Tag`]), as a
//! processor's are with a VMID, an ASID or the EPTP, and only entries of the loaded tag are used. A
//! root's generation is never used twice, so what was cached under a root that was withdrawn is
//! never used under the next, flushed or not. Whether an entry should be gone is judged before its
//! tag, so that no tag hides a flush that was not carried out.
//!
//! Only what is mapped is cached. A format may let hardware remember that nothing was
//! ([`INSTALL_NEEDS_FENCE`](slat_mmu::Format::INSTALL_NEEDS_FENCE)); this TLB does not, and has no
//! use for [`install_fence`](slat_mmu::SecondStage::install_fence).

use std::sync::Arc;

use slat_mmu::{Flush, Gfn, GfnRange, Level};

use super::{frames::Lease, shootdown::Shootdown};
use crate::memory::GuestView;

/// Base-2 logarithm of the pages an entry maps, and of how many entries there are, for each size.
const SIZES: [(u32, u32); 3] = [(0, 10), (9, 7), (18, 3)];

/// Where a translation belongs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Tag {
    as_id: u8,
    /// The root's generation. They count from 1; 0 is no root.
    root: u64,
}

impl Tag {
    /// Where the walks of `context` begin.
    pub(super) fn of(context: &slat_mmu::Vcpu) -> Self {
        Self {
            as_id: context.as_id(),
            root: context.root().map_or(0, |root| root.generation),
        }
    }
}

/// A cached translation.
#[derive(Debug)]
struct TlbEntry {
    tag: Tag,
    span: GfnRange,
    mapping: Arc<Lease>,
    /// Of the span's first frame, in the mapping.
    page: u64,
    readable: bool,
    /// Writable and Dirty: a write needs no walk.
    writable: bool,
    /// The flush its vCPU had obeyed when the walk began.
    walked: u64,
    /// Completed flushes it was checked against.
    checked: u64,
}

/// A translation to be cached.
#[derive(Debug)]
pub(super) struct Fill {
    pub(super) gfn: u64,
    pub(super) level: Level,
    pub(super) readable: bool,
    /// The walk found W and D.
    pub(super) writable: bool,
    pub(super) mapping: Arc<Lease>,
    /// Of `gfn` in the mapping.
    pub(super) page: u64,
    pub(super) walked: u64,
}

/// A revoked translation was about to be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "a vCPU's TLB still held frame {gfn:#x} after the flush that revoked it was complete: a bug of this program, and guest memory is not to be trusted"
)]
pub(super) struct Stale {
    pub(super) gfn: u64,
}

/// Where an access goes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Hit {
    size: usize,
    index: usize,
    page: u64,
}

#[derive(Debug)]
pub(super) struct Tlb {
    sizes: Vec<Vec<Option<TlbEntry>>>,
    /// Entries of this tag are used, and new ones get it.
    tag: Tag,
}

fn index(gfn: u64, (shift, bits): (u32, u32)) -> usize {
    ((gfn >> shift) & ((1 << bits) - 1)) as usize
}

impl Tlb {
    pub(super) fn new() -> Self {
        let array = |(_, bits): (u32, u32)| (0..1 << bits).map(|_| None).collect();
        Self {
            sizes: SIZES.into_iter().map(array).collect(),
            tag: Tag::default(),
        }
    }

    /// From now on walks begin elsewhere, or where they did.
    pub(super) fn load(&mut self, tag: Tag) {
        self.tag = tag;
    }

    /// The translation of `gfn`, if it is cached and allows the access.
    ///
    /// # Errors
    /// [`Stale`] when it should not be here any more.
    pub(super) fn find(
        &mut self,
        gfn: u64,
        write: bool,
        shootdown: &Shootdown,
    ) -> Result<Option<Hit>, Stale> {
        let completions = shootdown.completions();
        for (size, entries) in self.sizes.iter_mut().enumerate() {
            let index = index(gfn, SIZES[size]);
            let cell = &mut entries[index];
            let Some(entry) = cell.as_mut().filter(|entry| entry.span.contains(Gfn(gfn))) else {
                continue;
            };
            if entry.checked != completions {
                match shootdown.was_revoked(entry.span, entry.walked, entry.checked) {
                    Some(true) => return Err(Stale { gfn }),
                    Some(false) => entry.checked = completions,
                    None => {
                        *cell = None;
                        continue;
                    }
                }
            }
            let allows = if write {
                entry.writable
            } else {
                entry.readable
            };
            if !allows || entry.tag != self.tag {
                *cell = None;
                continue;
            }
            let page = entry.page + (gfn - entry.span.start.0);
            return Ok(Some(Hit { size, index, page }));
        }
        Ok(None)
    }

    /// The memory of a hit, and the page in it. `None` never follows a hit.
    pub(super) fn memory(&self, hit: Hit) -> Option<(&GuestView, u64)> {
        let entry = self.sizes[hit.size][hit.index].as_ref()?;
        Some((&**entry.mapping, hit.page))
    }

    /// Caches a translation, walked when `completions` flushes were complete or later.
    pub(super) fn fill(&mut self, fill: Fill, completions: u64) {
        // Coarser leaves than 1 GiB are never mapped; they would be cached by their parts.
        let size = fill.level.index().min(SIZES.len() - 1);
        let pages = 1 << SIZES[size].0;
        let inside = fill.gfn & (pages - 1);
        self.sizes[size][index(fill.gfn, SIZES[size])] = Some(TlbEntry {
            tag: self.tag,
            span: GfnRange::new(Gfn(fill.gfn - inside), pages),
            page: fill.page - inside,
            mapping: fill.mapping,
            readable: fill.readable,
            writable: fill.writable,
            walked: fill.walked,
            checked: completions,
        });
    }

    /// Drops whatever it has for a frame.
    pub(super) fn drop_frame(&mut self, gfn: u64) {
        self.flush(Flush::range(GfnRange::new(Gfn(gfn), 1)));
    }

    /// Drops all that `flush` covers.
    pub(super) fn flush(&mut self, flush: Flush) {
        for (entries, size) in self.sizes.iter_mut().zip(SIZES) {
            let (first, count) = match flush {
                Flush::None => return,
                Flush::Range { gfn, pages } => {
                    let last = gfn.0.saturating_add(pages - 1) >> size.0;
                    (index(gfn.0, size), last - (gfn.0 >> size.0) + 1)
                }
                Flush::All => (0, u64::MAX),
            };
            let count = usize::try_from(count)
                .unwrap_or(usize::MAX)
                .min(entries.len());
            for at in first..first + count {
                let at = at & (entries.len() - 1);
                if entries[at]
                    .as_ref()
                    .is_some_and(|entry| flush.touches(entry.span))
                {
                    entries[at] = None;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{frames::Frames, port::Direct},
        *,
    };
    use crate::memory::Region;

    fn tlb(entries: &[(u64, Level)]) -> (Tlb, Shootdown) {
        let frames = Frames::new(1);
        let region = Region::new("test", 1).unwrap();
        let base = frames.add(region.guest(), 0).unwrap();
        let (lease, _) = frames.view(0).find(base).unwrap();
        let mut tlb = Tlb::new();
        for &(gfn, level) in entries {
            let fill = Fill {
                gfn,
                level,
                readable: gfn != 11,
                writable: gfn % 2 == 0,
                mapping: Arc::clone(&lease),
                page: gfn,
                walked: 0,
            };
            tlb.fill(fill, 0);
        }
        (tlb, Shootdown::new(0, Arc::new(Direct)))
    }

    #[test]
    fn entries_of_every_size_are_found_and_flushed_by_any_frame_of_theirs() {
        let entries = [
            (7, Level::SIZE_4K),
            (1024 + 5, Level::SIZE_2M),
            (3 << 18, Level::SIZE_1G),
        ];
        let frames = [7, 1024 + 511, (3 << 18) + 100_000];
        for flushed in frames {
            let (mut tlb, shootdown) = tlb(&entries);
            tlb.drop_frame(flushed);
            for gfn in frames {
                let hit = tlb.find(gfn, false, &shootdown).unwrap();
                assert_eq!(hit.map(|hit| hit.page), (gfn != flushed).then_some(gfn));
            }
        }
        let (mut tlb, shootdown) = tlb(&entries);
        tlb.flush(Flush::range(GfnRange::new(Gfn(8), 1 << 30)));
        assert!(tlb.find(7, false, &shootdown).unwrap().is_some());
        assert!(tlb.find(1025, false, &shootdown).unwrap().is_none());
        tlb.flush(Flush::All);
        assert!(tlb.find(7, false, &shootdown).unwrap().is_none());
    }

    #[test]
    fn a_write_needs_a_writable_entry() {
        let (mut tlb, shootdown) = tlb(&[(7, Level::SIZE_4K), (8, Level::SIZE_4K)]);
        assert!(tlb.find(8, true, &shootdown).unwrap().is_some());
        assert!(tlb.find(7, true, &shootdown).unwrap().is_none());
        let (mut tlb, shootdown) = super::tests::tlb(&[(11, Level::SIZE_4K)]);
        assert!(tlb.find(11, false, &shootdown).unwrap().is_none());
    }

    #[test]
    fn a_translation_of_another_root_or_address_space_is_not_used() {
        let tag = |as_id, root| Tag { as_id, root };
        for other in [tag(0, 1), tag(1, 0)] {
            let (mut tlb, shootdown) = tlb(&[(7, Level::SIZE_4K), (8, Level::SIZE_4K)]);
            tlb.load(other);
            assert!(tlb.find(7, false, &shootdown).unwrap().is_none());
            // The other frame was not looked for in between: back under its own tag it is good.
            tlb.load(tag(0, 0));
            assert!(tlb.find(8, true, &shootdown).unwrap().is_some());
            tlb.load(other);
            assert!(tlb.find(8, true, &shootdown).unwrap().is_none());
        }
    }

    #[test]
    fn a_tag_hides_no_entry_that_should_be_gone() {
        let (mut tlb, shootdown) = tlb(&[(7, Level::SIZE_4K)]);
        shootdown.shoot(Flush::All);
        tlb.load(Tag { as_id: 0, root: 2 });
        assert_eq!(
            tlb.find(7, false, &shootdown).unwrap_err(),
            Stale { gfn: 7 }
        );
    }

    #[test]
    fn an_entry_that_outlived_its_flush_is_caught() {
        let (mut tlb, shootdown) = tlb(&[(7, Level::SIZE_4K), (9, Level::SIZE_4K)]);
        // The flush is complete, but this TLB was not told.
        shootdown.shoot(Flush::range(GfnRange::new(Gfn(7), 1)));
        assert_eq!(
            tlb.find(7, false, &shootdown).unwrap_err(),
            Stale { gfn: 7 }
        );
        assert!(tlb.find(9, false, &shootdown).unwrap().is_some());
    }
}
