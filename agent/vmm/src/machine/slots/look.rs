//! What is read of a VM's memory as a whole: the slots, the digest, whether dirty pages may be
//! read.

use std::{num::NonZero, time::Duration};

use slat_proto::{ApiError, Reason, v1};

use super::super::{
    Machine,
    view::{Participation, State},
};
use crate::memory::{MemoryDigest, SlotTable};

/// Pages of a source are waited for so long, below what callers wait for a digest.
const LOADS: Duration = Duration::from_secs(240);

impl Machine {
    /// Digest of all guest memory. Life-cycle calls wait until it is done, so that nothing writes
    /// meanwhile.
    ///
    /// # Errors
    /// NO_SUCH_VM; VM_RUNNING; MIGRATION_IN_PROGRESS during the switchover, which it would
    /// lengthen.
    pub(crate) fn digest(&self) -> Result<MemoryDigest, ApiError> {
        self.load_source(LOADS)?;
        let _control = self.control();
        self.refuse_unloaded("be digested")?;
        // Under the lock: the switchover may have begun while this waited for it.
        self.refuse_at_once("be digested")?;
        let view = self.shared.view();
        self.shared.identity(&view)?;
        if view.state == State::Running {
            return Err(ApiError::new(
                Reason::VmRunning,
                format!(
                    "{} runs: its memory changes while it is read",
                    self.shared.vm
                ),
            )
            .with("vm", &self.shared.vm)
            .with("advice", "pause the VM"));
        }
        let threads = std::thread::available_parallelism().map_or(1, NonZero::get);
        Ok(MemoryDigest::of(&self.memory.table(), threads))
    }

    /// The slots as the API shows them.
    ///
    /// # Errors
    /// NO_SUCH_VM.
    pub(crate) fn list_slots(&self) -> Result<v1::ListSlotsResponse, ApiError> {
        self.shared.identity(&self.shared.view())?;
        let (slots, generation) = self.show_slots(&self.memory.table());
        Ok(v1::ListSlotsResponse {
            slots,
            generation,
            max_slots: self.built_backend()?.most_slots(),
            ..Default::default()
        })
    }

    /// A table as the API shows it, and its generation.
    pub(crate) fn show_slots(&self, table: &SlotTable) -> (Vec<v1::Slot>, u64) {
        let slots = table
            .slots()
            .iter()
            .map(|slot| v1::Slot {
                dirty_logging: self.dirty.slot_enabled(slot.spec().slot),
                ..slot.spec().to_message()
            })
            .collect();
        (slots, table.generation())
    }

    /// Whether the VM's memory is this process's: it has the VM, neither gave it away nor receives
    /// it.
    ///
    /// # Errors
    /// NO_SUCH_VM; STALE_EPOCH; VM_STATE, which says that it cannot do `what`.
    pub(super) fn check_memory_here(&self, what: &str) -> Result<(), ApiError> {
        let view = self.shared.view();
        self.shared.identity(&view)?;
        if view.state == State::Relinquished {
            return Err(self.shared.stale_epoch(&view));
        }
        if let Participation::Incoming { migration, .. } = &view.participation {
            return Err(self
                .shared
                .bad_state(&view, what)
                .with("migration", migration));
        }
        Ok(())
    }

    /// Whether callers may read dirty pages now.
    ///
    /// # Errors
    /// NO_SUCH_VM; STALE_EPOCH when handed over; VM_STATE while the VM is received;
    /// CAPABILITY_MISSING.
    pub(crate) fn check_dirty_readable(&self) -> Result<(), ApiError> {
        self.check_memory_here("report dirty pages")?;
        let capabilities = self.built_backend()?.capabilities();
        if capabilities.contains(&v1::Capability::DirtyLog) {
            return Ok(());
        }
        Err(ApiError::capability_missing(
            &self.shared.vm,
            v1::Capability::DirtyLog,
        ))
    }
}
