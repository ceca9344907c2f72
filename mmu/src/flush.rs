//! TLB-flush requests as values.
//!
//! The MMU changes tables; it never reaches for a TLB. Each operation returns the flush it owes, and **the operation
//! is complete only when its caller has carried that flush out on every vCPU**: a harvest may be reported, a page
//! reused, a slot forgotten only then. The type is `#[must_use]`, so a forgotten flush is a compiler warning.
//!
//! Requests from several operations may be merged and executed once.

use crate::addr::{Gfn, GfnRange};

/// What must leave the TLBs before an operation is complete.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[must_use = "translations stay in the TLBs until this flush is carried out"]
pub enum Flush {
    /// Nothing.
    #[default]
    None,
    /// Every translation of a frame in `[gfn, gfn + pages)`, at whatever level it is cached.
    Range {
        /// First frame.
        gfn: Gfn,
        /// Number of pages, never 0.
        pages: u64,
    },
    /// Every translation; also, a vCPU must load the root anew
    /// ([`SecondStage::root`](crate::SecondStage::root)).
    All,
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
}

#[cfg(test)]
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
    fn covers_is_exact() {
        let a = Flush::Range {
            gfn: Gfn(4),
            pages: 2,
        };
        assert!(a.covers(Gfn(5)));
        assert!(!a.covers(Gfn(6)));
        assert!(Flush::All.covers(Gfn(u64::MAX)));
    }
}
