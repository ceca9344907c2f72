//! Single operations with their flushes, on every format.

use slat_arch::GuestStage;
use slat_mmu::{
    Access, AdPolicy, Arena, DirtyLogError, Fault, FaultOutcome, Flush, Gfn, GfnRange, Level,
    MmuConfig, Pfn, SecondStage, SlotError, SlotFlags, SlotSpec, WalkFault,
};

const BASE: Gfn = Gfn(1024);
const PAGES: u64 = 2048;
const HOST: Pfn = Pfn(0x20_0000);

fn each(test: impl Fn(GuestStage, &dyn SecondStage)) {
    for stage in GuestStage::ALL {
        let mmu = stage.build(Arena::new(Pfn(0x1000), 64), MmuConfig::default());
        mmu.create_slot(SlotSpec::new(0, BASE, PAGES, HOST))
            .unwrap();
        test(stage, mmu.as_ref());
    }
}

fn fixed(level: Level) -> FaultOutcome {
    FaultOutcome::Fixed {
        level,
        flush: Flush::None,
    }
}

#[test]
fn a_huge_leaf_is_split_while_writes_are_logged_and_comes_back_after() {
    each(|_, mmu| {
        assert_eq!(
            mmu.fault(Fault::new(BASE, Access::Read)),
            fixed(Level::SIZE_2M)
        );
        assert_eq!(
            mmu.fault(Fault::new(BASE, Access::Write)),
            FaultOutcome::Spurious {
                level: Level::SIZE_2M
            }
        );
        let flush = mmu.set_slot_flags(0, SlotFlags::LOG_DIRTY).unwrap();
        assert_eq!(
            flush,
            Flush::Range {
                gfn: BASE,
                pages: PAGES
            }
        );
        assert_eq!(
            mmu.fault(Fault::new(BASE, Access::Read)),
            FaultOutcome::Spurious {
                level: Level::SIZE_2M
            }
        );
        assert_eq!(
            mmu.fault(Fault::new(BASE, Access::Write)),
            fixed(Level::SIZE_4K)
        );
        assert_eq!(
            (
                mmu.stats().pages_at(Level::SIZE_4K),
                mmu.stats().pages_at(Level::SIZE_2M)
            ),
            (512, 0)
        );
        assert!(mmu.set_slot_flags(0, SlotFlags::empty()).unwrap().is_none());
        let back = FaultOutcome::Fixed {
            level: Level::SIZE_2M,
            flush: Flush::Range {
                gfn: BASE,
                pages: 512,
            },
        };
        assert_eq!(mmu.fault(Fault::new(Gfn(BASE.0 + 1), Access::Write)), back);
        assert_eq!(
            (
                mmu.stats().pages_at(Level::SIZE_4K),
                mmu.stats().pages_at(Level::SIZE_2M)
            ),
            (0, 1)
        );
    });
}

#[test]
fn enabling_the_log_flushes_even_if_nothing_is_mapped() {
    each(|_, mmu| {
        let flush = mmu.set_slot_flags(0, SlotFlags::LOG_DIRTY).unwrap();
        assert_eq!(
            flush,
            Flush::Range {
                gfn: BASE,
                pages: PAGES
            }
        );
        assert!(
            mmu.set_slot_flags(0, SlotFlags::LOG_DIRTY)
                .unwrap()
                .is_none()
        );
    });
}

#[test]
fn deleting_a_slot_flushes_even_if_nothing_is_mapped() {
    each(|_, mmu| {
        assert_eq!(
            mmu.delete_slot(0),
            Ok(Flush::Range {
                gfn: BASE,
                pages: PAGES
            })
        );
        assert_eq!(mmu.delete_slot(0), Err(SlotError::UnknownId { id: 0 }));
        assert_eq!(
            mmu.fault(Fault::new(BASE, Access::Read)),
            FaultOutcome::NoSlot
        );
    });
}

#[test]
fn zapping_part_of_a_huge_leaf_flushes_all_of_it() {
    each(|_, mmu| {
        assert_eq!(
            mmu.fault(Fault::new(BASE, Access::Write)),
            fixed(Level::SIZE_2M)
        );
        let flush = mmu.zap_gfn_range(GfnRange::new(Gfn(BASE.0 + 7), 1));
        assert_eq!(
            flush,
            Flush::Range {
                gfn: BASE,
                pages: 512
            }
        );
        assert!(mmu.translate(Gfn(BASE.0 + 300)).is_none());
        assert!(mmu.zap_gfn_range(GfnRange::new(Gfn(0), BASE.0)).is_none());
    });
}

#[test]
fn clearing_the_log_checks_its_arguments_and_clears_only_what_was_asked() {
    each(|_, mmu| {
        let clear = |first, pages, bits: &[u64]| mmu.clear_dirty_log(0, first, pages, bits);
        assert_eq!(clear(0, 64, &[1]), Err(DirtyLogError::NotLogging { id: 0 }));
        let _flush = mmu.set_slot_flags(0, SlotFlags::LOG_DIRTY).unwrap();
        assert!(matches!(
            clear(1, 64, &[1]),
            Err(DirtyLogError::Unaligned { .. })
        ));
        assert!(matches!(
            clear(0, 63, &[1]),
            Err(DirtyLogError::Unaligned { .. })
        ));
        assert!(matches!(
            clear(0, PAGES + 64, &[1; 64]),
            Err(DirtyLogError::OutOfSlot { .. })
        ));
        assert!(matches!(
            clear(64, u64::MAX - 63, &[1]),
            Err(DirtyLogError::OutOfSlot { .. })
        ));
        assert!(matches!(
            clear(0, 128, &[1]),
            Err(DirtyLogError::BitmapTooShort { needed: 2, got: 1 })
        ));
        assert_eq!(
            mmu.get_dirty_log(9, &mut []),
            Err(DirtyLogError::UnknownSlot { id: 9 })
        );

        for page in [64, 65] {
            assert_eq!(
                mmu.fault(Fault::new(Gfn(BASE.0 + page), Access::Write)),
                fixed(Level::SIZE_4K)
            );
        }
        // Page 70 is clean: asking for it neither protects nor flushes it.
        let flush = clear(64, 64, &[1 << 1 | 1 << 6]).unwrap();
        assert_eq!(
            flush,
            Flush::Range {
                gfn: Gfn(BASE.0 + 65),
                pages: 1
            }
        );
        assert!(mmu.translate(Gfn(BASE.0 + 64)).unwrap().writable);
        assert!(!mmu.translate(Gfn(BASE.0 + 65)).unwrap().writable);
        let mut bitmap = [0; 32];
        mmu.get_dirty_log(0, &mut bitmap).unwrap();
        assert_eq!(bitmap[1], 1);
        assert!(clear(64, 64, &[1 << 1]).unwrap().is_none());
    });
}

#[test]
fn a_read_only_slot_is_never_writable() {
    each(|_, mmu| {
        mmu.create_slot(SlotSpec::new(1, Gfn(0), 512, Pfn(0)).with_flags(SlotFlags::READONLY))
            .unwrap();
        assert_eq!(
            mmu.fault(Fault::new(Gfn(1), Access::Write)),
            FaultOutcome::ReadOnly
        );
        assert_eq!(
            mmu.fault(Fault::new(Gfn(1), Access::Read)),
            fixed(Level::SIZE_2M)
        );
        assert_eq!(
            mmu.access(Gfn(1), Access::Write),
            Err(WalkFault::Permission)
        );
        assert_eq!(
            mmu.set_slot_flags(1, SlotFlags::empty()),
            Err(SlotError::ReadOnlyIsFixed { id: 1 })
        );
    });
}

#[test]
fn ageing_ends_with_a_fault_where_hardware_does_not_set_accessed() {
    each(|stage, mmu| {
        let range = GfnRange::new(BASE, 512);
        assert_eq!(
            mmu.fault(Fault::new(BASE, Access::Read)),
            fixed(Level::SIZE_2M)
        );
        assert!(mmu.test_age(range));
        assert!(mmu.age(range));
        assert!(!mmu.age(range));
        match stage.info().ad_policy {
            AdPolicy::Hardware => assert!(mmu.access(BASE, Access::Read).is_ok()),
            AdPolicy::SetAtInstall | AdPolicy::AccessTracking => {
                assert_eq!(
                    mmu.access(BASE, Access::Read),
                    Err(WalkFault::AccessedDirty)
                );
                assert_eq!(
                    mmu.fault(Fault::new(BASE, Access::Read)),
                    fixed(Level::SIZE_2M)
                );
                assert!(mmu.access(BASE, Access::Read).is_ok());
            }
        }
        assert!(mmu.test_age(range));
    });
}

#[test]
fn a_prefetch_maps_but_is_no_use_and_no_fault() {
    each(|stage, mmu| {
        assert_eq!(mmu.fault(Fault::prefetch(BASE)), fixed(Level::SIZE_2M));
        assert_eq!(
            mmu.fault(Fault::prefetch(BASE)),
            FaultOutcome::Spurious {
                level: Level::SIZE_2M
            }
        );
        assert_eq!((mmu.stats().faults_taken, mmu.stats().faults_fixed), (0, 1));
        assert_eq!(
            mmu.test_age(GfnRange::new(BASE, 1)),
            stage.info().ad_policy == AdPolicy::SetAtInstall
        );
    });
}

#[test]
fn the_format_bounds_guest_frames() {
    each(|stage, mmu| {
        let max = stage.info().max_gfn;
        assert_eq!(
            mmu.fault(Fault::new(max, Access::Read)),
            FaultOutcome::OutOfRange
        );
        assert_eq!(
            mmu.fault(Fault::new(Gfn(u64::MAX), Access::Read)),
            FaultOutcome::OutOfRange
        );
        assert_eq!(mmu.access(max, Access::Read), Err(WalkFault::NotPresent));
        assert_eq!(mmu.walk(max).last(), None);
        mmu.create_slot(SlotSpec::new(1, Gfn(max.0 - 1), 1, HOST))
            .unwrap();
        assert_eq!(
            mmu.fault(Fault::new(Gfn(max.0 - 1), Access::Write)),
            fixed(Level::SIZE_4K)
        );
        let spec = SlotSpec::new(2, Gfn(max.0 - 1), 2, HOST);
        assert!(matches!(
            mmu.create_slot(spec),
            Err(SlotError::BeyondFormat { .. })
        ));
    });
}

#[test]
fn a_gigabyte_is_mapped_at_once_if_everything_is_aligned() {
    each(|_, mmu| {
        let huge = 1 << 18;
        mmu.create_slot(SlotSpec::new(1, Gfn(huge), 2 * huge, Pfn(4 * huge)))
            .unwrap();
        assert_eq!(
            mmu.fault(Fault::new(Gfn(huge + 5), Access::Write)),
            fixed(Level::SIZE_1G)
        );
        assert_eq!(
            mmu.translate(Gfn(2 * huge - 1)).unwrap().pfn,
            Pfn(5 * huge - 1)
        );
        assert!(mmu.split_huge_pages(GfnRange::new(Gfn(huge), 1), Level::SIZE_2M));
        assert_eq!(
            (
                mmu.stats().pages_at(Level::SIZE_1G),
                mmu.stats().pages_at(Level::SIZE_2M)
            ),
            (0, 512)
        );
        assert_eq!(
            mmu.translate(Gfn(2 * huge - 1)).unwrap().pfn,
            Pfn(5 * huge - 1)
        );
    });
}

#[test]
fn flush_requests_are_counted() {
    each(|_, mmu| {
        let _flush = mmu.set_slot_flags(0, SlotFlags::LOG_DIRTY).unwrap();
        let _flush = mmu.zap_all();
        let stats = mmu.stats();
        assert_eq!(
            (stats.flush_ranges, stats.flush_pages, stats.flush_alls),
            (1, PAGES, 1)
        );
    });
}
