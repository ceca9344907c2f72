//! What a layout must keep for the laws of [`Format`](slat_mmu::Format) to hold, as far as
//! constants can show it. A format whose layout does not keep it does not compile.

use slat_mmu::AdPolicy;

use crate::layout::Layout;

/// What is wrong with a layout, if anything is.
pub(crate) const fn fault<L: Layout>() -> Option<&'static str> {
    let mut level = 0;
    while level + 1 < L::INDEX_BITS.len() {
        if L::INDEX_BITS[level] != 9 {
            return Some("only the root may have other than 9 index bits");
        }
        level += 1;
    }

    let memory = L::MEMORY;
    let fields = [
        L::SMALL.mask | L::HUGE.mask | L::LEAF,
        L::FRAME.mask(),
        memory.mask,
        L::READ.mask,
        L::WRITE.mask,
        L::EXECUTE.mask,
        L::ACCESSED.mask,
        L::DIRTY.mask,
        L::MMU_WRITABLE.mask,
        L::HOST_WRITABLE.mask,
    ];
    let (mut used, mut i) = (0, 0);
    while i < fields.len() {
        if used & fields[i] != 0 {
            return Some("fields of a leaf overlap");
        }
        // Reading may go without saying.
        if fields[i] == 0 && i != 3 {
            return Some("a leaf lacks a field");
        }
        used |= fields[i];
        i += 1;
    }
    if (memory.normal | memory.non_cacheable | memory.device) & !memory.mask != 0 {
        return Some("a memory type is outside its field");
    }
    if memory.normal == memory.non_cacheable
        || memory.normal == memory.device
        || memory.non_cacheable == memory.device
    {
        return Some("two memory types are one");
    }

    if L::TABLE & L::FRAME.mask() != 0 {
        return Some("a pointer has fixed bits in its frame");
    }
    if L::HUGE.is_on(L::TABLE) || L::MMU_WRITABLE.is_on(L::TABLE) {
        return Some("a pointer looks like a leaf");
    }
    if L::TABLE & L::SMALL.value & L::HUGE.value & L::PRESENT != L::PRESENT {
        return Some("a pointer or a leaf is not present");
    }
    if (L::EMPTY | L::FROZEN) & (L::PRESENT | L::HARDWARE_PRESENT) != 0 {
        return Some("an absent entry is present");
    }
    if L::EMPTY == L::FROZEN || L::FROZEN == 0 {
        return Some("an empty entry is frozen");
    }

    if matches!(L::AD_POLICY, AdPolicy::AccessTracking) {
        let home = L::READ.mask | L::EXECUTE.mask;
        if L::READ.yes | L::EXECUTE.yes != home || L::READ.mask == 0 {
            return Some("R and X that are saved must be bits that grant");
        }
        if L::SAVED_SHIFT == 0 || (home << L::SAVED_SHIFT) & used != 0 {
            return Some("saved permissions have no place of their own");
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use slat_mmu::{DirtyLogPolicy, FlushPrimitive, Level};

    use super::*;
    use crate::layout::{Flag, Frame, Mark, Memory};

    /// A sound layout, with one fault put in.
    #[derive(Clone, Copy)]
    struct Broken<const FAULT: u32>;

    const fn or(at_fault: bool, wrong: u64, right: u64) -> u64 {
        if at_fault { wrong } else { right }
    }

    impl<const FAULT: u32> Layout for Broken<FAULT> {
        const NAME: &'static str = "broken";
        const INDEX_BITS: &'static [u32] = if FAULT == 1 { &[10, 9] } else { &[9, 11] };
        const MAX_LEAF_LEVEL: Level = Level::SIZE_2M;
        const AD_POLICY: AdPolicy = AdPolicy::AccessTracking;
        const DIRTY_LOG: DirtyLogPolicy = DirtyLogPolicy::WriteProtect;
        const INSTALL_NEEDS_FENCE: bool = false;
        const BREAK_BEFORE_MAKE: bool = false;
        const FLUSH: FlushPrimitive = FlushPrimitive::new("none");
        const FROZEN: u64 = or(FAULT == 10, 0, or(FAULT == 9, 1 << 63 | 1, 1 << 63));
        const FRAME: Frame = Frame::new(12, 40);
        const PRESENT: u64 = 1;
        const TABLE: u64 = or(FAULT == 6, 1 << 12, 0) | or(FAULT == 7, 3, 1);
        const SMALL: Mark = Mark::set(or(FAULT == 8, 2, 3));
        const HUGE: Mark = Mark::set(3);
        const READ: Flag = match FAULT {
            11 => Flag::clear(1 << 2),
            _ => Flag::set(1 << 2),
        };
        const WRITE: Flag = Flag::set(or(FAULT == 2, 1 << 2, 1 << 3));
        const EXECUTE: Flag = Flag::set(1 << 4);
        const ACCESSED: Flag = Flag::set(1 << 5);
        const DIRTY: Flag = Flag::set(or(FAULT == 3, 0, 1 << 6));
        const MMU_WRITABLE: Flag = Flag::set(1 << 7);
        const HOST_WRITABLE: Flag = Flag::set(1 << 8);
        const MEMORY: Memory = Memory {
            mask: 3 << 9,
            normal: 0,
            non_cacheable: or(FAULT == 4, 1 << 11, 1 << 9),
            device: or(FAULT == 5, 1 << 9, 2 << 9),
        };
        const SAVED_SHIFT: u32 = if FAULT == 12 { 2 } else { 52 };
    }

    #[test]
    fn each_fault_of_a_layout_is_named() {
        assert_eq!(fault::<Broken<0>>(), None);
        let faults = [
            (fault::<Broken<1>>(), "only the root"),
            (fault::<Broken<2>>(), "overlap"),
            (fault::<Broken<3>>(), "lacks a field"),
            (fault::<Broken<4>>(), "outside its field"),
            (fault::<Broken<5>>(), "two memory types"),
            (fault::<Broken<6>>(), "bits in its frame"),
            (fault::<Broken<7>>(), "looks like a leaf"),
            (fault::<Broken<8>>(), "not present"),
            (fault::<Broken<9>>(), "is present"),
            (fault::<Broken<10>>(), "is frozen"),
            (fault::<Broken<11>>(), "bits that grant"),
            (fault::<Broken<12>>(), "no place of their own"),
        ];
        for (found, meant) in faults {
            assert!(
                found.is_some_and(|said| said.contains(meant)),
                "{meant}: {found:?}"
            );
        }
    }
}
