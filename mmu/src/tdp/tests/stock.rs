//! What work ahead of faults leaves for faults.

use alloc::sync::Weak;
use std::{sync::OnceLock, thread};

use super::*;

/// Huge pages in slot 0; slot 1 is over what comes after them.
const HUGE: u64 = 100;

fn two_slots<F: Format>(
    frames: usize,
    config: MmuConfig,
    host: impl Host + 'static,
) -> (Arc<Arena>, Mmu<F>) {
    let arena = Arc::new(Arena::new(Pfn(0x400), frames));
    let mmu = Mmu::<F>::new(Arc::clone(&arena), host, config);
    let pages = HUGE * 512;
    mmu.create_slot(SlotSpec::new(0, Gfn(0), pages, Pfn(1 << 20)))
        .unwrap();
    mmu.create_slot(SlotSpec::new(1, Gfn(pages), 1 << 16, Pfn(1 << 21)))
        .unwrap();
    let mut vcpu = mmu.vcpu();
    for huge in 0..HUGE {
        let fault = Fault::new(Gfn(huge * 512), Access::Write);
        let level = Level::SIZE_2M;
        assert_eq!(mmu.fault(&mut vcpu, fault), FaultOutcome::Fixed { level });
    }
    drop(vcpu);
    mmu.reclaim();
    (arena, mmu)
}

/// How many pages of slot 1, each in a table of its own, can be mapped before memory runs out.
fn unrelated_faults(mmu: &Mmu) -> u32 {
    let mut vcpu = mmu.vcpu();
    let mut mapped = 0;
    loop {
        let gfn = Gfn((HUGE + u64::from(mapped)) * 512);
        let fault = Fault::new(gfn, Access::Write).with_max_level(Level::SIZE_4K);
        match mmu.fault(&mut vcpu, fault) {
            FaultOutcome::Fixed { .. } => mapped += 1,
            FaultOutcome::OutOfMemory => return mapped,
            outcome => panic!("{outcome:?}"),
        }
    }
}

#[test]
fn logging_one_slot_leaves_tables_for_faults_of_another_and_says_what_it_could_not_split() {
    for reserve in [0, 7, 32] {
        let config = MmuConfig::default().with_fault_reserve(reserve);
        // The root takes four frames.
        let (arena, mmu) = two_slots(64, config, NoTlb);
        let space = mmu.space(0);
        let unsplit = space.set_slot_flags(0, SlotFlags::LOG_DIRTY).unwrap();
        assert_eq!(unsplit, HUGE - (60 - u64::from(reserve)));
        assert_eq!(arena.frames() - arena.used_frames(), reserve as usize);
        assert_eq!(unrelated_faults(&mmu), reserve);
        // What was left whole is protected, too.
        let writable = (0..HUGE * 512).find(|&gfn| space.translate(Gfn(gfn)).unwrap().writable);
        assert_eq!(writable, None);
    }
}

#[test]
fn with_memory_enough_nothing_is_left_whole_and_nothing_is_kept() {
    let (arena, mmu) = two_slots::<Flat>(256, MmuConfig::default(), NoTlb);
    let flags = SlotFlags::LOG_DIRTY;
    assert_eq!(mmu.space(0).set_slot_flags(0, flags), Ok(0));
    assert_eq!(arena.used_frames(), 4 + HUGE as usize);
    assert_eq!(mmu.stats().pages[..2], [(HUGE * 512) as i64, 0]);
}

#[test]
fn the_first_write_to_what_was_left_whole_splits_it_and_is_logged() {
    let (_, mmu) = two_slots::<Flat>(64, MmuConfig::default(), NoTlb);
    let space = mmu.space(0);
    assert_eq!(space.set_slot_flags(0, SlotFlags::LOG_DIRTY), Ok(72));
    let gfn = Gfn((HUGE - 1) * 512 + 3);
    assert_eq!(space.translate(gfn).unwrap().level, Level::SIZE_2M);
    let level = Level::SIZE_4K;
    let fault = Fault::new(gfn, Access::Write);
    assert_eq!(
        mmu.fault(&mut mmu.vcpu(), fault),
        FaultOutcome::Fixed { level }
    );
    let mut bitmap = vec![0; (HUGE * 8) as usize];
    assert_eq!(space.harvest_dirty_log(0, &mut bitmap), Ok(1));
    assert_eq!(bitmap[(gfn.0 / 64) as usize], 1 << (gfn.0 % 64));
}

#[test]
fn clearing_dirty_bits_leaves_tables_for_faults() {
    let config = MmuConfig::default()
        .with_dirty_log_start(DirtyLogStart::InitiallySet)
        .with_fault_reserve(5);
    let (arena, mmu) = two_slots(64, config, NoTlb);
    let space = mmu.space(0);
    assert_eq!(space.set_slot_flags(0, SlotFlags::LOG_DIRTY), Ok(0));
    let all = vec![u64::MAX; (HUGE * 8) as usize];
    let cleared = space.clear_dirty_log(0, 0, HUGE * 512, &all);
    assert_eq!(cleared, Ok(HUGE * 512));
    assert_eq!(mmu.stats().splits, 55);
    assert_eq!(arena.frames() - arena.used_frames(), 5);
    assert_eq!(unrelated_faults(&mmu), 5);
}

/// Faults in slot 1 from another thread at each flush.
#[derive(Default)]
struct Beside {
    mmu: OnceLock<Weak<Mmu<Breaking>>>,
    outcomes: StdMutex<Vec<FaultOutcome>>,
}

impl Host for Beside {
    fn flush(&self, request: &FlushRequest) {
        if request.cause != FlushCause::BreakBeforeMake {
            return;
        }
        let mmu = self.mmu.get().unwrap().upgrade().unwrap();
        let mut outcomes = self.outcomes.lock().unwrap();
        let gfn = Gfn((HUGE + outcomes.len() as u64) * 512);
        let fault = Fault::new(gfn, Access::Write).with_max_level(Level::SIZE_4K);
        thread::scope(|scope| {
            let outcome = scope.spawn(|| mmu.fault(&mut mmu.vcpu(), fault)).join();
            outcomes.push(outcome.unwrap());
        });
    }
}

#[test]
fn a_fault_beside_the_split_finds_the_reserve() {
    let beside = Arc::new(Beside::default());
    let config = MmuConfig::default();
    // 28 tables for splits, and the reserve.
    let (_, mmu) = two_slots::<Breaking>(64, config, Arc::clone(&beside));
    let mmu = Arc::new(mmu);
    beside.mmu.set(Arc::downgrade(&mmu)).unwrap();
    // As much as one batch fetches, so that the reserve is not filled again.
    let range = range(0, 20 * 512);
    assert_eq!(mmu.space(0).split_huge_pages(range, Level::SIZE_4K), 0);
    let outcomes = beside.outcomes.lock().unwrap();
    let level = Level::SIZE_4K;
    assert_eq!(*outcomes, vec![FaultOutcome::Fixed { level }; 20]);
}

/// What the crate's page says of the reserve: 8 for each vCPU.
#[test]
fn eight_tables_of_reserve_serve_a_vcpu_each() {
    for vcpus in [1, 2, 5] {
        let config = MmuConfig::default().with_fault_reserve(8 * vcpus);
        let (_, mmu) = two_slots::<Flat>(64, config, NoTlb);
        let flags = SlotFlags::LOG_DIRTY;
        assert!(mmu.space(0).set_slot_flags(0, flags).unwrap() > 0);
        let mut fault = |number: u32| {
            let gfn = Gfn((HUGE + u64::from(number)) * 512);
            let fault = Fault::new(gfn, Access::Write).with_max_level(Level::SIZE_4K);
            // Each keeps what it has fetched.
            let mut vcpu = mmu.vcpu();
            (mmu.fault(&mut vcpu, fault), vcpu)
        };
        let (outcomes, _vcpus): (Vec<_>, Vec<_>) = (0..vcpus).map(&mut fault).unzip();
        let level = Level::SIZE_4K;
        assert_eq!(
            outcomes,
            vec![FaultOutcome::Fixed { level }; vcpus as usize]
        );
        let (beyond, _) = fault(vcpus);
        assert_eq!(beyond, FaultOutcome::OutOfMemory);
    }
}
