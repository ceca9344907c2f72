//! Page headers: what is known about each table.
//!
//! The counterpart of `struct kvm_mmu_page`. A header is found by the table's frame in one step
//! ([`TableMemory::header`]); the host keeps one beside each frame, because the frames themselves
//! hold nothing but entries. A table of several frames (a 16 KiB root) is found by any of them.
//!
//! *Locking*: fields are atomic, so that a header may be looked at any time; it is written by
//! whoever owns the table before the table is linked, by its unlinker afterwards, and the NX mark
//! under the NX list's lock. A snapshot taken while the table changes hands may mix two lives of a
//! frame; who needs more holds the MMU lock. *Invariants*: a linked table's header says *live*; a
//! child's level is its parent's minus one, and its first frame is aligned to what the linking
//! entry spans.
//!
//! [`TableMemory::header`]: crate::TableMemory::header

use crate::{
    addr::{Gfn, Level, PAGE_SIZE, Pfn},
    sync::{Acquire, AtomicU64, Relaxed, Release},
};

const LEVEL: u64 = 0xf;
const INVALID: u64 = 1 << 4;
const MIRROR: u64 = 1 << 5;
const NX_DISALLOWED: u64 = 1 << 6;
const LIVE: u64 = 1 << 7;
const AS_ID_SHIFT: u32 = 8;
/// Which frame of its table this one is.
const FRAME_SHIFT: u32 = 16;
const FRAME: u64 = 0xff << FRAME_SHIFT;

const INDEX_BITS: u32 = 14;
const NO_PARENT: u64 = u64::MAX;

/// The place of a table's description; one for each frame of table memory. 32 bytes.
#[derive(Debug)]
#[repr(align(32))]
pub struct Header {
    word: AtomicU64,
    gfn: AtomicU64,
    /// The linking entry: frame of its table and position.
    parent: AtomicU64,
}

impl Default for Header {
    fn default() -> Self {
        Self {
            word: AtomicU64::new(0),
            gfn: AtomicU64::new(0),
            parent: AtomicU64::new(NO_PARENT),
        }
    }
}

/// What makes two tables interchangeable (`kvm_mmu_page_role`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct PageRole {
    /// Address space.
    pub as_id: u8,
    /// Level of the table's entries.
    pub level: Level,
    /// The table is a root that no vCPU may load any more.
    pub invalid: bool,
    /// The table mirrors one that an external owner keeps.
    pub mirror: bool,
}

impl PageRole {
    pub(crate) const fn new(as_id: u8, level: Level, mirror: bool) -> Self {
        Self {
            as_id,
            level,
            invalid: false,
            mirror,
        }
    }
}

/// A table's description.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct PageHeader {
    /// What the table is.
    pub role: PageRole,
    /// First guest frame that it covers.
    pub gfn: Gfn,
    /// First host frame of the table.
    pub pfn: Pfn,
    /// First host frame of the table that links it, and the position there; `None` for a root.
    pub parent: Option<(Pfn, usize)>,
    /// The table exists because huge pages are not executable here (NX-huge-page mitigation).
    pub nx_huge_page_disallowed: bool,
}

impl Header {
    /// Describes a table, before it is linked. The other frames of a table of several are described
    /// by [`describe_tail`](Self::describe_tail).
    pub(crate) fn describe(&self, role: PageRole, gfn: Gfn, parent: Option<(Pfn, usize)>) {
        let parent = parent.map_or(NO_PARENT, |(pfn, index)| pfn.0 << INDEX_BITS | index as u64);
        self.gfn.store(gfn.0, Relaxed);
        self.parent.store(parent, Relaxed);
        let word = u64::from(role.level.get())
            | LIVE
            | u64::from(role.as_id) << AS_ID_SHIFT
            | if role.mirror { MIRROR } else { 0 };
        self.word.store(word, Release);
    }

    /// Says that this frame is the `frame`-th of its table.
    pub(crate) fn describe_tail(&self, frame: usize) {
        self.word
            .store(LIVE | (frame as u64) << FRAME_SHIFT & FRAME, Release);
    }

    pub(crate) fn forget(&self) {
        self.word.store(0, Release);
    }

    pub(crate) fn invalidate(&self) {
        let word = self.word.load(Relaxed);
        self.word.store(word | INVALID, Release);
    }

    pub(crate) fn nx_disallowed(&self) -> bool {
        self.word.load(Acquire) & NX_DISALLOWED != 0
    }

    pub(crate) fn set_nx_disallowed(&self, on: bool) {
        let word = self.word.load(Relaxed);
        let word = if on {
            word | NX_DISALLOWED
        } else {
            word & !NX_DISALLOWED
        };
        self.word.store(word, Release);
    }

    /// The first guest frame of the table and the entry that links it.
    pub(crate) fn place(&self) -> (Gfn, Option<(Pfn, usize)>) {
        let parent = self.parent.load(Relaxed);
        let parent = (parent != NO_PARENT).then_some((
            Pfn(parent >> INDEX_BITS),
            (parent & ((1 << INDEX_BITS) - 1)) as usize,
        ));
        (Gfn(self.gfn.load(Relaxed)), parent)
    }

    /// How many frames before this one the table begins; `None` if no live table covers the frame.
    pub(crate) fn frames_back(&self) -> Option<u64> {
        let word = self.word.load(Acquire);
        (word & LIVE != 0).then_some((word & FRAME) >> FRAME_SHIFT)
    }

    /// The description of the table that begins at `pfn`, this header's frame.
    pub(crate) fn snapshot(&self, pfn: Pfn) -> Option<PageHeader> {
        let word = self.word.load(Acquire);
        let level = Level::new((word & LEVEL) as u8)?;
        if word & LIVE == 0 {
            return None;
        }
        let (gfn, parent) = self.place();
        Some(PageHeader {
            role: PageRole {
                as_id: (word >> AS_ID_SHIFT) as u8,
                level,
                invalid: word & INVALID != 0,
                mirror: word & MIRROR != 0,
            },
            gfn,
            pfn,
            parent,
            nx_huge_page_disallowed: word & NX_DISALLOWED != 0,
        })
    }
}

/// Frames of a table of `bytes`.
pub(crate) fn frames_of(bytes: usize) -> u64 {
    (bytes as u64).div_ceil(PAGE_SIZE)
}

#[cfg(all(test, not(any(feature = "loom", feature = "shuttle"))))]
mod tests {
    use super::*;

    #[test]
    fn says_what_it_was_told() {
        let header = Header::default();
        assert_eq!(header.snapshot(Pfn(7)), None);
        let role = PageRole::new(1, Level::SIZE_2M, true);
        header.describe(role, Gfn(0x4_0000), Some((Pfn(0xfff_ffff_ffff), 2047)));
        let said = header.snapshot(Pfn(7)).unwrap();
        assert_eq!(said.role, role);
        assert_eq!(said.gfn, Gfn(0x4_0000));
        assert_eq!(said.parent, Some((Pfn(0xfff_ffff_ffff), 2047)));
        header.invalidate();
        assert!(header.snapshot(Pfn(7)).unwrap().role.invalid);
        header.forget();
        assert_eq!(header.snapshot(Pfn(7)), None);
        header.describe_tail(3);
        assert_eq!(header.frames_back(), Some(3));
        assert_eq!(header.snapshot(Pfn(7)), None);
    }
}
