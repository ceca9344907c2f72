//! A virtual CPU: the loop that every hypervisor has around "enter the guest".
//!
//! 1. Load the root: the MMU may have withdrawn the old one. A new root means a flush of the CPU's
//!    own TLB, because entries may be tagged by something that stays the same.
//! 2. Enter. The processor looks into its TLB, walks on a miss, and traps when the walk does not
//!    end well.
//! 3. On a trap, outside the guest, ask the MMU to resolve it. *Fixed* and *spurious*: drop what
//!    the own TLB holds of the frame, and, where hardware remembers absent entries, what the MMU
//!    says that this owes ([`SecondStage::install_fence`]); then enter again. *Retry*: enter again.
//!    All else is for the device model, or ends the guest. (On arm64, `DSB ISHST` before entering.)
//!
//! Where the processor logs addresses as it sets Dirty (Intel PML), the log is drained into the
//! MMU's bitmap before a harvest and when it is full: [`VirtualCpu::drain`].

use alloc::{sync::Arc, vec::Vec};

use slat_mmu::{
    Access, Fault, FaultOutcome, Flush, Gfn, GfnRange, Pfn, Root, SecondStage, TdpMmu, Vcpu,
};

use crate::{
    frames::Frames,
    hardware::{self, Found, Manual, Trap},
    host::BareHost,
};

/// Times that one access is tried. The hypervisor answers a retry by doing what it was about to do:
/// here, by coming back.
const PATIENCE: usize = 8;
/// Entries in a processor's page-modification log.
const LOG_ENTRIES: usize = 512;

/// A guest's MMU.
pub(crate) type Mmu<M> = TdpMmu<M, Arc<Frames>>;

/// Why the vCPU cannot go on by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Exit {
    /// The MMU's answer to the fault.
    Fault(FaultOutcome),
    /// The processor does not accept the tables.
    Malformed,
}

/// A virtual CPU of a guest.
#[derive(Debug)]
pub(crate) struct VirtualCpu<'a, M: Manual> {
    mmu: &'a Mmu<M>,
    machine: &'a BareHost,
    memory: &'a Frames,
    /// The vCPU's part of the MMU.
    part: Vcpu,
    loaded: Option<Root>,
    log: Vec<Gfn>,
}

impl<'a, M: Manual> VirtualCpu<'a, M> {
    /// A vCPU that has not run yet.
    pub(crate) fn new(mmu: &'a Mmu<M>, machine: &'a BareHost, memory: &'a Frames) -> Self {
        Self {
            mmu,
            machine,
            memory,
            part: mmu.vcpu(),
            loaded: None,
            log: Vec::new(),
        }
    }

    /// The guest touches a frame; where it ended up.
    pub(crate) fn touch(&mut self, gfn: Gfn, access: Access) -> Result<Pfn, Exit> {
        let mut last = FaultOutcome::Retry;
        for _ in 0..PATIENCE {
            let Some(root) = self.mmu.load_root(&mut self.part) else {
                return Err(Exit::Fault(FaultOutcome::OutOfMemory));
            };
            if self.loaded.replace(root) != Some(root) {
                self.machine.flush_locally(Flush::All);
            }
            let trap = match self.enter(root, gfn, access) {
                Ok(pfn) => {
                    // A full log is a reason of its own to leave the guest.
                    if self.log.len() == LOG_ENTRIES {
                        self.drain();
                    }
                    return Ok(pfn);
                }
                Err(trap) => trap,
            };
            // The number is read before the memory behind the frame is looked for, so that the MMU
            // notices if it was taken back meanwhile. A hypervisor that pages would now make it
            // available.
            let fault = Fault::new(gfn, access).with_seq(self.mmu.invalidate_seq());
            let fault = match trap {
                Trap::NotPresent { .. } => fault,
                Trap::Permission | Trap::AccessedDirty => fault.with_present(),
                Trap::Malformed => return Err(Exit::Malformed),
            };
            last = self.mmu.fault(&mut self.part, fault);
            match last {
                FaultOutcome::Fixed { .. } | FaultOutcome::Spurious { .. } => {
                    let frame = Flush::range(GfnRange::new(gfn, 1));
                    let installed = self.mmu.install_fence(&mut self.part, gfn, last);
                    self.machine.flush_locally(frame.merge(installed));
                }
                FaultOutcome::Retry => {}
                other => return Err(Exit::Fault(other)),
            }
        }
        Err(Exit::Fault(last))
    }

    /// Runs the guest for one access: what a processor does between entry and exit.
    fn enter(&mut self, root: Root, gfn: Gfn, access: Access) -> Result<Pfn, Trap> {
        if let Some(pfn) = self.machine.tlb.with(|tlb| tlb.look_up(gfn, access)) {
            return Ok(pfn);
        }
        if self.machine.tlb.with(|tlb| tlb.is_absent(gfn)) {
            return Err(Trap::NotPresent { pages: 1 });
        }
        let found = hardware::walk::<M>(self.memory, M::register(root.pfn), gfn, access);
        if M::REMEMBERS_ABSENCE
            && let Err(Trap::NotPresent { pages }) = found
        {
            self.machine.tlb.with(|tlb| tlb.remember_absent(gfn, pages));
        }
        let found = found?;
        self.machine.tlb.with(|tlb| tlb.fill(gfn, found));
        if M::LOGS_WRITES && found.dirtied {
            self.log.push(gfn);
        }
        Ok(found.pfn)
    }

    /// Tells the MMU what the processor has logged. Before a harvest, for each vCPU, which must
    /// have left the guest for it.
    pub(crate) fn drain(&mut self) {
        for gfn in self.log.drain(..) {
            self.mmu.space(0).mark_dirty(GfnRange::new(gfn, 1));
        }
    }

    /// A walk beside the guest and past the TLB, to see what a processor would see.
    pub(crate) fn walk(&self, gfn: Gfn, access: Access) -> Result<Found, Trap> {
        let root = self
            .mmu
            .space(0)
            .root()
            .ok_or(Trap::NotPresent { pages: 1 })?;
        hardware::walk::<M>(self.memory, M::register(root.pfn), gfn, access)
    }
}
