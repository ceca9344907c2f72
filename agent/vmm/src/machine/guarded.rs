//! The backend as the machine hands it out: to look, to save state and to invalidate, nothing else.
//!
//! Who runs vCPUs, changes slots or reads the dirty log without the machine breaks its invariants:
//! two owners, a table that is not the backend's, dirty pages that a reader never sees. So those
//! calls fail here whoever makes them.

use std::sync::Arc;

use slat_proto::v1;

use crate::{
    backend::{Backend, BackendError, CpuFact, EngineInUse, PagedGuest},
    memory::{DirtyError, DirtySource, SlotBitmaps, SlotMemory},
};

#[derive(Debug)]
pub(super) struct Guarded(pub(super) Arc<dyn Backend>);

fn refused<T>(what: &str) -> Result<T, BackendError> {
    Err(BackendError::Vcpu {
        message: format!("only the machine {what}"),
    })
}

impl DirtySource for Guarded {
    fn set_dirty_logging(&self, slot: u32, _: bool) -> Result<(), DirtyError> {
        Err(DirtyError::Refused {
            slot,
            message: "only the machine's dirty log switches logging".to_owned(),
        })
    }
    fn harvest_dirty(&self, into: &mut SlotBitmaps) -> Result<(), DirtyError> {
        Err(DirtyError::Refused {
            slot: into.keys().next().copied().unwrap_or(0),
            message: "only the machine's dirty log harvests".to_owned(),
        })
    }
}

impl Backend for Guarded {
    fn capabilities(&self) -> Vec<v1::Capability> {
        self.0.capabilities()
    }
    fn dirty_engine(&self) -> EngineInUse {
        self.0.dirty_engine()
    }
    fn cpu_facts(&self) -> Vec<CpuFact> {
        self.0.cpu_facts()
    }
    fn paged(&self) -> Option<PagedGuest> {
        self.0.paged()
    }
    fn most_slots(&self) -> u32 {
        self.0.most_slots()
    }
    fn add_slot(&self, _: &Arc<SlotMemory>) -> Result<(), BackendError> {
        refused("adds slots")
    }
    fn remove_slot(&self, _: u32) -> Result<(), BackendError> {
        refused("removes slots")
    }
    fn move_slot(&self, _: u32, _: u64) -> Result<(), BackendError> {
        refused("moves slots")
    }
    fn set_read_only(&self, _: u32, _: bool) -> Result<(), BackendError> {
        refused("changes slots")
    }
    fn invalidate(&self, gfn: u64, pages: u64) -> Result<(), BackendError> {
        self.0.invalidate(gfn, pages)
    }
    fn run(&self) -> Result<(), BackendError> {
        refused("runs vCPUs")
    }
    fn pause(&self) -> Result<(), BackendError> {
        refused("pauses vCPUs")
    }
    fn save_state(&self) -> Result<Vec<u8>, BackendError> {
        self.0.save_state()
    }
    fn load_state(&self, _: &[u8]) -> Result<(), BackendError> {
        refused("loads vCPU state")
    }
    fn stats(&self) -> v1::MmuStats {
        self.0.stats()
    }
}
