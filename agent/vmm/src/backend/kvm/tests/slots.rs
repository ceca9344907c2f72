//! Slots as the kernel takes them: as many as it says, and flags by making a slot anew.

use slat_proto::model::{MAX_SLOT, SlotSpec};

use super::{migrate::random, *};

const PLACE: u64 = 1 << 20;

#[test]
fn as_many_slots_as_the_kernel_says_and_no_more() {
    need_kvm!();
    let vm = Vm::new(memstress(8 << 20, 1, random()));
    let most = vm.backend.most_slots();
    // One page's memory, at many places.
    let page = SlotMemory::new(SlotSpec::new(1, PLACE, 1, false).unwrap()).unwrap();
    let at = |slot: u32| {
        let spec = SlotSpec::new(slot, PLACE + u64::from(slot), 1, false).unwrap();
        Arc::new(page.moved(spec))
    };
    vm.backend.run().unwrap();
    // All of them would take seconds; the last number shows that it is the kernel's.
    for slot in (1..2000).chain([most - 1]) {
        vm.backend.add_slot(&at(slot)).unwrap();
    }
    if most <= MAX_SLOT {
        let error = vm.backend.add_slot(&at(most)).unwrap_err();
        assert!(
            matches!(&error, BackendError::BadSlot { slot, message }
                if *slot == most && message.contains(&most.to_string())),
            "{error}"
        );
    }
    vm.backend.remove_slot(most - 1).unwrap();
    vm.backend.remove_slot(77).unwrap();
    vm.backend.add_slot(&at(77)).unwrap();
    vm.backend.pause().unwrap();
    assert!(vm.events.try_recv().is_err(), "the guest goes on");
    assert_eq!(vm.counters().errors, 0);
}

#[test]
fn a_slot_made_anew_keeps_contents_and_logging() {
    need_kvm!();
    let vm = Vm::new(memstress(8 << 20, 1, random()));
    let spec = SlotSpec::new(5, PLACE, 70, false).unwrap();
    let memory = Arc::new(SlotMemory::new(spec).unwrap());
    memory.host().store(8, 7);
    vm.backend.add_slot(&memory).unwrap();
    vm.backend.set_dirty_logging(5, true).unwrap();
    let harvest = || {
        let mut into = SlotBitmaps::from([(5, DirtyBitmap::new(70))]);
        vm.backend.harvest_dirty(&mut into)?;
        Ok::<_, DirtyError>(into[&5].count())
    };
    for read_only in [true, true, false, true] {
        vm.backend.set_read_only(5, read_only).unwrap();
        assert_eq!(harvest().unwrap(), 0, "the log begins empty, and is on");
        assert_eq!(memory.guest().load(8), 7);
    }
    // It can be moved, and is still read-only.
    vm.backend.move_slot(5, PLACE + 9).unwrap();
    vm.backend.set_read_only(5, false).unwrap();
    vm.backend.set_dirty_logging(5, false).unwrap();
    vm.backend.set_read_only(5, true).unwrap();
    assert!(harvest().is_err(), "off stays off");
    let error = vm.backend.set_read_only(9, true).unwrap_err();
    assert!(matches!(error, BackendError::NoSuchSlot { slot: 9 }));
    vm.backend.remove_slot(5).unwrap();
}
