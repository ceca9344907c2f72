//! What a guest or an owner is refused, by which words, and what becomes of tables that nobody
//! needs.

use super::*;
use crate::memory::MemoryDigest;

#[test]
fn accesses_without_memory_fail_with_their_address() {
    let vm = Vm::new(spec(Format::Sv48x4, 2, MemstressSpec::default()));
    vm.backend.run().unwrap();
    vm.until_written(100);
    vm.backend.remove_slot(0).unwrap();
    let message = vm.failure();
    assert!(
        message.contains("0x") && message.contains("no memory"),
        "{message}"
    );
}

/// All of the guest's memory, its own state included: while it is read-only nothing that the guest
/// does lasts, and afterwards it goes on as if it had not run.
#[test]
fn writes_to_a_read_only_slot_change_nothing_and_are_counted() {
    for format in [Format::Ept4, Format::Sv57x4, Format::Npt4] {
        let vm = Vm::new(spec(format, 2, MemstressSpec::default()));
        vm.backend.run().unwrap();
        vm.until_written(100);
        vm.backend.pause().unwrap();
        vm.backend.set_dirty_logging(0, true).unwrap();
        vm.backend.set_read_only(0, true).unwrap();
        let (counters, digest) = (vm.counters(), MemoryDigest::of(&vm.memory.table(), 1));
        let dropped = || vm.backend.stats().read_only_writes.unwrap();
        assert_eq!(dropped(), 0);
        vm.backend.run().unwrap();
        vm.until(|| dropped() > 1000);
        vm.backend.pause().unwrap();
        assert_eq!(vm.counters(), counters);
        assert_eq!(MemoryDigest::of(&vm.memory.table(), 1).slots, digest.slots);
        let mut dirty = SlotBitmaps::from([(0, DirtyBitmap::new(MEMORY / PAGE_SIZE))]);
        vm.backend.harvest_dirty(&mut dirty).unwrap();
        assert!(dirty[&0].is_empty(), "nothing was written: {dirty:?}");

        vm.backend.set_read_only(0, false).unwrap();
        let before = dropped();
        vm.backend.run().unwrap();
        vm.until_written(100);
        vm.backend.pause().unwrap();
        assert_eq!((dropped(), vm.counters().errors), (before, 0));
        vm.backend.harvest_dirty(&mut dirty).unwrap();
        assert!(!dirty[&0].is_empty(), "it logs as before");
        assert!(vm.events.lock().unwrap().is_empty());
    }
}

#[test]
fn without_table_memory_the_vm_fails_with_words() {
    let vm = Vm::new(spec(Format::Ept4, 1, MemstressSpec::default()));
    vm.backend.set_dirty_logging(0, true).unwrap();
    vm.backend.budget.limit_to(4);
    vm.backend.run().unwrap();
    let message = vm.failure();
    assert!(message.contains("no table memory"), "{message}");
}

#[test]
fn tables_of_slots_that_are_gone_are_given_back() {
    let vm = Vm::new(spec(Format::Ept4, 1, MemstressSpec::default()));
    vm.backend.run().unwrap();
    vm.until_written(100);
    vm.backend.pause().unwrap();
    let slot = SlotSpec::new(1, 1 << 20, 3, false).unwrap();
    vm.backend
        .add_slot(&Arc::new(SlotMemory::new(slot).unwrap()))
        .unwrap();
    let mut vcpu = vm.backend.vm.mmu.vcpu();
    let mut most = 0;
    for place in 1..200 {
        let gfn = place << 20;
        vm.backend.move_slot(1, gfn).unwrap();
        let fault = slat_mmu::Fault::prefetch(Gfn(gfn));
        let outcome = vm.backend.vm.mmu.fault(&mut vcpu, fault);
        assert!(
            matches!(outcome, slat_mmu::FaultOutcome::Fixed { .. }),
            "{outcome:?}"
        );
        most = most.max(vm.backend.budget.used());
    }
    // 200 places want a table each; vCPUs keep some ready.
    assert!(most < 100, "{most} tables for 8 MiB");
    vm.backend.run().unwrap();
    vm.until_written(1000);
    vm.assert_well();
}

#[test]
fn pause_wakes_an_idle_guest_and_bad_requests_are_refused() {
    let idle = MemstressSpec {
        dirty_rate: Some(0),
        ..MemstressSpec::default()
    };
    let slow = MemstressSpec {
        dirty_rate: Some(4096),
        ..MemstressSpec::default()
    };
    for guest in [idle, slow, MemstressSpec::default()] {
        let vm = Vm::new(spec(Format::Ept4, 2, guest));
        for _ in 0..10 {
            vm.backend.run().unwrap();
            vm.backend.pause().unwrap();
            vm.backend.pause().unwrap();
            let before = vm.snapshot();
            vm.backend.save_state().unwrap();
            assert_eq!(
                changed(&before, &vm.snapshot()),
                NO_PAGES,
                "it runs after a pause"
            );
        }
        vm.backend.run().unwrap();
        let no_slot = |result: Result<(), BackendError>| {
            assert!(matches!(result, Err(BackendError::NoSuchSlot { slot: 7 })));
        };
        no_slot(vm.backend.remove_slot(7));
        no_slot(vm.backend.move_slot(7, 0));
        let no_log = |result: Result<(), DirtyError>| {
            assert!(matches!(result, Err(DirtyError::NoSuchSlot { slot: 7 })));
        };
        no_log(vm.backend.set_dirty_logging(7, true));
        no_log(vm.harvest_slot(7, 64).map(drop));
        vm.backend.set_dirty_logging(0, true).unwrap();
        assert!(vm.harvest_slot(0, vm.pages() - 1).is_err());
        for slot in [(0, 1 << 20), (3, 5), (3, 1 << 36), (u32::MAX, 1 << 20)] {
            let bad = SlotSpec {
                slot: slot.0,
                base_gfn: slot.1,
                pages: 1,
                read_only: false,
            };
            let memory = Arc::new(SlotMemory::new(bad).unwrap());
            let refused = vm.backend.add_slot(&memory).unwrap_err();
            assert!(matches!(refused, BackendError::BadSlot { .. }), "{refused}");
            assert_eq!(Arc::strong_count(memory.guest()), 1);
        }
        vm.backend.invalidate(u64::MAX, u64::MAX).unwrap();
    }
}

#[test]
fn a_raw_image_is_refused_by_the_name_of_what_is_missing() {
    let raw = VmSpec {
        guest: GuestSpec::RawImage(Default::default()),
        ..spec(Format::Ept4, 1, MemstressSpec::default())
    };
    let refused = SoftwareBackend::new(&raw, Arc::new(|_| {})).unwrap_err();
    assert!(matches!(refused, BackendError::Unsupported { .. }));
    assert!(refused.to_string().contains("RAW_IMAGE"), "{refused}");
}
