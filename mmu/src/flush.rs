//! TLB flushes: what is flushed, why, and who carries it out.
//!
//! The MMU changes tables; TLBs are the host's. It tells the host through
//! [`Host::flush`](crate::Host::flush), which returns when no vCPU uses a translation that the
//! request covers. The MMU calls it at the moments that the rules below demand, so an operation
//! that has returned is complete.
//!
//! # When a flush is owed
//!
//! | change | flush |
//! |---|---|
//! | non-present → present | none; a vCPU may owe itself a [fence] |
//! | huge leaf → table of the same mappings | none (the same) |
//! | table → huge leaf, or table removed | its whole range, before the table can be freed |
//! | leaf removed | its range, before the lock is let go of |
//! | leaf loses MMU-writable | its range, **also if W was off**: a TLB may hold it writable |
//! | leaf loses W or D for the dirty log | the pages reported, after the lock |
//! | logging switched on | the whole slot, **even if nothing changed** |
//! | leaf loses Accessed | none: idle is a hint |
//! | change under an invalid root | none: all was flushed when the root became invalid |
//! | break-before-make | the entry's range, between break and make |
//! | a mirror's leaf removed or protected | none: its owner's answer is the flush |
//!
//! The fence is for formats that remember invalid entries. When logging is switched on, an entry
//! may have lost W before without a flush, so the whole slot is flushed.
//!
//! [fence]: crate::SecondStage::install_fence
//!
//! # Accumulating
//!
//! A long operation gathers what it owes and pays at the end, or *before* it yields the lock,
//! whichever comes first; after a yield it starts from nothing. [`Flush::merge`] takes the hull, so
//! it may flush more than was asked, never less.

use crate::addr::{Gfn, GfnRange};

/// A TLB flush.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Flush {
    /// Nothing to flush.
    #[default]
    None,
    /// Every translation of a frame in the range, at whatever level it is cached.
    Range {
        /// First frame.
        gfn: Gfn,
        /// Number of pages, never 0.
        pages: u64,
    },
    /// Every translation, of every address space; also, a vCPU must load its root anew.
    All,
}

/// Why a flush is owed: the bounded label of statistics.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum FlushCause {
    /// Pages were protected for the dirty log, or logging was switched on.
    DirtyLog,
    /// The host took memory back, or a range was unmapped on request.
    Unmap,
    /// A slot was deleted or moved.
    Slot,
    /// Pages were write-protected for another reason than the dirty log.
    WriteProtect,
    /// A table was replaced by a huge mapping, on fault or to recover huge pages.
    HugePage,
    /// Roots were withdrawn.
    Roots,
    /// A table was removed so that a huge page may come back (NX-huge-page recovery).
    NxRecovery,
    /// The architecture wants an entry broken before it is made anew.
    BreakBeforeMake,
    /// A mirror's pages were unmapped to see which are used again.
    Age,
}

impl FlushCause {
    /// Every cause.
    pub const ALL: [Self; 9] = [
        Self::DirtyLog,
        Self::Unmap,
        Self::Slot,
        Self::WriteProtect,
        Self::HugePage,
        Self::Roots,
        Self::NxRecovery,
        Self::BreakBeforeMake,
        Self::Age,
    ];

    /// Whether what is flushed for this reason includes entries that pointed to tables.
    const fn changes_tables(self) -> bool {
        matches!(
            self,
            Self::HugePage | Self::Roots | Self::NxRecovery | Self::BreakBeforeMake
        )
    }

    /// The name in statistics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::DirtyLog => "dirty_log",
            Self::Unmap => "unmap",
            Self::Slot => "slot",
            Self::WriteProtect => "write_protect",
            Self::HugePage => "huge_page",
            Self::Roots => "roots",
            Self::NxRecovery => "nx_recovery",
            Self::BreakBeforeMake => "break_before_make",
            Self::Age => "age",
        }
    }
}

/// A flush as the host is asked for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct FlushRequest {
    /// What; never [`Flush::None`].
    pub flush: Flush,
    /// Why.
    pub cause: FlushCause,
    /// The address space that the frames of a range are of. [`Flush::All`] is for every address
    /// space, whatever stands here.
    pub as_id: u8,
    /// Entries that pointed to tables changed, so caches of those have to go as well. Where a fence
    /// by address drops cached leaves only, it does not do (RISC-V: `HFENCE.GVMA` with `rs1 = x0`;
    /// x86 has no other).
    pub tables: bool,
}

impl FlushRequest {
    pub(crate) const fn new(flush: Flush, cause: FlushCause, as_id: u8) -> Self {
        Self {
            flush,
            cause,
            as_id,
            tables: cause.changes_tables(),
        }
    }
}

impl Flush {
    /// A flush of `range`, or none if it is empty.
    pub fn range(range: GfnRange) -> Self {
        if range.is_empty() {
            Self::None
        } else {
            Self::Range {
                gfn: range.start,
                pages: range.pages(),
            }
        }
    }

    /// A request that covers both: the hull of two ranges, so it may flush more than either asked.
    #[must_use]
    pub fn merge(self, other: Self) -> Self {
        match (self, other) {
            (Self::None, flush) | (flush, Self::None) => flush,
            (Self::All, _) | (_, Self::All) => Self::All,
            (
                Self::Range { gfn, pages },
                Self::Range {
                    gfn: other_gfn,
                    pages: other_pages,
                },
            ) => Self::range(GfnRange::new(gfn, pages).hull(GfnRange::new(other_gfn, other_pages))),
        }
    }

    /// Whether nothing has to be flushed.
    pub const fn is_none(self) -> bool {
        matches!(self, Self::None)
    }

    /// Whether a cached translation of `gfn` has to go.
    pub const fn covers(self, gfn: Gfn) -> bool {
        match self {
            Self::None => false,
            Self::Range { gfn: start, pages } => GfnRange::new(start, pages).contains(gfn),
            Self::All => true,
        }
    }

    /// Whether a cached translation of `span`, at whatever level, has to go.
    pub const fn touches(self, span: GfnRange) -> bool {
        match self {
            Self::None => false,
            Self::Range { gfn, pages } => GfnRange::new(gfn, pages).overlaps(span),
            Self::All => true,
        }
    }
}

#[cfg(all(test, not(any(feature = "loom", feature = "shuttle"))))]
mod tests {
    use super::*;

    #[test]
    fn merge_covers_both() {
        let a = Flush::Range {
            gfn: Gfn(4),
            pages: 2,
        };
        let b = Flush::Range {
            gfn: Gfn(9),
            pages: 1,
        };
        assert_eq!(
            a.merge(b),
            Flush::Range {
                gfn: Gfn(4),
                pages: 6
            }
        );
        assert_eq!(a.merge(Flush::None), a);
        assert_eq!(Flush::All.merge(a), Flush::All);
    }

    #[test]
    fn an_empty_range_is_no_flush() {
        assert!(Flush::range(GfnRange::new(Gfn(3), 0)).is_none());
    }

    #[test]
    fn a_range_at_the_top_does_not_wrap() {
        let top = Flush::range(GfnRange::new(Gfn(u64::MAX - 1), u64::MAX));
        assert!(top.covers(Gfn(u64::MAX - 1)) && !top.covers(Gfn(0)));
    }

    #[test]
    fn covers_is_exact() {
        let a = Flush::Range {
            gfn: Gfn(4),
            pages: 2,
        };
        assert!(a.covers(Gfn(5)));
        assert!(!a.covers(Gfn(6)));
        assert!(a.touches(GfnRange::new(Gfn(0), 512)) && !a.touches(GfnRange::new(Gfn(6), 1)));
        assert!(Flush::All.covers(Gfn(u64::MAX)));
    }
}
