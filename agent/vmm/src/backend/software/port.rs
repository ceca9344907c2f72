//! What may stand between a vCPU, the MMU and the shoot-down: given from outside when the backend
//! is built.
//!
//! [`Direct`] lets everything through. A pager decides about a fault before the MMU does; whoever
//! wants to see that a broken backend is noticed breaks it here. Nothing on the path of an access
//! is here, only what happens on a miss or a flush, so that the port costs nothing that can be
//! measured.

use std::fmt;

use slat_mmu::{Fault, Flush, SecondStage};

/// See the module. What is not overridden changes nothing.
pub(super) trait Port: fmt::Debug + Send + Sync {
    /// The host's memory management, between a vCPU's fault and the MMU. Called outside the guest.
    /// `None`: the host refuses the memory.
    fn page_in(&self, _mmu: &dyn SecondStage, fault: Fault) -> Option<Fault> {
        Some(fault)
    }

    /// What a vCPU drops from its TLB of a flush that it acknowledges.
    fn dropped(&self, flush: Flush) -> Flush {
        flush
    }

    /// Whether a vCPU's TLB follows its root.
    fn follows_root(&self) -> bool {
        true
    }

    /// Whether a complete flush is noted for the check of stale translations.
    fn notes(&self) -> bool {
        true
    }
}

/// Everything goes through as it is.
#[derive(Debug)]
pub(super) struct Direct;

impl Port for Direct {}
