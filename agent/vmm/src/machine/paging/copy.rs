//! A VM made of a snapshot, or of a saved file: its own from the first moment, with an identity and
//! a journal of its own, and memory whose pages come from elsewhere.
//!
//! The source was handed over through the pager's socket before. Lazily, memory is watched and the
//! VM is there at once, and its pages come while it runs; otherwise all are brought first, and
//! nothing is watched.

use std::time::Duration;

use slat_paging::wire::Ask;
use slat_proto::{
    ApiError, Reason,
    model::{BackendKind, GuestSpec, PAGE_SIZE, Paging, SlotSpec, VmSpec, now},
    v1,
};
use slat_record::{journal::Entry, uid::VmUid};

use super::super::{
    Machine,
    birth::Birth,
    build::{FIRST_EPOCH, MadeAs},
    resolve,
    room::check_free,
    view::{Identity, State},
};
use crate::{
    backend::PagedGuest,
    guest::memstress::control_page,
    memory::{Mode, check_room},
    pager::Work,
};

/// A pager that the agent started is there within this.
const COMES: Duration = Duration::from_secs(15);
/// Pages that the VM cannot begin without come within this.
const FIRST: Duration = Duration::from_secs(30);
/// All pages come within this, as long as any do.
const ALL: Duration = Duration::from_secs(300);

/// What is to be made.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CopyOrder<'a> {
    /// The VM that it is a copy of.
    pub(crate) vm: &'a v1::Vm,
    /// Its slots.
    pub(crate) slots: &'a [SlotSpec],
    /// State of its vCPUs.
    pub(crate) vcpus: &'a [u8],
    /// Of its slot table.
    pub(crate) generation: Option<u64>,
    /// It is there before its pages are.
    pub(crate) lazy: bool,
    /// It runs at once.
    pub(crate) start: bool,
    /// Who pages it; `None`: as the copied one's spec says.
    pub(crate) paging: Option<Paging>,
}

impl Machine {
    /// Builds it. State PAUSED, or RUNNING when it was to start.
    ///
    /// # Errors
    /// VM_EXISTS; BAD_PARAMETER, BAD_SLOT_TABLE; VM_STATE without a source; CAPABILITY_MISSING,
    /// also for a lazy copy of memory that cannot be watched; NO_MEMORY, NO_HUGE_PAGES;
    /// PAGER_UNREACHABLE, PAGE_SOURCE_STALLED and the source's; STATE_LOAD and
    /// STATE_VERSION_UNSUPPORTED; KVM_IOCTL; JOURNAL. There is then no VM here.
    pub(crate) fn build_copy(&self, order: CopyOrder<'_>) -> Result<v1::Vm, ApiError> {
        let mut control = self.control();
        self.free_for_a_vm()?;
        let spec = self.copied_spec(&order)?;
        super::super::incoming::check_announced(&spec, order.slots)?;
        if !self.pager.has_source() {
            let words = "no page source was handed over for a copy";
            return Err(ApiError::new(Reason::VmState, words).with("vm", &self.shared.vm));
        }
        let bytes = order
            .slots
            .iter()
            .fold(0_u64, |sum, slot| sum.saturating_add(slot.bytes()));
        if !order.lazy {
            check_free(spec.backing.ordinary_bytes(bytes), Reason::NoMemory)?;
        }
        check_room(Mode::from(&spec), bytes)?;
        let made = self.make_copy(&order, &spec).and_then(|()| {
            let uid = self
                .parts
                .uid
                .clone()
                .unwrap_or_else(VmUid::fresh)
                .to_string();
            control.journal.append(&Entry::Created {
                vm: self.shared.vm.id().to_owned(),
                uid: uid.clone(),
                epoch: FIRST_EPOCH,
            })?;
            Ok(uid)
        });
        let uid = match made {
            Ok(uid) => uid,
            Err(error) => {
                self.tear_down();
                return Err(error.with("vm", &self.shared.vm));
            }
        };
        self.shared.change(|view| {
            view.identity = Some(Identity {
                uid,
                spec,
                birth: Some(Birth::at(now())),
            });
            view.state = State::Paused;
            view.epoch = FIRST_EPOCH;
        });
        if order.start {
            self.run_vcpus(&control).map_err(|error| {
                error.with(
                    "advice",
                    "the copy is here and paused: resume it, or delete it",
                )
            })?;
        }
        self.shown()
    }

    fn copied_spec(&self, order: &CopyOrder<'_>) -> Result<VmSpec, ApiError> {
        let spec = order.vm.spec.as_ref();
        let spec = spec.ok_or_else(|| ApiError::bad_parameter("manifest.vm.spec", "is missing"))?;
        let mut spec = VmSpec::from_resource(spec)?;
        if spec.backend.is_none() {
            return Err(ApiError::bad_parameter(
                "manifest.vm.spec.backend",
                "the snapshot says which",
            ));
        }
        if let Some(paging) = order.paging {
            spec.paging = paging;
        }
        let spec = resolve(&self.parts, &spec)?;
        if order.lazy || spec.paging == Paging::Agent {
            self.check_watchable(&spec)?;
        }
        Ok(spec)
    }

    /// Everything but the journal.
    fn make_copy(&self, order: &CopyOrder<'_>, spec: &VmSpec) -> Result<(), ApiError> {
        self.build(spec, order.slots, Reason::NoMemory, MadeAs::Copy)?;
        let mode = Mode::from(spec);
        if mode.backing.reserved_page().is_some() || (spec.prefault && !order.lazy) {
            self.populate_now(self.memory.table().slots(), mode)?;
        }
        let by_agent = spec.paging == Paging::Agent;
        if order.lazy || by_agent {
            self.make_watched(order, spec)?;
        } else {
            self.make_whole(spec)?;
        }
        let loaded = self.built_backend()?.load_state(order.vcpus);
        loaded.map_err(|error| {
            let mut error = ApiError::from(error);
            if error.reason != Reason::StateVersionUnsupported {
                error.reason = Reason::StateLoad;
            }
            error
        })?;
        if let Some(generation) = order.generation {
            self.memory.raise_generation(generation);
        }
        if spec.prefault && !order.lazy {
            self.prefault_done();
        }
        Ok(())
    }

    /// Has its memory watched while pages come.
    fn make_watched(&self, order: &CopyOrder<'_>, spec: &VmSpec) -> Result<(), ApiError> {
        let guest = self.watchable(spec)?;
        {
            let mut watching = self.watching();
            watching.set_source(Some(if self.pager.is_forked() {
                "a fork"
            } else {
                "restored lazily"
            }));
            if spec.paging == Paging::Agent {
                watching.by_agent();
            }
        }
        // What is populated before is mapped, too.
        self.begin_watching(guest, spec.prefault)?;
        let pager = |error| self.paged(error);
        self.pager.await_attached(COMES).map_err(pager)?;
        if !order.lazy {
            self.pager.load_all(ALL).map_err(pager)?;
            self.source_is_here();
            return Ok(());
        }
        if let GuestSpec::Memstress(_) = spec.guest {
            // Whoever paces it and shows its counters reads these pages without a fault.
            let load = Ask::Load {
                gfn: control_page(0) / PAGE_SIZE,
                pages: spec.vcpus.into(),
                write: true,
            };
            self.pager.ask(load, FIRST).map_err(pager)?;
        }
        Ok(())
    }

    /// Has all pages brought, by a pager that ends then.
    fn make_whole(&self, spec: &VmSpec) -> Result<(), ApiError> {
        let guest = self.built_backend()?.paged().unwrap_or(PagedGuest {
            format: spec
                .format
                .map_or_else(|| "ept4".to_owned(), |format| format.to_string()),
            vcpus: Vec::new(),
        });
        debug_assert!(spec.backend != Some(BackendKind::Kvm) || !guest.vcpus.is_empty());
        let work = Work {
            guest,
            watched: false,
            mapped: false,
            load_all: true,
        };
        self.pager.begin(work, self.memory.table().slots());
        let pager = |error| self.paged(error);
        self.pager.await_connected(COMES).map_err(pager)?;
        self.pager.load_all(ALL).map_err(pager)?;
        self.source_is_here();
        self.pager.end();
        Ok(())
    }
}
