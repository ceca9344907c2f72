//! Memory slots as the API takes them: checked alone and as a table, before any backend sees them.
//!
//! Limits are KVM's (KVM_SET_USER_MEMORY_REGION): a slot is at most 2^31 - 1 pages, guest-physical
//! addresses do not wrap, slots of one VM do not overlap. Frames are 4 KiB; guest-physical space
//! ends at 2^40 frames here (52 bits), and a backend's format may end it earlier. Numbers are those
//! that some kernel takes; how many slots a VM has on its host is the backend's to say.

use crate::{ApiError, Reason, v1};

/// Bytes of a page.
pub const PAGE_SIZE: u64 = 4096;
/// Highest slot number that any kernel takes (KVM: `SHRT_MAX` slots, less its own).
pub const MAX_SLOT: u32 = 32_766;
/// Most pages in a slot (KVM: fits in a signed 32-bit integer).
pub const MAX_SLOT_PAGES: u64 = (1 << 31) - 1;
/// End of guest-physical space in frames.
const MAX_GFN: u64 = 1 << 40;
/// Frames below 3 GiB go to the first slot; the rest begins at 4 GiB, as on a PC.
const LOW_END_GFN: u64 = (3 << 30) / PAGE_SIZE;
const HIGH_BASE_GFN: u64 = (4 << 30) / PAGE_SIZE;

/// One slot, checked by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotSpec {
    /// Number in the VM.
    pub slot: u32,
    /// First guest frame.
    pub base_gfn: u64,
    /// Pages of 4 KiB, never 0.
    pub pages: u64,
    /// Guest writes are refused.
    pub read_only: bool,
}

pub(super) fn bad(slot: u32, message: impl std::fmt::Display) -> ApiError {
    ApiError::new(Reason::BadSlotTable, format!("slot {slot}: {message}")).with("slot", slot)
}

impl SlotSpec {
    /// Checks a slot by itself.
    ///
    /// # Errors
    /// BAD_SLOT_TABLE when the number, the length or the end is out of range or wraps.
    pub fn new(slot: u32, base_gfn: u64, pages: u64, read_only: bool) -> Result<Self, ApiError> {
        if slot > MAX_SLOT {
            return Err(bad(
                slot,
                format_args!("the highest slot number is {MAX_SLOT}"),
            ));
        }
        if pages == 0 {
            return Err(bad(slot, "a slot has at least one page"));
        }
        if pages > MAX_SLOT_PAGES {
            return Err(bad(
                slot,
                format_args!("{pages} pages; at most {MAX_SLOT_PAGES}"),
            )
            .with("pages", pages));
        }
        match base_gfn.checked_add(pages) {
            Some(end) if end <= MAX_GFN => Ok(Self { slot, base_gfn, pages, read_only }),
            _ => Err(bad(
                slot,
                format_args!("frames {base_gfn:#x} + {pages:#x} go beyond the end of guest-physical space ({MAX_GFN:#x})"),
            )
            .with("gfn", base_gfn)
            .with("pages", pages)),
        }
    }

    /// From a message; the output-only field is not read.
    ///
    /// # Errors
    /// As [`SlotSpec::new`].
    pub fn from_message(slot: &v1::Slot) -> Result<Self, ApiError> {
        Self::new(slot.slot, slot.base_gfn, slot.pages, slot.read_only)
    }

    /// As a message, with dirty logging off.
    #[must_use]
    pub fn to_message(self) -> v1::Slot {
        v1::Slot {
            slot: self.slot,
            base_gfn: self.base_gfn,
            pages: self.pages,
            read_only: self.read_only,
            dirty_logging: false,
        }
    }

    /// First frame after the slot.
    #[must_use]
    pub fn end_gfn(self) -> u64 {
        self.base_gfn + self.pages
    }

    /// Length in bytes.
    #[must_use]
    pub fn bytes(self) -> u64 {
        self.pages * PAGE_SIZE
    }
}

/// Checks slots against each other.
///
/// # Errors
/// BAD_SLOT_TABLE when a number occurs twice or two slots overlap; the message names both.
pub fn check_slot_table(slots: &[SlotSpec]) -> Result<(), ApiError> {
    let mut sorted: Vec<&SlotSpec> = slots.iter().collect();
    sorted.sort_by_key(|slot| slot.slot);
    for pair in sorted.windows(2) {
        if pair[0].slot == pair[1].slot {
            return Err(bad(pair[0].slot, "the number is taken"));
        }
    }
    sorted.sort_by_key(|slot| slot.base_gfn);
    for pair in sorted.windows(2) {
        if pair[0].end_gfn() > pair[1].base_gfn {
            return Err(bad(
                pair[1].slot,
                format_args!(
                    "frames [{:#x}, {:#x}) overlap slot {} [{:#x}, {:#x})",
                    pair[1].base_gfn,
                    pair[1].end_gfn(),
                    pair[0].slot,
                    pair[0].base_gfn,
                    pair[0].end_gfn()
                ),
            )
            .with("other_slot", pair[0].slot));
        }
    }
    Ok(())
}

/// The slots a VM of `memory_bytes` starts with: slot 0 below 3 GiB, slot 1 from 4 GiB up.
///
/// # Errors
/// BAD_SLOT_TABLE when the memory does not fit a slot.
pub fn slots_for_memory(memory_bytes: u64) -> Result<Vec<SlotSpec>, ApiError> {
    let pages = memory_bytes / PAGE_SIZE;
    let low = pages.min(LOW_END_GFN);
    let mut slots = vec![SlotSpec::new(0, 0, low, false)?];
    if pages > low {
        slots.push(SlotSpec::new(1, HIGH_BASE_GFN, pages - low, false)?);
    }
    Ok(slots)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_that_cannot_be_are_refused() {
        let reason = |result: Result<SlotSpec, ApiError>| result.unwrap_err().reason;
        assert_eq!(
            reason(SlotSpec::new(MAX_SLOT + 1, 0, 1, false)),
            Reason::BadSlotTable
        );
        assert_eq!(reason(SlotSpec::new(0, 0, 0, false)), Reason::BadSlotTable);
        assert_eq!(
            reason(SlotSpec::new(0, 0, 1 << 31, false)),
            Reason::BadSlotTable
        );
        assert_eq!(
            reason(SlotSpec::new(0, u64::MAX, 2, false)),
            Reason::BadSlotTable
        );
        assert_eq!(
            reason(SlotSpec::new(0, MAX_GFN, 1, false)),
            Reason::BadSlotTable
        );
    }

    #[test]
    fn memory_over_three_gib_is_split_at_the_hole() {
        let slots = slots_for_memory(5 << 30).unwrap();
        assert_eq!(slots.len(), 2);
        assert_eq!(slots[1].base_gfn, HIGH_BASE_GFN);
        assert_eq!(slots.iter().map(|slot| slot.bytes()).sum::<u64>(), 5 << 30);
        check_slot_table(&slots).unwrap();
    }
}
