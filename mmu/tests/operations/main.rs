//! Single operations with the flushes they ask for, on every format.
//!
//! *Rig*: one MMU with one slot of 2048 pages, aligned to huge pages on both sides, one vCPU, and a
//! host that records flushes.

#![cfg(not(any(feature = "loom", feature = "shuttle")))]

#[path = "../common/mod.rs"]
mod common;
mod faults;
mod log;
mod roots;
mod slots;
mod spec;

use std::sync::Arc;

use common::Recorder;
use slat_arch::GuestStage;
use slat_mmu::{
    Access, AdPolicy, Arena, DirtyLogError, DirtyLogPolicy, DirtyLogStart, Entry, Fault,
    FaultOutcome, Flush, FlushCause, Gfn, GfnRange, Level, MemoryType, MmuConfig, Pfn,
    PrefaultError, SecondStage, SlotError, SlotFlags, SlotSpec, Translation, Vcpu, WalkFault,
};

const BASE: Gfn = Gfn(1024);
const PAGES: u64 = 2048;
const HOST: Pfn = Pfn(0x20_0000);

struct Rig {
    stage: GuestStage,
    arena: Arc<Arena>,
    host: Arc<Recorder>,
    mmu: Box<dyn SecondStage>,
    vcpu: Vcpu,
}

fn each_with(config: MmuConfig, test: impl Fn(&mut Rig)) {
    for stage in GuestStage::ALL {
        let arena = Arc::new(Arena::new(Pfn(0x1000), 768));
        let host = Arc::new(Recorder::default());
        let mmu = stage.build(Arc::clone(&arena), Arc::clone(&host), config);
        mmu.create_slot(SlotSpec::new(0, BASE, PAGES, HOST))
            .unwrap();
        let vcpu = mmu.vcpu();
        println!("{stage}");
        test(&mut Rig {
            stage,
            arena,
            host,
            mmu,
            vcpu,
        });
    }
}

fn each(test: impl Fn(&mut Rig)) {
    each_with(MmuConfig::default(), test);
}

impl Rig {
    fn fault(&mut self, fault: Fault) -> FaultOutcome {
        self.mmu.fault(&mut self.vcpu, fault)
    }

    fn touch(&mut self, gfn: u64, access: Access) -> FaultOutcome {
        self.fault(Fault::new(Gfn(gfn), access))
    }

    /// What a vCPU does: walks, and faults until the walk succeeds.
    fn run(&mut self, gfn: u64, access: Access) -> Translation {
        for _ in 0..4 {
            match self.mmu.access(&mut self.vcpu, Gfn(gfn), access) {
                Ok(to) => return to,
                Err(fault) => {
                    let present = matches!(fault, WalkFault::Permission | WalkFault::AccessedDirty);
                    let mut fault = Fault::new(Gfn(gfn), access);
                    fault.present = present;
                    let outcome = self.fault(fault);
                    assert!(
                        matches!(
                            outcome,
                            FaultOutcome::Fixed { .. } | FaultOutcome::Spurious { .. }
                        ),
                        "{outcome:?}"
                    );
                }
            }
        }
        panic!("{:#x} cannot be used", gfn);
    }

    fn pages(&self) -> (i64, i64) {
        let stats = self.mmu.stats();
        (
            stats.pages_at(Level::SIZE_4K),
            stats.pages_at(Level::SIZE_2M),
        )
    }

    /// Whether a page that lost its bit to the log faults at the next write.
    fn protects(&self) -> bool {
        self.stage.info().dirty_log == DirtyLogPolicy::WriteProtect
    }

    fn flushed(&self) -> Vec<(Flush, FlushCause)> {
        self.host.take()
    }
}

fn range(gfn: u64, pages: u64) -> Flush {
    Flush::Range {
        gfn: Gfn(gfn),
        pages,
    }
}

const fn fixed(level: Level) -> FaultOutcome {
    FaultOutcome::Fixed { level }
}

const fn spurious(level: Level) -> FaultOutcome {
    FaultOutcome::Spurious { level }
}

const SLOT: (u64, u64) = (BASE.0, PAGES);
