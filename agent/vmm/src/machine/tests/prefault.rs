//! Memory that is populated before a VM starts, and modes that this host does not have.

use slat_proto::model::{MemoryBacking, SlotChange, SlotSpec, VmSpec};

use super::{super::prefault::Prefault, *};

fn spec() -> VmSpec {
    VmSpec {
        prefault: true,
        ..fake::spec()
    }
}

fn shown(vm: &FakeVm) -> v1::Prefault {
    let vm = vm.machine.snapshot().expect("there is a VM");
    vm.prefault.expect("prefault was asked for")
}

/// Starts it as soon as that may be.
fn start(vm: &FakeVm) {
    let begun = std::time::Instant::now();
    while let Err(error) = vm.machine.start() {
        assert_eq!(error.reason, Reason::VmState, "{error:?}");
        assert!(begun.elapsed() < Duration::from_secs(60), "{error:?}");
    }
}

#[test]
fn a_vm_starts_when_all_of_its_memory_is_there() {
    let vm = fake::empty();
    vm.machine.create(spec()).unwrap();
    start(&vm);
    let prefault = shown(&vm);
    assert!(prefault.done && prefault.error.is_empty());
    assert_eq!(prefault.populated_bytes, 8 << 20);
    assert_eq!(prefault.total_bytes, 8 << 20);
    let table = vm.machine.memory().table();
    assert_eq!(table.slots()[0].allocated().unwrap(), 8 << 20);
    let stats = vm.machine.snapshot().unwrap().mmu_stats.unwrap();
    let (small, huge) = (stats.backing_4k_bytes, stats.backing_2m_bytes);
    assert_eq!(small.unwrap() + huge.unwrap(), 8 << 20);

    // What is added later is there as soon as the guest may see it.
    let added = SlotSpec::new(9, 1 << 20, 600, false).unwrap();
    vm.machine
        .update_slots(&[SlotChange::Create(added)], 0)
        .unwrap();
    let table = vm.machine.memory().table();
    let slot = table.slot(9).unwrap();
    assert_eq!(slot.allocated().unwrap(), added.bytes());
}

#[test]
fn without_being_asked_nothing_is_populated() {
    let vm = fake::created();
    assert_eq!(vm.machine.snapshot().unwrap().prefault, None);
    let table = vm.machine.memory().table();
    assert!(table.slots()[0].allocated().unwrap() < 1 << 20);
    vm.machine.start().unwrap();
}

#[test]
fn memory_that_was_not_there_is_told_when_it_is_to_start_and_tried_again() {
    let vm = fake::empty();
    vm.machine.create(spec()).unwrap();
    *vm.machine.prefault.lock().unwrap() = Prefault::Failed {
        error: "Cannot allocate memory".to_owned(),
        populated: 4096,
        total: 8 << 20,
    };
    assert_eq!(shown(&vm).error, "Cannot allocate memory");
    let view = vm.machine.shared.view();
    let error = vm.machine.refuse_unpopulated(&view).unwrap_err();
    assert_eq!(error.reason, Reason::NoMemory);
    assert_eq!(error.metadata["populated_bytes"], "4096");
    assert!(error.message.contains("Cannot allocate memory"), "{error}");
    assert!(!vm.backend.state().running);
    start(&vm);
    assert!(shown(&vm).done);
}

#[test]
fn deleting_a_vm_ends_what_populates_it() {
    let vm = fake::empty();
    let large = VmSpec {
        memory_bytes: 256 << 20,
        backing: MemoryBacking::Small,
        ..spec()
    };
    vm.machine.create(large).unwrap();
    vm.machine.delete().unwrap();
    let prefault = vm.machine.prefault.lock().unwrap();
    assert!(matches!(*prefault, Prefault::Unasked), "{prefault:?}");
}

#[test]
fn what_is_received_is_populated_by_the_migration() {
    let source = fake::empty();
    source.machine.create(spec()).unwrap();
    let shown_there = source.machine.snapshot().unwrap();
    let slots: Vec<SlotSpec> = {
        let table = source.machine.memory().table();
        table.slots().iter().map(|slot| slot.spec()).collect()
    };
    let vm = fake::empty();
    vm.machine
        .begin_incoming(&migration(), &shown_there, &slots)
        .unwrap();
    assert_eq!(vm.machine.snapshot().unwrap().prefault, None, "not yet");
    prepare(&vm.machine, b"fake vCPUs").unwrap();
    own(&vm.machine, true, true).unwrap();
    assert!(shown(&vm).done, "nothing is left to do");
    assert!(vm.machine.snapshot().unwrap().spec.unwrap().prefault);
}

#[test]
fn a_node_and_pages_that_are_not_there_are_refused_and_nothing_is_built() {
    let elsewhere = VmSpec {
        numa_node: Some(1000),
        ..fake::spec()
    };
    let pages = VmSpec {
        // More than any machine has set aside.
        memory_bytes: 4 << 40,
        backing: MemoryBacking::Hugetlb2M,
        ..fake::spec()
    };
    let no_pages = if std::path::Path::new("/sys/kernel/mm/hugepages/hugepages-2048kB").exists() {
        Reason::NoHugePages
    } else {
        Reason::CapabilityMissing
    };
    for (spec, refused) in [(elsewhere, Reason::NoSuchNode), (pages, no_pages)] {
        let vm = fake::empty();
        let error = vm.machine.create(spec.clone()).unwrap_err();
        assert_eq!(error.reason, refused, "{error:?}");
        assert_eq!(vm.machine.snapshot(), None);
        assert_eq!(reason(vm.machine.plan(&spec).map(drop)), refused);

        // As a destination, too.
        let source = fake::created();
        let mut there = source.machine.snapshot().unwrap();
        let mut slots: Vec<SlotSpec> = {
            let table = source.machine.memory().table();
            table.slots().iter().map(|slot| slot.spec()).collect()
        };
        let small = VmSpec {
            memory_bytes: 8 << 20,
            ..spec
        };
        there.spec = Some(small.to_resource());
        there.spec.as_mut().unwrap().backend = v1::Backend::Software.into();
        if refused == Reason::NoHugePages {
            // 4 TiB of it.
            slots.push(SlotSpec::new(7, 1 << 24, 1 << 30, false).unwrap());
        }
        let error = vm
            .machine
            .begin_incoming(&migration(), &there, &slots)
            .unwrap_err();
        assert_eq!(error.reason, refused, "{error:?}");
        assert_eq!(error.metadata["vm_location"], "SOURCE");
        assert_eq!(vm.machine.snapshot(), None);
    }
}
