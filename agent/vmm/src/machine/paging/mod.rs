//! A VM whose memory is watched: its faults are resolved by a pager ([`crate::pager`]).
//!
//! | file | what |
//! |---|---|
//! | `watch` | whether memory can be watched; beginning and ending it |
//! | `keeper` | the thread that does so when nobody waits for it |
//! | `snapshot` | memory and state of one moment |
//! | `still` | the same with the vCPUs stopped, where memory cannot be watched |
//! | `copy` | a VM made of a snapshot |
//! | `reads` | what our own threads read, and have brought before |
//! | `ask` | working set, mappings, a source that is tried again |
//! | `readers` | named readers of the working set |
//! | `prefault` | pages that are mapped before the guest touches them |
//! | `touched` | what a saved VM's file says of its working set |
//! | `slots` | slots that come, go and move |
//! | `status` | what is shown of it |
//!
//! *Locking*: `readers` is a leaf, held for changes of bitmaps. `watching` is a leaf, changed under
//! `control` but for the keeper's news. Views are registered and unregistered under `control`, with
//! the collapser kept out: what it does to memory takes mappings away behind the pager's back.
//! Calls that wait for a pager hold `control`, except those that wait for one to come, the listing
//! of what a save's guest touched, and the arming of a snapshot; the pager's threads never take it.
//! Whoever deletes the VM or ends its process makes those that wait give up before it takes
//! `control`.

mod ask;
mod copy;
mod keeper;
mod prefault;
mod readers;
mod reads;
mod slots;
mod snapshot;
mod status;
mod still;
mod touched;
mod watch;

#[cfg(test)]
pub(crate) use self::keeper::ServedPagers;
pub(crate) use self::{copy::CopyOrder, snapshot::Taken};
