//! The laws of `slat_mmu::Format`, on every format.

mod common;

use proptest::prelude::*;
use slat_arch::{Ept4, Sv39x4, Sv48x4, Sv57x4};
use slat_mmu::{Entry, Format, Gfn, Leaf, Level, MemoryType, Pfn};

const CASES: u32 = 2000;

fn levels<F: Format>() -> impl Iterator<Item = Level> {
    (1..=F::ROOT_LEVEL.get()).filter_map(Level::new)
}

fn leaf_levels<F: Format>() -> impl Iterator<Item = Level> {
    levels::<F>().filter(|&level| level <= F::MAX_LEAF_LEVEL)
}

fn any_leaf() -> impl Strategy<Value = Leaf> {
    let memory = prop_oneof![
        Just(MemoryType::Normal),
        Just(MemoryType::NonCacheable),
        Just(MemoryType::Device)
    ];
    (any::<u64>(), any::<[bool; 6]>(), memory).prop_map(|(pfn, [w, x, m, h, a, d], memory)| Leaf {
        readable: true,
        pfn: Pfn(pfn),
        writable: w,
        executable: x,
        mmu_writable: m,
        host_writable: h,
        accessed: a,
        dirty: d,
        memory,
    })
}

fn fit<F: Format>(leaf: Leaf, level: Level) -> Leaf {
    Leaf {
        pfn: Pfn((leaf.pfn.0 % F::MAX_PFN.0) & !(F::span(level) - 1)),
        ..leaf
    }
}

fn round_trip<F: Format>() {
    common::check(CASES, &any_leaf(), |leaf| {
        for level in leaf_levels::<F>() {
            let leaf = fit::<F>(leaf, level);
            prop_assert_eq!(
                F::decode(F::make_leaf(&leaf, level), level),
                Entry::Leaf(leaf)
            );
        }
        let pfn = Pfn(leaf.pfn.0 % F::MAX_PFN.0);
        for level in levels::<F>().skip(1) {
            prop_assert_eq!(F::decode(F::make_table(pfn), level), Entry::Table { pfn });
        }
        Ok(())
    });
}

/// Whatever the bits, decoding is total, and what it accepts is encoded back to the same bits. Values near a valid entry
/// are tried as well as arbitrary ones, because almost no arbitrary value is accepted.
fn exactness<F: Format>() {
    common::check(
        CASES,
        &(any_leaf(), any::<u64>(), 0..64u32, any::<bool>()),
        |(leaf, raw, flip, table)| {
            for level in levels::<F>() {
                let near = if table {
                    F::make_table(leaf.pfn)
                } else {
                    F::make_leaf(&leaf, level)
                };
                for raw in [raw, near, near ^ 1 << flip] {
                    match F::decode(raw, level) {
                        Entry::Leaf(leaf) => {
                            prop_assert!(level <= F::MAX_LEAF_LEVEL);
                            prop_assert_eq!(F::make_leaf(&leaf, level), raw);
                            prop_assert!(leaf.pfn < F::MAX_PFN);
                        }
                        Entry::Table { pfn } => {
                            prop_assert!(level > Level::SIZE_4K);
                            prop_assert_eq!(F::make_table(pfn), raw);
                        }
                        Entry::Frozen => prop_assert_eq!(raw, F::FROZEN),
                        Entry::Mmio { .. } => prop_assert!(F::MMIO_GENERATION_BITS > 0),
                        Entry::NonPresent | Entry::Malformed => prop_assert_ne!(raw, F::FROZEN),
                    }
                }
            }
            Ok(())
        },
    );
}

fn absence<F: Format>() {
    for level in levels::<F>() {
        assert_eq!(F::decode(0, level), Entry::NonPresent);
        assert_eq!(F::decode(F::EMPTY, level), Entry::NonPresent);
        assert_eq!(F::decode(F::FROZEN, level), Entry::Frozen);
        for bit in 0..64 {
            assert_ne!(
                F::decode(F::FROZEN ^ 1 << bit, level),
                Entry::Frozen,
                "bit {bit}"
            );
        }
    }
    assert_ne!(F::EMPTY, F::FROZEN);
}

fn mutators<F: Format>() {
    common::check(CASES, &(any_leaf(), any::<bool>()), |(leaf, on)| {
        for level in leaf_levels::<F>() {
            let leaf = fit::<F>(leaf, level);
            let raw = F::make_leaf(&leaf, level);
            let decoded = |raw| F::decode(raw, level);
            prop_assert_eq!(
                decoded(F::with_writable(raw, on)),
                Entry::Leaf(Leaf {
                    writable: on,
                    ..leaf
                })
            );
            prop_assert_eq!(
                decoded(F::with_accessed(raw, on)),
                Entry::Leaf(Leaf {
                    accessed: on,
                    ..leaf
                })
            );
            prop_assert_eq!(
                decoded(F::with_dirty(raw, on)),
                Entry::Leaf(Leaf { dirty: on, ..leaf })
            );
            let without = Leaf {
                writable: false,
                mmu_writable: false,
                ..leaf
            };
            prop_assert_eq!(decoded(F::clear_mmu_writable(raw)), Entry::Leaf(without));
            prop_assert_eq!(F::is_writable(raw, level), leaf.writable);
            prop_assert_eq!(F::is_mmu_writable(raw, level), leaf.mmu_writable);
            prop_assert_eq!(F::is_accessed(raw, level), leaf.accessed);
            prop_assert_eq!(F::is_dirty(raw, level), leaf.dirty);
        }
        Ok(())
    });
}

fn splitting<F: Format>() {
    common::check(
        CASES,
        &(any_leaf(), any::<prop::sample::Index>()),
        |(leaf, index)| {
            for level in leaf_levels::<F>() {
                let leaf = fit::<F>(leaf, level);
                let raw = F::make_leaf(&leaf, level);
                let Some(child) = level.child() else {
                    prop_assert_eq!(F::make_huge_page_split(raw, level, 0), F::EMPTY);
                    continue;
                };
                let index = index.index(F::entries(child));
                let pfn = Pfn(leaf.pfn.0 + index as u64 * F::span(child));
                let split = F::make_huge_page_split(raw, level, index);
                prop_assert_eq!(F::decode(split, child), Entry::Leaf(Leaf { pfn, ..leaf }));
            }
            Ok(())
        },
    );
    assert_eq!(
        F::make_huge_page_split(F::make_table(Pfn(1)), Level::SIZE_2M, 0),
        F::EMPTY
    );
}

fn geometry<F: Format>() {
    assert_eq!(
        1u64 << (F::shift(F::ROOT_LEVEL) + F::index_bits(F::ROOT_LEVEL)),
        F::MAX_GFN.0
    );
    assert!(F::MAX_LEAF_LEVEL <= F::ROOT_LEVEL);
    for level in levels::<F>() {
        assert!(F::node_size(level).is_multiple_of(4096));
        assert_eq!(
            F::index(Gfn(F::MAX_GFN.0 - 1), level),
            F::entries(level) - 1
        );
        assert_eq!(F::span(level), 512u64.pow(u32::from(level.get()) - 1));
    }
}

macro_rules! laws {
    ($($name:ident: $format:ty),*) => {$(
        mod $name {
            use super::*;

            #[test]
            fn round_trip() {
                super::round_trip::<$format>();
            }

            #[test]
            fn exactness() {
                super::exactness::<$format>();
            }

            #[test]
            fn absence() {
                super::absence::<$format>();
            }

            #[test]
            fn mutators() {
                super::mutators::<$format>();
            }

            #[test]
            fn splitting() {
                super::splitting::<$format>();
            }

            #[test]
            fn geometry() {
                super::geometry::<$format>();
            }
        }
    )*};
}

laws!(ept4: Ept4, sv39x4: Sv39x4, sv48x4: Sv48x4, sv57x4: Sv57x4);
