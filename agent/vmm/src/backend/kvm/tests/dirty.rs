//! Dirty log, slots and invalidation, held against what the guest says it did.
//!
//! # What a log may say beyond it
//! Where a processor walks the guest's page tables through the second stage, it does so as if it
//! wrote them, whether or not a bit of theirs changes (nested paging on AMD; EPT with accessed and
//! dirty bits). A log that has just been cleared therefore tells of the tables that the guest's
//! next accesses walk: of these pages and of no others, and each once a harvest. Shadow paging has
//! no such walk, and guests of RISC-V have no page tables.

use std::collections::BTreeSet;

use slat_proto::model::{DirtyEngine, MemstressPattern, SlotSpec};

use super::*;
use crate::guest::{
    Layout,
    memstress::{GuestAccess, NoMemory, run_batch},
};

/// Every way to log that this host has, by name.
fn logs(spec: &VmSpec) -> Vec<(&'static str, Choice)> {
    let bitmap = Choice {
        wish: Some(DirtyEngine::Bitmap),
        ..Choice::of(spec)
    };
    let ring = Choice {
        wish: Some(DirtyEngine::Ring),
        ..bitmap
    };
    let mut all = vec![
        ("manual protection", bitmap),
        (
            "cleared as it is read",
            Choice {
                manual_protect: false,
                ..bitmap
            },
        ),
    ];
    if offers_dirty_rings() {
        all.push(("ring", ring));
        all.push((
            "ring that is always full",
            Choice {
                ring_entries: 1024,
                ..ring
            },
        ));
    } else {
        eprintln!("SKIPPED: mode ring: this host's KVM has no dirty rings");
    }
    all
}

/// Portable memstress that notes which frames it writes.
struct Noting<'a> {
    memory: &'a SlotTable,
    written: BTreeSet<u64>,
}

impl GuestAccess for Noting<'_> {
    type Error = NoMemory;
    fn read_u64(&mut self, gpa: u64) -> Result<u64, NoMemory> {
        (&*self.memory).read_u64(gpa)
    }
    fn write_u64(&mut self, gpa: u64, value: u64) -> Result<(), NoMemory> {
        self.written.insert(gpa / 4096);
        (&*self.memory).write_u64(gpa, value)
    }
}

fn harvest(vm: &Vm) -> BTreeSet<u64> {
    let table = vm.memory.table();
    let specs = || table.slots().iter().map(|slot| slot.spec());
    let mut into: SlotBitmaps = specs()
        .map(|spec| (spec.slot, DirtyBitmap::new(spec.pages)))
        .collect();
    vm.backend.harvest_dirty(&mut into).unwrap();
    let frames = |spec: SlotSpec| {
        let runs = into[&spec.slot].runs();
        runs.flat_map(move |(first, len)| spec.base_gfn + first..spec.base_gfn + first + len)
    };
    specs().flat_map(frames).collect()
}

/// Frames of the guest's page tables, which a processor may be said to write: see the module.
fn tables(memory_bytes: u64) -> std::ops::Range<u64> {
    let layout = Layout::new(memory_bytes).unwrap();
    let first = layout.support() / 4096;
    let end = layout.slots()[0].end_gfn();
    if cfg!(target_arch = "x86_64") {
        first..end
    } else {
        end..end
    }
}

/// One slot's, by a bitmap of so many pages.
fn harvest_slot(vm: &Vm, slot: u32, pages: u64) -> Result<u64, DirtyError> {
    let mut into = SlotBitmaps::from([(slot, DirtyBitmap::new(pages))]);
    vm.backend.harvest_dirty(&mut into)?;
    Ok(into[&slot].count())
}

#[test]
fn the_log_holds_exactly_what_was_written() {
    need_kvm!();
    for pattern in [MemstressPattern::Sequential, MemstressPattern::Random] {
        let spec = MemstressSpec {
            pattern,
            ..Default::default()
        };
        let spec = memstress(32 << 20, 2, spec);
        for (log, choice) in logs(&spec) {
            exact(pattern, log, Vm::with_log(spec.clone(), choice));
        }
    }
}

fn exact(pattern: MemstressPattern, log: &str, vm: Vm) {
    {
        let batch = vm.word(0, offset::BATCH);
        let model = copy(&vm.memory.table());
        let table = model.table();
        // Some writes before logging, which must not be in it.
        vm.run_visits(2 * batch);
        let step = |batches: u64| {
            let mut noting = Noting {
                memory: &table,
                written: BTreeSet::new(),
            };
            for vcpu in 0..2 {
                for _ in 0..batches {
                    run_batch(&mut noting, vcpu).unwrap();
                }
            }
            noting.written
        };
        step(2);
        vm.backend.set_dirty_logging(0, true).unwrap();
        assert!(harvest(&vm).is_empty(), "the log starts empty");
        let walked = tables(vm.spec.memory_bytes);
        let (mut total, mut of_tables) = (0, 0);
        for round in 1..=3 {
            vm.run_visits((2 + 2 * round) * batch);
            let written = step(2);
            let told = harvest(&vm);
            let (own, of_guest): (BTreeSet<u64>, BTreeSet<u64>) = told
                .iter()
                .copied()
                .partition(|frame| walked.contains(frame));
            assert!(of_guest == written, "round {round} of {pattern:?}, {log}");
            assert!(harvest(&vm).is_empty(), "taken once");
            total += told.len() as u64;
            of_tables += own.len();
        }
        println!("{pattern:?}, {log}: {total} pages, {of_tables} of them of page tables");
        assert_eq!(vm.backend.stats().dirty_pages_harvested, Some(total));
        // Off and on again: what was written in between is gone.
        vm.backend.set_dirty_logging(0, false).unwrap();
        vm.run_visits(12 * batch);
        vm.backend.set_dirty_logging(0, true).unwrap();
        assert!(harvest(&vm).is_empty());
        assert_eq!(vm.counters().errors, 0);
    }
}

#[test]
fn no_write_is_lost_between_harvests_of_a_running_guest() {
    need_kvm!();
    let spec = MemstressSpec {
        pattern: MemstressPattern::Random,
        ..Default::default()
    };
    let spec = memstress(32 << 20, 2, spec);
    for (log, choice) in logs(&spec) {
        let vm = Vm::with_log(spec.clone(), choice);
        replicate(&vm);
        if let Some(rings) = vm.backend.rings() {
            let full = rings.times_full();
            println!("{log}: {} entries, full {full} times", rings.entries());
        }
    }
}

/// Follows the guest's writes by harvests alone, then compares all memory.
fn replicate(vm: &Vm) {
    vm.backend.set_dirty_logging(0, true).unwrap();
    let replica = copy(&vm.memory.table());
    let (from, to) = (vm.memory.table(), replica.table());
    let bring = |frames: BTreeSet<u64>| {
        let mut page = [0; 4096];
        for frame in frames {
            assert!(from.read(frame * 4096, &mut page));
            assert!(to.write(frame * 4096, &page));
        }
    };
    vm.backend.run().unwrap();
    for _ in 0..20 {
        let before = vm.counters().pages_written;
        bring(harvest(vm));
        vm.wait("more writes", || {
            vm.counters().pages_written > before + 1000
        });
    }
    // Nobody harvests until a small ring has been full once.
    if let Some(rings) = vm.backend.rings().filter(|rings| rings.entries() <= 1024) {
        vm.wait("a full ring", || rings.times_full() > 0);
    }
    vm.backend.pause().unwrap();
    bring(harvest(vm));
    assert!(same(&from, &to), "the replica differs");
    assert_eq!(vm.counters().errors, 0);
}

#[test]
fn invalidated_memory_is_faulted_in_again_with_its_contents() {
    need_kvm!();
    let vm = Vm::new(memstress(32 << 20, 1, MemstressSpec::default()));
    let visits = vm.counters().pages.next_multiple_of(512);
    vm.run_visits(2 * visits);
    let faults = || vm.backend.stats().faults_taken;
    let warm = faults();
    vm.run_visits(3 * visits);
    let idle = faults();
    vm.backend.invalidate(0, (32 << 20) / 4096).unwrap();
    vm.run_visits(4 * visits);
    assert_eq!(vm.counters().errors, 0);
    if let (Some(warm), Some(idle), Some(after)) = (warm, idle, faults()) {
        assert!(idle - warm < 100, "{} faults once warm", idle - warm);
        // With huge pages one fault brings 512 pages back.
        assert!(after - idle >= 16, "{} faults after", after - idle);
    }
    // While it runs, too.
    vm.limit_visits(u64::MAX);
    vm.backend.run().unwrap();
    for _ in 0..20 {
        let passes = vm.counters().passes;
        vm.backend.invalidate(100, 5000).unwrap();
        vm.wait("each page", || vm.counters().passes > passes);
    }
    vm.backend.pause().unwrap();
    assert_eq!(vm.counters().errors, 0);
}

#[test]
fn slots_are_checked() {
    need_kvm!();
    let vm = Vm::new(memstress(16 << 20, 1, MemstressSpec::default()));
    let slot = |number, base, read_only| {
        Arc::new(SlotMemory::new(SlotSpec::new(number, base, 64, read_only).unwrap()).unwrap())
    };
    let refused = |result: Result<(), BackendError>, slot: u32, says: &str| {
        let Err(BackendError::BadSlot { slot: at, message }) = result else {
            panic!("{result:?}, {says} expected");
        };
        assert!(at == slot && message.contains(says), "{message}");
    };
    refused(vm.backend.add_slot(&slot(1, 100, false)), 1, "overlaps");
    refused(vm.backend.add_slot(&slot(0, 1 << 20, false)), 0, "taken");
    // A slot ends below 2^52, which some hosts can address.
    let most = 1 << 40;
    if vm.backend.end_gfn() < most {
        let beyond = slot(1, most - 64, false);
        refused(vm.backend.add_slot(&beyond), 1, "ends at");
    }
    let unlogged = |result: Result<u64, DirtyError>, slot: u32, says: &str| {
        refused(result.map(drop).map_err(BackendError::from), slot, says);
    };
    unlogged(harvest_slot(&vm, 0, (16 << 20) / 4096), 0, "logging is off");
    let none = |result: Result<(), BackendError>| {
        assert!(matches!(result, Err(BackendError::NoSuchSlot { slot: 7 })));
    };
    none(vm.backend.remove_slot(7));
    none(vm.backend.move_slot(7, 0));
    none(
        vm.backend
            .set_dirty_logging(7, true)
            .map_err(BackendError::from),
    );
    none(
        harvest_slot(&vm, 7, 64)
            .map(drop)
            .map_err(BackendError::from),
    );

    vm.backend.add_slot(&slot(3, 1 << 20, true)).unwrap();
    refused(vm.backend.move_slot(3, 5), 3, "overlaps");
    vm.backend.move_slot(3, 2 << 20).unwrap();
    // Its old place is free again.
    vm.backend.add_slot(&slot(4, 1 << 20, false)).unwrap();
    vm.backend.set_dirty_logging(4, true).unwrap();
    unlogged(harvest_slot(&vm, 4, 63), 4, "bitmap");
    vm.backend.move_slot(4, 3 << 20).unwrap();
    assert_eq!(harvest_slot(&vm, 4, 64).unwrap(), 0);
    vm.backend.remove_slot(4).unwrap();
    none(vm.backend.remove_slot(7));
    vm.run_visits(1024);
    assert_eq!(vm.counters().errors, 0);
}
