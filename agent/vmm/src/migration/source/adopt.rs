//! The order to take back a VM that was given away, carried out by the thread that has it: the
//! coordinator has left by then.

use slat_proto::{ApiError, Reason, v1::TransferPhase};

use super::parts::cursor;
use crate::{
    handover::{
        protocol::{
            Written,
            source::{Action, End, Input, Source},
        },
        side::Side,
    },
    machine::Machine,
};

/// Takes the VM back at `epoch`. No effect when it was taken back already. Callers come one at a
/// time.
///
/// # Errors
/// VM_STATE unless the side is RELINQUISHED and waits for nothing more; as [`Machine::adopt`]: the
/// side is then as before.
pub(crate) fn take_back(
    machine: &Machine,
    side: &Side<Source>,
    epoch: u64,
) -> Result<(), ApiError> {
    if side.machine(Source::ended) == Some(End::TakenBack) {
        return Ok(());
    }
    let mut failed = None;
    if side.has_left() {
        side.feed(Input::Adopt);
        while let Some(action) = side.next() {
            match action {
                Action::JournalAdopted => {
                    let written = match machine.adopt(side.migration(), epoch) {
                        Ok(_) => Written::Durable,
                        Err(error) => {
                            let written = if error.reason == Reason::Journal {
                                Written::Unknown
                            } else {
                                Written::Refused
                            };
                            failed = Some(error);
                            written
                        }
                    };
                    side.feed(Input::AdoptionWritten(written));
                }
                Action::StopLogging => stop_logging(machine),
                Action::RecordEnd(End::TakenBack) => record(machine, side, epoch),
                // Nothing else follows from the order.
                _ => {}
            }
        }
    }
    if let Some(error) = failed {
        return Err(error);
    }
    if side.machine(Source::ended) == Some(End::TakenBack) {
        return Ok(());
    }
    let phase = side.phase();
    let advice = match phase {
        TransferPhase::Completed => "the destination said that it has the VM: delete what is left",
        TransferPhase::Relinquished => "the answer to COMMIT is still waited for: try again",
        _ => "the VM was not given away",
    };
    Err(ApiError::new(
        Reason::VmState,
        format!(
            "the side of {} is {} and its VM cannot be taken back",
            side.migration(),
            phase.as_str_name()
        ),
    )
    .with("migration", side.migration())
    .with("phase", phase.as_str_name())
    .with("advice", advice))
}

fn stop_logging(machine: &Machine) {
    match cursor().and_then(|cursor| machine.dirty().detach(&cursor)) {
        Ok(()) => {}
        Err(error) if error.reason == Reason::NoSuchCursor => {}
        Err(error) => tracing::error!(%error, "dirty logging could not be turned off"),
    }
}

/// As a side that kept its VM: a destination in doubt that asks gives up.
fn record(machine: &Machine, side: &Side<Source>, epoch: u64) {
    let error = ApiError::new(
        Reason::CancelledByUser,
        format!("an operator took the VM back at its source, at epoch {epoch}"),
    )
    .to_migration_error(slat_proto::v1::MigrationPhase::Switchover, "source");
    side.end(machine.dir(), TransferPhase::Cancelled, Some(error));
}
