//! Failures of the data path.

use std::io;

use slat_proto::{ApiError, Reason};

/// Metadata of an error that the other side told.
pub(crate) const TOLD: &str = "told_by";

/// A failure of the data path.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum WireError {
    /// A header or payload that the protocol does not allow.
    #[error("bad frame: {field}: {message}")]
    Corrupt {
        field: &'static str,
        message: String,
    },
    /// A frame of another version than the one that was agreed on.
    #[error("bad frame: protocol version {found}, {agreed} was agreed on")]
    Version { found: u32, agreed: u32 },
    /// A run outside its slot.
    #[error("slot {slot}, page {page:#x} + {pages}: outside the declared slots")]
    OutOfSlot { slot: u32, page: u64, pages: u64 },
    /// The connection broke or ended.
    #[error("connection: {0}")]
    Io(#[from] io::Error),
    /// The other side gave up.
    #[error("the other side gave up: {0}")]
    Aborted(ApiError),
}

impl WireError {
    pub(crate) fn corrupt(field: &'static str, message: impl ToString) -> Self {
        Self::Corrupt {
            field,
            message: message.to_string(),
        }
    }
}

fn lost(message: &str) -> ApiError {
    ApiError::new(Reason::ConnectionLost, message).with(
        "advice",
        "migrate again; if it repeats, see the log of the other host and the network between both",
    )
}

impl From<WireError> for ApiError {
    fn from(error: WireError) -> Self {
        let message = error.to_string();
        match error {
            WireError::Corrupt { field, .. } => {
                ApiError::new(Reason::StreamCorrupt, message).with("field", field)
            }
            WireError::Version { found, agreed } => {
                ApiError::new(Reason::StateVersionUnsupported, message)
                    .with("found", found)
                    .with("agreed", agreed)
            }
            WireError::OutOfSlot { slot, page, .. } => {
                ApiError::new(Reason::PageOutOfSlot, message)
                    .with("slot", slot)
                    .with("page", page)
            }
            WireError::Io(source)
                if matches!(
                    source.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
                ) =>
            {
                ApiError::new(
                    Reason::ProgressStalled,
                    "the other side neither sends nor takes data",
                )
            }
            WireError::Io(source) if source.kind() == io::ErrorKind::UnexpectedEof => lost(
                "the other side closed the connection in mid-migration: its process ended, or its host did",
            ),
            WireError::Io(_) => lost(&message),
            WireError::Aborted(error) => error.with(TOLD, "the other side"),
        }
    }
}
