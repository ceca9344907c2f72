//! How resources read: their columns and pages, short words for enums, and the progress of a
//! migration while it runs. How they are printed is [`crate::output`]'s.

mod host;
mod leftover;
mod migration;
mod pace;
mod paging;
mod path;
mod phases;
mod progress;
mod save;
mod vm;
mod words;

pub(crate) use leftover::leftover_words;
pub(crate) use pace::iterations;
pub(crate) use path::page_path;
pub(crate) use progress::Progress;
pub(crate) use save::{SaveProgress, saved};
pub(crate) use vm::prefault;
pub(crate) use words::{
    backend, ended, format, id, per_second, phase, short, span, verification, vm_state,
};
