//! `dirty_log_page_splitting_test`: how many mappings of each size there are, before, in and after
//! logging, while vCPUs run.
//!
//! Without manual protection all are split when logging begins; with the log initially set none is
//! until the first clear. When logging ends the counts are what they were, in place: before
//! anything was touched again.

use slat_mmu::{DirtyLogStart, Level, MmuStats};

use super::*;

/// A slot of one 1 GiB page, and one of two 2 MiB pages.
const SLOTS: [(u64, u64); 2] = [(1 << 18, 1 << 18), ((2 << 18) + 512, 1024)];
const HUGE: u64 = 512;

fn pages(stats: &MmuStats) -> [i64; 3] {
    [Level::SIZE_4K, Level::SIZE_2M, Level::SIZE_1G].map(|level| stats.pages_at(level))
}

fn oracle(stage: GuestStage, start: DirtyLogStart, sabotage: Option<Sabotage>) -> Outcome {
    let config = MmuConfig::default()
        .with_dirty_log_start(start)
        .with_eager_split(sabotage != Some(Sabotage::Own));
    let machine = OracleVm::new("dirty_log_page_splitting_test", stage, 2, config);
    let slots =
        [0, 1].map(|id| machine.plug(id, SLOTS[usize::from(id)].0, SLOTS[usize::from(id)].1));
    let total = SLOTS.iter().map(|(_, pages)| *pages as i64).sum();
    let touched = AtomicU64::new(0);
    let program = |cpu: &mut Cpu<'_>| {
        // A page of each 2 MiB, or some, by both vCPUs.
        for (base, pages) in SLOTS {
            let step = if pages > 1024 { 16 * HUGE } else { HUGE };
            for gfn in (base..base + pages).step_by(step as usize) {
                let access = if cpu.random.below(2) == 0 {
                    cpu.write(gfn + 2 * cpu.number, gfn)
                } else {
                    cpu.read(gfn).map(drop)
                };
                access.map_err(|error| error.to_string())?;
            }
        }
        touched.fetch_add(1, Relaxed);
        Ok(())
    };
    let owner = || {
        let now = || pages(&machine.mmu().stats());
        let touch = || {
            let goal = touched.load(Relaxed) + 2;
            machine.until(|| touched.load(Relaxed) >= goal)
        };
        let expect = |when: &str, found: [i64; 3], wanted: [i64; 3]| {
            check(found == wanted, || {
                format!("{when}: mappings of 4 KiB, 2 MiB, 1 GiB are {found:?}, not {wanted:?}")
            })
        };
        machine.run()?;
        touch()?;
        let populated = now();
        expect("populated", populated, [0, 2, 1])?;
        for round in 0..2 {
            if sabotage.is_some() {
                // So that no write splits what was left.
                machine.pause()?;
            }
            slots.iter().for_each(|slot| machine.log(slot, true));
            let split = [total, 0, 0];
            if start == DirtyLogStart::InitiallySet {
                touch()?;
                expect("initially set, enabled", now(), populated)?;
                for slot in &slots {
                    let pages = slot.memory.guest().pages();
                    let all = vec![u64::MAX; pages.div_ceil(64) as usize];
                    let cleared = machine
                        .mmu()
                        .space(0)
                        .clear_dirty_log(slot.id, 0, pages, &all);
                    check(cleared == Ok(pages), || {
                        format!("cleared {cleared:?} of {pages}")
                    })?;
                }
                expect("initially set, cleared", now(), split)?;
            } else {
                expect("enabled", now(), split)?;
            }
            touch()?;
            expect("in use while logging", now(), split)?;
            slots.iter().for_each(|slot| machine.log(slot, false));
            expect("disabled", now(), populated)?;
            touch()?;
            expect(&format!("in use again, round {round}"), now(), populated)?;
        }
        let stats = machine.mmu().stats();
        check(stats.splits >= 2 * 3 && stats.recovered >= 2 * 3, || {
            format!("{stats:?}")
        })
    };
    machine.with_vcpus(program, owner)
}

#[test]
fn the_counts_are_those_of_the_selftest() {
    for stage in stages() {
        accepts(oracle(stage, DirtyLogStart::Protected, None));
        accepts(oracle(stage, DirtyLogStart::InitiallySet, None));
    }
}

#[test]
fn it_objects_to_huge_pages_left_when_logging_begins() {
    for stage in stages() {
        objects(
            oracle(stage, DirtyLogStart::Protected, Some(Sabotage::Own)),
            "enabled: mappings",
        );
    }
}
