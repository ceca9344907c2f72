//! What is flushed, and when: pitfalls 25 to 32.

use slat_mmu::{
    Access, DirtyLogPolicy, Fault, FaultOutcome, Flush, FlushCause, Gfn, Level, MmuConfig,
    SlotFlags,
};

use crate::rig::{Event, GIGA, HUGE, each, each_with, range};

fn flush(gfn: u64, pages: u64) -> Flush {
    Flush::range(range(gfn, pages))
}

#[test]
fn a_table_that_becomes_a_leaf_is_flushed_as_wide_as_it_was() {
    each(|rig| {
        let mut vcpu = rig.mmu.vcpu();
        rig.map(&mut vcpu, HUGE + 9, Access::Write, Level::SIZE_4K);
        rig.events();
        // The fault is in the middle of what it maps.
        rig.map(&mut vcpu, HUGE + 77, Access::Write, Level::SIZE_2M);
        assert_eq!(
            rig.flushes(),
            [(flush(HUGE, HUGE), FlushCause::HugePage)],
            "{}",
            rig.stage
        );
    });
}

/// Recovery in place: the flush covers the whole of each replaced table, and no table's memory
/// comes back before it.
#[test]
fn a_table_is_flushed_before_its_memory_comes_back() {
    each(|rig| {
        let mut vcpu = rig.mmu.vcpu();
        rig.mmu
            .space(0)
            .set_slot_flags(0, SlotFlags::LOG_DIRTY)
            .unwrap();
        for gfn in [3 * HUGE + 5, 3 * HUGE + 6] {
            rig.touch(&mut vcpu, gfn, Access::Write);
        }
        rig.events();
        rig.mmu
            .space(0)
            .set_slot_flags(0, SlotFlags::empty())
            .unwrap();
        rig.mmu.reclaim();
        let events = rig.events();
        let freed = events
            .iter()
            .position(|event| matches!(event, Event::Freed(_)));
        let flushed = events.iter().position(|event| match event {
            Event::Flush(request) => {
                request.tables
                    && request.flush.covers(Gfn(3 * HUGE))
                    && request.flush.covers(Gfn(4 * HUGE - 1))
            }
            Event::Freed(_) => false,
        });
        assert!(freed.is_some(), "{}: no table came back", rig.stage);
        assert!(
            flushed.is_some_and(|flushed| Some(flushed) < freed),
            "{}: {events:?}",
            rig.stage
        );
    });
}

/// W went to the dirty log, whose flush is the harvester's: a TLB may still have it when the leave
/// to write is taken.
#[test]
fn taking_the_leave_to_write_is_flushed_even_if_w_was_gone() {
    each(|rig| {
        if rig.mmu.format().dirty_log != DirtyLogPolicy::WriteProtect {
            return;
        }
        let mut vcpu = rig.mmu.vcpu();
        rig.touch_small(&mut vcpu, 5);
        rig.mmu
            .space(0)
            .set_slot_flags(0, SlotFlags::LOG_DIRTY)
            .unwrap();
        assert!(!rig.mmu.space(0).translate(Gfn(5)).unwrap().writable);
        rig.events();
        assert!(rig.mmu.space(0).write_protect_gfn(Gfn(5), Level::SIZE_4K));
        assert_eq!(
            rig.flushes(),
            [(flush(5, 1), FlushCause::WriteProtect)],
            "{}",
            rig.stage
        );
        assert!(
            !rig.mmu.space(0).write_protect_gfn(Gfn(5), Level::SIZE_4K),
            "nothing was left to take"
        );
        assert_eq!(rig.flushes(), []);
    });
}

#[test]
fn logging_begins_with_a_flush_whatever_changed() {
    each(|rig| {
        rig.mmu
            .space(0)
            .set_slot_flags(0, SlotFlags::LOG_DIRTY)
            .unwrap();
        assert_eq!(
            rig.flushes(),
            [(flush(0, 2 * GIGA), FlushCause::DirtyLog)],
            "{}",
            rig.stage
        );
    });
}

#[test]
fn what_changes_nothing_flushes_nothing() {
    each(|rig| {
        let mut vcpu = rig.mmu.vcpu();
        rig.mmu.space(0).zap_gfn_range(range(0, GIGA));
        assert_eq!(rig.flushes(), [], "nothing was mapped");
        // From nothing to something, and from huge to small: the same translations.
        rig.map(&mut vcpu, 0, Access::Write, Level::SIZE_2M);
        rig.mmu
            .space(0)
            .split_huge_pages(range(0, HUGE), Level::SIZE_4K);
        rig.mmu.space(0).age(range(0, HUGE));
        assert_eq!(rig.flushes(), [], "{}", rig.stage);
        // Logging ends where nothing can be recovered.
        rig.slot(1, 3 * GIGA, 8);
        rig.mmu
            .space(0)
            .set_slot_flags(1, SlotFlags::LOG_DIRTY)
            .unwrap();
        rig.touch(&mut vcpu, 3 * GIGA, Access::Write);
        rig.events();
        rig.mmu
            .space(0)
            .set_slot_flags(1, SlotFlags::empty())
            .unwrap();
        assert_eq!(rig.flushes(), [], "{}", rig.stage);
        // Under a withdrawn root nothing is cached, and zapping it says nothing.
        rig.mmu.invalidate_roots();
        rig.events();
        rig.mmu.space(0).zap_gfn_range(range(0, HUGE));
        rig.mmu.zap_invalidated_roots();
        assert_eq!(rig.flushes(), [], "{}", rig.stage);
    });
}

/// A clean dirty log costs no flush; one bit costs one, of that page.
#[test]
fn a_harvest_flushes_exactly_what_it_took() {
    each(|rig| {
        let mut vcpu = rig.mmu.vcpu();
        rig.mmu
            .space(0)
            .set_slot_flags(0, SlotFlags::LOG_DIRTY)
            .unwrap();
        rig.events();
        let mut bitmap = vec![0; (2 * GIGA / 64) as usize];
        assert_eq!(rig.mmu.space(0).harvest_dirty_log(0, &mut bitmap), Ok(0));
        assert_eq!(rig.flushes(), [], "{}", rig.stage);
        rig.touch(&mut vcpu, 700, Access::Write);
        assert_eq!(rig.mmu.space(0).harvest_dirty_log(0, &mut bitmap), Ok(1));
        assert_eq!(
            rig.flushes(),
            [(flush(700, 1), FlushCause::DirtyLog)],
            "{}",
            rig.stage
        );
    });
}

/// Where an invalid entry may be remembered, the format says that an install needs the faulting
/// hart's fence; and another hart that remembers it takes one fault, told to be spurious, and not
/// one for ever.
#[test]
fn a_hart_that_remembers_nothing_there_faults_once() {
    each(|rig| {
        let info = rig.mmu.format();
        assert_eq!(
            info.install_needs_fence,
            info.name.starts_with("sv"),
            "{}",
            rig.stage
        );
        let (mut one, mut other) = (rig.mmu.vcpu(), rig.mmu.vcpu());
        rig.map(&mut one, 5, Access::Write, Level::SIZE_4K);
        let late = Fault::new(Gfn(5), Access::Write).with_max_level(Level::SIZE_4K);
        let outcome = rig.mmu.fault(&mut other, late);
        assert_eq!(
            outcome,
            FaultOutcome::Spurious {
                level: Level::SIZE_4K
            },
            "{}",
            rig.stage
        );
        assert_eq!(rig.flushes(), []);
    });
}

#[test]
fn a_range_to_the_end_of_all_numbers_is_unmapped_and_flushed() {
    each(|rig| {
        let mut vcpu = rig.mmu.vcpu();
        let top = rig.mmu.format().max_gfn.0;
        rig.slot(1, top - 8, 8);
        rig.map(&mut vcpu, top - 1, Access::Write, Level::SIZE_4K);
        rig.events();
        assert!(
            rig.mmu.space(0).zap_gfn_range(range(top - 4, u64::MAX)),
            "{}",
            rig.stage
        );
        assert!(rig.mmu.space(0).translate(Gfn(top - 1)).is_none());
        let flushes = rig.flushes();
        assert!(
            flushes.iter().any(|(flush, _)| flush.covers(Gfn(top - 1))),
            "{}: {flushes:?}",
            rig.stage
        );
    });
}

/// A generation that a vCPU does not know makes it flush by itself: its tag may be the same as
/// before.
#[test]
fn a_new_root_has_a_new_generation() {
    each_with(MmuConfig::default(), |rig| {
        let mut vcpu = rig.mmu.vcpu();
        let first = rig.mmu.load_root(&mut vcpu).unwrap();
        rig.mmu.zap_all();
        let second = rig.mmu.load_root(&mut vcpu).unwrap();
        assert_ne!(first.generation, second.generation, "{}", rig.stage);
    });
}
