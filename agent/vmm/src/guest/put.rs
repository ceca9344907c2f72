//! Writing a guest into memory, and why that fails.

use slat_proto::{ApiError, Reason};

use crate::memory::SlotTable;

/// Why a guest cannot be put into memory.
#[derive(Debug, thiserror::Error)]
pub(crate) enum GuestError {
    /// No slots can be made for that much memory.
    #[error("guest memory: {0}")]
    Memory(#[from] ApiError),
    /// The image does not fit between its load address and the page tables.
    #[error("the image has {bytes} bytes; this VM's memory holds {limit}")]
    ImageTooLarge {
        /// Its length.
        bytes: u64,
        /// What fits.
        limit: u64,
    },
    /// The slot table is not the one the VM's size asks for.
    #[error("no guest memory at {gpa:#x}, where the guest's {what} belongs")]
    NoMemory {
        /// Guest-physical address.
        gpa: u64,
        /// What was to be written.
        what: &'static str,
    },
    /// A thread could not be made.
    #[error("filling guest memory: {0}")]
    Thread(#[source] std::io::Error),
}

impl From<GuestError> for ApiError {
    fn from(error: GuestError) -> Self {
        let message = error.to_string();
        match error {
            GuestError::Memory(error) => error,
            GuestError::ImageTooLarge { bytes, limit } => {
                ApiError::bad_parameter("spec.raw_image.image", message)
                    .with("bytes", bytes)
                    .with("limit", limit)
            }
            GuestError::NoMemory { gpa, .. } => {
                ApiError::new(Reason::BadSlotTable, message).with("gpa", gpa)
            }
            GuestError::Thread(_) => ApiError::new(Reason::Internal, message),
        }
    }
}

/// Writes `bytes`; `what` they are is for the error.
pub(super) fn put(
    memory: &SlotTable,
    gpa: u64,
    bytes: &[u8],
    what: &'static str,
) -> Result<(), GuestError> {
    if memory.write(gpa, bytes) {
        Ok(())
    } else {
        Err(GuestError::NoMemory { gpa, what })
    }
}
