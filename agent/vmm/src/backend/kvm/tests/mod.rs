//! The backend on the real `/dev/kvm`; skipped where there is none.

mod arch;
mod counting;
mod dirty;
mod migrate;
mod raw;
mod running;
mod slots;

use std::{
    path::Path,
    sync::{Arc, mpsc},
    thread,
    time::{Duration, Instant},
};

use slat_proto::{
    model::{BackendKind, GuestSpec, MemoryBacking, MemstressSpec, VmSpec, slots_for_memory},
    v1,
};

use super::{super::Backend as _, engine::Choice, *};
use crate::{
    backend::{BackendError, EventSink, GuestEvent},
    guest::{
        self,
        memstress::{GuestAccess as _, control_page, counters, offset},
    },
    memory::{
        DirtyBitmap, DirtyError, DirtySource as _, GuestMemory, SlotBitmaps, SlotMemory, SlotTable,
    },
};

/// Bound on any wait; far more than any of them takes.
const LIMIT: Duration = Duration::from_secs(60);

macro_rules! need_kvm {
    () => {
        if let Err(error) = crate::backend::kvm::probe() {
            eprintln!("SKIPPED: {error}");
            return;
        }
    };
}
use need_kvm;

struct Vm {
    backend: KvmBackend,
    memory: GuestMemory,
    spec: VmSpec,
    events: mpsc::Receiver<GuestEvent>,
}

fn memory(bytes: u64) -> GuestMemory {
    let memory = GuestMemory::new();
    memory.publish(
        slots_for_memory(bytes)
            .unwrap()
            .into_iter()
            .map(|spec| Arc::new(SlotMemory::new(spec).unwrap()))
            .collect(),
    );
    memory
}

/// Same contents in other memory, as after a migration.
fn copy(from: &SlotTable) -> GuestMemory {
    let to = memory(from.pages() * 4096);
    for (from, to) in from.slots().iter().zip(to.table().slots()) {
        let mut bytes = vec![0; from.spec().bytes() as usize];
        from.host().read(0, &mut bytes);
        to.host().write(0, &bytes);
    }
    to
}

fn same(one: &SlotTable, other: &SlotTable) -> bool {
    let (mut a, mut b) = ([0; 4096], [0; 4096]);
    one.slots().iter().zip(other.slots()).all(|(one, other)| {
        (0..one.spec().pages).all(|page| {
            one.read_page(page, &mut a);
            other.read_page(page, &mut b);
            a == b
        })
    })
}

fn memstress(bytes: u64, vcpus: u32, spec: MemstressSpec) -> VmSpec {
    VmSpec {
        memory_bytes: bytes,
        vcpus,
        backend: Some(BackendKind::Kvm),
        format: None,
        dirty_engine: None,
        backing: MemoryBacking::Auto,
        numa_node: None,
        prefault: false,
        paging: slat_proto::model::Paging::Kernel,
        guest: GuestSpec::Memstress(spec),
        labels: slat_proto::model::Labels::default(),
    }
}

impl Vm {
    fn over(memory: GuestMemory, spec: VmSpec, console: Option<&Path>) -> Self {
        let choice = Choice::of(&spec);
        Self::build(memory, spec, console, choice)
    }

    fn build(memory: GuestMemory, spec: VmSpec, console: Option<&Path>, choice: Choice) -> Self {
        let (send, events) = mpsc::channel();
        let sink = Arc::new(move |event| {
            // A test that ended listens no more.
            drop(send.send(event));
        });
        let backend = KvmBackend::build(&spec, sink, console, choice).unwrap();
        for slot in memory.table().slots() {
            backend.add_slot(slot).unwrap();
        }
        Self {
            backend,
            memory,
            spec,
            events,
        }
    }

    fn new(spec: VmSpec) -> Self {
        let choice = Choice::of(&spec);
        Self::with_log(spec, choice)
    }

    fn with_log(spec: VmSpec, choice: Choice) -> Self {
        let memory = memory(spec.memory_bytes);
        guest::install(&memory.table(), &spec).unwrap();
        Self::build(memory, spec, None, choice)
    }

    fn counters(&self) -> v1::GuestCounters {
        counters(&self.memory.table(), self.spec.vcpus).unwrap()
    }

    fn word(&self, vcpu: u32, at: u64) -> u64 {
        (&*self.memory.table())
            .read_u64(control_page(vcpu) + at)
            .unwrap()
    }

    fn set_word(&self, vcpu: u32, at: u64, value: u64) {
        (&*self.memory.table())
            .write_u64(control_page(vcpu) + at, value)
            .unwrap();
    }

    fn limit_visits(&self, visits: u64) {
        for vcpu in 0..self.spec.vcpus {
            self.set_word(vcpu, offset::VISIT_LIMIT, visits);
        }
    }

    /// Runs until every vCPU made that many visits, and pauses.
    fn run_visits(&self, visits: u64) {
        self.limit_visits(visits);
        self.backend.run().unwrap();
        self.wait("the visits", || {
            (0..self.spec.vcpus).all(|vcpu| self.word(vcpu, offset::VISITS) >= visits)
        });
        self.backend.pause().unwrap();
    }

    fn wait(&self, what: &str, done: impl Fn() -> bool) {
        let start = Instant::now();
        while !done() {
            if let Ok(event) = self.events.try_recv() {
                panic!("waiting for {what}: {event:?}");
            }
            assert!(start.elapsed() < LIMIT, "waiting for {what}");
            thread::sleep(Duration::from_millis(1));
        }
    }
}

/// How a backend is made for a test, by name of its way to log.
type Mode = (
    &'static str,
    fn(&VmSpec, EventSink, Option<&Path>) -> Result<Arc<dyn crate::backend::Backend>, BackendError>,
);

/// The modes of the kernel's dirty_log_test: the log cleared as it is read, cleared by calls of its
/// own, rings, and rings so small that vCPUs stop all the time.
pub(crate) fn logging_modes() -> [Mode; 4] {
    use slat_proto::model::DirtyEngine::{Bitmap, Ring};
    [
        ("get", |spec, events, console| {
            let choice = Choice {
                wish: Some(Bitmap),
                manual_protect: false,
                ..Choice::of(spec)
            };
            Ok(Arc::new(KvmBackend::build(spec, events, console, choice)?))
        }),
        ("clear", |spec, events, console| {
            let choice = Choice {
                wish: Some(Bitmap),
                ..Choice::of(spec)
            };
            Ok(Arc::new(KvmBackend::build(spec, events, console, choice)?))
        }),
        ("ring", |spec, events, console| {
            let choice = Choice {
                wish: Some(Ring),
                ..Choice::of(spec)
            };
            Ok(Arc::new(KvmBackend::build(spec, events, console, choice)?))
        }),
        ("ring, full", |spec, events, console| {
            let choice = Choice {
                wish: Some(Ring),
                ring_entries: 1024,
                ..Choice::of(spec)
            };
            Ok(Arc::new(KvmBackend::build(spec, events, console, choice)?))
        }),
    ]
}

#[test]
fn a_host_takes_the_vms_of_its_own_kind() {
    let facts = match host_facts() {
        Ok(facts) => facts,
        Err(error) => {
            eprintln!("SKIPPED: {error}");
            return;
        }
    };
    // More than the two that every architecture needs.
    assert!(facts.len() > 3, "{facts:?}");
    assert_eq!(crate::backend::compare_facts(&facts, &facts), []);
    for fact in &facts {
        println!("{} = {}", fact.name, fact.value);
    }
}
