//! A backend for tests: its "guest" writes when the test says so, and every call can be made to
//! fail.
//!
//! It is strict about the protocol: harvesting a slot that does not log, or running twice, is an
//! error, so that a test sees a caller that breaks it.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io,
    path::Path,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
};

use slat_proto::{
    ApiError,
    model::{BackendKind, DirtyEngine, HostName, VmName, VmSpec},
    v1,
};
use slat_record::{
    dir::VmDir,
    journal::{Disk, RealDisk},
};

use crate::{
    backend::{Backend, BackendError, CpuFact, EngineInUse, EventSink, GuestEvent, PagedGuest},
    machine::{Machine, Parts},
    memory::{DirtyError, DirtySource, SlotBitmaps, SlotMemory, SlotTable},
    pager::Watcher,
};

/// A slot as the fake sees it.
#[derive(Debug, Default)]
pub(crate) struct FakeSlot {
    pub(crate) base_gfn: u64,
    pub(crate) pages: u64,
    pub(crate) read_only: bool,
    pub(crate) logging: bool,
    pub(crate) dirty: BTreeSet<u64>,
}

#[derive(Default)]
pub(crate) struct FakeState {
    pub(crate) slots: BTreeMap<u32, FakeSlot>,
    pub(crate) running: bool,
    pub(crate) runs: u32,
    /// Pages of slot 0 that the guest writes again and again while it runs.
    pub(crate) hot: BTreeSet<u64>,
    /// It has run since the last harvest.
    ran: bool,
    pub(crate) loaded: Option<Vec<u8>>,
    pub(crate) invalidated: Vec<(u64, u64)>,
    /// How often vCPUs that ran were stopped.
    pub(crate) pauses: u32,
    /// Slots changed while vCPUs ran, by the call's name.
    pub(crate) changed_running: Vec<&'static str>,
    /// Names of calls that fail: each entry fails the next such call, once.
    pub(crate) fail: Vec<&'static str>,
    /// What they fail with; EIO when 0.
    pub(crate) errno: i32,
    /// Most slots; 0: 32,764.
    pub(crate) most_slots: u32,
    /// Capabilities not offered.
    pub(crate) lacks: Vec<v1::Capability>,
    events: Option<EventSink>,
}

/// See the module.
#[derive(Default)]
pub(crate) struct FakeBackend(Mutex<FakeState>);

impl std::fmt::Debug for FakeBackend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("FakeBackend")
    }
}

impl FakeBackend {
    pub(crate) fn state(&self) -> MutexGuard<'_, FakeState> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The guest writes a page.
    pub(crate) fn guest_writes(&self, slot: u32, page: u64) {
        let mut state = self.state();
        let slot = state.slots.get_mut(&slot).expect("the slot exists");
        assert!(page < slot.pages);
        if slot.logging {
            slot.dirty.insert(page);
        }
    }

    /// The guest ends.
    pub(crate) fn guest_event(&self, event: GuestEvent) {
        let mut state = self.state();
        state.running = false;
        let events = state.events.clone().expect("built by a machine");
        drop(state);
        events(event);
    }

    fn enter(&self, call: &'static str) -> Result<MutexGuard<'_, FakeState>, BackendError> {
        let mut state = self.state();
        if let Some(at) = state.fail.iter().position(|fail| *fail == call) {
            state.fail.remove(at);
            let errno = match state.errno {
                0 => libc::EIO,
                errno => errno,
            };
            return Err(BackendError::Ioctl {
                op: call,
                source: std::io::Error::from_raw_os_error(errno),
            });
        }
        if state.running && call.ends_with("_slot") {
            state.changed_running.push(call);
        }
        Ok(state)
    }
}

fn vcpu(message: &str) -> BackendError {
    BackendError::Vcpu {
        message: message.to_owned(),
    }
}

fn refused(slot: u32, message: &str) -> DirtyError {
    DirtyError::Refused {
        slot,
        message: message.to_owned(),
    }
}

impl DirtySource for FakeBackend {
    fn set_dirty_logging(&self, slot: u32, on: bool) -> Result<(), DirtyError> {
        let op = if on { "log_on" } else { "log_off" };
        let mut state = self.enter(op).map_err(|_| refused(slot, "told to fail"))?;
        let found = state.slots.get_mut(&slot);
        let found = found.ok_or(DirtyError::NoSuchSlot { slot })?;
        found.logging = on;
        found.dirty.clear();
        Ok(())
    }

    fn harvest_dirty(&self, into: &mut SlotBitmaps) -> Result<(), DirtyError> {
        let mut state = self.state();
        let running = state.running;
        let ran = std::mem::replace(&mut state.ran, running);
        let hot = if ran {
            state.hot.clone()
        } else {
            BTreeSet::new()
        };
        if let Some(found) = state.slots.get_mut(&0) {
            found.dirty.extend(hot);
        }
        for (slot, bitmap) in into {
            // Some are taken before the call fails, as a kernel that fails in the middle of CLEAR.
            let failing = state.fail.iter().position(|fail| *fail == "harvest");
            let found = state.slots.get_mut(slot);
            let found = found.ok_or(DirtyError::NoSuchSlot { slot: *slot })?;
            if !found.logging {
                return Err(refused(*slot, "harvest of a slot that does not log"));
            }
            let all = found.dirty.len();
            let take = if failing.is_some() { all / 2 } else { all };
            for page in found.dirty.iter().take(take) {
                bitmap.set(*page, 1);
            }
            found.dirty = found.dirty.iter().skip(take).copied().collect();
            if let Some(at) = failing {
                state.fail.remove(at);
                return Err(refused(*slot, "told to fail"));
            }
        }
        Ok(())
    }
}

impl Backend for FakeBackend {
    fn dirty_engine(&self) -> EngineInUse {
        EngineInUse {
            engine: DirtyEngine::Bitmap,
            reason: "a fake has nothing else".to_owned(),
        }
    }

    fn capabilities(&self) -> Vec<v1::Capability> {
        use v1::Capability::{DirtyLog, FaultStatistics, Invalidate, ReadOnlySlots, VcpuState};
        let state = self.state();
        [
            DirtyLog,
            VcpuState,
            FaultStatistics,
            Invalidate,
            ReadOnlySlots,
        ]
        .into_iter()
        .filter(|capability| !state.lacks.contains(capability))
        .collect()
    }

    fn cpu_facts(&self) -> Vec<CpuFact> {
        Vec::new()
    }

    fn paged(&self) -> Option<PagedGuest> {
        None
    }

    fn most_slots(&self) -> u32 {
        match self.state().most_slots {
            0 => 32_764,
            most => most,
        }
    }

    fn add_slot(&self, memory: &Arc<SlotMemory>) -> Result<(), BackendError> {
        let spec = memory.spec();
        let slot = FakeSlot {
            base_gfn: spec.base_gfn,
            pages: spec.pages,
            read_only: spec.read_only,
            ..FakeSlot::default()
        };
        let before = self.enter("add_slot")?.slots.insert(spec.slot, slot);
        assert!(before.is_none(), "slot {} added twice", spec.slot);
        Ok(())
    }

    fn remove_slot(&self, slot: u32) -> Result<(), BackendError> {
        match self.enter("remove_slot")?.slots.remove(&slot) {
            Some(_) => Ok(()),
            None => Err(BackendError::NoSuchSlot { slot }),
        }
    }

    fn move_slot(&self, slot: u32, base_gfn: u64) -> Result<(), BackendError> {
        let mut state = self.enter("move_slot")?;
        let found = state.slots.get_mut(&slot);
        found.ok_or(BackendError::NoSuchSlot { slot })?.base_gfn = base_gfn;
        Ok(())
    }

    /// As a kernel that takes the slot away and puts it back: "lose_slot" does not put it back.
    fn set_read_only(&self, slot: u32, read_only: bool) -> Result<(), BackendError> {
        if self.state().running {
            return Err(vcpu("a slot is made anew under running vCPUs"));
        }
        if self.enter("lose_slot").is_err() {
            self.state().slots.remove(&slot);
            let message = "told to".to_owned();
            return Err(BackendError::SlotLost { slot, message });
        }
        let mut state = self.enter("set_read_only")?;
        let found = state.slots.get_mut(&slot);
        let found = found.ok_or(BackendError::NoSuchSlot { slot })?;
        found.read_only = read_only;
        found.dirty.clear();
        Ok(())
    }

    fn invalidate(&self, gfn: u64, pages: u64) -> Result<(), BackendError> {
        self.enter("invalidate")?.invalidated.push((gfn, pages));
        Ok(())
    }

    fn run(&self) -> Result<(), BackendError> {
        let mut state = self.enter("run")?;
        state.running = true;
        state.ran = true;
        state.runs += 1;
        Ok(())
    }

    fn pause(&self) -> Result<(), BackendError> {
        let mut state = self.enter("pause")?;
        state.pauses += u32::from(std::mem::replace(&mut state.running, false));
        Ok(())
    }

    fn save_state(&self) -> Result<Vec<u8>, BackendError> {
        let state = self.enter("save_state")?;
        if state.running {
            return Err(vcpu("saving the state of running vCPUs"));
        }
        Ok(b"fake vCPUs".to_vec())
    }

    fn load_state(&self, bytes: &[u8]) -> Result<(), BackendError> {
        let mut state = self.enter("load_state")?;
        if bytes != b"fake vCPUs" {
            return Err(BackendError::State {
                message: "not a fake's state".to_owned(),
            });
        }
        state.loaded = Some(bytes.to_vec());
        Ok(())
    }

    fn stats(&self) -> v1::MmuStats {
        v1::MmuStats {
            faults_taken: Some(7),
            ..v1::MmuStats::default()
        }
    }
}

/// Parts that build `backend`.
pub(crate) fn parts(backend: &Arc<FakeBackend>) -> Parts {
    let backend = Arc::clone(backend);
    Parts {
        offers_rings: |_| false,
        available: || (vec![BackendKind::Software], Some("a test".to_owned())),
        create: Arc::new(move |_: &VmSpec, events: EventSink, _: Option<&Path>| {
            backend.enter("create")?.events = Some(events);
            Ok(Arc::clone(&backend) as Arc<dyn Backend>)
        }),
        install: |table: &SlotTable, _: &VmSpec| -> Result<(), ApiError> {
            assert!(table.write(0, b"fake guest"));
            Ok(())
        },
        oom_score: None,
        disk: Arc::new(RealDisk),
        watcher: || Watcher::none("a test"),
        uid: None,
        counters: |table: &SlotTable, _: u32| {
            let mut bytes = [0; 10];
            (table.read(0, &mut bytes) && &bytes == b"fake guest").then(|| v1::GuestCounters {
                pages: table.pages(),
                ..v1::GuestCounters::default()
            })
        },
    }
}

/// A disk that fails when the test says so.
#[derive(Debug, Default)]
pub(crate) struct FakeDisk {
    broken: AtomicBool,
    /// A line arrives although its sync fails.
    late: AtomicBool,
    /// What an append takes besides, microseconds.
    micros: AtomicU64,
    /// Calls that failed.
    failures: AtomicU32,
}

impl FakeDisk {
    pub(crate) fn set_broken(&self, broken: bool) {
        self.broken.store(broken, Ordering::Relaxed);
    }

    pub(crate) fn set_late(&self) {
        self.late.store(true, Ordering::Relaxed);
    }

    /// From now on an append takes so much longer.
    pub(crate) fn set_slow(&self, by: std::time::Duration) {
        let micros = u64::try_from(by.as_micros()).unwrap();
        self.micros.store(micros, Ordering::Relaxed);
    }

    pub(crate) fn failures(&self) -> u32 {
        self.failures.load(Ordering::Relaxed)
    }

    fn fail(&self) -> io::Result<()> {
        if self.broken.load(Ordering::Relaxed) {
            self.failures.fetch_add(1, Ordering::Relaxed);
            return Err(io::Error::other("a broken disk"));
        }
        Ok(())
    }
}

impl Disk for FakeDisk {
    fn append(&self, file: &mut File, bytes: &[u8]) -> io::Result<()> {
        let micros = self.micros.load(Ordering::Relaxed);
        std::thread::sleep(std::time::Duration::from_micros(micros));
        if self.late.load(Ordering::Relaxed) {
            RealDisk.append(file, bytes)?;
        }
        self.fail()?;
        RealDisk.append(file, bytes)
    }

    fn replace(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        self.fail()?;
        RealDisk.replace(path, bytes)
    }

    fn truncate(&self, path: &Path, len: u64) -> io::Result<()> {
        self.fail()?;
        RealDisk.truncate(path, len)
    }
}

/// A machine for `vms/web` on `hosts/a` over a fake backend, in a directory that goes with the
/// value.
pub(crate) struct FakeVm {
    pub(crate) machine: Arc<Machine>,
    pub(crate) backend: Arc<FakeBackend>,
    pub(crate) disk: Arc<FakeDisk>,
    _dir: slat_test_dir::TestDir,
}

/// Without a VM.
pub(crate) fn empty() -> FakeVm {
    let dir = slat_test_dir::TestDir::new();
    let backend = Arc::new(FakeBackend::default());
    let disk = Arc::new(FakeDisk::default());
    let machine = Machine::with_parts(
        VmDir::new(dir.path()),
        VmName::parse("web").unwrap(),
        HostName::parse("a").unwrap(),
        Parts {
            oom_score: Some(dir.path().join("oom_score_adj")),
            disk: Arc::clone(&disk) as Arc<dyn Disk>,
            ..parts(&backend)
        },
    )
    .unwrap();
    FakeVm {
        machine,
        backend,
        disk,
        _dir: dir,
    }
}

/// A spec of 8 MiB.
pub(crate) fn spec() -> VmSpec {
    VmSpec::from_message(&v1::VmSpec {
        memory_bytes: 8 << 20,
        vcpus: 1,
        ..v1::VmSpec::default()
    })
    .unwrap()
}

/// With a VM in state CREATED.
pub(crate) fn created() -> FakeVm {
    let vm = empty();
    vm.machine.create(spec()).unwrap();
    vm
}
