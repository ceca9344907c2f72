//! Mirror roots and the owner of the tables that they stand for, on every format. What happens when
//! the owner refuses at random is the model's; here are single refusals and their consequences.

#![cfg(not(any(feature = "loom", feature = "shuttle")))]

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
};

use slat_arch::GuestStage;
use slat_mmu::{
    Access, Arena, ExternalTables, Fault, FaultOutcome, FlushRequest, Gfn, GfnRange, Host, Leaf,
    Level, MmuConfig, NoTlb, Pfn, Refused, SecondStage, SlotFlags, SlotSpec, Vcpu,
};

const HOST: u64 = 0x20_0000;

#[derive(Debug, Default)]
struct Owner {
    refuse: AtomicBool,
    leaves: Mutex<BTreeMap<u64, Leaf>>,
    tables: Mutex<BTreeSet<u64>>,
}

impl Owner {
    fn answer(&self) -> Result<(), Refused> {
        if self.refuse.load(SeqCst) {
            Err(Refused)
        } else {
            Ok(())
        }
    }

    fn frames(&self) -> Vec<u64> {
        self.leaves.lock().unwrap().keys().copied().collect()
    }
}

impl Host for Owner {
    fn flush(&self, _: &FlushRequest) {}

    fn external(&self) -> Option<&dyn ExternalTables> {
        Some(self)
    }
}

impl ExternalTables for Owner {
    fn set_leaf(&self, gfn: Gfn, leaf: &Leaf) -> Result<(), Refused> {
        self.answer()?;
        self.leaves.lock().unwrap().insert(gfn.0, *leaf);
        Ok(())
    }

    fn link_table(&self, _: Gfn, _: Level, table: Pfn) -> Result<(), Refused> {
        self.answer()?;
        self.tables.lock().unwrap().insert(table.0);
        Ok(())
    }

    fn remove_leaf(&self, gfn: Gfn, pfn: Pfn) -> Result<(), Refused> {
        self.answer()?;
        let leaf = self.leaves.lock().unwrap().remove(&gfn.0);
        assert_eq!(leaf.map(|leaf| leaf.pfn), Some(pfn));
        Ok(())
    }

    fn free_table(&self, _: Gfn, _: Level, table: Pfn) -> Result<(), Refused> {
        self.answer()?;
        assert!(self.tables.lock().unwrap().remove(&table.0));
        Ok(())
    }
}

struct Rig {
    arena: Arc<Arena>,
    owner: Arc<Owner>,
    vcpu: Vcpu,
    mmu: Box<dyn SecondStage>,
    levels: usize,
}

fn each(test: impl Fn(Rig)) {
    for stage in GuestStage::ALL {
        let arena = Arc::new(Arena::new(Pfn(0x1000), 128));
        let owner = Arc::new(Owner::default());
        let config = MmuConfig::default();
        let mmu = stage.build(Arc::clone(&arena), Arc::clone(&owner), config);
        mmu.create_slot(SlotSpec::new(0, Gfn(0), 1024, Pfn(HOST)))
            .unwrap();
        println!("{stage}");
        test(Rig {
            arena,
            owner,
            vcpu: mmu.vcpu(),
            mmu,
            levels: usize::from(stage.info().root_level.get()),
        });
    }
}

impl Rig {
    fn fault(&mut self, gfn: u64, access: Access) -> FaultOutcome {
        let fault = Fault::new(Gfn(gfn), access).with_mirror();
        self.mmu.fault(&mut self.vcpu, fault)
    }
}

const FIXED: FaultOutcome = FaultOutcome::Fixed {
    level: Level::SIZE_4K,
};

#[test]
fn a_mirror_is_its_owners_in_pages_of_4_kib() {
    each(|mut rig| {
        assert_eq!(rig.fault(5, Access::Write), FIXED);
        assert_eq!(rig.fault(6, Access::Read), FIXED);
        let level = Level::SIZE_4K;
        assert_eq!(
            rig.fault(6, Access::Write),
            FaultOutcome::Spurious { level }
        );
        assert_eq!(rig.owner.frames(), [5, 6]);
        assert_eq!(rig.owner.leaves.lock().unwrap()[&6].pfn, Pfn(HOST + 6));
        assert_eq!(rig.owner.tables.lock().unwrap().len(), rig.levels - 1);
        assert_eq!(
            rig.mmu.space(0).translate(Gfn(5)),
            None,
            "not the guest's own"
        );
        // What is done to the guest's tables leaves it alone.
        rig.mmu
            .space(0)
            .set_slot_flags(0, SlotFlags::LOG_DIRTY)
            .unwrap();
        rig.mmu
            .space(0)
            .set_slot_flags(0, SlotFlags::empty())
            .unwrap();
        assert!(!rig.mmu.space(0).age(GfnRange::new(Gfn(0), 9)));
        rig.mmu.zap_all();
        assert_eq!(rig.mmu.stats().pages, [2, 0, 0, 0, 0]);
        assert!(rig.mmu.space(0).zap_gfn_range(GfnRange::new(Gfn(5), 1)));
        assert_eq!(rig.owner.frames(), [6]);
        rig.mmu.space(0).delete_slot(0).unwrap();
        assert_eq!(
            (rig.owner.frames(), rig.mmu.stats().pages),
            (vec![], [0; 5])
        );
        drop(rig.vcpu);
        drop(rig.mmu);
        assert!(rig.owner.tables.lock().unwrap().is_empty());
        assert_eq!(rig.arena.used_frames(), 0);
    });
}

#[test]
fn what_the_owner_refuses_does_not_happen() {
    each(|mut rig| {
        rig.owner.refuse.store(true, SeqCst);
        assert_eq!(rig.fault(5, Access::Write), FaultOutcome::Retry);
        rig.owner.refuse.store(false, SeqCst);
        assert_eq!(rig.fault(5, Access::Write), FIXED);
        rig.owner.refuse.store(true, SeqCst);
        assert_eq!(rig.fault(6, Access::Write), FaultOutcome::Retry);
        assert!(!rig.mmu.space(0).zap_gfn_range(GfnRange::new(Gfn(0), 9)));
        assert_eq!((rig.owner.frames(), rig.mmu.stats().pages[0]), (vec![5], 1));
        rig.owner.refuse.store(false, SeqCst);
        assert!(rig.mmu.space(0).zap_gfn_range(GfnRange::new(Gfn(0), 9)));
        assert_eq!((rig.owner.frames(), rig.mmu.stats().pages[0]), (vec![], 0));
    });
}

#[test]
fn a_table_that_the_owner_keeps_is_leaked_and_nothing_else() {
    each(|mut rig| {
        assert_eq!(rig.fault(5, Access::Write), FIXED);
        rig.mmu.space(0).delete_slot(0).unwrap();
        rig.owner.refuse.store(true, SeqCst);
        drop(rig.vcpu);
        drop(rig.mmu);
        assert_eq!(rig.arena.used_frames(), rig.levels - 1);
    });
}

#[test]
fn without_an_owner_there_is_no_mirror() {
    for stage in GuestStage::ALL {
        let mmu = stage.build(Arena::new(Pfn(0x1000), 64), NoTlb, MmuConfig::default());
        mmu.create_slot(SlotSpec::new(0, Gfn(0), 8, Pfn(8)))
            .unwrap();
        let fault = Fault::new(Gfn(1), Access::Read).with_mirror();
        let outcome = mmu.fault(&mut mmu.vcpu(), fault);
        assert_eq!(outcome, FaultOutcome::NoRoot);
    }
}
