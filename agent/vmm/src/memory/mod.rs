//! Guest memory: one memfd a slot, mapped shared for as long as anyone holds the slot.

mod digest;
mod dirty;
mod mapping;
mod slots;

pub use digest::{MemoryDigest, SlotDigest, digest_page, digest_slot};
pub use dirty::{API_CURSOR_IDLE, ApiHarvest, DirtyBatch, DirtyLog, MAX_CURSORS};
pub use mapping::Mapping;
pub use slots::{GuestMemory, SlotMemory, SlotTable};
