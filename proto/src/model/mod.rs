//! The strict types behind the API: what passed validation, in the units and ranges the rest of
//! Slat relies on.
//!
//! Each type is made from its message by a `try_from`-like function that answers BAD_PARAMETER or
//! BAD_SLOT_TABLE with the field at fault, and turns back into the message without loss.

mod migration;
mod name;
mod page;
mod ports;
mod slot;
mod time;
mod vm;

pub use migration::{MigrationParams, OnTimeout, Verify};
pub use name::{CursorName, HostName, MigrationName, VmName};
pub use page::{PageRequest, paginate};
pub use ports::PortRange;
pub use slot::{
    MAX_SLOT, MAX_SLOT_PAGES, PAGE_SIZE, SlotChange, SlotSpec, check_slot_table, slots_for_memory,
};
pub use time::{now, proto_duration, std_duration, timestamp};
pub use vm::{
    BackendKind, Format, GuestSpec, MemstressFill, MemstressPattern, MemstressSpec, RawImageSpec,
    VmSpec,
};
