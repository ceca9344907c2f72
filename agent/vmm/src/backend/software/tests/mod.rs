//! memstress over every format: nothing lost, nothing stale, whatever is done to slots and tables
//! meanwhile.

mod refusals;
mod walks;

use std::{
    ops::Range,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use slat_proto::model::{
    BackendKind, Format, GuestSpec, MemoryBacking, MemstressFill, MemstressPattern, MemstressSpec,
    PAGE_SIZE, SlotSpec, VmSpec,
};

use super::{kernel_oracles::Hooks, *};
use crate::{
    backend::GuestEvent,
    guest::{self, Layout, memstress},
    memory::{DirtyBitmap, GuestMemory},
};

const MEMORY: u64 = 8 << 20;
/// Everything here takes a second at most; a hang is an error.
const PATIENCE: Duration = Duration::from_secs(60);
const NO_PAGES: [u64; 0] = [];

fn spec(format: Format, vcpus: u32, guest: MemstressSpec) -> VmSpec {
    VmSpec {
        memory_bytes: MEMORY,
        vcpus,
        backend: Some(BackendKind::Software),
        format: Some(format),
        dirty_engine: None,
        backing: MemoryBacking::Auto,
        numa_node: None,
        prefault: false,
        paging: slat_proto::model::Paging::Kernel,
        guest: GuestSpec::Memstress(guest),
        labels: slat_proto::model::Labels::default(),
    }
}

fn random(fill: MemstressFill) -> MemstressSpec {
    MemstressSpec {
        pattern: MemstressPattern::Random,
        write_percent: 60,
        fill,
        ..MemstressSpec::default()
    }
}

struct Vm {
    backend: SoftwareBackend,
    memory: GuestMemory,
    spec: VmSpec,
    events: Arc<Mutex<Vec<GuestEvent>>>,
    hooks: Arc<Hooks>,
}

impl Vm {
    /// With the memory its size asks for, empty.
    fn empty(spec: VmSpec, slots: &[SlotSpec]) -> Self {
        let events: Arc<Mutex<Vec<GuestEvent>>> = Arc::default();
        let sink = Arc::clone(&events);
        let sink: EventSink = Arc::new(move |event| sink.lock().unwrap().push(event));
        let hooks = Arc::new(Hooks::default());
        let port = Arc::clone(&hooks) as Arc<dyn Port>;
        let backend = SoftwareBackend::with_port(&spec, sink, port).unwrap();
        let memory = GuestMemory::new();
        let slots: Vec<_> = slots
            .iter()
            .map(|slot| Arc::new(SlotMemory::new(*slot).unwrap()))
            .collect();
        for slot in &slots {
            backend.add_slot(slot).unwrap();
        }
        memory.publish(slots);
        Self {
            backend,
            memory,
            spec,
            events,
            hooks,
        }
    }

    fn new(spec: VmSpec) -> Self {
        let layout = Layout::new(spec.memory_bytes).unwrap();
        let vm = Self::empty(spec, layout.slots());
        guest::install(&vm.memory.table(), &vm.spec).unwrap();
        vm
    }

    fn counters(&self) -> v1::GuestCounters {
        memstress::counters(&self.memory.table(), self.spec.vcpus).unwrap()
    }

    /// Waits until the guest has written so many pages more.
    fn until_written(&self, pages: u64) {
        let goal = self.counters().pages_written + pages;
        self.until(|| self.counters().pages_written >= goal);
    }

    fn until(&self, done: impl Fn() -> bool) {
        let until = Instant::now() + PATIENCE;
        while !done() {
            assert!(
                Instant::now() < until,
                "{:?} {:?}",
                self.counters(),
                self.events
            );
            thread::yield_now();
        }
    }

    fn failure(&self) -> String {
        self.until(|| !self.events.lock().unwrap().is_empty());
        match self.events.lock().unwrap().as_slice() {
            [GuestEvent::Failed(failure)] => failure.to_string(),
            other => panic!("{other:?}"),
        }
    }

    fn assert_well(&self) {
        assert_eq!(*self.events.lock().unwrap(), []);
        let counters = self.counters();
        assert_eq!(counters.errors, 0, "{counters:?}");
        assert!(counters.pages_written > 0);
    }

    fn pages(&self) -> u64 {
        self.memory.table().pages()
    }

    fn copy(&self, page: u64, to: &mut [u8]) {
        let at = page as usize * PAGE_SIZE as usize;
        let to = &mut to[at..at + PAGE_SIZE as usize];
        assert!(self.memory.table().read(page * PAGE_SIZE, to));
    }

    fn snapshot(&self) -> Vec<u8> {
        let mut bytes = vec![0; MEMORY as usize];
        (0..self.pages()).for_each(|page| self.copy(page, &mut bytes));
        bytes
    }

    fn harvest(&self) -> Vec<u64> {
        let bitmap = self.harvest_slot(0, self.pages()).unwrap();
        let runs = bitmap.runs();
        runs.flat_map(|(first, len)| first..first + len).collect()
    }

    /// One slot's dirty pages, by a bitmap of so many.
    fn harvest_slot(&self, slot: u32, pages: u64) -> Result<DirtyBitmap, DirtyError> {
        let mut into = SlotBitmaps::from([(slot, DirtyBitmap::new(pages))]);
        self.backend.harvest_dirty(&mut into)?;
        Ok(into.remove(&slot).unwrap())
    }
}

/// Pages whose contents differ.
fn changed(one: &[u8], two: &[u8]) -> Vec<u64> {
    let page = |bytes: &[u8], page: usize| {
        let range: Range<usize> = page * 4096..page * 4096 + 4096;
        bytes[range].to_vec()
    };
    (0..one.len() / 4096)
        .filter(|&at| page(one, at) != page(two, at))
        .map(|at| at as u64)
        .collect()
}

#[test]
fn a_format_has_the_same_name_at_the_api_and_in_the_mmu() {
    for format in Format::ALL {
        assert_eq!(
            super::stage(format).unwrap().to_string(),
            format.to_string()
        );
    }
}

#[test]
fn memstress_runs_on_every_format_and_the_counters_move() {
    for (format, vcpus) in Format::ALL
        .into_iter()
        .zip([2, 3, 4, 1].into_iter().cycle())
    {
        let vm = Vm::new(spec(format, vcpus, random(MemstressFill::Random)));
        vm.backend.run().unwrap();
        vm.until_written(6000);
        vm.backend.pause().unwrap();
        vm.assert_well();
        let stats = vm.backend.stats();
        assert!(
            stats.faults_taken > Some(0) && stats.faults_fixed > Some(0),
            "{stats:?}"
        );
        assert!(
            stats.pages_2m > Some(0),
            "huge pages are possible: {stats:?}"
        );
        assert!(stats.table_pages > Some(0));
        assert_eq!(stats.exits, None);
        vm.backend.run().unwrap();
        // A flush that reaches vCPUs. It takes one that is inside the guest at that moment.
        vm.until(|| {
            vm.backend.invalidate(0, 512).unwrap();
            vm.backend.stats().remote_tlb_flushes > Some(0)
        });
        vm.until_written(100);
        vm.backend.pause().unwrap();
        let later = vm.backend.stats();
        assert!(later.faults_taken > stats.faults_taken);
        assert!(later.remote_tlb_flush_requests > stats.remote_tlb_flush_requests);
        assert!(later.vcpu_tlb_flushes > stats.vcpu_tlb_flushes);
        vm.assert_well();
    }
}

#[test]
fn the_dirty_log_is_exactly_what_was_written() {
    for format in Format::ALL {
        let guest = MemstressSpec {
            write_percent: 10,
            ..random(MemstressFill::Zero)
        };
        let vm = Vm::new(spec(format, 2, guest));
        vm.backend.run().unwrap();
        vm.until_written(500);
        vm.backend.set_dirty_logging(0, true).unwrap();
        vm.backend.pause().unwrap();
        vm.harvest();
        assert_eq!(vm.harvest(), NO_PAGES, "nothing ran");
        let mut before = vm.snapshot();
        for _ in 0..3 {
            vm.backend.run().unwrap();
            vm.until_written(50);
            vm.backend.pause().unwrap();
            let now = vm.snapshot();
            assert_eq!(vm.harvest(), changed(&before, &now), "{format}");
            before = now;
        }
        vm.assert_well();
    }
}

#[test]
fn no_write_is_lost_between_harvests_while_the_guest_runs() {
    for format in Format::ALL {
        let vm = Vm::new(spec(format, 3, random(MemstressFill::Zero)));
        vm.backend.run().unwrap();
        vm.until_written(500);
        vm.backend.set_dirty_logging(0, true).unwrap();
        let mut copy = vm.snapshot();
        for _ in 0..20 {
            vm.until_written(20);
            for page in vm.harvest() {
                vm.copy(page, &mut copy);
            }
        }
        vm.backend.pause().unwrap();
        for page in vm.harvest() {
            vm.copy(page, &mut copy);
        }
        assert_eq!(changed(&copy, &vm.snapshot()), NO_PAGES, "{format}");
        vm.assert_well();
    }
}

#[test]
fn huge_mappings_come_back_in_place_when_logging_ends() {
    for format in Format::ALL {
        let vm = Vm::new(spec(format, 2, random(MemstressFill::Zero)));
        vm.backend.run().unwrap();
        vm.until(|| vm.backend.stats().pages_2m >= Some(3));
        vm.backend.set_dirty_logging(0, true).unwrap();
        vm.until_written(2000);
        let logging = vm.backend.stats();
        assert_eq!(logging.pages_2m, Some(0), "{format}");
        assert!(logging.pages_4k > Some(100) && logging.huge_pages_split >= Some(3));
        vm.backend.set_dirty_logging(0, false).unwrap();
        // By the end of logging, and not by faults. A vCPU that was about to do the same to a table
        // finishes it first: recovery leaves an entry to the one that owns it.
        vm.backend.pause().unwrap();
        let after = vm.backend.stats();
        assert!(after.pages_2m >= Some(3) && after.huge_pages_recovered >= Some(3));
        assert_eq!(after.pages_4k, Some(0), "{format}");
        let flushes = |cause| {
            let found = after.flushes.iter().find(|flush| flush.cause == cause);
            found.map(|flush| flush.ranges)
        };
        assert!(flushes("dirty_log") > Some(0) && flushes("huge_page") > Some(0));
        assert_eq!(flushes("unmap"), Some(0), "{format}: nothing was zapped");
        let harvested = vm.harvest_slot(0, vm.pages());
        assert!(harvested.is_err(), "logging is off");
        vm.backend.run().unwrap();
        vm.until_written(1000);
        vm.backend.pause().unwrap();
        vm.assert_well();
    }
}

#[test]
fn a_storm_of_harvests_invalidations_and_slot_changes_loses_nothing() {
    for format in Format::ALL {
        let vm = Vm::new(spec(format, 4, random(MemstressFill::Random)));
        vm.backend.run().unwrap();
        let stop = AtomicBool::new(false);
        let running = || !stop.load(Relaxed);
        thread::scope(|scope| {
            scope.spawn(|| {
                let mut page = 0;
                while running() {
                    vm.backend.invalidate(page, 100).unwrap();
                    page = (page + 777) % 2000;
                }
            });
            scope.spawn(|| {
                while running() {
                    vm.backend.set_dirty_logging(0, true).unwrap();
                    (0..5).for_each(|_| drop(vm.harvest()));
                    vm.backend.set_dirty_logging(0, false).unwrap();
                }
            });
            scope.spawn(|| {
                let at = |gfn| SlotSpec::new(9, gfn, 600, false).unwrap();
                while running() {
                    let slot = Arc::new(SlotMemory::new(at(1 << 20)).unwrap());
                    vm.backend.add_slot(&slot).unwrap();
                    vm.backend.move_slot(9, 3 << 20).unwrap();
                    vm.backend.remove_slot(9).unwrap();
                    assert_eq!(
                        Arc::strong_count(slot.guest()),
                        1,
                        "nothing maps it any more"
                    );
                }
            });
            vm.until_written(20_000);
            stop.store(true, Relaxed);
        });
        vm.until_written(2000);
        vm.backend.pause().unwrap();
        vm.assert_well();
    }
}

#[test]
fn a_guest_goes_on_over_copied_memory() {
    for format in Format::ALL {
        let source = Vm::new(spec(format, 2, random(MemstressFill::Random)));
        source.backend.run().unwrap();
        assert!(source.backend.save_state().is_err(), "the vCPUs run");
        source.until_written(1000);
        source.backend.pause().unwrap();
        let state = source.backend.save_state().unwrap();
        let target = Vm::empty(source.spec.clone(), Layout::new(MEMORY).unwrap().slots());
        for garbage in [&b""[..], b"garbage", &state[1..], &[0; 4096]] {
            let refused = target.backend.load_state(garbage).unwrap_err();
            assert!(matches!(refused, BackendError::State { .. }), "{refused}");
        }
        assert!(target.memory.table().write(0, &source.snapshot()));
        target.backend.load_state(&state).unwrap();
        let written = target.counters().pages_written;
        target.backend.run().unwrap();
        target.until_written(3000);
        target.backend.pause().unwrap();
        target.assert_well();
        assert!(target.counters().pages_written >= written + 3000);
        assert!(target.backend.load_state(&state).is_err(), "it has run");
    }
}

#[test]
fn a_page_reverted_behind_the_guests_back_is_found_by_the_guest() {
    let vm = Vm::new(spec(Format::Sv39x4, 2, MemstressSpec::default()));
    let layout = Layout::new(MEMORY).unwrap();
    vm.backend.run().unwrap();
    vm.until_written(2 * layout.working_pages());
    vm.backend.pause().unwrap();
    vm.assert_well();
    let page = layout.working_page(123);
    assert!(vm.memory.table().write(page, &[0; PAGE_SIZE as usize]));
    vm.backend.run().unwrap();
    vm.until(|| vm.counters().errors > 0);
    assert_eq!(vm.counters().first_error_page, 123);
}

/// Something that revokes translations the guest is using.
type Revocation = (&'static str, fn(&Vm));

#[test]
fn a_translation_used_after_its_flush_stops_the_vm() {
    let revocations: [Revocation; 5] = [
        ("invalidate", |vm| {
            vm.backend.invalidate(0, MEMORY / PAGE_SIZE).unwrap();
        }),
        ("begin to log", |vm| {
            vm.backend.set_dirty_logging(0, false).unwrap();
            vm.backend.set_dirty_logging(0, true).unwrap();
        }),
        ("harvest", |vm| drop(vm.harvest())),
        ("recover huge pages", |vm| {
            vm.backend.set_dirty_logging(0, false).unwrap();
        }),
        ("withdraw the root", |vm| vm.backend.vm.mmu.zap_all()),
    ];
    // Every format, every revocation; not every pair.
    for (number, format) in Format::ALL.into_iter().enumerate() {
        let (name, revoke) = revocations[number % revocations.len()];
        let vm = Vm::new(spec(format, 2, MemstressSpec::default()));
        vm.backend.run().unwrap();
        vm.backend.set_dirty_logging(0, true).unwrap();
        vm.until_written(1000);
        vm.hooks.deaf.store(true, Relaxed);
        revoke(&vm);
        let message = vm.failure();
        assert!(
            message.contains("after the flush that revoked it"),
            "{format}, {name}: {message}"
        );
        assert!(vm.backend.run().is_err(), "it does not run again");
        vm.backend.pause().unwrap();
    }
}

#[test]
fn no_lock_of_the_owners_holds_up_a_vcpu() {
    for format in Format::ALL {
        let vm = Vm::new(spec(format, 3, random(MemstressFill::Zero)));
        vm.backend.run().unwrap();
        let _slots = vm.backend.slots();
        let _numbers = vm.backend.vm.frames.numbers();
        let faults = vm.backend.stats().faults_taken;
        vm.backend.vm.mmu.zap_all();
        vm.until_written(500);
        assert!(vm.backend.stats().faults_taken > faults, "{format}");
    }
}
