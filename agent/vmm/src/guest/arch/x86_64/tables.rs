//! Guest page tables: every slot mapped one to one by 2 MiB pages, 4 levels, for code at CPL 3.

use slat_proto::model::{PAGE_SIZE, SlotSpec};

use crate::guest::layout::{bounds, support_pages};

/// Present, writable, user, accessed.
const TABLE: u64 = 0x27;
/// Present, writable, user, accessed, dirty, 2 MiB.
const LEAF: u64 = 0xe7;
const ENTRIES: u64 = 512;
const LEAF_BYTES: u64 = 2 << 20;
const PD_BYTES: u64 = LEAF_BYTES * ENTRIES;
const PDPT_BYTES: u64 = PD_BYTES * ENTRIES;

/// The tables' bytes, for `root` in guest-physical memory: a root, a page for each 512 GiB up to
/// the end, a page for each GiB that holds memory.
pub(in crate::guest) fn identity(slots: &[SlotSpec], root: u64) -> Vec<u8> {
    let pages = support_pages(slots);
    let mut words = vec![0u64; (pages * ENTRIES) as usize];
    let end = slots.iter().map(|slot| bounds(slot).1).max().unwrap_or(0);
    let pdpts = end.div_ceil(PDPT_BYTES);
    for pdpt in 0..pdpts {
        words[pdpt as usize] = (root + (1 + pdpt) * PAGE_SIZE) | TABLE;
    }
    let mut next = 1 + pdpts;
    for slot in slots {
        let (base, end) = bounds(slot);
        for gib in base / PD_BYTES..end.div_ceil(PD_BYTES) {
            // PDPTs lie one after the other, so a GiB's number is its entry's number in all of
            // them.
            words[(ENTRIES + gib) as usize] = (root + next * PAGE_SIZE) | TABLE;
            for leaf in 0..ENTRIES {
                let at = gib * PD_BYTES + leaf * LEAF_BYTES;
                if (base..end).contains(&at) {
                    words[(next * ENTRIES + leaf) as usize] = at | LEAF;
                }
            }
            next += 1;
        }
    }
    debug_assert_eq!(next, pages);
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::Layout;

    fn walk(layout: &Layout, bytes: &[u8], address: u64) -> Option<u64> {
        let root = layout.support();
        let entry = |table: u64, index: u64| {
            let at = (table - root + index * 8) as usize;
            let word = u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
            (word & 1 != 0).then_some(word)
        };
        let table = |word: u64| word & 0x000f_ffff_ffff_f000;
        let pdpt = entry(root, address / PDPT_BYTES)?;
        let pd = entry(table(pdpt), address / PD_BYTES % ENTRIES)?;
        let leaf = entry(table(pd), address / LEAF_BYTES % ENTRIES)?;
        assert_eq!(leaf & 0xfff, LEAF);
        Some(table(leaf) + address % LEAF_BYTES)
    }

    #[test]
    fn slots_are_mapped_one_to_one_and_nothing_else_is() {
        for gib in [1u64, 5, 1024] {
            let layout = Layout::new(gib << 30).unwrap();
            let bytes = identity(layout.slots(), layout.support());
            for slot in layout.slots() {
                let (base, end) = bounds(slot);
                for address in [base, base + 5, (base + end) / 2, end - 1] {
                    assert_eq!(walk(&layout, &bytes, address), Some(address));
                }
                assert_eq!(walk(&layout, &bytes, end), None);
            }
        }
    }
}
