//! A fault on its way down the tables.

use super::root::RootPage;
use crate::{fault::Fault, rcu::cell::Cell, slot::Memslot};

/// A fault on its way down: what does not change from level to level.
pub(super) struct Descent<'d> {
    pub(super) fault: &'d Fault,
    pub(super) slot: &'d Memslot,
    pub(super) root: &'d RootPage,
    pub(super) cell: &'d Cell,
    /// The generation of slots in which `slot` was found.
    pub(super) generation: u64,
}

/// The entry changed under us; judge it again.
pub(super) struct Changed;
