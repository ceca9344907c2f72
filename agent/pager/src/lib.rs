//! Resolves a guest's page faults by the Common MMU, and writes saved VMs.
//!
//! ADR 9 (`docs/adr/0009-paging-by-the-mmu.md`) says who does what. [`run`] is a whole pager: it
//! serves one VM process over one connection ([`slat_paging::wire`]) and ends with it. It opens no
//! file: all descriptors are handed to it. It is a process of its own, with threads of its own
//! (`shared` lists them, and the order of locks), and may be killed at any time: the VM process
//! drops what was mapped, wakes who waits, and the next pager goes on.

mod aged;
mod asks;
mod bell;
mod dialect;
mod drops;
mod early;
mod error;
mod faults;
mod guard;
mod hear;
mod layout;
mod load;
mod memory;
mod mirror;
mod noted;
mod options;
mod owner;
mod page_file;
mod pager;
mod problems;
mod queue;
mod resolve;
mod shared;
mod snapshots;
mod source;
mod stats;
mod sweep;
mod sync;
mod tables;
mod ticker;
mod window;
pub mod writer;

pub use self::{
    error::{PagerError, Trouble},
    options::{Options, Tuning},
    pager::{connect, run, run_with},
    source::{Contents, Source},
};
