//! A vCPU: a thread that runs memstress through a TLB of its own and the Common MMU's tables.
//!
//! The order of its steps is `shootdown`'s protocol. It pauses between batches, never within one: a
//! batch is the guest's instruction as far as its state is concerned. Within a batch it obeys
//! flushes at each access.
//!
//! # A miss
//! *Inside* the guest it only walks, as hardware would: [`SecondStage::access`] sets Accessed and
//! Dirty where the format's hardware does, and tells the dirty log. It takes no lock, but when the
//! root was withdrawn: then it moves to the next one, and may wait for a lock whose holder never
//! waits for a flush, so a flush can still wait for this vCPU. A fault is taken *outside*, because
//! it takes the MMU's lock, whose holder may be waiting for this vCPU to obey. What the walk said
//! goes along: a mapping that is there and does not allow the access is worth the path without the
//! lock. After a full flush the root may be another: it is loaded, outside, before the next walk.
//!
//! *Locking*: takes the MMU's lock shared (in faults, outside), its own view's of the frames (in
//! misses), its own mailbox's, and the gate's when it sleeps; one at a time. None of these is held
//! by another vCPU that does the same; the MMU's table memory has a lock that vCPUs share, for a
//! few instructions in every dozen new tables.
//!
//! [`SecondStage::access`]: slat_mmu::SecondStage::access

use std::{
    fmt::Display,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, atomic::Ordering::Relaxed},
    thread,
    time::Instant,
};

use slat_mmu::{Access, Fault, FaultOutcome, Flush, Gfn, PAGE_SIZE, WalkFault};

use super::{
    frames::FrameView,
    gate::Next,
    shared::VmCore,
    tlb::{Fill, Stale, Tag, Tlb},
};
use crate::{
    guest::memstress::{GuestAccess, Pacer, Turn, run_batch},
    memory::GuestView,
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
    #[error("no memory for the root of the page tables")]
    NoRoot,
    #[error(transparent)]
    Stale(#[from] Stale),
}

#[derive(Debug)]
pub(super) struct Vcpu {
    vm: Arc<VmCore>,
    number: u32,
    /// Its part of the MMU.
    pub(super) context: slat_mmu::Vcpu,
    frames: Arc<FrameView>,
    pub(super) tlb: Tlb,
    /// Number of the last flush obeyed.
    obeyed: u64,
    /// A full flush was obeyed, or it never ran: the root is to be loaded before the next walk.
    reload: bool,
    pacer: Pacer,
}

impl Vcpu {
    pub(super) fn new(vm: Arc<VmCore>, number: u32) -> Self {
        Self {
            context: vm.mmu.vcpu(),
            frames: vm.frames.view(number as usize),
            vm,
            number,
            tlb: Tlb::new(),
            obeyed: 0,
            reload: true,
            pacer: Pacer::new(),
        }
    }

    /// The thread's whole life.
    pub(super) fn live(self) {
        self.live_by(Self::run);
    }

    /// The same with another program: it enters the guest, and returns when it is to rest.
    pub(super) fn live_by<E: Display>(mut self, mut run: impl FnMut(&mut Self) -> Result<(), E>) {
        let mut next = self.vm.gate.wait();
        while next == Next::Run {
            // A panic here is a bug, but one that must not leave a sender or the owner waiting for
            // ever.
            let ended = catch_unwind(AssertUnwindSafe(|| run(&mut self)));
            self.leave();
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
            self.leave();
            self.vm.gate.doze(wait);
            self.enter();
        }
        Ok(())
    }

    fn index(&self) -> usize {
        self.number as usize
    }

    pub(super) fn enter(&mut self) {
        self.vm.shootdown.enter(self.index());
        self.retag();
        self.obey();
    }

    /// The TLB follows the root: after whatever may have loaded another.
    fn retag(&mut self) {
        if self.vm.port.follows_root() {
            self.tlb.load(Tag::of(&self.context));
        }
    }

    pub(super) fn leave(&self) {
        self.vm.shootdown.leave(self.index());
    }

    /// Obeys the flushes that were posted, if any.
    fn obey(&mut self) {
        if self.vm.shootdown.posted(self.index()) == self.obeyed {
            return;
        }
        let (number, flush) = self.vm.shootdown.take(self.index());
        self.reload |= flush == Flush::All;
        self.tlb.flush(self.vm.port.dropped(flush));
        self.obeyed = number;
        self.vm.shootdown.acknowledge(self.index(), number);
    }

    /// The memory behind an address, and the offset in it. It may be used until the next obeying.
    fn memory(&mut self, gpa: u64, write: bool) -> Result<(&GuestView, usize), AccessError> {
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
        if self.reload {
            return self.load_root();
        }
        let access = if write { Access::Write } else { Access::Read };
        let completions = self.vm.shootdown.completions();
        let walked = self.vm.mmu.access(&mut self.context, gfn, access);
        // The walk itself may have moved on to another root.
        self.retag();
        let fault = match walked {
            Ok(found) => {
                let frame = self.frames.find(found.pfn.0);
                let (mapping, page) = frame.ok_or(AccessError::NoFrame { gpa })?;
                let fill = Fill {
                    gfn: gfn.0,
                    level: found.level,
                    readable: found.readable,
                    writable: found.writable && found.dirty,
                    mapping,
                    page,
                    walked: self.obeyed,
                };
                self.tlb.fill(fill, completions);
                return Ok(());
            }
            Err(WalkFault::Permission | WalkFault::AccessedDirty) => {
                Fault::new(gfn, access).with_present()
            }
            Err(WalkFault::Malformed) => return Err(AccessError::BadEntry { gpa }),
            Err(_) => Fault::new(gfn, access),
        };
        self.leave();
        let Some(fault) = self.vm.port.page_in(&*self.vm.mmu, fault) else {
            self.enter();
            return Err(AccessError::NoFrame { gpa });
        };
        let outcome = self.vm.mmu.fault(&mut self.context, fault);
        if outcome == FaultOutcome::Retry {
            thread::yield_now();
        }
        self.enter();
        // What allowed less. `install_fence` would add nothing: it is for a TLB that remembers that
        // nothing was mapped, which some formats allow and this one does not do.
        self.tlb.drop_frame(gfn.0);
        match outcome {
            FaultOutcome::Fixed { .. } | FaultOutcome::Spurious { .. } | FaultOutcome::Retry => {
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

    fn load_root(&mut self) -> Result<(), AccessError> {
        self.leave();
        let root = self.vm.mmu.load_root(&mut self.context);
        // Cleared before entering: a full flush obeyed there asks for it again.
        self.reload = false;
        self.enter();
        root.map(drop).ok_or(AccessError::NoRoot)
    }
}

impl GuestAccess for Vcpu {
    type Error = AccessError;

    fn read_u64(&mut self, gpa: u64) -> Result<u64, AccessError> {
        let (mapping, offset) = self.memory(gpa, false)?;
        Ok(mapping.load(offset))
    }

    fn write_u64(&mut self, gpa: u64, value: u64) -> Result<(), AccessError> {
        match self.memory(gpa, true) {
            Ok((mapping, offset)) => mapping.store(offset, value),
            // As on KVM: the write changes nothing and the guest goes on.
            Err(AccessError::ReadOnly { .. }) => {
                self.vm.read_only_writes.fetch_add(1, Relaxed);
            }
            Err(error) => return Err(error),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use slat_arch::GuestStage;
    use slat_mmu::{MmuConfig, Pfn, SlotSpec};

    use super::{
        super::{
            port::Port,
            tables::{Budget, TableHeap},
        },
        *,
    };
    use crate::memory::Region;

    /// Complete flushes are not noted, so the check of stale translations finds nothing.
    #[derive(Debug)]
    struct Blind;

    impl Port for Blind {
        fn notes(&self) -> bool {
            false
        }
    }

    /// A slot of one page at frame 0, over new memory.
    fn plug(vm: &VmCore) -> Region {
        let region = Region::new("tags", 1).unwrap();
        let frames = vm.frames.add(region.guest(), 0).unwrap();
        let slot = SlotSpec::new(0, Gfn(0), 1, Pfn(frames));
        vm.mmu.create_slot(slot).unwrap();
        region
    }

    /// The full flush that goes with a new root is lost, and so is the check that finds such a
    /// loss.
    #[test]
    fn nothing_walked_from_a_withdrawn_root_is_used_under_the_next() {
        for stage in GuestStage::ALL {
            let budget = Arc::new(Budget::default());
            budget.limit_to(1 << 10);
            let tables = TableHeap::new(budget).unwrap();
            let (config, events) = (MmuConfig::default(), Arc::new(|_| {}));
            let vm = VmCore::new(stage, 1, config, tables, events, Arc::new(Blind));
            let mut vcpu = Vcpu::new(Arc::clone(&vm), 0);
            let old = plug(&vm);
            vcpu.enter();
            vcpu.write_u64(0, 1).unwrap();
            vcpu.leave();
            let withdrawn = vcpu.context.root();

            vm.mmu.space(0).delete_slot(0).unwrap();
            let new = plug(&vm);
            new.host().store(0, 2);
            vm.mmu.zap_all();
            (vcpu.obeyed, _) = vm.shootdown.take(0);
            vm.shootdown.acknowledge(0, vcpu.obeyed);
            vm.mmu.load_root(&mut vcpu.context).unwrap();
            vcpu.enter();
            assert_eq!(vcpu.read_u64(0).unwrap(), 2, "{stage}");
            vcpu.leave();
            assert_ne!(vcpu.context.root(), withdrawn, "{stage}");
            assert_eq!(old.host().load(0), 1, "{stage}");
        }
    }
}
