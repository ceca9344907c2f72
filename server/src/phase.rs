//! Which phases are final. At the bottom: store, protocol, driver and pages all ask.

use slat_proto::v1::{MigrationPhase, TransferPhase};

/// Whether a migration in this phase has ended.
pub(crate) const fn has_ended(phase: MigrationPhase) -> bool {
    matches!(
        phase,
        MigrationPhase::Completed | MigrationPhase::Cancelled | MigrationPhase::Failed
    )
}

/// Whether a side in this phase has ended by itself: RELINQUISHED and READY wait for the other one.
pub(crate) const fn side_ended(phase: TransferPhase) -> bool {
    matches!(
        phase,
        TransferPhase::Completed | TransferPhase::Cancelled | TransferPhase::Failed
    )
}
