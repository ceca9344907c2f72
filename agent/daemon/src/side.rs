//! What names a side of a migration: the migration, and source or destination.

use slat_proto::{ApiError, Reason, model::MigrationName, v1};

/// Which side of a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Role {
    Source,
    Destination,
}

impl Role {
    pub(super) fn from_field(value: i32) -> Result<Self, ApiError> {
        match v1::TransferRole::try_from(value) {
            Ok(v1::TransferRole::Source) => Ok(Self::Source),
            Ok(v1::TransferRole::Destination) => Ok(Self::Destination),
            _ => {
                Err(ApiError::bad_parameter("role", "is SOURCE or DESTINATION")
                    .with("value", value))
            }
        }
    }

    pub(super) fn to_message(self) -> v1::TransferRole {
        match self {
            Self::Source => v1::TransferRole::Source,
            Self::Destination => v1::TransferRole::Destination,
        }
    }

    /// As in error metadata (`side`).
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Destination => "destination",
        }
    }
}

/// One side of one migration.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct SideKey {
    pub(super) migration: MigrationName,
    pub(super) role: Role,
}

impl SideKey {
    /// From a request's fields.
    pub(super) fn from_fields(migration: &str, role: i32) -> Result<Self, ApiError> {
        Ok(Self {
            migration: MigrationName::parse(migration)?,
            role: Role::from_field(role)?,
        })
    }

    /// Of a transfer; `None` when it names no migration or side.
    pub(super) fn of(transfer: &v1::Transfer) -> Option<Self> {
        Self::from_fields(&transfer.migration, transfer.role).ok()
    }

    pub(super) fn source(migration: MigrationName) -> Self {
        Self {
            migration,
            role: Role::Source,
        }
    }

    pub(super) fn destination(migration: MigrationName) -> Self {
        Self {
            migration,
            role: Role::Destination,
        }
    }

    /// Whether a journal's `{migration}` is this side's.
    pub(super) fn is_of(&self, written: &str) -> bool {
        MigrationName::parse(written).is_ok_and(|written| written == self.migration)
    }

    /// No such side at this endpoint.
    pub(super) fn unknown(&self) -> ApiError {
        ApiError::new(
            Reason::NoSuchMigration,
            format!("no {} side of {} here", self.role.as_str(), self.migration),
        )
        .with("migration", &self.migration)
        .with("side", self.role.as_str())
    }
}

/// Whether a side ended by itself; RELINQUISHED and READY wait for the other side.
pub(super) fn is_terminal(phase: v1::TransferPhase) -> bool {
    matches!(
        phase,
        v1::TransferPhase::Completed | v1::TransferPhase::Cancelled | v1::TransferPhase::Failed
    )
}
