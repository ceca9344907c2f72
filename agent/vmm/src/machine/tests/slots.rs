//! Slot changes are all or none, stop the vCPUs once or not at all, and are taken back whatever the
//! kernel fails with; invalidation and discarding stay within slots.

use proptest::prelude::*;
use slat_proto::model::{CursorName, SlotChange, SlotSpec};

use super::*;

fn add(slot: u32, base_gfn: u64, pages: u64) -> SlotChange {
    SlotChange::Create(SlotSpec::new(slot, base_gfn, pages, false).unwrap())
}

fn read_only(slot: u32, read_only: bool) -> SlotChange {
    SlotChange::SetFlags { slot, read_only }
}

/// (slot, base, pages, read-only) as the table and as the backend has it, both sorted.
type SlotLayout = Vec<(u32, u64, u64, bool)>;

fn layouts(vm: &FakeVm) -> (SlotLayout, SlotLayout) {
    let table = vm.machine.memory().table();
    let mut published: SlotLayout = table
        .slots()
        .iter()
        .map(|slot| {
            let spec = slot.spec();
            (spec.slot, spec.base_gfn, spec.pages, spec.read_only)
        })
        .collect();
    published.sort_unstable();
    let state = vm.backend.state();
    let backend = state
        .slots
        .iter()
        .map(|(slot, fake)| (*slot, fake.base_gfn, fake.pages, fake.read_only))
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
        .unwrap()
        .table;
    assert_eq!(table.generation(), 3);
    let (published, backend) = layouts(&vm);
    assert_eq!(
        published,
        vec![
            (0, 0, 2048, false),
            (3, 0x20_0000, 4, false),
            (4, 0x10_0000, 2, false)
        ]
    );
    assert_eq!(published, backend);
    let mut bytes = [0; 4];
    assert!(table.read(0x20_0000 << 12, &mut bytes));
    assert_eq!(&bytes, b"kept");
    assert!(table.read(0x10_0000 << 12, &mut bytes));
    assert_eq!(bytes, [0; 4]);
}

#[test]
fn what_is_small_and_stops_nobody_is_made_at_once_and_all_else_is_left() {
    let vm = fake::created();
    let at_once = |changes: &[SlotChange]| vm.machine.update_slots_at_once(changes, 0);
    let made = at_once(&[add(3, 0x10_0000, 4), add(4, 0x20_0000, 8)]);
    assert_eq!(made.unwrap().unwrap().table.generation(), 2);
    let gone = at_once(&[SlotChange::Delete { slot: 4 }]).unwrap().unwrap();
    assert_eq!(gone.table.slots().len(), 2);
    let refused = at_once(&[SlotChange::Delete { slot: 4 }]);
    assert_eq!(refused.unwrap().unwrap_err().reason, Reason::NoSuchSlot);
    let before = layouts(&vm);
    let left = |changes: &[SlotChange], why: &str| {
        assert!(at_once(changes).is_none(), "{why}");
        assert_eq!(layouts(&vm), before, "{why}");
    };
    let many: Vec<_> = (10..20)
        .map(|slot| add(slot, 0x30_0000 + u64::from(slot), 1))
        .collect();
    left(&many, "many");
    left(&[add(5, 0x30_0000, 512)], "a large one");
    left(&[read_only(0, true)], "a large one that is there");
    {
        let _held = vm.machine.control();
        left(&[add(5, 0x30_0000, 1)], "somebody changes the VM");
    }
    let reader = CursorName::from_id("reader").unwrap();
    vm.machine.dirty().attach(&reader).unwrap();
    left(&[add(5, 0x30_0000, 1)], "dirty pages are read");
    vm.machine.dirty().detach(&reader).unwrap();
    vm.machine.start().unwrap();
    left(&[read_only(3, true)], "vCPUs have to stop");
    assert!(at_once(&[add(5, 0x30_0000, 1)]).unwrap().is_ok());
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
        read_only(0, true),
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
    assert!(published.contains(&(3, 0x10_0000, 4, false)));
}

#[test]
fn slots_log_as_the_readers_need() {
    let vm = fake::created();
    let cursor = CursorName::parse("backup").unwrap();
    vm.machine.dirty().attach(&cursor).unwrap();
    assert!(vm.machine.snapshot().unwrap().dirty_logging);
    vm.machine.update_slots(&[add(3, 0x10_0000, 4)], 0).unwrap();
    let slots = vm.machine.list_slots().unwrap().slots;
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

fn runs() -> FakeVm {
    let vm = fake::created();
    vm.machine.start().unwrap();
    vm
}

/// How often vCPUs were stopped and let go.
fn counts(vm: &FakeVm) -> (u32, u32) {
    let state = vm.backend.state();
    (state.pauses, state.runs)
}

#[test]
fn a_batch_stops_the_vcpus_once_or_not_at_all() {
    let vm = runs();
    let batch = |changes: &[SlotChange], pauses: u32| {
        let (before, runs) = counts(&vm);
        let update = vm.machine.update_slots(changes, 0).unwrap();
        assert_eq!(counts(&vm), (before + pauses, runs + pauses), "{changes:?}");
        assert_eq!(update.paused.is_zero(), pauses == 0, "{update:?}");
        assert!(update.took >= update.paused);
        assert_eq!(state(&vm), v1::vm::State::Running);
        std::mem::take(&mut vm.backend.state().changed_running)
    };
    let live = batch(&[add(3, 0x10_0000, 4), add(4, 0x20_0000, 8)], 0);
    assert_eq!(live, ["add_slot", "add_slot"]);
    let live = batch(&[add(5, 0x30_0000, 4), SlotChange::Delete { slot: 3 }], 0);
    assert_eq!(live, ["add_slot", "remove_slot"]);
    let move_it = SlotChange::Move {
        slot: 5,
        base_gfn: 0x40_0000,
    };
    let stopped = [
        SlotChange::Delete { slot: 4 },
        move_it,
        add(4, 0x20_0000, 2),
        read_only(5, true),
        read_only(5, false),
    ];
    assert!(batch(&stopped, 1).is_empty(), "changed under running vCPUs");
    assert!(batch(&[read_only(4, true)], 1).is_empty());
    // A VM that does not run is not stopped, and stays so.
    vm.machine.pause().unwrap();
    let before = counts(&vm);
    let update = vm.machine.update_slots(&[read_only(4, false)], 0).unwrap();
    assert!(update.paused.is_zero());
    assert_eq!(counts(&vm), before);
    assert_eq!(state(&vm), v1::vm::State::Paused);
}

#[test]
fn vcpus_that_do_not_stop_or_run_again_are_told() {
    let vm = runs();
    vm.machine.update_slots(&[add(3, 0x10_0000, 4)], 0).unwrap();
    let before = layouts(&vm);
    vm.backend.state().fail.push("pause");
    let error = vm.machine.update_slots(&[read_only(3, true)], 0);
    assert_eq!(reason(error), Reason::SourcePause);
    assert_eq!(layouts(&vm), before);
    assert_eq!(state(&vm), v1::vm::State::Running);
    vm.backend.state().fail.push("run");
    let error = vm.machine.update_slots(&[read_only(3, true)], 0);
    assert!(error.unwrap_err().metadata["advice"].contains("paused"));
    assert_eq!(state(&vm), v1::vm::State::Paused);
    let (published, backend) = layouts(&vm);
    assert_eq!(published, backend);
    vm.machine.resume().unwrap();
}

/// Whatever a kernel says no with, at whichever change of a batch.
#[test]
fn every_failure_of_the_kernel_takes_the_batch_back() {
    let vm = runs();
    let before = [add(3, 0x10_0000, 4), add(4, 0x20_0000, 8)];
    vm.machine.update_slots(&before, 0).unwrap();
    let before = layouts(&vm);
    let changes = [
        add(5, 0x30_0000, 4),
        read_only(3, true),
        SlotChange::Move {
            slot: 4,
            base_gfn: 0x40_0000,
        },
        SlotChange::Delete { slot: 3 },
    ];
    let calls = ["add_slot", "set_read_only", "move_slot", "remove_slot"];
    let memory = [libc::ENOMEM, libc::ENOSPC, libc::EDQUOT];
    for errno in memory.into_iter().chain([libc::EINTR, libc::EAGAIN]) {
        for (index, call) in calls.into_iter().enumerate() {
            vm.backend.state().errno = errno;
            vm.backend.state().fail.push(call);
            let error = vm.machine.update_slots(&changes, 0).unwrap_err();
            assert_eq!(layouts(&vm), before, "{call} {errno}: {error}");
            let wanted = if memory.contains(&errno) {
                Reason::NoMemory
            } else {
                Reason::KvmIoctl
            };
            assert_eq!(error.reason, wanted, "{error}");
            assert_eq!(error.metadata["errno"], errno.to_string());
            assert_eq!(error.metadata["change"], index.to_string());
            assert_eq!(error.metadata["slot"], changes[index].slot().to_string());
            assert_eq!(state(&vm), v1::vm::State::Running);
            assert!(vm.backend.state().running);
        }
    }
    vm.machine.update_slots(&changes, 0).unwrap();
}

#[test]
fn a_slot_that_the_kernel_loses_is_gone_from_the_table_too() {
    let vm = runs();
    vm.machine.update_slots(&[add(3, 0x10_0000, 4)], 0).unwrap();
    vm.backend.state().fail.push("lose_slot");
    let changes = [add(4, 0x20_0000, 8), read_only(3, true)];
    let error = vm.machine.update_slots(&changes, 0).unwrap_err();
    assert_eq!(error.reason, Reason::Internal);
    let (published, backend) = layouts(&vm);
    assert_eq!(published, backend);
    assert_eq!(published, vec![(0, 0, 2048, false)]);
    assert_eq!(state(&vm), v1::vm::State::Running);
}

#[test]
fn more_slots_than_the_backend_has_are_refused_with_the_limit() {
    let vm = fake::created();
    vm.backend.state().most_slots = 4;
    assert_eq!(vm.machine.list_slots().unwrap().max_slots, 4);
    let full = [
        add(1, 0x10_0000, 1),
        add(2, 0x20_0000, 1),
        add(3, 0x30_0000, 1),
    ];
    vm.machine.update_slots(&full, 0).unwrap();
    let before = layouts(&vm);
    let gone = SlotChange::Delete { slot: 1 };
    for (changes, at) in [
        (&[add(1, 0x40_0000, 1)][..], None),
        (&[gone, add(4, 0x40_0000, 1)], Some("1")),
        (
            &[gone, add(1, 0x40_0000, 1), add(5, 0x50_0000, 1)],
            Some("2"),
        ),
    ] {
        let error = vm.machine.update_slots(changes, 0).unwrap_err();
        assert_eq!(layouts(&vm), before);
        assert_eq!(error.reason, Reason::LimitReached, "{error}");
        assert_eq!(error.metadata["limit"], "4");
        assert!(
            at.is_none_or(|at| error.metadata["change"] == at),
            "{error}"
        );
    }
    vm.machine
        .update_slots(&[gone, add(1, 0x40_0000, 1)], 0)
        .unwrap();
    vm.backend.state().lacks = vec![v1::Capability::ReadOnlySlots];
    let error = vm.machine.update_slots(&[read_only(1, true)], 0);
    assert_eq!(reason(error), Reason::CapabilityMissing);
}

#[test]
fn a_slot_made_read_only_owes_its_readers_what_it_did() {
    let vm = runs();
    vm.machine.update_slots(&[add(3, 0x10_0000, 9)], 0).unwrap();
    let cursor = CursorName::parse("backup").unwrap();
    vm.machine.dirty().attach(&cursor).unwrap();
    vm.backend.guest_writes(3, 5);
    vm.machine.update_slots(&[read_only(3, true)], 0).unwrap();
    let batch = vm.machine.dirty().harvest(&cursor).unwrap();
    assert_eq!(batch.pages, 1, "what was written, and no more");
    vm.machine
        .dirty()
        .acknowledge(&cursor, batch.batch)
        .unwrap();
    vm.machine.update_slots(&[read_only(3, false)], 0).unwrap();
    vm.backend.guest_writes(3, 6);
    assert_eq!(vm.machine.dirty().harvest(&cursor).unwrap().pages, 1);
}

#[test]
fn what_is_discarded_reads_zero_and_is_dirty() {
    let vm = runs();
    // Adjacent to slot 0.
    vm.machine.update_slots(&[add(1, 2048, 16)], 0).unwrap();
    let table = vm.machine.memory().table();
    for gfn in 2030..2064 {
        assert!(table.store(gfn << 12, 7));
    }
    let cursor = CursorName::parse("backup").unwrap();
    vm.machine.dirty().attach(&cursor).unwrap();
    let discarded = vm
        .machine
        .discard(&[(2040, 16), (2062, 1), (2062, 1)])
        .unwrap();
    assert_eq!((discarded.pages, discarded.freed_bytes), (18, 17 << 12));
    let gone = |gfn: u64| (2040..2056).contains(&gfn) || gfn == 2062;
    for gfn in 2030..2064 {
        let word = if gone(gfn) { 0 } else { 7 };
        assert_eq!(table.load(gfn << 12), Some(word), "frame {gfn}");
    }
    assert_eq!(vm.machine.dirty().harvest(&cursor).unwrap().pages, 17);
    assert_eq!(
        vm.backend.state().invalidated,
        [(2040, 8), (2048, 8), (2062, 1), (2062, 1)]
    );

    // Checked before anything is discarded.
    for (ranges, at) in [
        (&[(2030, 1), (2063, 2)][..], "1"),
        (&[(0, 0)], "0"),
        (&[(u64::MAX, 2)], "0"),
        (&[(2030, 1), (5000, 1), (2030, 1)], "1"),
    ] {
        let error = vm.machine.discard(ranges).unwrap_err();
        assert_eq!(error.reason, Reason::BadParameter, "{ranges:?}");
        assert_eq!(error.metadata["range"], at);
    }
    assert_eq!(table.load(2030 << 12), Some(7));
}

#[test]
fn memory_is_discarded_until_the_switchover() {
    let vm = runs();
    vm.machine.begin_outgoing(&migration(), 1).unwrap();
    let cursor = CursorName::parse("migration").unwrap();
    vm.machine.dirty().attach(&cursor).unwrap();
    vm.machine.discard(&[(9, 1)]).unwrap();
    let batch = vm.machine.dirty().harvest(&cursor).unwrap();
    assert_eq!(batch.pages, 1, "the migration sends the zeroes");
    vm.machine.enter_switchover(&migration()).unwrap();
    assert_eq!(
        reason(vm.machine.discard(&[(9, 1)])),
        Reason::MigrationInProgress
    );
    vm.machine.leave_switchover(&migration()).unwrap();
    vm.machine.discard(&[(9, 1)]).unwrap();
    vm.machine.enter_switchover(&migration()).unwrap();
    vm.machine.relinquish(&migration()).unwrap();
    assert_eq!(reason(vm.machine.discard(&[(9, 1)])), Reason::StaleEpoch);
}

fn change() -> impl Strategy<Value = SlotChange> {
    let base = (0_u64..6).prop_map(|at| 0x10_0000 + at * 4);
    prop_oneof![
        (1_u32..5, base.clone(), 1_u64..8).prop_map(|(slot, base, pages)| add(slot, base, pages)),
        (1_u32..5).prop_map(|slot| SlotChange::Delete { slot }),
        (1_u32..5, base).prop_map(|(slot, base_gfn)| SlotChange::Move { slot, base_gfn }),
        (1_u32..5, any::<bool>()).prop_map(|(slot, flag)| read_only(slot, flag)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn slot_changes_are_all_or_none(
        batches in prop::collection::vec(
            (
                prop::collection::vec(change(), 1..5),
                prop::option::of(prop::sample::select(vec![
                    "add_slot", "remove_slot", "move_slot", "set_read_only",
                ])),
            ),
            1..8,
        ),
    ) {
        let vm = fake::created();
        for (changes, fail) in batches {
            let (before, _) = layouts(&vm);
            let generation = vm.machine.memory().table().generation();
            vm.backend.state().fail.extend(fail);
            let result = vm.machine.update_slots(&changes, 0).map(|update| update.table);
            let spent = std::mem::take(&mut vm.backend.state().fail).is_empty() && fail.is_some();
            let (published, backend) = layouts(&vm);
            prop_assert_eq!(&published, &backend);
            match result {
                Ok(table) => {
                    let mut specs: Vec<SlotSpec> = before
                        .iter()
                        .map(|(slot, base, pages, flag)| SlotSpec::new(*slot, *base, *pages, *flag).unwrap())
                        .collect();
                    let mut changed = false;
                    for change in &changes {
                        let then = change.apply(&specs).unwrap();
                        // A batch in which nothing differs from the start is none.
                        changed |= !then.iter().all(|spec| specs.contains(spec)) || then.len() != specs.len();
                        specs = then;
                    }
                    let mut expected: SlotLayout =
                        specs.iter().map(|spec| (spec.slot, spec.base_gfn, spec.pages, spec.read_only)).collect();
                    expected.sort_unstable();
                    prop_assert_eq!(published, expected);
                    prop_assert_eq!(table.generation(), generation + u64::from(changed));
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
