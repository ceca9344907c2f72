//! What a caller says about a slot, and why it may be refused.
//!
//! The rules of creation and change are those of `KVM_SET_USER_MEMORY_REGION`
//! (Documentation/virt/kvm/api.rst, 4.35), with an error of its own for each. `set` checks them.

use bitflags::bitflags;
use thiserror::Error;

use crate::{
    addr::{Gfn, GfnRange, Level, PAGE_SIZE, Pfn},
    format::MemoryType,
};

/// The most pages in a slot (KVM: `KVM_MEM_MAX_NR_PAGES`).
pub const MAX_SLOT_PAGES: u64 = (1 << 31) - 1;
/// Slots that an MMU has unless configured otherwise (KVM on x86 and RISC-V: `KVM_USER_MEM_SLOTS`).
pub const DEFAULT_MAX_SLOTS: u16 = 32764;

/// A slot's number, unique in its address space.
pub type SlotId = u16;

bitflags! {
    /// Properties of a slot.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct SlotFlags: u32 {
        /// Record which pages the guest writes.
        const LOG_DIRTY = 1 << 0;
        /// The guest may not write; a write is reported as
        /// [`FaultOutcome::ReadOnly`](crate::FaultOutcome::ReadOnly).
        const READONLY = 1 << 1;
    }
}

/// What a caller says about a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct SlotSpec {
    /// The slot's number.
    pub id: SlotId,
    /// Address space, below [`MmuConfig::address_spaces`](crate::MmuConfig::address_spaces).
    pub as_id: u8,
    /// First guest frame.
    pub base_gfn: Gfn,
    /// Length in pages, 1 to [`MAX_SLOT_PAGES`].
    pub npages: u64,
    /// Host frame behind `base_gfn`; the following frames are contiguous. Huge pages need the two
    /// congruent: [`fits_leaf`](Self::fits_leaf).
    pub host_base_pfn: Pfn,
    /// Properties.
    pub flags: SlotFlags,
    /// The coarsest mapping that the host's backing allows (its own page size).
    pub max_level: Level,
    /// Cacheability of the slot's memory. On RISC-V, other than
    /// [`Normal`](MemoryType::Normal) only with Svpbmt:
    /// [`MmuConfig::memory_types`](crate::MmuConfig::memory_types).
    pub memory: MemoryType,
}

impl SlotSpec {
    /// A writable slot in address space 0 without limit on the mapping level.
    pub const fn new(id: SlotId, base_gfn: Gfn, npages: u64, host_base_pfn: Pfn) -> Self {
        Self {
            id,
            as_id: 0,
            base_gfn,
            npages,
            host_base_pfn,
            flags: SlotFlags::empty(),
            max_level: Level::SIZE_256T,
            memory: MemoryType::Normal,
        }
    }

    /// As [`new`](Self::new), from addresses and a size in bytes.
    ///
    /// # Errors
    ///
    /// [`SlotError::Unaligned`] if one of the three is not a multiple of 4096.
    pub const fn from_bytes(id: SlotId, gpa: u64, size: u64, hpa: u64) -> Result<Self, SlotError> {
        let (mut i, values) = (0, [gpa, size, hpa]);
        while i < values.len() {
            if !values[i].is_multiple_of(PAGE_SIZE) {
                return Err(SlotError::Unaligned { value: values[i] });
            }
            i += 1;
        }
        Ok(Self::new(
            id,
            Gfn::from_gpa(gpa),
            size / PAGE_SIZE,
            Pfn(hpa / PAGE_SIZE),
        ))
    }

    /// The same with other flags.
    #[must_use]
    pub const fn with_flags(mut self, flags: SlotFlags) -> Self {
        self.flags = flags;
        self
    }

    /// The same in another address space.
    #[must_use]
    pub const fn with_as_id(mut self, as_id: u8) -> Self {
        self.as_id = as_id;
        self
    }

    /// The same with another cacheability.
    #[must_use]
    pub const fn with_memory(mut self, memory: MemoryType) -> Self {
        self.memory = memory;
        self
    }

    /// The same with a limit on the mapping level.
    #[must_use]
    pub const fn with_max_level(mut self, level: Level) -> Self {
        self.max_level = level;
        self
    }

    /// Whether a leaf of `pages` pages over `gfn` fits into the slot; `pages` is a power of two,
    /// 512 for 2 MiB.
    ///
    /// An entry holds one host frame, aligned to the leaf's size, and hardware adds the low bits of
    /// the guest's address. So `base_gfn` and `host_base_pfn` must be *congruent modulo* `pages`,
    /// and the whole aligned leaf must lie in the slot. Memory placed otherwise is mapped in finer
    /// pages; nothing else says so.
    pub const fn fits_leaf(&self, gfn: Gfn, pages: u64) -> bool {
        let low = pages.wrapping_sub(1);
        let (start, range) = (gfn.0 & !low, self.range());
        start >= range.start.0
            && range.end.0.saturating_sub(start) >= pages
            && (self.base_gfn.0 ^ self.host_base_pfn.0) & low == 0
    }

    /// The coarsest level whose leaf fits anywhere into the slot, where a level's pages are as its
    /// name says: to be asked when memory is placed. What is mapped may be finer still, for
    /// [`max_level`](Self::max_level), the format, [`MmuConfig::max_level`](crate::MmuConfig) and
    /// [`Host::mapping_level`](crate::Host::mapping_level) limit it, too.
    pub fn alignment_level(&self) -> Level {
        let fits = |level: &Level| {
            let pages = 1 << (9 * u32::from(level.get() - 1));
            // The first frame at or after the base where such a leaf could begin.
            let first = self.base_gfn.0.checked_next_multiple_of(pages);
            first.is_some_and(|first| self.fits_leaf(Gfn(first), pages))
        };
        let coarser = core::iter::successors(Level::SIZE_4K.parent(), |level| level.parent());
        coarser.filter(fits).last().unwrap_or(Level::SIZE_4K)
    }

    /// The guest frames of the slot.
    pub const fn range(&self) -> GfnRange {
        GfnRange::new(self.base_gfn, self.npages)
    }
}

/// Why a slot operation was refused. Nothing has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum SlotError {
    /// An address or size is not a multiple of the page size.
    #[error("{value:#x} is not a multiple of 4096")]
    Unaligned {
        /// The offending value, in bytes.
        value: u64,
    },
    /// The slot has no pages.
    #[error("slot {id} has no pages")]
    Empty {
        /// The slot.
        id: SlotId,
    },
    /// The slot is longer than [`MAX_SLOT_PAGES`].
    #[error("{pages} pages are more than a slot may have ({MAX_SLOT_PAGES})")]
    TooLarge {
        /// The length asked for, in pages.
        pages: u64,
    },
    /// Guest or host frames wrap around the number space.
    #[error("slot {id} wraps around the address space")]
    Wraps {
        /// The slot.
        id: SlotId,
    },
    /// The slot ends beyond what the format can translate.
    #[error("slot {id} ends at {end}, beyond the format's limit {limit}")]
    BeyondFormat {
        /// The slot.
        id: SlotId,
        /// First frame after the slot.
        end: Gfn,
        /// First frame that cannot be translated.
        limit: Gfn,
    },
    /// The slot's memory lies beyond what an entry can hold.
    #[error("memory of slot {id} ends at {end}, beyond the format's limit {limit}")]
    BeyondHost {
        /// The slot.
        id: SlotId,
        /// First host frame after the slot.
        end: Pfn,
        /// First host frame that does not fit.
        limit: Pfn,
    },
    /// The guest frames belong to another slot.
    #[error("slot {id} overlaps slot {other}")]
    Overlaps {
        /// The slot asked for.
        id: SlotId,
        /// The slot that is there.
        other: SlotId,
    },
    /// A slot of this number exists.
    #[error("slot {id} exists")]
    Exists {
        /// The slot.
        id: SlotId,
    },
    /// No slot has this number.
    #[error("slot {id} does not exist")]
    UnknownId {
        /// The slot asked for.
        id: SlotId,
    },
    /// The number is not below the limit of slots.
    #[error("slot {id} is beyond the limit of {limit} slots")]
    TooMany {
        /// The slot asked for.
        id: SlotId,
        /// Slots that the MMU may have.
        limit: u16,
    },
    /// The address space does not exist.
    #[error("address space {as_id} does not exist")]
    UnknownAddressSpace {
        /// The address space asked for.
        as_id: u8,
    },
    /// `READONLY` cannot change while the slot exists.
    #[error("slot {id}: READONLY cannot change, delete and create the slot")]
    ReadOnlyIsFixed {
        /// The slot.
        id: SlotId,
    },
    /// Flags that this version does not know.
    #[error("unknown slot flags {bits:#x}")]
    UnknownFlags {
        /// The unknown bits.
        bits: u32,
    },
    /// The memory type needs an extension, and
    /// [`MmuConfig::memory_types`](crate::MmuConfig::memory_types) does not say that it is there.
    #[error(
        "slot {id}: {memory:?} memory needs an extension that the processor is not said to have"
    )]
    MemoryType {
        /// The slot.
        id: SlotId,
        /// The type asked for.
        memory: MemoryType,
    },
    /// No memory for the dirty bitmap.
    #[error("no memory for the dirty bitmap of slot {id}")]
    NoMemory {
        /// The slot.
        id: SlotId,
    },
}

#[cfg(all(test, not(any(feature = "loom", feature = "shuttle"))))]
mod tests {
    use super::*;

    #[test]
    fn a_leaf_fits_where_both_sides_are_aligned_alike_and_all_of_it_is_there() {
        let slot = |gfn, pages, pfn| SlotSpec::new(0, Gfn(gfn), pages, Pfn(pfn));
        assert!(slot(512, 512, 1024).fits_leaf(Gfn(700), 512));
        assert!(!slot(512, 511, 1024).fits_leaf(Gfn(700), 512), "too short");
        assert!(
            !slot(513, 512, 1025).fits_leaf(Gfn(700), 512),
            "begins inside"
        );
        assert!(
            !slot(512, 1024, 1025).fits_leaf(Gfn(700), 512),
            "not congruent"
        );
        let inside = slot(500, 1024, 500 + (1 << 18));
        assert!(!inside.fits_leaf(Gfn(511), 512) && inside.fits_leaf(Gfn(512), 512));
        assert!(!inside.fits_leaf(Gfn(1 << 40), 512), "outside the slot");
        assert!(!inside.fits_leaf(Gfn(u64::MAX), 512));
        assert!(slot(5, 1, 77).fits_leaf(Gfn(5), 1));
    }

    #[test]
    fn the_coarsest_level_follows_from_both_bases_and_the_length() {
        let level = |gfn, pages, pfn| SlotSpec::new(0, Gfn(gfn), pages, Pfn(pfn)).alignment_level();
        assert_eq!(level(0, 512, 0), Level::SIZE_2M);
        assert_eq!(level(0, 511, 0), Level::SIZE_4K);
        assert_eq!(level(0, 1 << 20, 1), Level::SIZE_4K);
        assert_eq!(
            level(7, 1 << 20, 7),
            Level::SIZE_1G,
            "a whole gigabyte inside"
        );
        assert_eq!(level(0, 1 << 20, 1 << 9), Level::SIZE_2M);
        assert_eq!(level(0, 1 << 28, 1 << 27), Level::SIZE_512G);
        assert_eq!(level(u64::MAX - 5, 5, u64::MAX - 5), Level::SIZE_4K);
    }
}
