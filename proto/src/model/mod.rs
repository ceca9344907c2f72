//! The strict types behind the API: what passed validation, in the units and ranges the rest of
//! Slat relies on.
//!
//! Each type is made from its message by a `try_from`-like function that answers BAD_PARAMETER or
//! BAD_SLOT_TABLE with the field at fault, and turns back into the message without loss.

mod history;
mod migration;
mod name;
mod named;
mod page;
mod slot;
mod time;
mod vm;
mod vm_ref;

pub use history::HISTORY_ENDS;
pub use migration::{MigrationParams, OnOverrun, OnTimeout, Verify};
pub use name::{CursorName, HostName, MigrationName, VmName};
pub use named::NamedVm;
pub use page::{PageRequest, paginate};
pub use slot::{
    MAX_SLOT, MAX_SLOT_PAGES, PAGE_SIZE, SlotChange, SlotSpec, check_slot_table, slots_for_memory,
};
pub use time::{
    Timeline, duration_nanos, nanos_duration, nanos_timestamp, now, proto_duration, std_duration,
    timestamp, timestamp_nanos,
};
pub use vm::{
    BackendKind, Format, GuestSpec, MemstressFill, MemstressPattern, MemstressSpec, RawImageSpec,
    VmSpec,
};
pub use vm_ref::{VmRef, is_uid};
