//! An owner of mirrored tables that keeps its own map, and checks what it is asked for: nothing is
//! mapped that is mapped, nothing is protected or unmapped that is not, and host frames are right.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
};

use slat_arch::GuestStage;
use slat_mmu::{
    Access, Arena, Batch, Change, ChangeKind, ExternalTables, Fault, FaultOutcome, FlushRequest,
    Gfn, GfnRange, Host, Level, MmuConfig, Pfn, Refused, SecondStage, SlotSpec, Vcpu,
};

/// First host frame of the slot.
pub(crate) const HOST: u64 = 0x20_0000;
/// Its pages.
pub(crate) const PAGES: u64 = 1024;

/// How far the owner goes with a change, and why no further. `None`: to its end.
type Policy = Box<dyn FnMut(&Change) -> Option<(u64, Refused)> + Send>;

#[derive(Default)]
pub(crate) struct Owner {
    /// No table is linked or freed.
    pub(crate) refuse_tables: AtomicBool,
    /// Batches are not answered at all.
    pub(crate) silent: AtomicBool,
    pub(crate) policy: Mutex<Option<Policy>>,
    /// Called in the middle of the next batch, once, with no lock of the owner's.
    pub(crate) during: Mutex<Option<Box<dyn FnOnce() + Send>>>,
    pub(crate) view: Mutex<View>,
}

#[derive(Default)]
pub(crate) struct View {
    /// Host frame, and whether it may be written, by guest frame.
    pub(crate) pages: BTreeMap<u64, (u64, bool)>,
    pub(crate) tables: BTreeSet<u64>,
    /// Each change, in words.
    pub(crate) log: Vec<String>,
    /// Batches of an older root are refused.
    pub(crate) since: u64,
    /// Mappings go by themselves: what is not mapped may be protected, and unmapped.
    pub(crate) loses: bool,
}

impl View {
    pub(crate) fn frames(&self) -> Vec<u64> {
        self.pages.keys().copied().collect()
    }

    pub(crate) fn writable(&self) -> Vec<u64> {
        let writable = self.pages.iter().filter(|(_, page)| page.1);
        writable.map(|(&gfn, _)| gfn).collect()
    }

    pub(crate) fn take_log(&mut self) -> Vec<String> {
        std::mem::take(&mut self.log)
    }

    fn carry_out(&mut self, change: &Change, pages: u64) {
        let start = change.gfns().start.0;
        for n in 0..pages {
            let (gfn, pfn) = (start + n, change.pfn().0 + n);
            let old = self.pages.get(&gfn).copied();
            assert!(
                old.is_none_or(|(old, _)| old == pfn),
                "{change:?} of another page: {old:?}"
            );
            match change.kind() {
                ChangeKind::Map { writable, again } => {
                    assert!(again || old.is_none(), "{change:?} over a mapping");
                    self.pages.insert(gfn, (pfn, writable));
                }
                ChangeKind::Protect { writable } => {
                    assert!(
                        self.loses || old == Some((pfn, !writable)),
                        "{change:?} of {old:?}"
                    );
                    if old.is_some() {
                        self.pages.insert(gfn, (pfn, writable));
                    }
                }
                ChangeKind::Unmap => {
                    assert!(self.loses || old.is_some(), "{change:?} of nothing");
                    self.pages.remove(&gfn);
                }
            }
        }
    }
}

fn words(change: &Change) -> String {
    let what = match change.kind() {
        ChangeKind::Map { writable, again } => {
            let what = if writable { "map rw" } else { "map ro" };
            format!("{what}{}", if again { " again" } else { "" })
        }
        ChangeKind::Protect { writable: true } => "permit".to_owned(),
        ChangeKind::Protect { writable: false } => "protect".to_owned(),
        ChangeKind::Unmap => "unmap".to_owned(),
    };
    let gfns = change.gfns();
    format!("{what} {}..{}", gfns.start.0, gfns.end.0)
}

impl Owner {
    pub(crate) fn view(&self) -> std::sync::MutexGuard<'_, View> {
        self.view.lock().unwrap()
    }

    pub(crate) fn frames(&self) -> Vec<u64> {
        self.view().frames()
    }

    /// From now on.
    pub(crate) fn answer(
        &self,
        policy: impl FnMut(&Change) -> Option<(u64, Refused)> + Send + 'static,
    ) {
        *self.policy.lock().unwrap() = Some(Box::new(policy));
    }

    pub(crate) fn refuse(&self, why: Refused) {
        self.answer(move |_| Some((0, why)));
    }

    pub(crate) fn accept(&self) {
        *self.policy.lock().unwrap() = None;
    }
}

impl Host for Owner {
    fn flush(&self, _: &FlushRequest) {}

    fn external(&self) -> Option<&dyn ExternalTables> {
        Some(self)
    }
}

impl ExternalTables for Owner {
    fn apply(&self, batch: &mut Batch) {
        let during = self.during.lock().unwrap().take();
        if let Some(during) = during {
            during();
        }
        if self.silent.load(SeqCst) {
            return;
        }
        let (as_id, generation) = (batch.as_id(), batch.generation());
        assert_eq!(as_id, 0);
        let mut policy = self.policy.lock().unwrap();
        let mut view = self.view();
        for change in batch.changes_mut() {
            assert!(!change.gfns().is_empty());
            let answer = match &mut *policy {
                _ if generation < view.since => Some((0, Refused::Gone)),
                Some(policy) => policy(change),
                None => None,
            };
            let pages = change.gfns().pages();
            let done = answer.map_or(pages, |(done, _)| done.min(pages));
            view.carry_out(change, done);
            view.log.push(words(change));
            match answer {
                Some((done, why)) => change.refuse(done, why),
                None => change.accept(),
            }
        }
    }

    fn link_table(&self, _: Gfn, _: Level, table: Pfn) -> Result<(), Refused> {
        if self.refuse_tables.load(SeqCst) {
            return Err(Refused::NoMemory);
        }
        self.view().tables.insert(table.0);
        Ok(())
    }

    fn free_table(&self, _: Gfn, _: Level, table: Pfn) -> Result<(), Refused> {
        if self.refuse_tables.load(SeqCst) {
            return Err(Refused::Busy);
        }
        assert!(self.view().tables.remove(&table.0));
        Ok(())
    }
}

pub(crate) struct Rig {
    pub(crate) arena: Arc<Arena>,
    pub(crate) owner: Arc<Owner>,
    pub(crate) vcpu: Vcpu,
    pub(crate) mmu: Arc<dyn SecondStage>,
    pub(crate) levels: usize,
}

/// Runs a test on every format.
pub(crate) fn each(test: impl Fn(Rig)) {
    for stage in GuestStage::ALL {
        println!("{stage}");
        test(Rig::new(stage));
    }
}

pub(crate) const FIXED: FaultOutcome = FaultOutcome::Fixed {
    level: Level::SIZE_4K,
};
pub(crate) const SPURIOUS: FaultOutcome = FaultOutcome::Spurious {
    level: Level::SIZE_4K,
};

pub(crate) fn fault(gfn: u64, access: Access) -> Fault {
    Fault::new(Gfn(gfn), access).with_mirror()
}

pub(crate) fn range(gfns: std::ops::Range<u64>) -> GfnRange {
    GfnRange::new(Gfn(gfns.start), gfns.end - gfns.start)
}

impl Rig {
    pub(crate) fn new(stage: GuestStage) -> Self {
        let arena = Arc::new(Arena::new(Pfn(0x1000), 128));
        let owner = Arc::new(Owner::default());
        let config = MmuConfig::default();
        let mmu = stage.build(Arc::clone(&arena), Arc::clone(&owner), config);
        mmu.create_slot(SlotSpec::new(0, Gfn(0), PAGES, Pfn(HOST)))
            .unwrap();
        Self {
            arena,
            owner,
            vcpu: mmu.vcpu(),
            mmu: mmu.into(),
            levels: usize::from(stage.info().root_level.get()),
        }
    }

    /// The MMU, to hold while the rest of this changes.
    pub(crate) fn mmu(&self) -> Arc<dyn SecondStage> {
        Arc::clone(&self.mmu)
    }

    pub(crate) fn fault(&mut self, gfn: u64, access: Access) -> FaultOutcome {
        self.mmu.fault(&mut self.vcpu, fault(gfn, access))
    }

    pub(crate) fn log(&self) -> Vec<String> {
        self.owner.view().take_log()
    }

    pub(crate) fn mapped(&self) -> i64 {
        self.mmu.stats().pages[0]
    }

    /// The mirror's leaves are the owner's pages, to the leave to write; and are counted.
    pub(crate) fn agrees(&self) {
        let leaves = self.mmu.space(0).mirror_leaves(range(0..u64::MAX));
        let leaves: BTreeMap<_, _> = leaves
            .map(|found| {
                assert_eq!(found.level, Level::SIZE_4K);
                (found.gfn.0, (found.leaf.pfn.0, found.leaf.writable))
            })
            .collect();
        let view = self.owner.view();
        assert_eq!(leaves, view.pages);
        assert_eq!(self.mapped(), view.pages.len() as i64);
    }
}
