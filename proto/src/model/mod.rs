//! The strict types behind the API: what passed validation, in the units and ranges the rest of
//! Slat relies on.
//!
//! Each type is made from its message by a `try_from`-like function that answers BAD_PARAMETER or
//! BAD_SLOT_TABLE with the field at fault, and turns back into the message without loss.

mod backing;
mod dirty;
mod grant;
mod history;
mod labels;
mod memstress;
mod migration;
mod name;
mod page;
mod paging;
mod ports;
mod slot;
mod slot_change;
mod time;
mod vm;
mod vm_ref;

pub use backing::{MemoryBacking, ordinary_bytes};
pub use dirty::DirtyRateOrder;
pub use grant::{key_from_message, key_message, refused_grant, signed_grant};
pub use history::HISTORY_ENDS;
pub use labels::Labels;
pub use memstress::{MemstressFill, MemstressPattern, MemstressSpec};
pub use migration::{MigrationParams, OnOverrun, OnTimeout, Verify};
pub use name::{CursorName, HostName, MigrationName, SaveName, VmName, children_of};
pub use page::{PageRequest, paginate};
pub use paging::Paging;
pub use ports::PortRange;
pub use slot::{MAX_SLOT, MAX_SLOT_PAGES, PAGE_SIZE, SlotSpec, check_slot_table, slots_for_memory};
pub use slot_change::{MAX_SLOT_CHANGES, SlotChange, SlotPlan};
pub use time::{
    Timeline, duration_nanos, nanos_duration, nanos_timestamp, now, proto_duration, std_duration,
    system_time, timestamp, timestamp_nanos, to_own_clock,
};
pub use vm::{BackendKind, DirtyEngine, Format, GuestSpec, RawImageSpec, VmSpec};
pub use vm_ref::{VmRef, is_uid};
