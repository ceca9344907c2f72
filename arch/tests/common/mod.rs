//! What the tests of all formats share: a property runner that prints its seed and writes no file, and page-table
//! walkers written from the manuals, which know nothing of `Format`.

#![allow(dead_code, reason = "each test uses a part")]

use std::{
    collections::hash_map::RandomState,
    fmt::Debug,
    hash::{BuildHasher, Hasher},
};

use proptest::{
    strategy::Strategy,
    test_runner::{Config, RngAlgorithm, TestCaseResult, TestRng, TestRunner},
};
use slat_arch::GuestStage;
use slat_mmu::{Arena, Pfn};

/// Runs `test` on `cases` values. The seed is printed (the harness shows it on failure); `SLAT_TEST_SEED` repeats it.
pub(crate) fn check<S: Strategy>(
    cases: u32,
    strategy: &S,
    test: impl Fn(S::Value) -> TestCaseResult,
) where
    S::Value: Debug,
{
    let seed = match std::env::var("SLAT_TEST_SEED") {
        Ok(seed) => seed.parse().expect("SLAT_TEST_SEED is a number"),
        Err(_) => RandomState::new().build_hasher().finish(),
    };
    println!("SLAT_TEST_SEED={seed}");
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    let config = Config {
        cases,
        failure_persistence: None,
        ..Config::default()
    };
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &bytes);
    if let Err(error) = TestRunner::new_with_rng(config, rng).run(strategy, test) {
        panic!("SLAT_TEST_SEED={seed}: {error}");
    }
}

/// What a hardware walker finds: host frame and whether it may be written.
pub(crate) type Hit = Option<(u64, bool)>;

/// Walks the tables in `arena` as the hardware of `stage` does.
pub(crate) fn hardware_walk(stage: GuestStage, arena: &Arena, root: Pfn, gfn: u64) -> Hit {
    match stage {
        GuestStage::Ept4 | GuestStage::Ept4NoAd => ept_walk(arena, root.hpa(), gfn, 4),
        GuestStage::Ept5 | GuestStage::Ept5NoAd => ept_walk(arena, root.hpa(), gfn, 5),
        GuestStage::Npt4 => npt_walk(arena, root.hpa(), gfn, 4),
        GuestStage::Npt5 => npt_walk(arena, root.hpa(), gfn, 5),
        GuestStage::Sv39x4 => g_stage_walk(arena, root.hpa(), gfn, 3),
        GuestStage::Sv48x4 => g_stage_walk(arena, root.hpa(), gfn, 4),
        GuestStage::Sv57x4 => g_stage_walk(arena, root.hpa(), gfn, 5),
        GuestStage::Arm64Ipa40 => arm64_walk(arena, root.hpa(), gfn, 1, 10),
        GuestStage::Arm64Ipa48 => arm64_walk(arena, root.hpa(), gfn, 0, 9),
        other => panic!("no walker for {other}"),
    }
}

/// RISC-V privileged specification, "Virtual Address Translation Process", as modified for two-stage translation.
fn g_stage_walk(arena: &Arena, root: u64, gfn: u64, levels: u32) -> Hit {
    if gfn >> (9 * levels + 2) != 0 || !root.is_multiple_of(16384) {
        return None;
    }
    let (mut a, mut i) = (root, levels - 1);
    loop {
        let bits = if i == levels - 1 { 11 } else { 9 };
        let vpn = (gfn >> (9 * i)) & ((1 << bits) - 1);
        let pte = arena.read(a + vpn * 8).expect("table outside the arena");
        let (v, r, w, x, u) = (
            pte & 1,
            pte >> 1 & 1,
            pte >> 2 & 1,
            pte >> 3 & 1,
            pte >> 4 & 1,
        );
        if v == 0 {
            return None;
        }
        assert!(!(r == 0 && w == 1), "reserved: W without R");
        assert_eq!(pte >> 54 & 0x7f, 0, "reserved bits");
        assert_eq!(pte >> 63, 0, "N");
        let ppn = pte >> 10 & ((1 << 44) - 1);
        if r == 1 || x == 1 {
            assert_eq!(ppn & ((1 << (9 * i)) - 1), 0, "misaligned superpage");
            assert_eq!((u, pte >> 6 & 1), (1, 1), "U and A");
            assert!(w == 0 || pte >> 7 & 1 == 1, "W without D faults on Svade");
            return Some((ppn | gfn & ((1 << (9 * i)) - 1), w == 1));
        }
        assert_eq!(
            (pte & 0b1101_0000, pte >> 61),
            (0, 0),
            "reserved in a pointer"
        );
        i = i.checked_sub(1).expect("a pointer at the last level");
        a = ppn << 12;
    }
}

/// Intel SDM vol. 3C, "EPT Translation Mechanism", without mode-based execute control.
fn ept_walk(arena: &Arena, root: u64, gfn: u64, levels: u32) -> Hit {
    if gfn >> (9 * levels) != 0 {
        return None;
    }
    let (mut table, mut writable) = (root, true);
    for level in (0..levels).rev() {
        let entry = arena
            .read(table + (gfn >> (9 * level) & 511) * 8)
            .expect("table outside the arena");
        if entry & 7 == 0 {
            return None;
        }
        assert_eq!(entry & 1, 1, "misconfiguration: not readable");
        writable &= entry >> 1 & 1 == 1;
        let pfn = entry >> 12 & ((1 << 40) - 1);
        if level == 0 || entry >> 7 & 1 == 1 {
            assert!(level < 3, "misconfiguration: leaf at level 4");
            assert!(
                matches!(entry >> 3 & 7, 0 | 1 | 4 | 5 | 6),
                "misconfiguration: memory type"
            );
            assert_eq!(
                pfn & ((1 << (9 * level)) - 1),
                0,
                "misconfiguration: unaligned leaf"
            );
            return Some((pfn | gfn & ((1 << (9 * level)) - 1), writable));
        }
        assert_eq!(
            entry >> 3 & 0x1f,
            0,
            "misconfiguration: reserved in a pointer"
        );
        table = pfn << 12;
    }
    unreachable!("level 0 returned")
}

/// AMD APM vol. 2, 5.3 "Long-Mode Page Translation" and 15.25 "Nested Paging", 51 physical address bits.
fn npt_walk(arena: &Arena, root: u64, gfn: u64, levels: u32) -> Hit {
    if gfn >> (9 * levels) != 0 {
        return None;
    }
    let (mut table, mut writable) = (root, true);
    for level in (0..levels).rev() {
        let entry = arena
            .read(table + (gfn >> (9 * level) & 511) * 8)
            .expect("table outside the arena");
        if entry & 1 == 0 {
            return None;
        }
        assert_eq!(entry >> 51 & 1, 0, "reserved frame bit");
        assert_eq!(entry >> 2 & 1, 1, "a nested walk is a user access");
        writable &= entry >> 1 & 1 == 1;
        let pfn = entry >> 12 & ((1 << 39) - 1);
        if level == 0 || entry >> 7 & 1 == 1 {
            assert!(level < 3, "reserved: PS at level 4");
            assert!(level > 0 || entry >> 7 & 1 == 0, "PAT");
            // Bit 12 of a huge leaf is PAT; this MMU leaves it clear.
            assert_eq!(pfn & ((1 << (9 * level)) - 1), 0, "unaligned leaf");
            return Some((pfn | gfn & ((1 << (9 * level)) - 1), writable));
        }
        assert_eq!(entry >> 63, 0, "NX in a pointer");
        table = pfn << 12;
    }
    unreachable!("level 0 returned")
}

/// Arm ARM D8, stage 2 with a 4 KiB granule from Arm's level `start` on, whose table has `root_bits` index bits.
fn arm64_walk(arena: &Arena, root: u64, gfn: u64, start: u32, root_bits: u32) -> Hit {
    if gfn >> (9 * (3 - start) + root_bits) != 0 || !root.is_multiple_of(8 << root_bits) {
        return None;
    }
    let mut table = root;
    for level in start..=3 {
        let (shift, bits) = (9 * (3 - level), if level == start { root_bits } else { 9 });
        let descriptor = arena
            .read(table + (gfn >> shift & ((1 << bits) - 1)) * 8)
            .expect("table outside the arena");
        if descriptor & 1 == 0 {
            return None;
        }
        assert_eq!(descriptor >> 48 & 7, 0, "reserved address bits");
        let pfn = descriptor >> 12 & ((1 << 36) - 1);
        if level == 3 || descriptor & 2 == 0 {
            assert!(level > 0, "no block at level 0");
            assert!(level < 3 || descriptor & 2 == 2, "reserved at level 3");
            assert_eq!(pfn & ((1 << shift) - 1), 0, "unaligned block");
            assert_eq!(descriptor >> 6 & 1, 1, "S2AP: not readable");
            assert_eq!(descriptor >> 10 & 1, 1, "AF faults");
            return Some((pfn | gfn & ((1 << shift) - 1), descriptor >> 7 & 1 == 1));
        }
        table = pfn << 12;
    }
    unreachable!("level 3 returned")
}
