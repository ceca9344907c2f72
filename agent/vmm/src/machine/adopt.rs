//! A VM that was given away, taken back by an operator.
//!
//! Whether another process runs it cannot be known here: whoever orders this asserts that none
//! does. What is made sure of is the order of things: ADOPTED is durable, above every epoch that
//! the destination could have, before a vCPU may run.

use slat_proto::{ApiError, Reason, model::MigrationName, v1};
use slat_record::journal::{Entry, Ownership};

use super::{
    Fence, Machine,
    view::{Participation, State},
};

impl Machine {
    /// Takes a RELINQUISHED VM back at `epoch`: journals ADOPTED, state PAUSED.
    ///
    /// # Errors
    /// NO_SUCH_VM; NO_SUCH_MIGRATION; VM_STATE unless RELINQUISHED; STALE_EPOCH when `epoch` is not
    /// above the destination's; JOURNAL: the entry may be durable, the VM stays RELINQUISHED, and
    /// the call can be made again.
    pub(crate) fn adopt(&self, migration: &MigrationName, epoch: u64) -> Result<v1::Vm, ApiError> {
        let mut control = self.control();
        let view = self.shared.view();
        self.shared.identity(&view)?;
        if view.state != State::Relinquished || control.fence != Fence::Up {
            return Err(self.shared.bad_state(&view, "be taken back"));
        }
        if view.participation.migration() != Some(migration) {
            return Err(self.shared.no_such_migration(migration));
        }
        if epoch <= view.epoch.saturating_add(1) || epoch == u64::MAX {
            return Err(ApiError::new(
                Reason::StaleEpoch,
                format!(
                    "epoch {epoch} is not above the one that the destination of {migration} may have: {}",
                    view.epoch.saturating_add(1)
                ),
            )
            .with("vm", &self.shared.vm)
            .with("epoch", view.epoch));
        }
        // An order before this one may have reached the file: then its epoch is the VM's.
        control.journal.settle()?;
        let epoch = match control.journal.state().map(|state| &state.ownership) {
            Some(Ownership::Owner { epoch: adopted }) if *adopted > view.epoch => *adopted,
            _ => {
                control.journal.append(&Entry::Adopted {
                    uid: view.uid(),
                    epoch,
                })?;
                epoch
            }
        };
        control.fence = Fence::Down;
        self.shared.change(|view| {
            view.state = State::Paused;
            view.message.clear();
            view.epoch = epoch;
            view.participation = Participation::None;
        });
        // The destination may have given out numbers of its own.
        self.go_on_counting(None);
        tracing::warn!(vm = %self.shared.vm, %migration, epoch, "taken back on an operator's order");
        self.shown()
    }
}
