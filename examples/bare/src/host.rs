//! Second of the two things a hypervisor implements: who carries out TLB flushes ([`Host`]).
//!
//! The machine has one CPU, and while the hypervisor runs the guest does not: a flush is done when
//! the CPU's TLB has dropped what was asked for. With more CPUs, [`Host::flush`] sends an interrupt
//! to each that is in the guest and waits until all have flushed or left it; it is called with the
//! MMU's lock held, so a CPU must acknowledge without calling into the MMU.

use core::sync::atomic::{AtomicU64, Ordering};

use slat_mmu::{Flush, FlushRequest, Host};

use crate::{lock::Lock, tlb::Tlb};

/// The machine's one CPU, as far as flushes concern it.
#[derive(Debug)]
pub(crate) struct BareHost {
    /// The CPU's TLB.
    pub(crate) tlb: Lock<Tlb>,
    flushes: AtomicU64,
}

impl BareHost {
    /// A machine with an empty TLB.
    pub(crate) fn new() -> Self {
        Self {
            tlb: Lock::new(Tlb::default()),
            flushes: AtomicU64::new(0),
        }
    }

    /// Flushes that the MMU has asked for.
    pub(crate) fn flushes(&self) -> u64 {
        self.flushes.load(Ordering::Relaxed)
    }

    /// A flush of the CPU's own, which nobody else has to know of.
    pub(crate) fn flush_locally(&self, flush: Flush) {
        self.tlb.with(|tlb| tlb.flush(flush));
    }
}

impl Host for BareHost {
    fn flush(&self, request: &FlushRequest) {
        self.flushes.fetch_add(1, Ordering::Relaxed);
        // `request.tables`: this TLB caches no pointers to tables, so there is nothing more to
        // drop.
        self.flush_locally(request.flush);
    }
}
