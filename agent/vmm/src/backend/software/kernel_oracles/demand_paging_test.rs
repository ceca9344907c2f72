//! `demand_paging_test`: memory that is not there is served by the host when the guest faults on
//! it, and taken back at random.
//!
//! The host serves a unit (a page, or a huge page) under that unit's lock, in versions, after it
//! read the invalidation sequence; it takes one back between *invalidate begin* and *end*, and
//! leaves poison. The guest never sees poison, never an older version than it saw before, and a
//! unit is served once for each time it was taken back. While an invalidation is in progress
//! nothing maps its range.

use slat_mmu::Level;

use super::*;

const BASE: u64 = 1 << 19;
const PAGES: u64 = 2048;
const POISON: u64 = 0xdead_dead_dead_dead;
const ROUNDS: u64 = 60;

#[derive(Debug, Default)]
struct Unit {
    present: bool,
    served: u64,
    taken: u64,
}

fn value(version: u64, page: u64) -> u64 {
    version << 32 | page
}

fn oracle(stage: GuestStage, level: Level, sabotage: Option<Sabotage>) -> Outcome {
    let machine = OracleVm::new(
        &format!("demand_paging_test by {level:?}"),
        stage,
        3,
        MmuConfig::default(),
    )
    .prepare(sabotage);
    let slot = machine.plug(0, BASE, PAGES);
    let unit_pages = if level == Level::SIZE_4K { 1 } else { 512 };
    let units: Arc<Vec<Mutex<Unit>>> =
        Arc::new((0..PAGES / unit_pages).map(|_| Mutex::default()).collect());
    let put = move |memory: &Region, unit: u64, value: &dyn Fn(u64) -> u64| {
        for page in unit * unit_pages..(unit + 1) * unit_pages {
            memory
                .host()
                .store((page * PAGE_SIZE) as usize, value(page));
        }
    };
    for unit in 0..units.len() as u64 {
        put(&slot.memory, unit, &|_| POISON);
    }
    let pager: Pager = {
        let (units, memory) = (Arc::clone(&units), slot.memory.clone());
        let careless = sabotage == Some(Sabotage::Own);
        Box::new(move |mmu, fault| {
            let seq = mmu.invalidate_seq();
            let number = (fault.gfn.0 - BASE) / unit_pages;
            let mut unit = units[number as usize].lock().unwrap();
            if !unit.present && !careless {
                unit.served += 1;
                let version = unit.served;
                put(&memory, number, &|page| value(version, page));
                unit.present = true;
            }
            drop(unit);
            Some(fault.with_seq(seq).with_max_level(level))
        })
    };
    assert!(machine.hooks.pager.set(pager).is_ok());
    let reads = AtomicU64::new(0);
    let newest: Vec<Vec<AtomicU64>> = (0..3)
        .map(|_| (0..PAGES).map(|_| AtomicU64::new(0)).collect())
        .collect();
    let program = |cpu: &mut Cpu<'_>| {
        let newest = &newest[cpu.number as usize];
        for _ in 0..64 {
            let page = cpu.random.below(PAGES);
            let seen = cpu.read(BASE + page).map_err(|error| error.to_string())?;
            reads.fetch_add(1, Relaxed);
            check(seen != POISON, || {
                format!("page {page} was seen after it was taken back")
            })?;
            check(seen & 0xffff_ffff == page, || {
                format!("page {page} shows {seen:#x}")
            })?;
            let before = newest[page as usize].swap(seen >> 32, Relaxed);
            check(before <= seen >> 32, || {
                format!("page {page} shows version {} after {before}", seen >> 32)
            })?;
        }
        Ok(())
    };
    let owner = || {
        machine.run()?;
        machine.until(|| reads.load(Relaxed) > 1000)?;
        machine.sabotage(sabotage);
        let mut random = machine.random(99);
        for round in 0..ROUNDS {
            let first = random.below(units.len() as u64);
            let count = (1 + random.below(3)).min(units.len() as u64 - first);
            let range = GfnRange::new(Gfn(BASE + first * unit_pages), count * unit_pages);
            let begun = machine.mmu().space(0).invalidate_begin(range, true);
            for unit in first..first + count {
                let mut state = units[unit as usize].lock().unwrap();
                state.taken += u64::from(state.present);
                state.present = false;
                put(&slot.memory, unit, &|_| POISON);
            }
            for gfn in range.start.0..range.end.0 {
                let mapped = machine.mmu().space(0).translate(Gfn(gfn));
                check(mapped.is_none(), || {
                    format!("{gfn:#x} is mapped while it is taken: {mapped:?}")
                })?;
            }
            machine.mmu().invalidate_end(begun).unwrap();
            if round % 3 == 0 {
                let goal = reads.load(Relaxed) + 100;
                machine.until(|| reads.load(Relaxed) >= goal)?;
            }
        }
        machine.pause()?;
        let mut served = 0;
        for (number, unit) in units.iter().enumerate() {
            let unit = unit.lock().unwrap();
            check(unit.served == unit.taken + u64::from(unit.present), || {
                format!("unit {number}: {unit:?}")
            })?;
            served += unit.served;
            let first = Gfn(BASE + number as u64 * unit_pages);
            let mapped = machine.mmu().space(0).translate(first);
            check(mapped.is_none() || unit.present, || {
                format!("unit {number} is mapped and not there")
            })?;
            check(mapped.is_none_or(|found| found.level == level), || {
                format!("{mapped:?}")
            })?;
        }
        check(served > ROUNDS / 4, || {
            format!("only {served} units were served")
        })
    };
    machine.with_vcpus(program, owner)
}

#[test]
fn every_page_is_served_once_and_never_seen_before() {
    for stage in stages() {
        accepts(oracle(stage, Level::SIZE_4K, None));
    }
}

#[test]
fn huge_pages_too() {
    for stage in stages() {
        accepts(oracle(stage, Level::SIZE_2M, None));
    }
}

#[test]
fn it_objects_to_vcpus_that_do_not_flush() {
    for stage in stages() {
        objects(
            oracle(stage, Level::SIZE_4K, Some(Sabotage::Deaf)),
            "after it was taken back",
        );
        objects(
            oracle(stage, Level::SIZE_2M, Some(Sabotage::Deaf)),
            "after it was taken back",
        );
    }
}

#[test]
fn it_objects_to_pages_mapped_before_they_are_served() {
    objects(
        oracle(GuestStage::Ept4, Level::SIZE_4K, Some(Sabotage::Own)),
        "after it was taken back",
    );
}
