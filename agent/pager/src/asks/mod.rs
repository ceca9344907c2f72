//! Carrying out what the VM process asks for.
//!
//! What only changes the mirror is done by one thread, in the order in which it was asked for:
//! *quick*. What may wait for a source (to load, to discard under a snapshot), or for many pages
//! (to arm) is done by others, so that it does not hold up the first: *slow*. To say the state has
//! a thread of its own, and to try again is done where it is heard. Each has a queue with a limit;
//! beyond it a request is refused.

mod contents;
mod frames;
mod layout;
mod prefault;
mod snapshot;
mod split;
mod thread;

pub(crate) use self::thread::{Asks, run_looks, run_quick, run_slow};
