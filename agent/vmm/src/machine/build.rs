//! Building a VM: choosing the backend, mapping memory, putting the guest in.

use std::sync::Arc;

use slat_proto::{
    ApiError, Reason,
    model::{BackendKind, DirtyEngine, Format, Paging, SlotSpec, VmSpec, now, slots_for_memory},
    v1,
};
use slat_record::{journal::Entry, uid::VmUid};

use super::{
    Machine, Parts,
    birth::Birth,
    room::check_free,
    view::{Identity, State},
};
use crate::{
    backend::{Backend, EventSink},
    memory::{DirtySource, Mode, Origin, SlotMemory, check_room, no_huge_pages},
};

/// The epoch a VM is created with.
pub(super) const FIRST_EPOCH: u64 = 1;

/// Where the contents of a new VM's memory come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum MadeAs {
    /// It is empty, and filled here.
    New,
    /// From the memories of the same numbers of a page source.
    Copy,
}

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
    let wants_rings = spec.dirty_engine == Some(DirtyEngine::Ring);
    if wants_rings && !(parts.offers_rings)(backend) {
        return Err(no_dirty_rings(backend));
    }
    Ok(VmSpec {
        backend: Some(backend),
        format,
        ..spec.clone()
    })
}

/// The VM needs dirty rings, which VMs of `backend` cannot have here.
pub(crate) fn no_dirty_rings(backend: BackendKind) -> ApiError {
    let capability = v1::Capability::DirtyRing.as_str_name();
    let why = match backend {
        BackendKind::Kvm => "this host's kernel has no KVM_CAP_DIRTY_LOG_RING",
        BackendKind::Software => "only KVM has them",
    };
    ApiError::new(
        Reason::CapabilityMissing,
        format!("VMs of the {backend} backend cannot have dirty rings here: {why}"),
    )
    .with("capability", capability)
    .with("backend", backend)
    .with(
        "advice",
        "take dirty engine auto or bitmap, or another host",
    )
}

/// Whether memory for a new VM could be made on this host now. Takes nothing.
///
/// # Errors
/// CAPABILITY_MISSING, NO_SUCH_NODE, NO_HUGE_PAGES; NO_MEMORY where it is to be there at once.
pub fn fits_here(spec: &VmSpec) -> Result<(), ApiError> {
    check_room(Mode::from(spec), spec.memory_bytes)?;
    if spec.prefault {
        check_free(spec.ordinary_bytes(), Reason::NoMemory)?;
    }
    Ok(())
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
        if spec.paging == Paging::Agent {
            self.check_watchable(&spec)?;
        }
        fits_here(&spec)?;
        Ok(spec)
    }

    /// Builds the VM: memory mapped, backend built, guest in place, journalled as owned at epoch 1.
    /// State CREATED.
    ///
    /// # Errors
    /// VM_EXISTS, CAPABILITY_MISSING, BAD_PARAMETER, NO_MEMORY, NO_HUGE_PAGES, KVM_IOCTL and the
    /// guest's; there is then still no VM. JOURNAL: the entry may or may not be durable, and this
    /// process will not run the VM.
    pub(crate) fn create(&self, spec: VmSpec) -> Result<v1::Vm, ApiError> {
        let mut control = self.control();
        let spec = self.plan(&spec)?;
        let slots = slots_for_memory(spec.memory_bytes)?;
        let reserved = spec.backing.reserved_page().is_some();
        let built = self.build(&spec, &slots, Reason::NoMemory, MadeAs::New);
        let built = built.and_then(|()| {
            if reserved {
                self.populate_now(self.memory.table().slots(), Mode::from(&spec))?;
            }
            (self.parts.install)(&self.memory.table(), &spec)?;
            self.watch_new(&spec)?;
            let identity = Identity {
                uid: self
                    .parts
                    .uid
                    .clone()
                    .unwrap_or_else(VmUid::fresh)
                    .to_string(),
                spec,
                birth: Some(Birth::at(now())),
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
                let prefault = identity.spec.prefault;
                self.shared.change(|view| {
                    view.identity = Some(identity);
                    view.state = State::Created;
                    view.epoch = FIRST_EPOCH;
                });
                match (prefault, reserved) {
                    (true, true) => self.prefault_done(),
                    (true, false) => self.begin_prefault(),
                    (false, _) => {}
                }
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
        made_as: MadeAs,
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
            may_have(&*backend, slot.slot, slot.read_only, Some(table.len()))?;
            let memory = map(*slot, Mode::from(spec), no_memory, made_as)?;
            self.add_slot(&backend, &memory)?;
            table.push(memory);
        }
        self.memory.publish(table);
        Ok(())
    }

    /// Forgets backend and memory of a VM that never came to be.
    pub(super) fn tear_down(&self) {
        self.end_paging();
        self.end_readers();
        self.set_backend(None);
        self.dirty.unbind();
        self.memory.publish(Vec::new());
    }
}

/// Whether this host's backend has such a slot; `others`: beside so many, when it is a new one.
///
/// # Errors
/// CAPABILITY_MISSING, LIMIT_REACHED.
pub(super) fn may_have(
    backend: &dyn Backend,
    slot: u32,
    read_only: bool,
    others: Option<usize>,
) -> Result<(), ApiError> {
    let capability = v1::Capability::ReadOnlySlots;
    if read_only && !backend.capabilities().contains(&capability) {
        return Err(ApiError::new(
            Reason::CapabilityMissing,
            format!("slot {slot}: this host's backend has no read-only slots"),
        )
        .with("capability", capability.as_str_name())
        .with("slot", slot));
    }
    let most = backend.most_slots();
    let Some(others) = others else {
        return Ok(());
    };
    let advice = if slot >= most {
        format!("take a number below {most}")
    } else if others >= most as usize {
        "delete slots that are no longer used".to_owned()
    } else {
        return Ok(());
    };
    Err(ApiError::new(
        Reason::LimitReached,
        format!("slot {slot}: a VM has at most {most} slots here, numbered from 0"),
    )
    .with("slot", slot)
    .with("limit", most)
    .with("advice", advice))
}

/// A slot of zeroes, in the VM's mode.
fn map(
    spec: SlotSpec,
    mode: Mode,
    no_memory: Reason,
    made_as: MadeAs,
) -> Result<Arc<SlotMemory>, ApiError> {
    whole_pages(spec, mode)?;
    let memory = SlotMemory::with(spec, mode);
    let memory = memory.and_then(|memory| match made_as {
        MadeAs::New => Ok(memory),
        MadeAs::Copy => Ok(memory.coming_from(Origin::new(spec.slot, spec.pages)?)),
    });
    memory
        .map(Arc::new)
        .map_err(|error| cannot_map(spec, mode, no_memory, &error))
}

/// Slots of zeroes, in the VM's mode; or which of them could not be had, and why.
pub(super) fn map_all(
    specs: &[SlotSpec],
    mode: Mode,
    no_memory: Reason,
) -> Result<Vec<Arc<SlotMemory>>, (usize, ApiError)> {
    for (at, spec) in specs.iter().enumerate() {
        whole_pages(*spec, mode).map_err(|error| (at, error))?;
    }
    match SlotMemory::all(specs, mode) {
        Ok(all) => Ok(all.into_iter().map(Arc::new).collect()),
        Err((at, error)) => Err((at, cannot_map(specs[at], mode, no_memory, &error))),
    }
}

/// A slot of reserved pages is a multiple of one.
fn whole_pages(spec: SlotSpec, mode: Mode) -> Result<(), ApiError> {
    let backing = mode.backing;
    let Some(page) = backing.reserved_page() else {
        return Ok(());
    };
    if spec.bytes().is_multiple_of(page) {
        return Ok(());
    }
    Err(ApiError::new(
        Reason::BadSlotTable,
        format!(
            "slot {}: {} bytes are no multiple of the {page} bytes of a {backing} page, of which \
             this VM's memory is made",
            spec.slot,
            spec.bytes()
        ),
    )
    .with("slot", spec.slot)
    .with("backing", backing)
    .with("page_bytes", page))
}

fn cannot_map(spec: SlotSpec, mode: Mode, no_memory: Reason, error: &std::io::Error) -> ApiError {
    if error.raw_os_error() == Some(libc::ENOMEM)
        && let Some(short) = no_huge_pages(mode.backing, spec.bytes())
    {
        return short.with("slot", spec.slot);
    }
    let (reason, advice) = match error.raw_os_error() {
        Some(libc::EMFILE | libc::ENFILE) => (
            Reason::DescriptorsExhausted,
            "each slot takes a descriptor: raise LimitNOFILE of the agent",
        ),
        _ => (
            no_memory,
            "the host may lack memory, or mappings: each slot takes two of vm.max_map_count",
        ),
    };
    ApiError::new(
        reason,
        format!(
            "slot {}: {} bytes cannot be mapped: {error}",
            spec.slot,
            spec.bytes()
        ),
    )
    .with("slot", spec.slot)
    .with("needed_bytes", spec.bytes())
    .with("advice", advice)
}
