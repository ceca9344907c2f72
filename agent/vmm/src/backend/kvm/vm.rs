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
    model::{GuestSpec, VmSpec},
    v1,
};

use super::{
    super::{Backend, BackendError, EventSink, cpu::CpuFact},
    arch::{self, ARCH, HostCpu, Told, VcpuState},
    console::Console,
    host::open_to_run,
    ioctl,
    refuse::{failed, unsupported},
    slots::Slots,
    state::{StateReader, StateWriter, bad},
    stats::Stats,
    vcpu::{Serving, Threads},
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
    vm: VmFd,
    slots: Arc<Slots>,
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
        Self::build(spec, events, console, true)
    }

    /// As [`KvmBackend::new`]; without `manual_protect` as on kernels before Linux 5.0.
    pub(super) fn build(
        spec: &VmSpec,
        events: EventSink,
        console: Option<&Path>,
        manual_protect: bool,
    ) -> Result<Self, BackendError> {
        let kvm = open_to_run()?;
        let most = kvm.get_max_vcpus();
        if spec.vcpus as usize > most {
            return Err(unsupported(format!(
                "run {} vCPUs in a VM; its most is {most}",
                spec.vcpus
            )));
        }
        let layout = Layout::new(spec.memory_bytes)
            .map_err(|error| unsupported(format!("lay out guest memory: {error}")))?;
        let vm = kvm.create_vm().map_err(failed("KVM_CREATE_VM"))?;
        let host = HostCpu::new(&kvm, &vm)?;
        arch::prepare_vm(&vm)?;
        let slots = Arc::new(Slots::new(&vm, host.end_gfn(), manual_protect)?);
        let mut vcpus = Vec::with_capacity(spec.vcpus as usize);
        let mut told = Vec::with_capacity(spec.vcpus as usize);
        for index in 0..spec.vcpus {
            let vcpu = vm
                .create_vcpu(index.into())
                .map_err(failed("KVM_CREATE_VCPU"))?;
            let entry = BootEntry::new(spec, &layout, index);
            told.push(arch::prepare_vcpu(&host, &vcpu, index, entry)?);
            vcpus.push(vcpu);
        }
        let stats = if vm.check_extension_raw(KVM_CAP_BINARY_STATS_FD.into()) > 0 {
            let files: std::io::Result<Vec<File>> = vcpus.iter().map(ioctl::stats_file).collect();
            ioctl::stats_file(&vm)
                .and_then(|of_vm| Stats::new(of_vm, files?))
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
            host,
            told: Mutex::new(told),
            vcpus: spec.vcpus,
            partly_loaded: AtomicBool::new(false),
        })
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

    fn harvest_dirty(&self, into: &mut SlotBitmaps) -> Result<(), DirtyError> {
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
        ];
        if self.stats.offers_faults() {
            all.push(v1::Capability::FaultStatistics);
        }
        if self.stats.offers_flushes() {
            all.push(v1::Capability::FlushStatistics);
        }
        all
    }

    fn cpu_facts(&self) -> Vec<CpuFact> {
        // All vCPUs of a VM are told the same but for their own number, which is no fact.
        let told = self.told();
        told.first()
            .map_or_else(Vec::new, |told| told.facts(&self.host))
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

    fn invalidate(&self, gfn: u64, pages: u64) -> Result<(), BackendError> {
        self.slots.invalidate(gfn, pages)
    }

    fn run(&self) -> Result<(), BackendError> {
        if self.partly_loaded.load(Ordering::SeqCst) {
            return Err(BackendError::Vcpu {
                message: "loading vCPU state failed in the middle; this VM cannot run".to_owned(),
            });
        }
        self.threads.run()
    }

    fn pause(&self) -> Result<(), BackendError> {
        self.threads.pause()
    }

    fn save_state(&self) -> Result<Vec<u8>, BackendError> {
        let mut writer = StateWriter::new(ARCH, self.vcpus);
        let told = self.told();
        self.threads.while_stopped(false, |index, vcpu| {
            VcpuState::save(&self.host, vcpu, &told[index as usize])?.write(&mut writer);
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
            ..self.stats.read()
        }
    }
}

/// Says which vCPU a refused state is of.
fn of_vcpu(index: u32) -> impl Fn(BackendError) -> BackendError {
    move |error| match error {
        BackendError::State { message } => bad(format!("vCPU {index}: {message}")),
        other => other,
    }
}
