//! Memory in each mode: what it is made of, what is kept, what is refused.

use std::sync::Arc;

use slat_proto::model::{MemoryBacking, PAGE_SIZE, SlotSpec};

use super::{
    Mode, SlotMemory,
    huge::{BLOCK, BLOCK_BYTES},
    reserved::{Reserved, free},
    scan, view,
};

const PAGE: usize = PAGE_SIZE as usize;

fn slot(pages: u64, backing: MemoryBacking) -> std::io::Result<SlotMemory> {
    let spec = SlotSpec::new(0, 0, pages, false).unwrap();
    SlotMemory::with(
        spec,
        Mode {
            backing,
            node: None,
        },
    )
}

/// Eight reserved pages for a test, or why it is skipped.
macro_rules! eight_pages {
    () => {
        match Reserved::take(8) {
            Ok(reserved) => reserved,
            Err(why) => {
                eprintln!("SKIPPED: {why}");
                return;
            }
        }
    };
}

#[test]
fn reserved_pages_are_taken_once_for_both_views_and_given_back_at_the_end() {
    let _reserved = eight_pages!();
    let before = free();
    let slot = slot(6 * BLOCK, MemoryBacking::Hugetlb2M).unwrap();
    assert_eq!(free(), before - 6, "reserved before any is touched");
    assert_eq!(slot.region().made_of().huge, Some(0));
    slot.guest().store(8, 7);
    assert_eq!(slot.host().load(8), 7, "one memory");
    slot.populate(0, 6 * BLOCK).unwrap();
    assert_eq!(slot.host().load(8), 7, "populating keeps what is there");
    let made_of = slot.region().made_of();
    assert_eq!(made_of.huge, Some(6 * BLOCK_BYTES));
    assert_eq!((made_of.small, made_of.giant), (Some(0), Some(0)));
    assert_eq!(made_of.shortfall(MemoryBacking::Hugetlb2M), "");
    assert_eq!(free(), before - 6);
    drop(slot);
    assert_eq!(free(), before);
}

#[test]
fn what_cannot_be_reserved_is_refused_when_it_is_mapped() {
    let _reserved = eight_pages!();
    let pages = free();
    let error = slot((pages + 1) * BLOCK, MemoryBacking::Hugetlb2M).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::ENOMEM));
    assert_eq!(free(), pages, "nothing stays reserved");
}

#[test]
fn discarding_reserved_pages_overwrites_exactly_those_and_keeps_the_reservation() {
    let _reserved = eight_pages!();
    let slot = slot(4 * BLOCK, MemoryBacking::Hugetlb2M).unwrap();
    let all = 4 * BLOCK;
    for page in 0..all {
        slot.guest().store(page as usize * PAGE + 16, page + 1);
    }
    let (before, allocated) = (free(), slot.allocated().unwrap());
    slot.discard(BLOCK - 3, BLOCK + 7).unwrap();
    for page in 0..all {
        let gone = (BLOCK - 3..2 * BLOCK + 4).contains(&page);
        let word = if gone { 0 } else { page + 1 };
        assert_eq!(
            slot.guest().load(page as usize * PAGE + 16),
            word,
            "page {page}"
        );
    }
    assert_eq!((free(), slot.allocated().unwrap()), (before, allocated));
}

#[test]
fn translations_of_reserved_pages_are_dropped_by_whole_pages_and_contents_stay() {
    let _reserved = eight_pages!();
    let slot = slot(2 * BLOCK, MemoryBacking::Hugetlb2M).unwrap();
    slot.guest().store(3 * PAGE, 5);
    slot.guest().store((BLOCK as usize + 1) * PAGE, 6);
    // A range that is neither aligned nor a whole page.
    slot.guest().drop_mappings(BLOCK - 1, 2).unwrap();
    slot.guest().drop_mappings(3, 1).unwrap();
    assert_eq!(slot.guest().load(3 * PAGE), 5);
    assert_eq!(slot.guest().load((BLOCK as usize + 1) * PAGE), 6);
    assert_eq!(slot.guest().address() % BLOCK_BYTES, 0);
}

#[test]
fn small_memory_has_no_huge_page_whatever_is_done_to_it() {
    let slot = slot(3 * BLOCK + 5, MemoryBacking::Small).unwrap();
    slot.host().write(BLOCK as usize * PAGE, b"kept");
    slot.populate(0, 3 * BLOCK + 5).unwrap();
    for block in 0..3 {
        slot.region().tidy(block);
    }
    let made_of = slot.region().made_of();
    assert_eq!(made_of.small, Some((3 * BLOCK + 5) * PAGE_SIZE));
    assert_eq!(made_of.huge, Some(0));
    for start in [
        slot.guest().address(),
        slot.host().range_ptr(0, 1).addr() as u64,
    ] {
        assert_eq!(view::mapped_huge(start), 0);
        assert_eq!(view::resident(start), (3 * BLOCK + 5) * PAGE_SIZE);
    }
    let kept = slot.guest().load(BLOCK as usize * PAGE).to_le_bytes();
    assert_eq!(&kept[..4], b"kept");
}

#[test]
fn thp_says_what_the_kernel_maps() {
    let slot = Arc::new(slot(3 * BLOCK + 5, MemoryBacking::Thp).unwrap());
    slot.populate(0, 3 * BLOCK + 5).unwrap();
    let made_of = slot.region().made_of();
    if !scan::is_said() {
        assert_eq!((made_of.small, made_of.huge), (None, None));
        eprintln!("SKIPPED: this kernel does not say which pages are huge");
        return;
    }
    let huge = view::mapped_huge(slot.guest().address());
    assert_eq!(made_of.huge, Some(huge), "as smaps has it");
    assert_eq!(made_of.small, Some((3 * BLOCK + 5) * PAGE_SIZE - huge));
    if huge == 0 {
        let why = made_of.shortfall(MemoryBacking::Thp);
        assert!(why.contains("gave none when they were touched"), "{why}");
    }
    // What another makes of it is seen by the next look.
    slot.guest().collapse(1..2).unwrap_or_default();
    slot.region().tidy(1);
    let huge = view::mapped_huge(slot.guest().address());
    assert_eq!(slot.region().huge_bytes(), huge);
}

#[test]
fn memory_of_a_node_is_memory_and_a_node_that_is_not_there_is_none() {
    let spec = SlotSpec::new(0, 0, 2 * BLOCK, false).unwrap();
    let on = |node| {
        let mode = Mode {
            backing: MemoryBacking::Auto,
            node: Some(node),
        };
        SlotMemory::with(spec, mode)
    };
    if !std::path::Path::new("/sys/devices/system/node/node0").exists() {
        eprintln!("SKIPPED: this kernel knows no NUMA nodes");
        return;
    }
    let slot = on(0).unwrap();
    slot.populate(0, 2 * BLOCK).unwrap();
    assert_eq!(slot.guest().node(0).unwrap(), (super::view::MPOL_BIND, 0));
    assert_eq!(slot.allocated().unwrap(), 2 * BLOCK_BYTES);
    let nowhere = on(1000).unwrap_err();
    assert_eq!(nowhere.raw_os_error(), Some(libc::EINVAL));
}
