//! Entries that hardware remembers as invalid: pitfall 31.
//!
//! A *hart* here has a TLB that remembers nothing but absence: where its walk ended at an entry
//! that maps nothing, it keeps that entry's level and frames and faults on all of them without
//! another look, as a RISC-V hart without Svvptc may. A fence of everything empties it. A fence by
//! address makes it forget an entry only if that is a leaf by now: what points to a table is not a
//! leaf, and the manual promises nothing about it.

use slat_mmu::{Access, Entry, Fault, FaultOutcome, Flush, Gfn, GfnRange, Level, Vcpu};

use crate::rig::{GIGA, HUGE, Rig, each, range};

/// Faults after which a hart is said to fault for ever.
const FOR_EVER: usize = 8;
/// Where harts look; the rig's slot covers it.
const PAGE: u64 = 5;
/// Another page of its table, mapped by nobody beforehand.
const BESIDE: u64 = 7;

struct Hart<'r> {
    rig: &'r Rig,
    vcpu: Vcpu,
    /// Executes the fences it is told.
    fences: bool,
    absent: Vec<(Level, GfnRange)>,
}

impl<'r> Hart<'r> {
    fn new(rig: &'r Rig) -> Self {
        Self {
            rig,
            vcpu: rig.mmu.vcpu(),
            fences: true,
            absent: Vec::new(),
        }
    }

    /// The entry at `level` on the way to `gfn`, and the frames it covers.
    fn entry(&self, gfn: Gfn, level: Level) -> Option<Entry> {
        let walk = self.rig.mmu.space(0).walk(gfn);
        let mut steps = walk.steps();
        Some(steps.find(|step| step.level == level)?.entry)
    }

    /// Whether the guest gets past a load from `gfn`. A walk that ends at nothing is remembered.
    fn load(&mut self, gfn: u64) -> bool {
        if self.absent.iter().any(|(_, span)| span.contains(Gfn(gfn))) {
            return false;
        }
        let walk = self.rig.mmu.space(0).walk(Gfn(gfn));
        let end = walk.last().expect("a root was loaded");
        match end.entry {
            Entry::Leaf(leaf) => leaf.readable,
            _ => {
                let span = span(end.level);
                self.absent
                    .push((end.level, range(gfn & !(span - 1), span)));
                false
            }
        }
    }

    /// What `HFENCE.GVMA` does on this hart.
    fn fence(&mut self, flush: Flush) {
        let kept = |&(level, span): &(Level, GfnRange)| match flush {
            Flush::None => true,
            Flush::All => false,
            Flush::Range { .. } => {
                !flush.touches(span)
                    || matches!(self.entry(span.start, level), Some(Entry::Table { .. }))
            }
        };
        let absent = self.absent.iter().copied().filter(kept).collect();
        self.absent = absent;
    }

    /// Takes the fault and says what it came to and which fence that owed.
    fn fault(&mut self, fault: Fault) -> (FaultOutcome, Flush) {
        let outcome = self.rig.mmu.fault(&mut self.vcpu, fault);
        let owed = self
            .rig
            .mmu
            .install_fence(&mut self.vcpu, fault.gfn, outcome);
        if self.fences {
            self.fence(owed);
        }
        (outcome, owed)
    }

    fn fault_small(&mut self, gfn: u64) -> (FaultOutcome, Flush) {
        self.fault(Fault::new(Gfn(gfn), Access::Read).with_max_level(Level::SIZE_4K))
    }

    /// Loads until it gets past, and returns how many faults that took; `None`: it faults for ever.
    fn faults(&mut self, gfn: u64) -> Option<usize> {
        for faults in 0..FOR_EVER {
            if self.load(gfn) {
                return Some(faults);
            }
            let (outcome, _) = self.fault_small(gfn);
            assert!(
                matches!(
                    outcome,
                    FaultOutcome::Fixed { .. } | FaultOutcome::Spurious { .. }
                ),
                "{}: {outcome:?}",
                self.rig.stage
            );
        }
        None
    }
}

/// Pages of an entry. Every level but the root's has nine bits of the frame.
fn span(level: Level) -> u64 {
    1 << (9 * level.index())
}

/// Runs `test` where harts may remember absence, with `vcpu`'s and everybody's walk to [`PAGE`]
/// ending at each level in turn: a neighbour in the table of that level is mapped, and nothing
/// nearer.
fn each_level(test: impl Fn(&Rig, Level)) {
    each(|rig| {
        let info = rig.mmu.format();
        if !info.install_needs_fence {
            return;
        }
        let mut level = Some(Level::SIZE_4K);
        let mut vcpu = rig.mmu.vcpu();
        let mut id = 1;
        while let Some(now) = level.filter(|level| *level <= info.root_level) {
            let neighbour = PAGE + span(now);
            if neighbour >= 2 * GIGA {
                rig.slot(id, neighbour, 1);
                id += 1;
            }
            rig.mmu.zap_all();
            rig.map(&mut vcpu, neighbour, Access::Read, Level::SIZE_4K);
            let end = rig
                .mmu
                .space(0)
                .walk(Gfn(PAGE))
                .last()
                .map(|step| step.level);
            assert_eq!(end, Some(now), "{}", rig.stage);
            test(rig, now);
            level = now.parent();
        }
    });
}

/// The fence it is told gets a hart past the page that it faulted on, with one fault; without it
/// there is no end.
#[test]
fn a_hart_that_remembers_an_invalid_entry_gets_past_it_by_the_fence_it_owes() {
    each_level(|rig, level| {
        let (mut hart, mut careless) = (Hart::new(rig), Hart::new(rig));
        careless.fences = false;
        assert!(!hart.load(PAGE) && !careless.load(PAGE));
        let fixed = FaultOutcome::Fixed {
            level: Level::SIZE_4K,
        };
        let owed = if level == Level::SIZE_4K {
            Flush::range(range(PAGE, 1))
        } else {
            Flush::All
        };
        assert_eq!(
            hart.fault_small(PAGE),
            (fixed, owed),
            "{}, {level:?}",
            rig.stage
        );
        assert!(hart.load(PAGE), "{}, {level:?}", rig.stage);
        assert_eq!(careless.faults(PAGE), None, "{}, {level:?}", rig.stage);
        // Paid: the page beside it costs a fence by address again.
        assert!(!hart.load(BESIDE));
        let next = Flush::range(range(BESIDE, 1));
        assert_eq!(hart.fault_small(BESIDE), (fixed, next), "{}", rig.stage);
        assert!(hart.load(BESIDE), "{}", rig.stage);
    });
}

/// A hart may remember an entry that another has made valid, with the tables below it: its faults
/// are spurious, or install no more than a leaf, and still come to an end.
#[test]
fn a_hart_gets_past_what_another_has_linked() {
    each_level(|rig, level| {
        let mut one = Hart::new(rig);
        let (mut late, mut beside) = (Hart::new(rig), Hart::new(rig));
        assert!(!late.load(PAGE) && !beside.load(BESIDE));
        assert_eq!(one.faults(PAGE), Some(1), "{}, {level:?}", rig.stage);
        assert_eq!(late.faults(PAGE), Some(1), "{}, {level:?}", rig.stage);
        let faults = beside.faults(BESIDE);
        let fewest = if level == Level::SIZE_4K { 1 } else { 2 };
        assert_eq!(faults, Some(fewest), "{}, {level:?}", rig.stage);
    });
}

/// Mapping in advance owes nobody a fence: who remembers takes one spurious fault.
#[test]
fn a_hart_gets_past_what_was_mapped_in_advance() {
    each_level(|rig, level| {
        let (mut one, mut other) = (Hart::new(rig), Hart::new(rig));
        assert!(!one.load(PAGE) && !other.load(PAGE));
        let pages = range(0, 16);
        let mapped = rig.mmu.prefault(&mut one.vcpu, pages, Level::SIZE_4K);
        assert_eq!(mapped, Ok(16), "{}", rig.stage);
        assert_eq!(one.faults(PAGE), Some(1), "{}, {level:?}", rig.stage);
        assert_eq!(other.faults(PAGE), Some(1), "{}, {level:?}", rig.stage);
        assert_eq!(one.faults(BESIDE), Some(0), "{}", rig.stage);
    });
}

/// A huge leaf takes a fence of its own span, also where the entry was remembered; its splitting
/// one of everything.
#[test]
fn a_huge_leaf_owes_its_span_and_its_splitting_everything() {
    each_level(|rig, level| {
        if level != Level::SIZE_2M {
            return;
        }
        let mut hart = Hart::new(rig);
        assert!(!hart.load(PAGE));
        let fault = Fault::new(Gfn(PAGE), Access::Write).with_max_level(level);
        let owed = Flush::range(range(0, HUGE));
        assert_eq!(hart.fault(fault), (FaultOutcome::Fixed { level }, owed));
        assert!(hart.load(PAGE), "{}", rig.stage);
        assert!(rig.mmu.space(0).write_protect_gfn(Gfn(PAGE), level));
        let fault = fault.with_max_level(Level::SIZE_4K).with_present();
        let fixed = FaultOutcome::Fixed {
            level: Level::SIZE_4K,
        };
        assert_eq!(hart.fault(fault), (fixed, Flush::All), "{}", rig.stage);
    });
}

/// What leaves the guest, or is to be tried again, owes nothing; nor does a format whose hardware
/// remembers no absence.
#[test]
fn no_fence_is_owed_where_nothing_is_remembered_or_nothing_was_mapped() {
    each(|rig| {
        let mut hart = Hart::new(rig);
        rig.mmu.load_root(&mut hart.vcpu).expect("a root");
        let nowhere = 3 * GIGA;
        assert_eq!(
            hart.fault_small(nowhere),
            (FaultOutcome::NoSlot, Flush::None)
        );
        let taken = rig.mmu.space(0).invalidate_begin(range(PAGE, 1), true);
        assert_eq!(hart.fault_small(PAGE), (FaultOutcome::Retry, Flush::None));
        rig.mmu.invalidate_end(taken).unwrap();
        let remembers = rig.mmu.format().install_needs_fence;
        for _ in 0..2 {
            let (_, owed) = hart.fault_small(PAGE);
            assert_eq!(owed.is_none(), !remembers, "{}", rig.stage);
        }
    });
}
