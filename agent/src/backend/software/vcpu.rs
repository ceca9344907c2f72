//! A vCPU: a thread that runs memstress through a TLB of its own and the Common MMU's tables.
//!
//! The order of its steps is `shootdown`'s protocol. It pauses between batches, never within one: a batch is the guest's
//! instruction as far as its state is concerned. Within a batch it obeys flushes at each access.
//!
//! *Locking*: takes the MMU's lock (in faults), the frames' (in misses), its mailbox's and the gate's, one at a time.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    thread,
    time::Instant,
};

use slat_mmu::{Access, Fault, FaultOutcome, Gfn, PAGE_SIZE};

use super::{
    Vm,
    gate::Next,
    tlb::{Fill, Stale, Tlb},
};
use crate::{
    guest::memstress::{GuestAccess, Pacer, Turn, run_batch},
    vm::memory::Mapping,
};

/// Why the guest cannot go on.
#[derive(Debug, thiserror::Error)]
pub(super) enum AccessError {
    #[error("the guest accessed {gpa:#x}, where there is no memory")]
    NoSlot { gpa: u64 },
    #[error("the guest wrote to {gpa:#x}, which is read-only")]
    ReadOnly { gpa: u64 },
    #[error("the guest accessed {gpa:#x}, beyond what its page-table format reaches")]
    OutOfRange { gpa: u64 },
    #[error("the guest accessed {gpa:#x}, which is not a multiple of 8")]
    Unaligned { gpa: u64 },
    #[error("no table memory left to map {gpa:#x}")]
    OutOfMemory { gpa: u64 },
    #[error("the page tables on the way to {gpa:#x} are damaged")]
    BadEntry { gpa: u64 },
    #[error("the tables map {gpa:#x} to memory that no slot has")]
    NoFrame { gpa: u64 },
    #[error(transparent)]
    Stale(#[from] Stale),
}

#[derive(Debug)]
pub(super) struct Vcpu {
    vm: Arc<Vm>,
    number: u32,
    tlb: Tlb,
    /// Number of the last flush obeyed.
    obeyed: u64,
    pacer: Pacer,
}

impl Vcpu {
    pub(super) fn new(vm: Arc<Vm>, number: u32) -> Self {
        Self {
            vm,
            number,
            tlb: Tlb::new(),
            obeyed: 0,
            pacer: Pacer::new(),
        }
    }

    /// The thread's whole life.
    pub(super) fn live(mut self) {
        let mut next = self.vm.gate.wait();
        while next == Next::Run {
            // A panic here is a bug, but one that must not leave a sender or the owner waiting for ever.
            let ended = catch_unwind(AssertUnwindSafe(|| self.run()));
            self.vm.shootdown.leave(self.index());
            match ended {
                Ok(Ok(())) => {}
                Ok(Err(error)) => self.fail(&error.to_string()),
                Err(_) => self.fail("its thread panicked"),
            }
            next = self.vm.gate.rest();
        }
    }

    fn fail(&self, message: &str) {
        self.vm
            .gate
            .fail(format!("vCPU {}: {message}", self.number));
    }

    fn run(&mut self) -> Result<(), AccessError> {
        self.enter();
        while self.vm.gate.running() {
            let mut pacer = std::mem::take(&mut self.pacer);
            let turn = pacer.turn(self, self.number, Instant::now());
            self.pacer = pacer;
            let wait = match turn? {
                Turn::Go => {
                    run_batch(self, self.number)?;
                    continue;
                }
                Turn::Wait(time) => Some(time),
                Turn::Idle => None,
            };
            self.vm.shootdown.leave(self.index());
            self.vm.gate.doze(wait);
            self.enter();
        }
        Ok(())
    }

    fn index(&self) -> usize {
        self.number as usize
    }

    fn enter(&mut self) {
        self.vm.shootdown.enter(self.index());
        self.obey();
    }

    /// Obeys the flushes that were posted, if any.
    fn obey(&mut self) {
        if self.vm.shootdown.posted(self.index()) == self.obeyed {
            return;
        }
        let (number, flush) = self.vm.shootdown.take(self.index());
        #[cfg(test)]
        let flush = if self.vm.deaf.load(std::sync::atomic::Ordering::Relaxed) {
            slat_mmu::Flush::None
        } else {
            flush
        };
        self.tlb.flush(flush);
        self.obeyed = number;
        self.vm.shootdown.acknowledge(self.index(), number);
    }

    /// The memory behind an address, and the offset in it. It may be used until the next obeying.
    fn memory(&mut self, gpa: u64, write: bool) -> Result<(&Mapping, usize), AccessError> {
        if !gpa.is_multiple_of(8) {
            return Err(AccessError::Unaligned { gpa });
        }
        let gfn = Gfn::from_gpa(gpa);
        let hit = loop {
            self.obey();
            match self.tlb.find(gfn.0, write, &self.vm.shootdown)? {
                Some(hit) => break hit,
                None => self.miss(gpa, gfn, write)?,
            }
        };
        let (mapping, page) = self.tlb.memory(hit).ok_or(AccessError::NoFrame { gpa })?;
        Ok((mapping, (page * PAGE_SIZE + gpa % PAGE_SIZE) as usize))
    }

    /// Fills the TLB, or the tables for the next try.
    fn miss(&mut self, gpa: u64, gfn: Gfn, write: bool) -> Result<(), AccessError> {
        let access = if write { Access::Write } else { Access::Read };
        let completions = self.vm.shootdown.completions();
        if let Ok(found) = self.vm.mmu.access(gfn, access) {
            let frame = self.vm.frames.find(found.pfn.0);
            let (mapping, page) = frame.ok_or(AccessError::NoFrame { gpa })?;
            let fill = Fill {
                gfn: gfn.0,
                level: found.level,
                writable: found.writable,
                mapping,
                page,
                walked: self.obeyed,
            };
            self.tlb.fill(fill, completions);
            return Ok(());
        }
        match self.vm.mmu.fault(Fault::new(gfn, access)) {
            FaultOutcome::Fixed { flush, .. } => {
                self.tlb.drop_frame(gfn.0);
                if !flush.is_none() {
                    // Outside, so that another sender does not wait for this one.
                    self.vm.shootdown.leave(self.index());
                    self.vm.shootdown.flush(flush);
                    self.enter();
                }
                Ok(())
            }
            FaultOutcome::Spurious { .. } => {
                self.tlb.drop_frame(gfn.0);
                Ok(())
            }
            FaultOutcome::Retry => {
                thread::yield_now();
                Ok(())
            }
            FaultOutcome::NoSlot => Err(AccessError::NoSlot { gpa }),
            FaultOutcome::ReadOnly => Err(AccessError::ReadOnly { gpa }),
            FaultOutcome::OutOfRange => Err(AccessError::OutOfRange { gpa }),
            FaultOutcome::OutOfMemory => Err(AccessError::OutOfMemory { gpa }),
            // Also what a later version of the MMU may answer: nothing this vCPU could go on from.
            _ => Err(AccessError::BadEntry { gpa }),
        }
    }
}

impl GuestAccess for Vcpu {
    type Error = AccessError;

    fn read_u64(&mut self, gpa: u64) -> Result<u64, AccessError> {
        let (mapping, offset) = self.memory(gpa, false)?;
        Ok(mapping.load(offset))
    }

    fn write_u64(&mut self, gpa: u64, value: u64) -> Result<(), AccessError> {
        let (mapping, offset) = self.memory(gpa, true)?;
        mapping.store(offset, value);
        Ok(())
    }
}
