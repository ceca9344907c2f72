//! Placing pages in guest memory and reading them out, all through the host view.
//!
//! Pages are addressed by slot and index, as migration and the dirty log do; bytes and words by
//! guest-physical address, as guests are installed and their counters read. Nothing here is in a
//! dirty log: who places pages says so to those who need to know.

use std::{io, sync::Arc};

use slat_proto::model::PAGE_SIZE;

use super::slots::{SlotMemory, SlotTable};

const PAGE: usize = PAGE_SIZE as usize;

impl SlotMemory {
    /// Whether the page holds only zeroes.
    ///
    /// # Panics
    /// When the slot has no such page.
    #[must_use]
    pub(crate) fn page_is_zero(&self, page: u64) -> bool {
        self.host().is_zero(page)
    }

    /// Whether the page has memory; one that has not reads as zero.
    pub(crate) fn has_page(&self, page: u64) -> bool {
        self.region().has_page(page)
    }

    /// Copies a page out.
    ///
    /// # Panics
    /// When the slot has no such page.
    pub(crate) fn read_page(&self, page: u64, to: &mut [u8; PAGE]) {
        self.host().read(page as usize * PAGE, to);
    }

    /// Overwrites a page with zeroes.
    ///
    /// # Panics
    /// When the slot has no such page.
    pub(crate) fn clear_page(&self, page: u64) {
        self.host().clear(page, 1);
    }

    /// Gives pages back to the host: they read zero from then on, in both views. Reserved pages are
    /// overwritten with zeroes instead. Some may be gone
    /// when it fails.
    ///
    /// # Errors
    /// When the kernel refuses.
    ///
    /// # Panics
    /// When the range reaches beyond the slot's end.
    pub(crate) fn discard(&self, page: u64, pages: u64) -> io::Result<()> {
        assert!(page + pages <= self.spec().pages, "pages beyond the slot");
        self.region().discard(page, pages)
    }

    /// Pages that are given back by the guest's pager: no huge pages are made there again.
    pub(crate) fn keep_small(&self, page: u64, pages: u64) {
        self.region().keep_small(page, pages);
    }

    /// Bytes of the host's memory that the slot takes now, as the kernel counts them.
    ///
    /// # Errors
    /// When the kernel does not say.
    pub(crate) fn allocated(&self) -> io::Result<u64> {
        self.region().allocated()
    }

    /// Allocates pages and maps them in both views, so that neither placing them nor the guest's
    /// first access costs a fault. Contents stay, but nobody may write the pages meanwhile.
    ///
    /// # Errors
    /// When memory is short.
    ///
    /// # Panics
    /// When the range reaches beyond the slot's end.
    pub(crate) fn populate(&self, page: u64, pages: u64) -> io::Result<()> {
        self.region().populate(page, pages)
    }
}

impl SlotTable {
    /// Copies bytes in at a guest-physical address. Returns false, having written nothing, when the
    /// range is not within one slot.
    #[must_use]
    pub(crate) fn write(&self, gpa: u64, bytes: &[u8]) -> bool {
        self.locate(gpa, bytes.len()).is_some_and(|(slot, offset)| {
            slot.host().write(offset, bytes);
            true
        })
    }

    /// Copies bytes out from a guest-physical address. Returns false when the range is not within
    /// one slot.
    #[cfg(test)]
    #[must_use]
    pub(crate) fn read(&self, gpa: u64, bytes: &mut [u8]) -> bool {
        self.locate(gpa, bytes.len()).is_some_and(|(slot, offset)| {
            slot.host().read(offset, bytes);
            true
        })
    }

    /// The little-endian word at a guest-physical address, in one piece. `None` when the address is
    /// not a multiple of 8 or in no slot.
    #[must_use]
    pub(crate) fn load(&self, gpa: u64) -> Option<u64> {
        let (slot, offset) = self.locate_word(gpa)?;
        Some(slot.host().load(offset))
    }

    /// Stores a little-endian word in one piece. Returns false when the address is not a multiple
    /// of 8 or in no slot.
    #[must_use]
    pub(crate) fn store(&self, gpa: u64, value: u64) -> bool {
        self.locate_word(gpa).is_some_and(|(slot, offset)| {
            slot.host().store(offset, value);
            true
        })
    }

    fn locate_word(&self, gpa: u64) -> Option<(&Arc<SlotMemory>, usize)> {
        self.locate(gpa, 8).filter(|_| gpa.is_multiple_of(8))
    }

    fn locate(&self, gpa: u64, len: usize) -> Option<(&Arc<SlotMemory>, usize)> {
        let (slot, page) = self.find(gpa / PAGE_SIZE)?;
        let offset = (page * PAGE_SIZE + gpa % PAGE_SIZE) as usize;
        let end = offset.checked_add(len)? as u64;
        (end <= slot.spec().bytes()).then_some((slot, offset))
    }
}

#[cfg(test)]
mod tests {
    use slat_proto::model::SlotSpec;

    use super::*;
    use crate::memory::{
        GuestMemory,
        view::{mapped_huge, resident},
    };

    fn slot(number: u32, base_gfn: u64, pages: u64) -> Arc<SlotMemory> {
        let spec = SlotSpec::new(number, base_gfn, pages, false).unwrap();
        Arc::new(SlotMemory::new(spec).unwrap())
    }

    #[test]
    fn bytes_and_words_stay_within_one_slot() {
        let memory = GuestMemory::new();
        memory.publish(vec![slot(0, 0, 4), slot(1, 100, 4)]);
        let table = memory.table();
        assert!(table.write(100 * 4096 + 5, b"abc"));
        let mut back = [0; 3];
        assert!(table.read(100 * 4096 + 5, &mut back));
        assert_eq!(&back, b"abc");
        assert!(!table.write(3 * 4096 + 4090, &[0; 10]));
        assert!(!table.read(u64::MAX, &mut back));
        assert!(table.store(103 * 4096 + 4088, 7));
        assert_eq!(table.load(103 * 4096 + 4088), Some(7));
        for nowhere in [
            4 * 4096,
            104 * 4096,
            u64::MAX,
            u64::MAX - 7,
            4,
            103 * 4096 + 4089,
        ] {
            assert_eq!(table.load(nowhere), None, "{nowhere:#x}");
            assert!(!table.store(nowhere, 1), "{nowhere:#x}");
        }
    }

    #[test]
    fn pages_are_placed_and_read_by_their_index() {
        let slot = slot(0, 7, 3);
        slot.guest().store(2 * PAGE + 8, 5);
        assert!(slot.page_is_zero(1) && !slot.page_is_zero(2));
        let mut page = [1; PAGE];
        slot.read_page(2, &mut page);
        assert_eq!((page[8], page[9]), (5, 0));
        slot.clear_page(2);
        assert!(slot.page_is_zero(2));
        assert_eq!(slot.guest().load(2 * PAGE + 8), 0);
    }

    #[test]
    fn populated_pages_are_mapped_in_both_views_and_can_be_written() {
        let slot = slot(0, 0, 300);
        slot.populate(10, 100).unwrap();
        slot.host().write(150 * PAGE, b"kept");
        slot.populate(110, 180).unwrap();
        assert_eq!(&slot.guest().load(150 * PAGE).to_le_bytes()[..4], b"kept");
        let bytes = 280 * PAGE_SIZE;
        for view in [
            slot.guest().address(),
            slot.host().range_ptr(0, 1).addr() as u64,
        ] {
            // Neighbours that are there may be mapped along, and none are.
            assert_eq!(resident(view), bytes);
        }
        let faults = minor_faults();
        // A few are the test's own.
        for page in 10..290 {
            slot.host().store(page * PAGE, 1);
            slot.guest().store(page * PAGE + 8, 1);
        }
        assert!(minor_faults() - faults < 8);
    }

    #[test]
    fn discarded_pages_read_zero_in_both_views_and_their_memory_is_free() {
        let slot = slot(0, 0, 3 * 512 + 5);
        slot.populate(0, 3 * 512 + 5).unwrap();
        let all = (3 * 512 + 5) * PAGE_SIZE;
        assert_eq!(slot.allocated().unwrap(), all);
        for page in 0..3 * 512 + 5 {
            slot.guest().store(page * PAGE + 8, 7);
        }
        // A part of the first block, all of the second, and the end.
        slot.discard(100, 50).unwrap();
        slot.discard(512, 512).unwrap();
        slot.discard(3 * 512 + 2, 3).unwrap();
        let gone = |page: u64| {
            (100..150).contains(&page) || (512..1024).contains(&page) || page >= 3 * 512 + 2
        };
        assert_eq!(slot.allocated().unwrap(), all - 565 * PAGE_SIZE);
        for page in 0..3 * 512 + 5 {
            let word = if gone(page) { 0 } else { 7 };
            let offset = page as usize * PAGE + 8;
            assert_eq!(slot.guest().load(offset), word, "page {page}");
            assert_eq!(slot.host().load(offset), word, "page {page}");
        }
        // What was taken to look goes again; what is whole no longer is not said to be.
        slot.discard(0, 3 * 512 + 5).unwrap();
        assert_eq!(slot.allocated().unwrap(), 0);
        assert_eq!(slot.region().huge_bytes(), 0);
        // The background leaves such blocks alone, whatever the guest touches.
        slot.guest().store(700 * PAGE, 1);
        slot.region().tidy(1);
        assert_eq!(slot.allocated().unwrap(), PAGE_SIZE);
    }

    #[test]
    fn what_is_populated_is_huge_where_it_says_so_and_all_there() {
        let slot = slot(0, 0, 4 * 512 + 30);
        // Not in the first block: it keeps what it has.
        slot.host().write(600 * PAGE, b"kept");
        slot.populate(0, 4 * 512 + 30).unwrap();
        assert_eq!(&slot.guest().load(600 * PAGE).to_le_bytes()[..4], b"kept");
        let huge = slot.region().huge_bytes();
        for view in [
            slot.guest().address(),
            slot.host().range_ptr(0, 1).addr() as u64,
        ] {
            assert_eq!(resident(view), slot.spec().bytes());
            assert_eq!(mapped_huge(view), huge, "as the kernel says");
        }
        if huge == 0 {
            eprintln!("SKIPPED: the kernel gave no huge page");
        }
    }

    /// Faults that this thread took without reading a disk.
    fn minor_faults() -> i64 {
        let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
        // SAFETY: the kernel fills the struct, for which zeroes are a value, too.
        let usage = unsafe {
            assert_eq!(libc::getrusage(libc::RUSAGE_THREAD, usage.as_mut_ptr()), 0);
            usage.assume_init()
        };
        usage.ru_minflt
    }
}
