//! The host's side: TLBs that obey only the flushes that the MMU asks for, and an owner of mirrored
//! tables that keeps its own map and sometimes refuses.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
};

use slat_mmu::{
    ExternalTables, FlushRequest, Gfn, Host, Leaf, Level, Pfn, Refused, SlotSpec, Translation,
};

/// vCPU, address space, guest frame.
type Tag = (usize, u8, u64);

#[derive(Debug, Default)]
pub(crate) struct Machine {
    pub(crate) tlb: Mutex<BTreeMap<Tag, Translation>>,
    /// Whether host mappings are of mixed sizes.
    pub(crate) mixed: AtomicBool,
    pub(crate) mirrors: AtomicBool,
    /// Refuse one in so many changes of mirrors; 0: none.
    pub(crate) refuse: AtomicU64,
    asked: AtomicU64,
    pub(crate) mirror: Mutex<Mirror>,
}

/// What the external owner has.
#[derive(Debug, Default)]
pub(crate) struct Mirror {
    pub(crate) leaves: BTreeMap<u64, u64>,
    /// By the mirror's own table.
    pub(crate) tables: BTreeSet<u64>,
    /// Frames whose removal was refused since this was last looked at.
    pub(crate) kept: BTreeSet<u64>,
    /// The same, ever.
    pub(crate) ever_kept: BTreeSet<u64>,
    /// A mapping was removed since this was last looked at.
    pub(crate) removed: bool,
    /// A mapping made or a table linked was refused since this was last looked at.
    pub(crate) refused: bool,
}

/// The host's own mapping behind a host frame.
pub(crate) fn mapping_level(mixed: bool, pfn: u64) -> Level {
    match pfn >> 9 {
        block if mixed && block % 5 == 3 => Level::SIZE_4K,
        _ if mixed => Level::SIZE_2M,
        _ => Level::SIZE_256T,
    }
}

impl Machine {
    fn refuses(&self) -> bool {
        let one_in = self.refuse.load(SeqCst);
        let asked = self.asked.fetch_add(1, SeqCst);
        one_in > 0 && asked % one_in == one_in - 1
    }
}

impl Host for Machine {
    fn flush(&self, request: &FlushRequest) {
        let all = request.flush == slat_mmu::Flush::All;
        self.tlb.lock().unwrap().retain(|&(_, as_id, gfn), _| {
            !(all || as_id == request.as_id && request.flush.covers(Gfn(gfn)))
        });
    }

    fn mapping_level(&self, slot: &SlotSpec, gfn: Gfn) -> Level {
        let pfn = slot.host_base_pfn.0 + gfn.0 - slot.base_gfn.0;
        mapping_level(self.mixed.load(SeqCst), pfn)
    }

    fn external(&self) -> Option<&dyn ExternalTables> {
        self.mirrors.load(SeqCst).then_some(self)
    }
}

impl ExternalTables for Machine {
    fn set_leaf(&self, gfn: Gfn, leaf: &Leaf) -> Result<(), Refused> {
        let refuses = self.refuses();
        let mut mirror = self.mirror.lock().unwrap();
        if refuses {
            mirror.refused = true;
            return Err(Refused);
        }
        let old = mirror.leaves.insert(gfn.0, leaf.pfn.0);
        assert_eq!(old, None, "{gfn} was mapped already");
        Ok(())
    }

    fn link_table(&self, _: Gfn, _: Level, table: Pfn) -> Result<(), Refused> {
        let refuses = self.refuses();
        let mut mirror = self.mirror.lock().unwrap();
        if refuses {
            mirror.refused = true;
            return Err(Refused);
        }
        assert!(mirror.tables.insert(table.0), "{table} was linked already");
        Ok(())
    }

    fn remove_leaf(&self, gfn: Gfn, pfn: Pfn) -> Result<(), Refused> {
        let refuses = self.refuses();
        let mut mirror = self.mirror.lock().unwrap();
        assert_eq!(
            mirror.leaves.get(&gfn.0),
            Some(&pfn.0),
            "{gfn} was mapped so"
        );
        if refuses {
            mirror.kept.insert(gfn.0);
            mirror.ever_kept.insert(gfn.0);
            return Err(Refused);
        }
        mirror.leaves.remove(&gfn.0);
        mirror.removed = true;
        Ok(())
    }

    fn free_table(&self, _: Gfn, _: Level, table: Pfn) -> Result<(), Refused> {
        let mut mirror = self.mirror.lock().unwrap();
        assert!(mirror.tables.remove(&table.0), "{table} was linked");
        Ok(())
    }
}
