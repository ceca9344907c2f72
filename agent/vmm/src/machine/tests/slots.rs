//! Slot changes are all or none; invalidation stays within slots.

use proptest::prelude::*;
use slat_proto::model::{CursorName, SlotChange, SlotSpec};

use super::*;

fn add(slot: u32, base_gfn: u64, pages: u64) -> SlotChange {
    SlotChange::Create(SlotSpec::new(slot, base_gfn, pages, false).unwrap())
}

/// (slot, base, pages) as the table and as the backend has it, both sorted.
type SlotLayout = Vec<(u32, u64, u64)>;

fn layouts(vm: &FakeVm) -> (SlotLayout, SlotLayout) {
    let table = vm.machine.memory().table();
    let mut published: SlotLayout = table
        .slots()
        .iter()
        .map(|slot| (slot.spec().slot, slot.spec().base_gfn, slot.spec().pages))
        .collect();
    published.sort_unstable();
    let state = vm.backend.state();
    let backend = state
        .slots
        .iter()
        .map(|(slot, fake)| (*slot, fake.base_gfn, fake.pages))
        .collect();
    (published, backend)
}

#[test]
fn changes_are_made_in_order_and_contents_move_along() {
    let vm = fake::created();
    vm.machine
        .update_slots(&[add(3, 0x10_0000, 4), add(4, 0x20_0000, 8)], 1)
        .unwrap();
    assert!(vm.machine.memory().table().write(0x10_0000 << 12, b"kept"));
    let table = vm
        .machine
        .update_slots(
            &[
                SlotChange::Delete { slot: 4 },
                SlotChange::Move {
                    slot: 3,
                    base_gfn: 0x20_0000,
                },
                add(4, 0x10_0000, 2),
            ],
            2,
        )
        .unwrap();
    assert_eq!(table.generation(), 3);
    let (published, backend) = layouts(&vm);
    assert_eq!(
        published,
        vec![(0, 0, 2048), (3, 0x20_0000, 4), (4, 0x10_0000, 2)]
    );
    assert_eq!(published, backend);
    let mut bytes = [0; 4];
    assert!(table.read(0x20_0000 << 12, &mut bytes));
    assert_eq!(&bytes, b"kept");
    assert!(table.read(0x10_0000 << 12, &mut bytes));
    assert_eq!(bytes, [0; 4]);
}

#[test]
fn every_bad_change_is_refused_with_its_place() {
    let vm = fake::created();
    vm.machine.update_slots(&[add(3, 0x10_0000, 4)], 0).unwrap();
    let before = layouts(&vm);
    let refused = |changes: &[SlotChange], generation| {
        let error = vm.machine.update_slots(changes, generation).unwrap_err();
        assert_eq!(layouts(&vm), before, "{error}");
        error
    };
    assert_eq!(
        refused(&[add(5, 0x20_0000, 1)], 1).reason,
        Reason::StaleGeneration
    );
    let overlap = refused(&[add(5, 0x20_0000, 1), add(6, 0x10_0003, 1)], 0);
    assert_eq!(overlap.reason, Reason::BadSlotTable);
    assert_eq!(overlap.metadata["change"], "1");
    assert_eq!(
        refused(&[SlotChange::Delete { slot: 9 }], 0).reason,
        Reason::NoSuchSlot
    );
    for own in [
        SlotChange::Delete { slot: 0 },
        SlotChange::Move {
            slot: 0,
            base_gfn: 0x40_0000,
        },
    ] {
        let error = refused(&[own], 0);
        assert_eq!(error.reason, Reason::BadSlotTable);
        assert_eq!(error.metadata["slot"], "0");
    }
    let huge = refused(&[add(5, 1 << 32, (1 << 31) - 1)], 0);
    assert_eq!(huge.reason, Reason::NoMemory, "8 TiB");
}

#[test]
fn undoing_that_fails_is_told_and_the_table_is_the_backends() {
    let vm = fake::created();
    vm.machine.update_slots(&[add(7, 0x70_0000, 1)], 0).unwrap();
    let changes = [
        add(3, 0x10_0000, 4),
        SlotChange::Move {
            slot: 7,
            base_gfn: 0x71_0000,
        },
    ];
    // The move fails, then taking the new slot back.
    let fail = ["move_slot", "remove_slot"];
    vm.backend.state().fail.extend(fail);
    let error = vm.machine.update_slots(&changes, 0).unwrap_err();
    assert_eq!(error.reason, Reason::Internal);
    let (published, backend) = layouts(&vm);
    assert_eq!(published, backend);
    assert!(published.contains(&(3, 0x10_0000, 4)));
}

#[test]
fn slots_log_as_the_readers_need() {
    let vm = fake::created();
    let cursor = CursorName::parse("backup").unwrap();
    vm.machine.dirty().attach(&cursor).unwrap();
    assert!(vm.machine.snapshot().unwrap().dirty_logging);
    vm.machine.update_slots(&[add(3, 0x10_0000, 4)], 0).unwrap();
    let (slots, _) = vm.machine.list_slots().unwrap();
    assert!(slots.iter().all(|slot| slot.dirty_logging));
    let batch = vm.machine.dirty().harvest(&cursor).unwrap();
    assert_eq!(batch.pages, 4, "the new slot as a whole");
    vm.backend.guest_writes(0, 9);
    vm.machine.dirty().harvest(&cursor).unwrap();
    let stats = vm.machine.snapshot().unwrap().mmu_stats.unwrap();
    assert_eq!(stats.dirty_pages_harvested, Some(1));
    vm.machine.dirty().detach(&cursor).unwrap();
    assert!(!vm.machine.snapshot().unwrap().dirty_logging);
}

#[test]
fn only_frames_in_slots_are_invalidated() {
    let vm = fake::created();
    // Adjacent to slot 0, and one far away.
    vm.machine
        .update_slots(&[add(1, 2048, 16), add(2, 0x10_0000, 4)], 0)
        .unwrap();
    let (pages, _) = vm.machine.invalidate(Some((2040, 16))).unwrap();
    assert_eq!(pages, 16);
    assert_eq!(vm.backend.state().invalidated, vec![(2040, 8), (2048, 8)]);
    assert_eq!(vm.machine.invalidate(None).unwrap().0, 2048 + 16 + 4);
    vm.backend.state().invalidated.clear();
    for bad in [(0, 0), (2060, 8), (0x10_0003, 2), (u64::MAX, 2), (5000, 1)] {
        let error = vm.machine.invalidate(Some(bad)).unwrap_err();
        assert_eq!(error.reason, Reason::BadParameter, "{bad:?}");
        assert_eq!(error.metadata["field"], "range");
    }
    assert!(vm.backend.state().invalidated.is_empty());
    vm.backend.state().lacks = vec![v1::Capability::Invalidate, v1::Capability::DirtyLog];
    assert_eq!(
        reason(vm.machine.invalidate(None)),
        Reason::CapabilityMissing
    );
    assert_eq!(
        reason(vm.machine.check_dirty_readable()),
        Reason::CapabilityMissing
    );
}

fn change() -> impl Strategy<Value = SlotChange> {
    let base = (0_u64..6).prop_map(|at| 0x10_0000 + at * 4);
    prop_oneof![
        (1_u32..5, base.clone(), 1_u64..8).prop_map(|(slot, base, pages)| add(slot, base, pages)),
        (1_u32..5).prop_map(|slot| SlotChange::Delete { slot }),
        (1_u32..5, base).prop_map(|(slot, base_gfn)| SlotChange::Move { slot, base_gfn }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn slot_changes_are_all_or_none(
        batches in prop::collection::vec(
            (
                prop::collection::vec(change(), 1..5),
                prop::option::of(prop::sample::select(vec!["add_slot", "remove_slot", "move_slot"])),
            ),
            1..8,
        ),
    ) {
        let vm = fake::created();
        for (changes, fail) in batches {
            let (before, _) = layouts(&vm);
            let generation = vm.machine.memory().table().generation();
            vm.backend.state().fail.extend(fail);
            let result = vm.machine.update_slots(&changes, 0);
            let spent = std::mem::take(&mut vm.backend.state().fail).is_empty() && fail.is_some();
            let (published, backend) = layouts(&vm);
            prop_assert_eq!(&published, &backend);
            match result {
                Ok(table) => {
                    let mut specs: Vec<SlotSpec> = before
                        .iter()
                        .map(|(slot, base, pages)| SlotSpec::new(*slot, *base, *pages, false).unwrap())
                        .collect();
                    for change in &changes {
                        specs = change.apply(&specs).unwrap();
                    }
                    let mut expected: SlotLayout =
                        specs.iter().map(|spec| (spec.slot, spec.base_gfn, spec.pages)).collect();
                    expected.sort_unstable();
                    prop_assert_eq!(published, expected);
                    prop_assert_eq!(table.generation(), generation + 1);
                }
                Err(error) => {
                    // One injected failure can hit a change; the undoing then works.
                    prop_assert_eq!(published, before, "{}", error);
                    prop_assert_eq!(vm.machine.memory().table().generation(), generation);
                    prop_assert_eq!(spent, error.reason == Reason::KvmIoctl, "{}", error);
                }
            }
        }
    }
}
