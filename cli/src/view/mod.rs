//! How resources read: short words for enums, rows for tables, a page for one host, VM or
//! migration, and the progress of a migration while it runs.

mod host;
mod migration;
mod progress;
mod vm;
mod words;

pub(crate) use host::{HOST_HEADS, host_page, host_row};
pub(crate) use migration::{MIGRATION_HEADS, migration_page, migration_row};
pub(crate) use progress::Progress;
pub(crate) use vm::{VM_HEADS, vm_page, vm_row};
pub(crate) use words::{
    backend, ended, format, id, per_second, phase, span, verification, vm_state,
};
