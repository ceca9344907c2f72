//! The laws of `slat_mmu::Format`, on every format: those of the list at the end.
//!
//! Raw values are arbitrary, and near valid entries as well (one bit flipped), because almost no
//! arbitrary value is accepted.

#[path = "../../mmu/tests/common/property.rs"]
mod property;

use proptest::prelude::*;
use slat_arch::{
    Arm64Ipa40, Arm64Ipa48, Ept4, Ept4NoAd, Ept5, Ept5NoAd, Npt4, Npt5, Sv39x4, Sv48x4, Sv57x4,
};
use slat_mmu::{AdPolicy, Entry, Format, Gfn, Leaf, Level, MemoryType, Pfn};

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
    // Mostly readable; of the others, some are execute-only and some are nothing.
    let readable = prop_oneof![3 => Just(true), 1 => Just(false)];
    (any::<u64>(), readable, any::<[bool; 6]>(), memory).prop_map(
        |(pfn, r, [w, x, m, h, a, d], memory)| Leaf {
            pfn: Pfn(pfn),
            readable: r,
            writable: w,
            executable: x,
            mmu_writable: m,
            host_writable: h,
            accessed: a,
            dirty: d,
            memory,
        },
    )
}

/// The leaf with its frame made to fit.
fn fit<F: Format>(leaf: Leaf, level: Level) -> Leaf {
    Leaf {
        pfn: Pfn((leaf.pfn.0 % F::MAX_PFN.0) & !(F::span(level) - 1)),
        ..leaf
    }
}

/// The nearest leaf that the format holds, so that no test is about leaves which it refuses.
fn hold<F: Format>(leaf: Leaf, level: Level) -> Leaf {
    let mut leaf = fit::<F>(leaf, level);
    if !F::holds(&leaf) && !leaf.readable {
        if F::EXECUTE_ONLY {
            (leaf.executable, leaf.writable, leaf.mmu_writable) = (true, false, false);
        } else {
            leaf.readable = true;
        }
    }
    if !F::holds(&leaf) {
        leaf.accessed = true;
    }
    assert!(F::holds(&leaf), "{leaf:?}");
    leaf
}

/// An arbitrary value, an arbitrary entry, and what is one bit away from it.
#[derive(Clone, Copy, Debug)]
struct Seed {
    raw: u64,
    leaf: Leaf,
    kind: u8,
    flip: u32,
    generation: u32,
}

fn any_seed() -> impl Strategy<Value = Seed> {
    (any::<u64>(), any_leaf(), 0..4u8, 0..64u32, any::<u32>()).prop_map(
        |(raw, leaf, kind, flip, generation)| Seed {
            raw,
            leaf,
            kind,
            flip,
            generation,
        },
    )
}

impl Seed {
    fn raws<F: Format>(self, level: Level) -> [u64; 4] {
        let leaf = || F::make_leaf(&hold::<F>(self.leaf, level), level);
        let near = match self.kind {
            0 => F::make_table(self.leaf.pfn),
            1 => F::make_mmio(Gfn(self.leaf.pfn.0), self.generation).unwrap_or(F::FROZEN),
            _ => leaf(),
        };
        let one = 1 << self.flip;
        [self.raw, near, near ^ one, near ^ one ^ self.raw & 0x7ff]
    }
}

/// Law 1.
fn round_trip<F: Format>() {
    property::check(CASES, &any_leaf(), |leaf| {
        for level in leaf_levels::<F>() {
            let any = fit::<F>(leaf, level);
            let without = Leaf {
                writable: false,
                ..any
            };
            let expected = if F::holds(&any) {
                Entry::Leaf(any)
            } else if F::holds(&without) {
                Entry::Leaf(without)
            } else {
                Entry::NonPresent
            };
            prop_assert_eq!(F::decode(F::make_leaf(&any, level), level), expected);
            let held = hold::<F>(leaf, level);
            prop_assert_eq!(
                F::decode(F::make_leaf(&held, level), level),
                Entry::Leaf(held)
            );
        }
        let pfn = Pfn(leaf.pfn.0 % F::MAX_PFN.0);
        for level in levels::<F>().skip(1) {
            prop_assert_eq!(F::decode(F::make_table(pfn), level), Entry::Table { pfn });
        }
        Ok(())
    });
}

/// Laws 2 and 4: whatever the bits, decoding is total, and what it accepts is encoded back to the
/// same bits.
fn exactness<F: Format>() {
    property::check(CASES, &any_seed(), |seed| {
        for level in levels::<F>() {
            for raw in seed.raws::<F>(level) {
                match F::decode(raw, level) {
                    Entry::Leaf(leaf) => {
                        prop_assert!(level <= F::MAX_LEAF_LEVEL);
                        prop_assert!(F::holds(&leaf));
                        prop_assert_eq!(F::make_leaf(&leaf, level), raw);
                        prop_assert!(leaf.pfn < F::MAX_PFN);
                    }
                    Entry::Table { pfn } => {
                        prop_assert!(level > Level::SIZE_4K);
                        prop_assert_eq!(F::make_table(pfn), raw);
                    }
                    Entry::Mmio { generation } => {
                        prop_assert_eq!(u64::from(generation) >> F::MMIO_GENERATION_BITS, 0);
                    }
                    Entry::Frozen => prop_assert_eq!(raw, F::FROZEN),
                    Entry::NonPresent | Entry::Malformed => prop_assert_ne!(raw, F::FROZEN),
                }
            }
        }
        Ok(())
    });
}

/// Law 3.
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

/// Law 5: what each mutator does to a leaf.
fn mutators<F: Format>() {
    let tracking = F::AD_POLICY == AdPolicy::AccessTracking;
    property::check(CASES, &(any_leaf(), any::<bool>()), |(leaf, on)| {
        for level in leaf_levels::<F>() {
            let leaf = hold::<F>(leaf, level);
            let raw = F::make_leaf(&leaf, level);
            let after = |raw: u64, wanted: Leaf| {
                if F::holds(&wanted) {
                    prop_assert_eq!(F::decode(raw, level), Entry::Leaf(wanted));
                }
                prop_assert_eq!(F::as_table(raw, level), None);
                Ok(())
            };
            after(
                F::with_writable(raw, on),
                Leaf {
                    writable: on,
                    accessed: leaf.accessed || tracking && on,
                    ..leaf
                },
            )?;
            after(
                F::with_accessed(raw, on),
                Leaf {
                    accessed: on,
                    writable: leaf.writable && (on || !tracking),
                    ..leaf
                },
            )?;
            after(F::with_dirty(raw, on), Leaf { dirty: on, ..leaf })?;
            let executable = Leaf {
                executable: on,
                ..leaf
            };
            after(F::with_executable(raw, on), executable)?;
            let without = Leaf {
                writable: false,
                mmu_writable: false,
                ..leaf
            };
            after(F::clear_mmu_writable(raw), without)?;
            if leaf.mmu_writable {
                // The fast path gives W back without a decode.
                let writable = F::with_writable(raw, true);
                prop_assert!(matches!(F::decode(writable, level), Entry::Leaf(l) if l.writable));
            }
        }
        Ok(())
    });
}

/// Law 5: no mutator, and nothing that hardware does to a leaf, makes a table of what was none, or
/// changes a frame.
fn mutators_make_no_table<F: Format>() {
    let mutate = |raw: u64, on: bool| {
        [
            F::with_writable(raw, on),
            F::clear_mmu_writable(raw),
            F::with_accessed(raw, on),
            F::with_dirty(raw, on),
            F::with_executable(raw, on),
            F::with_dirty(F::with_accessed(raw, true), true),
        ]
    };
    property::check(CASES, &(any_seed(), any::<bool>()), |(seed, on)| {
        for level in levels::<F>() {
            for raw in seed.raws::<F>(level) {
                for new in mutate(raw, on) {
                    match (F::decode(raw, level), F::decode(new, level)) {
                        (Entry::Malformed | Entry::Table { .. }, _) => {}
                        (Entry::Leaf(old), Entry::Leaf(new)) => prop_assert_eq!(old.pfn, new.pfn),
                        (_, Entry::Table { .. }) => {
                            prop_assert!(false, "{raw:#x} became the table {new:#x}");
                        }
                        _ => {}
                    }
                }
            }
        }
        Ok(())
    });
}

fn splitting<F: Format>() {
    property::check(
        CASES,
        &(any_leaf(), any::<prop::sample::Index>()),
        |(leaf, index)| {
            for level in leaf_levels::<F>() {
                let leaf = hold::<F>(leaf, level);
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

/// Law 6, and that an overridden `shift` and `index` are what the index bits say.
fn geometry<F: Format>() {
    property::check(CASES, &any::<u64>(), |gfn| {
        for level in levels::<F>() {
            let position = (gfn >> F::shift(level)) % F::entries(level) as u64;
            prop_assert_eq!(F::index(Gfn(gfn), level) as u64, position);
        }
        Ok(())
    });
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
        assert_eq!(
            F::shift(level),
            F::INDEX_BITS.iter().take(level.index()).sum()
        );
        assert_eq!(F::span(level), 512u64.pow(u32::from(level.get()) - 1));
    }
}

/// Law 7: shortcuts against `decode`. `is_volatile` is compared with the trait's definition of it.
fn shortcuts<F: Format>() {
    property::check(CASES, &any_seed(), |seed| {
        for level in levels::<F>() {
            for raw in seed.raws::<F>(level) {
                let entry = F::decode(raw, level);
                let table = match entry {
                    Entry::Table { pfn } => Some(pfn),
                    _ => None,
                };
                prop_assert_eq!(F::as_table(raw, level), table, "{:#x}", raw);
                prop_assert_eq!(F::table_hpa(raw, level), table.map(Pfn::hpa), "{:#x}", raw);
                if entry == Entry::Malformed {
                    continue;
                }
                let leaf = match entry {
                    Entry::Leaf(leaf) => Some(leaf),
                    _ => None,
                };
                let is = |property: fn(&Leaf) -> bool| leaf.as_ref().is_some_and(property);
                prop_assert_eq!(F::is_leaf(raw, level), leaf.is_some(), "{:#x}", raw);
                prop_assert_eq!(F::is_writable(raw, level), is(|l| l.writable));
                prop_assert_eq!(F::is_mmu_writable(raw, level), is(|l| l.mmu_writable));
                prop_assert_eq!(F::is_accessed(raw, level), is(|l| l.accessed));
                prop_assert_eq!(F::is_dirty(raw, level), is(|l| l.dirty));
                prop_assert_eq!(F::is_present(raw, level), leaf.is_some() || table.is_some());
                let volatile = match F::AD_POLICY {
                    AdPolicy::Hardware => is(|l| match l.writable {
                        true => !l.dirty,
                        false => l.mmu_writable,
                    }),
                    AdPolicy::SetAtInstall => is(|l| !l.writable && l.mmu_writable),
                    AdPolicy::AccessTracking => is(|l| !(l.writable && l.accessed)),
                };
                prop_assert_eq!(F::is_volatile(raw, level), volatile, "{:#x}", raw);
            }
        }
        Ok(())
    });
}

/// Law 7: neighbouring leaves differ by `leaf_step`.
fn steps<F: Format>() {
    property::check(CASES, &any_leaf(), |leaf| {
        for level in leaf_levels::<F>() {
            let leaf = hold::<F>(leaf, level);
            let next = Leaf {
                pfn: Pfn(leaf.pfn.0 + F::span(level)),
                ..leaf
            };
            if next.pfn < F::MAX_PFN {
                prop_assert_eq!(
                    F::make_leaf(&leaf, level) + F::leaf_step(level),
                    F::make_leaf(&next, level)
                );
            }
        }
        Ok(())
    });
}

/// Law 8.
fn mmio<F: Format>() {
    assert_eq!(
        F::make_mmio(Gfn(0), 0).is_some(),
        F::MMIO_GENERATION_BITS > 0
    );
    property::check(
        CASES,
        &(any::<u64>(), any::<u32>()),
        |(gfn, all_generation)| {
            let gfn = Gfn(gfn % F::MAX_GFN.0);
            let Some(raw) = F::make_mmio(gfn, all_generation) else {
                return Ok(());
            };
            let generation = all_generation & ((1u64 << F::MMIO_GENERATION_BITS) - 1) as u32;
            for level in leaf_levels::<F>() {
                prop_assert_eq!(F::decode(raw, level), Entry::Mmio { generation });
                prop_assert!(!F::is_present(raw, level) && !F::is_leaf(raw, level));
                prop_assert!(!F::is_volatile(raw, level));
                prop_assert_eq!(F::as_table(raw, level), None);
            }
            prop_assert!(raw != F::FROZEN && raw != F::EMPTY);
            Ok(())
        },
    );
}

macro_rules! laws {
    (@each $format:ty: $($law:ident)*) => {$(
        #[test]
        fn $law() {
            super::$law::<$format>();
        }
    )*};
    ($($name:ident: $format:ty),* $(,)?) => {
        $(mod $name {
            use super::*;

            laws! {
                @each $format: round_trip exactness absence mutators mutators_make_no_table splitting geometry shortcuts
                steps mmio
            }
        })*

        #[test]
        fn every_stage_is_in_the_list() {
            let names = [$(<$format>::NAME),*];
            for stage in slat_arch::GuestStage::ALL {
                assert!(names.contains(&stage.info().name), "{stage}");
            }
        }
    };
}

laws! {
    ept4: Ept4,
    ept5: Ept5,
    ept4_noad: Ept4NoAd,
    ept5_noad: Ept5NoAd,
    npt4: Npt4,
    npt5: Npt5,
    sv39x4: Sv39x4,
    sv48x4: Sv48x4,
    sv57x4: Sv57x4,
    arm64_ipa40: Arm64Ipa40,
    arm64_ipa48: Arm64Ipa48,
}
