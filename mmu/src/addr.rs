//! Frame numbers and mapping levels.
//!
//! Everything the MMU computes is in 4 KiB frames, never in bytes: a [`Gfn`] counts guest frames, a
//! [`Pfn`] host frames, and the two types cannot be mixed. Levels count from 1 (a 4 KiB mapping),
//! as KVM's `PG_LEVEL_*` do.

use core::fmt;

/// Bytes in a base page, as a shift.
pub const PAGE_SHIFT: u32 = 12;
/// Bytes in a base page.
pub const PAGE_SIZE: u64 = 1 << PAGE_SHIFT;
/// The most levels any format has.
pub const MAX_LEVELS: usize = 5;

/// A guest frame number: guest physical address / 4096.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Gfn(pub u64);

impl Gfn {
    /// The frame that holds guest physical address `gpa` (bytes).
    pub const fn from_gpa(gpa: u64) -> Self {
        Self(gpa >> PAGE_SHIFT)
    }
}

impl fmt::Display for Gfn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "gfn {:#x}", self.0)
    }
}

/// A host frame number: host physical address / 4096.
///
/// The host decides what "physical" is. For a hardware walker it is RAM; for the software backend
/// it is an offset into the guest's backing memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Pfn(pub u64);

impl Pfn {
    /// The host physical address (bytes) of the frame's first byte.
    pub const fn hpa(self) -> u64 {
        self.0 << PAGE_SHIFT
    }
}

impl fmt::Display for Pfn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pfn {:#x}", self.0)
    }
}

/// A page-table level, 1 (entries map 4 KiB) to 5.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Level(u8);

impl Level {
    /// Entries map 4 KiB.
    pub const SIZE_4K: Self = Self(1);
    /// Entries map 2 MiB.
    pub const SIZE_2M: Self = Self(2);
    /// Entries map 1 GiB.
    pub const SIZE_1G: Self = Self(3);
    /// Entries map 512 GiB.
    pub const SIZE_512G: Self = Self(4);
    /// Entries map 256 TiB.
    pub const SIZE_256T: Self = Self(5);

    /// Level `n`, or `None` unless 1 ≤ `n` ≤ 5.
    #[inline(always)]
    pub const fn new(n: u8) -> Option<Self> {
        if n >= 1 && n as usize <= MAX_LEVELS {
            Some(Self(n))
        } else {
            None
        }
    }

    /// The level's number, from 1.
    #[inline(always)]
    pub const fn get(self) -> u8 {
        self.0
    }

    /// The level's position in a per-level array, from 0.
    #[inline(always)]
    pub const fn index(self) -> usize {
        (self.0 - 1) as usize
    }

    /// The next finer level, or `None` at 4 KiB.
    #[inline(always)]
    pub const fn child(self) -> Option<Self> {
        Self::new(self.0 - 1)
    }

    /// The next coarser level, or `None` at the coarsest.
    #[inline(always)]
    pub const fn parent(self) -> Option<Self> {
        Self::new(self.0 + 1)
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            1 => "4k",
            2 => "2m",
            3 => "1g",
            4 => "512g",
            _ => "256t",
        })
    }
}

/// A range of guest frames, `[start, end)`: its end is exclusive.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct GfnRange {
    /// First frame.
    pub start: Gfn,
    /// First frame after the range. A range whose end is not above its start is empty.
    pub end: Gfn,
}

impl GfnRange {
    /// The range of `pages` frames from `start`; it stops at the top of the number space instead of
    /// wrapping.
    pub const fn new(start: Gfn, pages: u64) -> Self {
        Self {
            start,
            end: Gfn(start.0.saturating_add(pages)),
        }
    }

    /// Length in pages.
    pub const fn pages(self) -> u64 {
        self.end.0.saturating_sub(self.start.0)
    }

    /// Whether the range holds no frame.
    pub const fn is_empty(self) -> bool {
        self.pages() == 0
    }

    /// Whether `gfn` lies in the range.
    pub const fn contains(self, gfn: Gfn) -> bool {
        self.start.0 <= gfn.0 && gfn.0 < self.end.0
    }

    /// Whether the two ranges share a frame.
    pub const fn overlaps(self, other: Self) -> bool {
        !self.is_empty()
            && !other.is_empty()
            && self.start.0 < other.end.0
            && other.start.0 < self.end.0
    }

    /// The smallest range that covers both; an empty range adds nothing.
    pub fn hull(self, other: Self) -> Self {
        if self.is_empty() {
            return other;
        }
        if other.is_empty() {
            return self;
        }
        Self {
            start: self.start.min(other.start),
            end: self.end.max(other.end),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_do_not_wrap() {
        let top = GfnRange::new(Gfn(u64::MAX - 1), 10);
        assert_eq!(top.pages(), 1);
        assert!(top.contains(Gfn(u64::MAX - 1)));
    }

    #[test]
    fn end_is_exclusive() {
        let a = GfnRange::new(Gfn(10), 5);
        assert!(!a.contains(Gfn(15)));
        assert!(!a.overlaps(GfnRange::new(Gfn(15), 1)));
        assert!(a.overlaps(GfnRange::new(Gfn(14), 1)));
        assert!(!a.overlaps(GfnRange::new(Gfn(12), 0)));
    }

    #[test]
    fn hull_ignores_empty_ranges() {
        let a = GfnRange::new(Gfn(10), 5);
        assert_eq!(a.hull(GfnRange::default()), a);
        assert_eq!(
            a.hull(GfnRange::new(Gfn(20), 1)),
            GfnRange::new(Gfn(10), 11)
        );
    }

    #[test]
    fn levels_stop_at_both_ends() {
        assert_eq!(Level::SIZE_4K.child(), None);
        assert_eq!(Level::SIZE_256T.parent(), None);
        assert_eq!(Level::new(0), None);
        assert_eq!(Level::new(6), None);
    }
}
