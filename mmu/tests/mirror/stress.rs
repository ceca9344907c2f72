//! Handlers, and everything that takes mappings away, by real threads, against an owner that checks
//! each request, takes its time, refuses now and then, and loses mappings.
//!
//! What is checked, besides the owner's own checks:
//!
//! - *Contents*: a page is mapped while its contents are there. A handler makes them before it
//!   faults, with the sequence that it read first; who discards them invalidates, and finds nothing
//!   mapped but what the owner would not unmap.
//! - *Slots*: where a slot was moved from nothing is mapped.
//! - *Views*: nothing is mapped in a view that was just made, but by batches of the new mirror.
//! - At the end the mirror is the owner's map, and everything is given back.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
    thread,
};

use slat_arch::GuestStage;
use slat_mmu::{
    Access, Arena, Around, Batch, ChangeKind, ExternalTables, FaultOutcome, FlushRequest, Gfn,
    GfnRange, Host, Level, MmuConfig, Pfn, Refused, SecondStage, SlotSpec,
};

use crate::owner::{fault, range};

/// Pages of the slot that stays, and of the one that moves.
const PAGES: u64 = 700;
const MOVING: u64 = 40;
/// Where the latter may be.
const PLACES: [u64; 2] = [1024, 1500];
const HOST: u64 = 0x8_0000;
const HANDLERS: u64 = 3;
const FAULTS: u64 = 400;

#[derive(Default)]
struct Owner {
    view: Mutex<View>,
    /// By host frame: whether there is anything in the page.
    contents: Vec<AtomicBool>,
    random: AtomicU64,
}

#[derive(Default)]
struct View {
    /// Host frame, and whether it may be written, by guest frame.
    pages: BTreeMap<u64, (u64, bool)>,
    since: u64,
    /// Frames whose unmapping was refused.
    kept: BTreeSet<u64>,
}

impl Owner {
    /// A number below `below`: not a good one, but another each time.
    fn random(&self, below: u64) -> u64 {
        let number = self.random.fetch_add(0x9e37_79b9_7f4a_7c15, SeqCst);
        ((number ^ number >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 32) % below
    }

    fn is_there(&self, pfn: u64) -> &AtomicBool {
        &self.contents[(pfn - HOST) as usize]
    }

    /// Frames over `range` that are mapped although nobody refused to unmap them.
    fn mapped(&self, range: GfnRange) -> Vec<u64> {
        let view = self.view.lock().unwrap();
        let mapped = view.pages.range(range.start.0..range.end.0);
        let mapped = mapped.map(|(&gfn, _)| gfn);
        mapped.filter(|gfn| !view.kept.contains(gfn)).collect()
    }
}

impl View {
    /// Carries out one page of a change, or says why not.
    fn page(&mut self, owner: &Owner, gfn: u64, pfn: u64, kind: ChangeKind) -> Result<(), Refused> {
        let old = self.pages.get(&gfn).copied();
        assert!(
            old.is_none_or(|(old, _)| old == pfn),
            "{gfn:#x}, {kind:?} of {pfn:#x}: {old:?}"
        );
        let refuses = owner.random(37) == 0;
        match kind {
            ChangeKind::Map { writable, again } => {
                assert_eq!(old.is_some(), again, "{gfn:#x}, {kind:?}");
                let there = owner.is_there(pfn).load(SeqCst);
                assert!(there || self.kept.contains(&gfn), "{gfn:#x} is empty");
                if refuses {
                    return Err(Refused::NoMemory);
                }
                self.pages.insert(gfn, (pfn, writable));
            }
            ChangeKind::Protect { writable } => {
                assert_eq!(old.map(|(_, old)| old), Some(!writable), "{gfn:#x}");
                if refuses {
                    return Err(Refused::Failed(11));
                }
                self.pages.insert(gfn, (pfn, writable));
            }
            ChangeKind::Unmap => {
                assert!(old.is_some(), "{gfn:#x} was not mapped");
                if refuses && owner.random(5) == 0 {
                    self.kept.insert(gfn);
                    return Err(Refused::Busy);
                }
                self.kept.remove(&gfn);
                self.pages.remove(&gfn);
            }
        }
        Ok(())
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
        for _ in 0..self.random(4) {
            thread::yield_now();
        }
        let generation = batch.generation();
        for change in batch.changes_mut() {
            let (gfns, pfn, kind) = (change.gfns(), change.pfn().0, change.kind());
            let mut view = self.view.lock().unwrap();
            if generation < view.since {
                change.refuse(0, Refused::Gone);
                continue;
            }
            let mut pages = 0..gfns.pages();
            let refused = pages.find_map(|n| {
                let done = view.page(self, gfns.start.0 + n, pfn + n, kind);
                done.err().map(|why| (n, why))
            });
            match refused {
                Some((done, why)) => change.refuse(done, why),
                None => change.accept(),
            }
            drop(view);
            // What is kept of a run behind the first refusal is kept as well.
            if let (ChangeKind::Unmap, Some((done, _))) = (kind, refused) {
                let mut view = self.view.lock().unwrap();
                view.kept.extend(gfns.start.0 + done..gfns.end.0);
            }
            thread::yield_now();
        }
    }

    /// Without a look at the view: who replaces it holds its lock while waiting for this one.
    fn link_table(&self, _: Gfn, _: Level, _: Pfn) -> Result<(), Refused> {
        match self.random(9) {
            0 => Err(Refused::NoMemory),
            _ => Ok(()),
        }
    }
}

struct Stage<'a> {
    mmu: &'a dyn SecondStage,
    owner: &'a Owner,
    place: AtomicU64,
    /// Nobody discards while a slot moves: contents are named by host frame.
    layout: Mutex<()>,
    done: AtomicBool,
}

impl Stage<'_> {
    fn random(&self, below: u64) -> u64 {
        self.owner.random(below)
    }

    /// A frame, and the host frame that it leads to unless its slot moves just now.
    fn frame(&self) -> (u64, u64) {
        match self.random(4) {
            0 => {
                let page = self.random(MOVING);
                let place = PLACES[self.place.load(SeqCst) as usize];
                (place + page, HOST + PAGES + page)
            }
            _ => {
                let page = self.random(PAGES);
                (page, HOST + page)
            }
        }
    }

    /// What a pager's thread does.
    fn handle(&self) {
        let mut vcpu = self.mmu.vcpu();
        for _ in 0..FAULTS {
            let (gfn, pfn) = self.frame();
            let beside = self.random(24);
            let access = [Access::Read, Access::Write][self.random(2) as usize];
            for _ in 0..50 {
                let seq = self.mmu.invalidate_seq();
                for pfn in pfn..(pfn + beside.max(1)).min(HOST + PAGES + MOVING) {
                    self.owner.is_there(pfn).store(true, SeqCst);
                }
                let mut asked = fault(gfn, access).with_seq(seq);
                asked.map_writable = self.random(2) == 0;
                asked.again = self.random(8) == 0;
                let mut around = Around::new(range(gfn..gfn + beside));
                around.map_writable = self.random(2) == 0;
                match self.mmu.fault_range(&mut vcpu, asked, around).outcome {
                    FaultOutcome::Fixed { .. } | FaultOutcome::Spurious { .. } => break,
                    FaultOutcome::Retry | FaultOutcome::Refused(_) => thread::yield_now(),
                    FaultOutcome::NoSlot => break,
                    other => panic!("{other:?} at {gfn:#x}"),
                }
            }
        }
    }

    /// Takes contents away, as a hole punched in a memory file does.
    fn discard(&self) {
        let layout = self.layout.lock().unwrap();
        let (gfn, pfn) = self.frame();
        let end = if gfn < PAGES {
            PAGES
        } else {
            gfn + HOST + PAGES + MOVING - pfn
        };
        let range = range(gfn..(gfn + 1 + self.random(60)).min(end));
        let token = self.mmu.space(0).invalidate_begin(range, true);
        let mapped = self.owner.mapped(range);
        assert!(mapped.is_empty(), "{mapped:x?} of {range:x?} are mapped");
        for n in 0..range.pages() {
            if !self.owner.view.lock().unwrap().kept.contains(&(gfn + n)) {
                self.owner.is_there(pfn + n).store(false, SeqCst);
            }
        }
        self.mmu.invalidate_end(token).unwrap();
        drop(layout);
    }

    fn relocate(&self) {
        let _layout = self.layout.lock().unwrap();
        let old = self.place.load(SeqCst);
        let space = self.mmu.space(0);
        space.move_slot(1, Gfn(PLACES[1 - old as usize])).unwrap();
        let left = self
            .owner
            .mapped(GfnRange::new(Gfn(PLACES[old as usize]), MOVING));
        assert!(left.is_empty(), "{left:x?} are where the slot was");
        self.place.store(1 - old, SeqCst);
    }

    fn replace(&self) {
        let mut view = self.owner.view.lock().unwrap();
        view.pages.clear();
        view.kept.clear();
        view.since = self.mmu.space(0).withdraw_mirrors();
        drop(view);
        self.mmu.zap_invalidated_roots();
    }

    fn churn(&self) {
        let space = self.mmu.space(0);
        let all = range(0..2048);
        let some = self.random(PAGES);
        let some = range(some..some + self.random(200));
        match self.random(16) {
            0 => self.replace(),
            1 | 2 => self.relocate(),
            3 | 4 => {
                let aged = space.age_mirror(some);
                let young = aged.young.iter().map(|run| run.pages()).sum::<u64>();
                assert!(aged.change.pages + aged.change.kept == young);
            }
            5 | 6 => {
                space.write_protect_mirror(some);
            }
            7 => {
                space.zap_gfn_range(all);
            }
            8 => {
                space.zap_mirror(some);
            }
            9 => {
                space.mirror_leaves(all).for_each(drop);
                self.mmu.reclaim();
            }
            _ => self.discard(),
        }
    }
}

fn stress(stage: GuestStage) {
    let owner = Arc::new(Owner {
        contents: (0..PAGES + MOVING)
            .map(|_| AtomicBool::new(false))
            .collect(),
        ..Owner::default()
    });
    let arena = Arc::new(Arena::new(Pfn(0x1000), 256));
    let mmu = stage.build(Arc::clone(&arena), Arc::clone(&owner), MmuConfig::default());
    let stays = SlotSpec::new(0, Gfn(0), PAGES, Pfn(HOST));
    let moves = SlotSpec::new(1, Gfn(PLACES[0]), MOVING, Pfn(HOST + PAGES));
    mmu.create_slot(stays).unwrap();
    mmu.create_slot(moves).unwrap();
    let scene = Stage {
        mmu: &*mmu,
        owner: &owner,
        place: AtomicU64::new(0),
        layout: Mutex::new(()),
        done: AtomicBool::new(false),
    };
    thread::scope(|scope| {
        let handlers: Vec<_> = (0..HANDLERS)
            .map(|_| scope.spawn(|| scene.handle()))
            .collect();
        for _ in 0..2 {
            scope.spawn(|| {
                while !scene.done.load(SeqCst) {
                    scene.churn();
                    thread::yield_now();
                }
            });
        }
        let ended: Vec<_> = handlers.into_iter().map(|handler| handler.join()).collect();
        scene.done.store(true, SeqCst);
        for ended in ended {
            ended.unwrap();
        }
    });
    let listed = mmu.space(0).mirror_leaves(range(0..u64::MAX));
    let listed: BTreeMap<_, _> = listed
        .map(|found| (found.gfn.0, (found.leaf.pfn.0, found.leaf.writable)))
        .collect();
    assert_eq!(listed, owner.view.lock().unwrap().pages);
    assert_eq!(mmu.stats().pages[0], listed.len() as i64);
    drop(mmu);
    assert_eq!(arena.used_frames(), 0);
}

#[test]
fn handlers_beside_everything_that_takes_mappings_away() {
    for stage in GuestStage::ALL {
        println!("{stage}");
        stress(stage);
    }
}
