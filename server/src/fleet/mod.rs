//! The fleet as its agents report it: hosts, the VMs on them, and the way to each agent.
//!
//! A VM is its uid, and its name a label that several may have.
//!
//! * `table` holds hosts and records and says what the fleet shows: plain data, no locks. Its parts
//!   are concepts of their own: whose record counts (`rank`, `epochs`), what a name means
//!   (`names`), one host's records (`records`) and which of them are another host's by now
//!   (`superseded`), whether it can be used (`contact`), where a new VM goes (`placing`,
//!   `placement`, `reservations`).
//! * `shared` has [`Fleet`]: the table behind one mutex, and a gRPC channel to each host's agent.
//! * `remember` writes what was seen to the store and reads it back at a start; `callback` calls
//!   agents back; `leftovers` says what adopting or deleting a leftover gives up. The first two are
//!   one task each, owned by the server.

mod callback;
mod contact;
mod epochs;
mod errors;
mod fenced;
mod leftovers;
mod names;
mod placement;
mod placing;
mod pools;
mod rank;
mod records;
mod remember;
mod reservations;
mod shared;
mod superseded;
mod table;
mod unsaved;

pub(crate) use self::{
    callback::call_back,
    errors::{fenced_meanwhile, host_unreachable, no_such_host, vm_exists},
    fenced::Fenceable,
    leftovers::{Ending, give_up_required, lives_elsewhere, taken_over},
    placement::{cannot_watch, why_not_watched},
    placing::memory_of,
    pools::NeededPages,
    remember::remember,
    shared::{BeingFenced, Fleet, Owner},
};
