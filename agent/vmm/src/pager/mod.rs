//! The VM process's end of its pager: what it is told, asked and answered, and the socket on which
//! it and the host's agent connect.
//!
//! The pager is a process of its own, which resolves the guest's faults (ADR 9,
//! `docs/adr/0009-paging-by-the-mmu.md`). What this process keeps for it outlives it: memory files,
//! bitmaps, the layers of a page source, snapshots. A pager that dies is followed by another, which
//! is told the same; the guest waits at its next fault meanwhile.
//!
//! | file | what |
//! |---|---|
//! | `error` | what can go wrong |
//! | `watching` | whether memory is to be watched, and why |
//! | `readers` | what each named reader of the working set has not been told |
//! | `watcher` | the process's userfaultfd |
//! | `layers` | a page source, kept with its descriptors |
//! | `asks` | questions without an answer |
//! | `snapshots` | files, marks and leases of snapshots |
//! | `state` | all of that under one lock, and how a pager is told of it |
//! | `silence` | how long a pager has said nothing |
//! | `desk` | what the machine does with it |
//! | `slots` | slots that come, go and move |
//! | `link`, `agent` | a connection of a pager, of an agent |
//! | `listener` | the socket |
//! | `offer` | what the host can do, for its agent |
//!
//! # Protocol
//! `slat_paging::wire` has the messages and their order. A pager may come before there is anything
//! to do for it: it then waits for its SETUP, at most two minutes.
//!
//! # Locking
//! One mutex, after all locks of the machine, the dirty log and the backend: nothing is taken under
//! it but the leaf of what is shown. Messages are sent under it, which keeps their order; a pager
//! that takes none for five seconds is given up. Connections' threads take nothing else, so whoever
//! waits for a pager may hold what it likes.
//!
//! # Invariants
//! At most one pager is set up. One that serves and says nothing for six seconds is given up. What
//! it is told is what is kept here: a later pager is told the same, and what changed since. Nothing
//! waits for a pager without a bound.

mod agent;
mod asks;
mod desk;
mod error;
mod layers;
mod link;
mod listener;
mod offer;
mod readers;
mod silence;
mod slots;
mod snapshots;
mod state;
mod watcher;
mod watching;

pub use self::offer::host_paging;
pub(crate) use self::{
    desk::{GivesWay, Pager},
    error::{PagerError, reason_of},
    listener::PagerSocket,
    readers::Readers,
    state::Work,
    watcher::Watcher,
    watching::{Step, Watching},
};
