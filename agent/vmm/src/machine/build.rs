//! Building a VM: choosing the backend, mapping memory, putting the guest in.

use std::sync::Arc;

use slat_proto::{
    ApiError, Reason,
    model::{BackendKind, Format, SlotSpec, VmSpec, now, slots_for_memory},
    v1,
};
use slat_record::{journal::Entry, uid::VmUid};

use super::{
    Machine, Parts,
    view::{Identity, State},
};
use crate::{
    backend::EventSink,
    memory::{DirtySource, SlotMemory},
};

/// The epoch a VM is created with.
const FIRST_EPOCH: u64 = 1;

/// Fills in backend and format. A format without a backend means the software backend: on KVM the
/// kernel chooses.
pub(crate) fn resolve(parts: &Parts, spec: &VmSpec) -> Result<VmSpec, ApiError> {
    let (available, why_not_kvm) = (parts.available)();
    let backend = match (spec.backend, spec.format) {
        (Some(backend), _) => backend,
        (None, Some(_)) => BackendKind::Software,
        (None, None) => *available.first().ok_or_else(|| {
            ApiError::new(Reason::CapabilityMissing, "no backend works on this host")
                .with("capability", "backend")
        })?,
    };
    if !available.contains(&backend) {
        let why = match (&why_not_kvm, backend) {
            (Some(why), BackendKind::Kvm) => format!(": {why}"),
            _ => String::new(),
        };
        return Err(ApiError::new(
            Reason::CapabilityMissing,
            format!("the {backend} backend does not work on this host{why}"),
        )
        .with("capability", backend)
        .with("advice", "choose another backend or another host"));
    }
    let format = match (backend, spec.format) {
        (BackendKind::Kvm, None) => None,
        (BackendKind::Kvm, Some(_)) => {
            return Err(ApiError::bad_parameter(
                "spec.format",
                "on KVM the kernel chooses the format; leave it out or take the software backend",
            ));
        }
        (BackendKind::Software, format) => Some(format.unwrap_or(Format::Ept4)),
    };
    Ok(VmSpec {
        backend: Some(backend),
        format,
        ..spec.clone()
    })
}

impl Machine {
    /// What [`Machine::create`] would build, with every default filled in; nothing is built.
    ///
    /// # Errors
    /// As [`Machine::create`], as far as they can be known before.
    pub(crate) fn plan(&self, spec: &VmSpec) -> Result<VmSpec, ApiError> {
        self.free_for_a_vm()?;
        let spec = resolve(&self.parts, spec)?;
        slots_for_memory(spec.memory_bytes)?;
        Ok(spec)
    }

    /// Builds the VM: memory mapped, backend built, guest in place, journalled as owned at epoch 1.
    /// State CREATED.
    ///
    /// # Errors
    /// VM_EXISTS, CAPABILITY_MISSING, BAD_PARAMETER, NO_MEMORY, KVM_IOCTL and the guest's; there is
    /// then still no VM. JOURNAL: the entry may or may not be durable, and this process will not
    /// run the VM.
    pub(crate) fn create(&self, spec: VmSpec) -> Result<v1::Vm, ApiError> {
        let mut control = self.control();
        let spec = self.plan(&spec)?;
        let slots = slots_for_memory(spec.memory_bytes)?;
        let built = self.build(&spec, &slots, Reason::NoMemory).and_then(|()| {
            (self.parts.install)(&self.memory.table(), &spec)?;
            let identity = Identity {
                uid: self
                    .parts
                    .uid
                    .clone()
                    .unwrap_or_else(VmUid::fresh)
                    .to_string(),
                spec,
                create_time: Some(now()),
            };
            control.journal.append(&Entry::Created {
                vm: self.shared.vm.id().to_owned(),
                uid: identity.uid.clone(),
                epoch: FIRST_EPOCH,
            })?;
            Ok(identity)
        });
        match built {
            Ok(identity) => {
                self.shared.change(|view| {
                    view.identity = Some(identity);
                    view.state = State::Created;
                    view.epoch = FIRST_EPOCH;
                });
                self.shown()
            }
            Err(error) => {
                self.tear_down();
                Err(error.with("vm", &self.shared.vm))
            }
        }
    }

    /// VM_EXISTS unless there is neither a VM nor the remains of one.
    pub(super) fn free_for_a_vm(&self) -> Result<(), ApiError> {
        let view = self.shared.view();
        if view.identity.is_none() && view.state == State::Unspecified {
            return Ok(());
        }
        let vm = &self.shared.vm;
        Err(
            ApiError::new(Reason::VmExists, format!("{vm} exists in this process"))
                .with("vm", vm)
                .with("state", view.state.as_str_name()),
        )
    }

    /// Backend and empty slots. On an error the caller tears down.
    pub(super) fn build(
        &self,
        spec: &VmSpec,
        slots: &[SlotSpec],
        no_memory: Reason,
    ) -> Result<(), ApiError> {
        let shared = Arc::downgrade(&self.shared);
        let events: EventSink = Arc::new(move |event| {
            if let Some(shared) = shared.upgrade() {
                shared.guest_event(event);
            }
        });
        let backend = (self.parts.create)(spec, events, Some(&self.dir.console()))?;
        self.dirty
            .bind(Arc::clone(&backend) as Arc<dyn DirtySource>);
        self.set_backend(Some(Arc::clone(&backend)));
        let mut table = Vec::with_capacity(slots.len());
        for slot in slots {
            let memory = map(*slot, no_memory)?;
            self.add_slot(&backend, &memory)?;
            table.push(memory);
        }
        self.memory.publish(table);
        Ok(())
    }

    /// Forgets backend and memory of a VM that never came to be.
    pub(super) fn tear_down(&self) {
        self.set_backend(None);
        self.dirty.unbind();
        self.memory.publish(Vec::new());
    }
}

/// A slot of zeroes.
pub(super) fn map(spec: SlotSpec, no_memory: Reason) -> Result<Arc<SlotMemory>, ApiError> {
    SlotMemory::new(spec).map(Arc::new).map_err(|error| {
        ApiError::new(
            no_memory,
            format!(
                "slot {}: {} bytes cannot be mapped: {error}",
                spec.slot,
                spec.bytes()
            ),
        )
        .with("slot", spec.slot)
        .with("needed_bytes", spec.bytes())
    })
}
