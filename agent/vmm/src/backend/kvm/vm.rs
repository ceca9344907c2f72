//! One VM of KVM behind the backend trait.

use std::{
    fs::File,
    path::Path,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use kvm_bindings::KVM_CAP_BINARY_STATS_FD;
use kvm_ioctls::VmFd;
use slat_proto::{
    model::{DirtyEngine, GuestSpec, VmSpec},
    v1,
};

use super::{
    super::{
        Backend, BackendError, EventSink,
        cpu::CpuFact,
        traits::{EngineInUse, PagedGuest},
    },
    arch::{self, ARCH, HostCpu, Told, VcpuState},
    console::Console,
    engine::Choice,
    host::{most_vcpus, new_vm},
    ioctl,
    refuse::unsupported,
    slots::Slots,
    state::{StateReader, StateWriter},
    stats::Stats,
    tracepoint::FaultEvents,
    vcpu::{Serving, Threads},
    vcpu_error::{self, of_vcpu},
};
use crate::{
    guest::{BootEntry, Layout},
    memory::{DirtyError, DirtySource, SlotBitmaps, SlotMemory},
};

/// One VM of KVM.
#[derive(Debug)]
pub(crate) struct KvmBackend {
    // Fields go in this order: threads leave the guest, the VM's descriptor closes, then memory may
    // go.
    threads: Threads,
    stats: Stats,
    pub(super) vm: Arc<VmFd>,
    slots: Arc<Slots>,
    engine: EngineInUse,
    host: HostCpu,
    /// What each vCPU was told of its CPU. Held only to copy in or out.
    told: Mutex<Vec<Told>>,
    vcpus: u32,
    /// A load failed in the middle: some vCPU is neither new nor loaded, and must not run.
    partly_loaded: AtomicBool,
}

impl KvmBackend {
    /// A stopped VM without slots. A raw image prints into the file `console`, or nowhere.
    ///
    /// # Errors
    /// `Unsupported` when the host's KVM lacks something, `Ioctl` when it or the console's file
    /// refuses.
    pub(crate) fn new(
        spec: &VmSpec,
        events: EventSink,
        console: Option<&Path>,
    ) -> Result<Self, BackendError> {
        Self::build(spec, events, console, Choice::of(spec))
    }

    /// With page faults counted by `events` where the kernel's statistics have none.
    #[must_use]
    pub(crate) fn with_fault_events(mut self, events: &FaultEvents) -> Self {
        self.stats.stand_in(events.clone());
        self
    }

    /// As [`KvmBackend::new`], logging as `choice` says.
    pub(super) fn build(
        spec: &VmSpec,
        events: EventSink,
        console: Option<&Path>,
        choice: Choice,
    ) -> Result<Self, BackendError> {
        let (kvm, vm) = new_vm()?;
        let most = most_vcpus(&vm);
        if spec.vcpus > most {
            return Err(unsupported(format!(
                "run {} vCPUs in a VM; its most is {most}",
                spec.vcpus
            )));
        }
        let layout = Layout::new(spec.memory_bytes)
            .map_err(|error| unsupported(format!("lay out guest memory: {error}")))?;
        let vm = Arc::new(vm);
        let host = HostCpu::new(&kvm, &vm)?;
        arch::prepare_vm(&vm)?;
        let (log, engine) = choice.enable(&vm)?;
        let slots = Arc::new(Slots::new(&vm, host.end_gfn(), log));
        let mut vcpus = Vec::with_capacity(spec.vcpus as usize);
        let mut told = Vec::with_capacity(spec.vcpus as usize);
        for index in 0..spec.vcpus {
            let vcpu = vcpu_error::set("KVM_CREATE_VCPU", "a new one", || {
                vm.create_vcpu(index.into())
            })
            .map_err(of_vcpu(index))?;
            let entry = BootEntry::new(spec, &layout, index);
            let prepared = arch::prepare_vcpu(&host, &vcpu, index, entry);
            told.push(prepared.map_err(of_vcpu(index))?);
            if let Some(rings) = slots.rings() {
                rings.map(&vcpu)?;
            }
            vcpus.push(vcpu);
        }
        let stats = if vm.check_extension_raw(KVM_CAP_BINARY_STATS_FD.into()) > 0 {
            let files: std::io::Result<Vec<File>> = vcpus.iter().map(ioctl::stats_file).collect();
            ioctl::stats_file(&*vm)
                .and_then(|of_vm| Stats::new(of_vm, files?, arch::COUNTED))
                .map_err(|source| BackendError::Ioctl {
                    op: "KVM_GET_STATS_FD",
                    source,
                })?
        } else {
            Stats::default()
        };
        let serving = match spec.guest {
            GuestSpec::Memstress(_) => Serving::Memstress,
            GuestSpec::RawImage(_) => {
                Serving::Raw(console.map(Console::open).transpose().map_err(|source| {
                    BackendError::Ioctl {
                        op: "opening the guest's console file",
                        source,
                    }
                })?)
            }
        };
        let threads = Threads::new(vcpus, vm.run_size(), Arc::clone(&slots), serving, events)?;
        Ok(Self {
            threads,
            stats,
            vm,
            slots,
            engine,
            host,
            told: Mutex::new(told),
            vcpus: spec.vcpus,
            partly_loaded: AtomicBool::new(false),
        })
    }

    /// Where guest-physical frames end.
    #[cfg(test)]
    pub(super) fn end_gfn(&self) -> u64 {
        self.host.end_gfn()
    }

    /// The vCPUs' dirty rings.
    #[cfg(test)]
    pub(super) fn rings(&self) -> Option<&super::ring::Rings> {
        self.slots.rings()
    }

    fn told(&self) -> Vec<Told> {
        self.told
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

impl DirtySource for KvmBackend {
    fn set_dirty_logging(&self, slot: u32, on: bool) -> Result<(), DirtyError> {
        self.slots.set_logging(&self.vm, slot, on)
    }

    fn begin_dirty_logging(&self, slot: u32) -> Result<bool, DirtyError> {
        let full = self.slots.begin_logging(&self.vm, slot)?;
        if !full {
            self.slots.set_logging(&self.vm, slot, true)?;
        }
        Ok(full)
    }

    fn protect(&self, slot: u32, first: u64, pages: u64) -> Result<(), DirtyError> {
        self.slots.protect(&self.vm, slot, first, pages)
    }

    fn harvest_dirty(&self, into: &mut SlotBitmaps) -> Result<(), DirtyError> {
        if self.slots.rings().is_some() {
            self.threads
                .leave_guest()
                .map_err(|error| DirtyError::Refused {
                    slot: into.keys().next().copied().unwrap_or(0),
                    message: error.to_string(),
                })?;
        }
        self.slots.harvest(&self.vm, into)
    }
}

impl Backend for KvmBackend {
    fn capabilities(&self) -> Vec<v1::Capability> {
        let mut all = vec![
            v1::Capability::DirtyLog,
            v1::Capability::VcpuState,
            v1::Capability::RawImage,
            v1::Capability::Invalidate,
            match self.engine.engine {
                DirtyEngine::Bitmap => v1::Capability::DirtyBitmap,
                DirtyEngine::Ring => v1::Capability::DirtyRing,
            },
        ];
        if self.slots.has_read_only() {
            all.push(v1::Capability::ReadOnlySlots);
        }
        if self.stats.offers_faults() {
            all.push(v1::Capability::FaultStatistics);
        }
        if self.stats.offers_flushes() {
            all.push(v1::Capability::FlushStatistics);
        }
        all
    }

    fn dirty_engine(&self) -> EngineInUse {
        self.engine.clone()
    }

    fn cpu_facts(&self) -> Vec<CpuFact> {
        // All vCPUs of a VM are told the same but for their own number, which is no fact.
        let told = self.told();
        told.first()
            .map_or_else(Vec::new, |told| told.facts(&self.host))
    }

    fn paged(&self) -> Option<PagedGuest> {
        Some(PagedGuest {
            format: arch::MIRROR.to_string(),
            vcpus: self.threads.ids(),
        })
    }

    fn most_slots(&self) -> u32 {
        u32::try_from(self.slots.most()).unwrap_or(u32::MAX)
    }

    fn add_slot(&self, memory: &Arc<SlotMemory>) -> Result<(), BackendError> {
        self.slots.add(&self.vm, memory)
    }

    fn remove_slot(&self, slot: u32) -> Result<(), BackendError> {
        self.slots.remove(&self.vm, slot)
    }

    fn move_slot(&self, slot: u32, base_gfn: u64) -> Result<(), BackendError> {
        self.slots.shift(&self.vm, slot, base_gfn)
    }

    fn set_read_only(&self, slot: u32, read_only: bool) -> Result<(), BackendError> {
        self.slots.set_read_only(&self.vm, slot, read_only)
    }

    fn invalidate(&self, gfn: u64, pages: u64) -> Result<(), BackendError> {
        self.slots.invalidate(gfn, pages)
    }

    fn run(&self) -> Result<(), BackendError> {
        if self.partly_loaded.load(Ordering::SeqCst) {
            return Err(BackendError::Vcpu {
                message: "loading vCPU state failed in the middle; this VM cannot run".to_owned(),
            });
        }
        arch::before_run()?;
        self.threads.run()
    }

    fn pause(&self) -> Result<(), BackendError> {
        self.threads.pause()
    }

    fn save_state(&self) -> Result<Vec<u8>, BackendError> {
        let mut writer = StateWriter::new(ARCH, self.vcpus);
        let told = self.told();
        self.threads.while_stopped(false, |index, vcpu| {
            VcpuState::save(&self.host, vcpu, &told[index as usize])
                .map_err(of_vcpu(index))?
                .write(&mut writer);
            Ok(())
        })?;
        Ok(writer.finish())
    }

    fn load_state(&self, state: &[u8]) -> Result<(), BackendError> {
        let mut reader = StateReader::new(state, ARCH, self.vcpus)?;
        let states = (0..self.vcpus)
            .map(|index| VcpuState::read(&mut reader, &self.host).map_err(of_vcpu(index)))
            .collect::<Result<Vec<_>, _>>()?;
        reader.finish()?;
        let told = states.iter().map(VcpuState::told).collect();
        self.threads.while_stopped(true, |index, vcpu| {
            self.partly_loaded.store(true, Ordering::SeqCst);
            states[index as usize]
                .load(&self.host, vcpu)
                .map_err(of_vcpu(index))
        })?;
        *self.told.lock().unwrap_or_else(PoisonError::into_inner) = told;
        self.partly_loaded.store(false, Ordering::SeqCst);
        Ok(())
    }

    fn stats(&self) -> v1::MmuStats {
        v1::MmuStats {
            dirty_pages_harvested: Some(self.slots.harvested()),
            read_only_writes: self
                .slots
                .has_read_only()
                .then(|| self.slots.read_only_writes()),
            ..self.stats.read()
        }
    }
}
