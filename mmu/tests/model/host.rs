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
    Batch, Change, ChangeKind, ExternalTables, FlushRequest, Gfn, Host, Level, Pfn, Refused,
    SlotSpec, Translation,
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

/// A mapping of the external owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Page {
    pub(crate) pfn: u64,
    pub(crate) w: bool,
    /// The owner dropped it by itself: the mirror still has it.
    pub(crate) lost: bool,
}

/// A page of a change that the owner was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Asked {
    pub(crate) gfn: u64,
    pub(crate) pfn: u64,
    pub(crate) kind: ChangeKind,
    /// `None`: it was done.
    pub(crate) refused: Option<Refused>,
}

/// What the external owner has.
#[derive(Debug, Default)]
pub(crate) struct Mirror {
    pub(crate) pages: BTreeMap<u64, Page>,
    /// By the mirror's own table.
    pub(crate) tables: BTreeSet<u64>,
    /// What it was asked for since this was last looked at.
    pub(crate) asked: Vec<Asked>,
    /// A table was refused since this was last looked at.
    pub(crate) refused_table: bool,
    /// Batches of an older root are out of date.
    pub(crate) since: u64,
}

impl Mirror {
    fn carry_out(&mut self, gfn: u64, pfn: u64, kind: ChangeKind) {
        let old = self.pages.get(&gfn).copied();
        assert!(old.is_none_or(|old| old.pfn == pfn), "{gfn:#x} is {old:?}");
        let lost = old.is_some_and(|old| old.lost);
        match kind {
            ChangeKind::Map { writable: w, again } => {
                assert_eq!(old.is_some(), again, "{gfn:#x}, {kind:?}: {old:?}");
                let lost = false;
                self.pages.insert(gfn, Page { pfn, w, lost });
            }
            ChangeKind::Protect { writable: w } => {
                assert_eq!(old.map(|old| old.w), Some(!w), "{gfn:#x}, {kind:?}");
                self.pages.insert(gfn, Page { pfn, w, lost });
            }
            ChangeKind::Unmap => {
                assert!(self.pages.remove(&gfn).is_some(), "{gfn:#x} was mapped");
            }
        }
    }
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
    /// A number that decides, one in so many times.
    fn refuses(&self) -> Option<u64> {
        let one_in = self.refuse.load(SeqCst);
        let asked = self.asked.fetch_add(1, SeqCst);
        (one_in > 0 && asked % one_in == one_in - 1).then_some(asked)
    }

    /// How much of a change is done, and why not more.
    fn answer(&self, change: &Change) -> (u64, Refused) {
        let pages = change.gfns().pages();
        let Some(number) = self.refuses() else {
            return (pages, Refused::Busy);
        };
        let reasons = [
            Refused::NoMemory,
            Refused::ContentsMissing,
            Refused::Gone,
            Refused::Busy,
            Refused::Failed(14),
        ];
        let done = number.wrapping_mul(7) % (pages + 1);
        (done, reasons[(number / 3 % 5) as usize])
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
    fn apply(&self, batch: &mut Batch) {
        let mut mirror = self.mirror.lock().unwrap();
        assert!(batch.generation() >= mirror.since && batch.as_id() == 0);
        let mut end = None;
        for change in batch.changes_mut() {
            let (start, pfn, kind) = (change.gfns().start.0, change.pfn().0, change.kind());
            let touches = end == Some((start, pfn, kind));
            assert!(!touches, "{kind:?} goes on at {start:#x}, in two changes");
            let (done, why) = self.answer(change);
            change.refuse(done, why);
            for n in 0..change.gfns().pages() {
                let refused = (n >= done).then_some(why);
                if refused.is_none() {
                    mirror.carry_out(start + n, pfn + n, kind);
                }
                mirror.asked.push(Asked {
                    gfn: start + n,
                    pfn: pfn + n,
                    kind,
                    refused,
                });
            }
            end = Some((change.gfns().end.0, pfn + change.gfns().pages(), kind));
        }
    }

    fn link_table(&self, _: Gfn, _: Level, table: Pfn) -> Result<(), Refused> {
        let refuses = self.refuses();
        let mut mirror = self.mirror.lock().unwrap();
        if refuses.is_some() {
            mirror.refused_table = true;
            return Err(Refused::NoMemory);
        }
        assert!(mirror.tables.insert(table.0), "{table} was linked already");
        Ok(())
    }

    fn free_table(&self, _: Gfn, _: Level, table: Pfn) -> Result<(), Refused> {
        let mut mirror = self.mirror.lock().unwrap();
        assert!(mirror.tables.remove(&table.0), "{table} was linked");
        Ok(())
    }
}
