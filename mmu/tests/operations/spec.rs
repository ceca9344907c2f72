//! What a slot's description decides: memory types, and where a huge page fits.

use super::*;

/// RISC-V's memory types are an extension, and without it an entry that holds one faults for ever.
#[test]
fn a_memory_type_that_hardware_may_not_know_is_refused() {
    let types = [MemoryType::NonCacheable, MemoryType::Device];
    let slot = |memory| SlotSpec::new(1, Gfn(0x8000), 512, Pfn(0x40_0000)).with_memory(memory);
    each(|rig| {
        for memory in types {
            let created = rig.mmu.create_slot(slot(memory));
            if rig.stage.info().optional_memory_types {
                assert_eq!(created, Err(SlotError::MemoryType { id: 1, memory }));
                assert_eq!(rig.mmu.slots().len(), 1);
                assert_eq!(rig.touch(0x8000, Access::Read), FaultOutcome::NoSlot);
            } else {
                assert_eq!(created, Ok(()));
                rig.mmu.space(0).delete_slot(1).unwrap();
            }
        }
        // What the platform itself says of the memory holds.
        rig.mmu.create_slot(slot(MemoryType::Normal)).unwrap();
    });
    each_with(MmuConfig::default().with_memory_types(true), |rig| {
        for memory in types {
            rig.mmu.create_slot(slot(memory)).unwrap();
            rig.run(0x8000, Access::Write);
            let entry = rig.mmu.space(0).walk(Gfn(0x8000)).last().unwrap().entry;
            assert!(
                matches!(entry, Entry::Leaf(leaf) if leaf.memory == memory),
                "{entry:?}"
            );
            rig.mmu.space(0).delete_slot(1).unwrap();
        }
    });
}

#[test]
fn riscv_alone_has_memory_types_as_an_extension() {
    let optional = |stage: &GuestStage| stage.info().optional_memory_types;
    let optional: Vec<_> = GuestStage::ALL.into_iter().filter(optional).collect();
    let riscv = [GuestStage::Sv39x4, GuestStage::Sv48x4, GuestStage::Sv57x4];
    assert_eq!(optional, riscv);
}

/// What [`SlotSpec::fits_leaf`] tells an embedder is what faults do.
#[test]
fn a_page_is_huge_where_the_slot_says_that_one_fits() {
    let places = [
        (0x8000, 0x40_0000, 512),
        (0x8000, 0x40_0000, 511),
        (0x8000, 0x40_0001, 1024),
        (0x8001, 0x40_0001, 1024),
        (0x8100, 0x40_0100, 2048),
        (0x8100, 0x40_0000, 2048),
    ];
    each(|rig| {
        for (gfn, pfn, pages) in places {
            let spec = SlotSpec::new(1, Gfn(gfn), pages, Pfn(pfn));
            rig.mmu.create_slot(spec).unwrap();
            let mut coarsest = Level::SIZE_4K;
            for at in [gfn, gfn + pages / 2, gfn + pages - 1] {
                let level = if spec.fits_leaf(Gfn(at), 512) {
                    Level::SIZE_2M
                } else {
                    Level::SIZE_4K
                };
                assert_eq!(
                    rig.run(at, Access::Write).level,
                    level,
                    "{at:#x} of {spec:?}"
                );
                coarsest = coarsest.max(level);
            }
            assert_eq!(spec.alignment_level(), coarsest, "{spec:?}");
            rig.mmu.space(0).delete_slot(1).unwrap();
        }
    });
}
