//! Which phases of a migration are final. At the bottom: store, protocol and pages all ask.

use slat_proto::v1::MigrationPhase;

/// Whether a migration in this phase has ended.
pub(crate) const fn has_ended(phase: MigrationPhase) -> bool {
    matches!(
        phase,
        MigrationPhase::Completed | MigrationPhase::Cancelled | MigrationPhase::Failed
    )
}
