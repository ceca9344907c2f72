//! `pre_fault_memory_test`: ranges mapped in advance, to the slot's end and beyond, while the slot
//! is deleted and made again.
//!
//! What was mapped in advance takes no fault. Where a range leaves the slot the pages before are
//! mapped and the rest is said. A slot that goes meanwhile makes the caller try again or says that
//! there is no slot: nothing hangs, and nothing maps the memory of a slot that is gone.

use slat_mmu::{FaultOutcome, Level, PrefaultError};

use super::*;

/// 2 MiB and 4 KiB.
const PAGES: u64 = 513;

/// The first frame: the last place in the format that is aligned for a huge page.
fn base(stage: GuestStage) -> u64 {
    stage.info().max_gfn.0 - 1024
}

fn oracle(stage: GuestStage, level: Level, sabotage: Option<Sabotage>) -> Outcome {
    let machine = OracleVm::new("pre_fault_memory_test", stage, 1, MmuConfig::default());
    let base = base(stage);
    let slot = machine.plug(0, base, PAGES);
    let mmu = machine.mmu();
    let wrong = |what: &str, result: Result<u64, PrefaultError>| Err(format!("{what}: {result:?}"));
    machine.alone(|cpu| {
        let mut prefault = |gfn, pages| {
            cpu.outside(|vcpu| {
                mmu.prefault(&mut vcpu.context, GfnRange::new(Gfn(gfn), pages), level)
            })
        };
        let last = Gfn(base + PAGES);
        let wanted = if sabotage.is_some() { 511 } else { 512 };
        match prefault(base, wanted) {
            Ok(pages) if pages == wanted => {}
            other => return wrong("2 MiB", other),
        }
        match prefault(base + 512, 2) {
            Err(PrefaultError::NoSlot { gfn, done: 1 }) if gfn == last => {}
            other => return wrong("one page in, one out", other),
        }
        match prefault(base + PAGES, 1) {
            Err(PrefaultError::NoSlot { gfn, done: 0 }) if gfn == last => {}
            other => return wrong("outside", other),
        }
        match prefault(base + 1024, 1) {
            Err(PrefaultError::Failed {
                outcome: FaultOutcome::OutOfRange,
                done: 0,
                ..
            }) => {}
            other => return wrong("beyond the format", other),
        }
        match prefault(base, 0) {
            Ok(0) => {}
            other => return wrong("nothing", other),
        }
        let before = mmu.stats();
        check(before.faults_taken == 0, || format!("{before:?}"))?;
        for page in 0..PAGES {
            cpu.write(slot.base + page, page)
                .map_err(|error| error.to_string())?;
        }
        let faults = mmu.stats().faults_taken;
        check(faults == 0, || {
            format!("{faults} faults on memory mapped in advance")
        })
    })
}

/// Prefaults from every vCPU, under deletions.
fn racing(stage: GuestStage, sabotage: Option<Sabotage>) -> Outcome {
    let machine = OracleVm::new(
        "pre_fault_memory_test, racing",
        stage,
        2,
        MmuConfig::default(),
    )
    .prepare(sabotage);
    let base = base(stage);
    let (version, generation) = (Version::default(), AtomicU64::new(0));
    let (done, torn) = (AtomicU64::new(0), AtomicU64::new(0));
    let program = |cpu: &mut Cpu<'_>| {
        let before = version.now();
        let wanted = generation.load(Relaxed);
        let level = if cpu.random.below(2) == 0 {
            Level::SIZE_4K
        } else {
            Level::SIZE_1G
        };
        let range = GfnRange::new(Gfn(base), PAGES);
        // Another vCPU may own an entry for as long as it is not scheduled: then one tries again,
        // and gets through.
        let mut result = Ok(0);
        for _ in 0..10_000 {
            result = cpu.outside(|vcpu| machine.mmu().prefault(&mut vcpu.context, range, level));
            if !matches!(result, Err(PrefaultError::Again { .. })) || version.now() != before {
                break;
            }
        }
        let page = cpu.random.below(PAGES);
        let seen = cpu.read(base + page);
        let stable = before % 2 == 0 && version.now() == before;
        match (&result, &seen, wanted) {
            (Ok(PAGES), Ok(seen), _) if stable => {
                check(wanted == *seen, || {
                    format!("generation {seen} is seen, not {wanted}")
                })?;
                done.fetch_add(1, Relaxed);
            }
            (Err(PrefaultError::NoSlot { done: 0, .. }), seen, 0) if stable => {
                check(is_mmio(seen), || format!("{seen:?} is seen without a slot"))?;
            }
            _ if stable => {
                return Err(format!(
                    "prefault {result:?}, then {seen:?}, of generation {wanted}"
                ));
            }
            (Ok(PAGES) | Err(PrefaultError::NoSlot { .. } | PrefaultError::Again { .. }), _, _) => {
                torn.fetch_add(1, Relaxed);
            }
            _ => return Err(format!("prefault: {result:?}")),
        }
        Ok(())
    };
    let owner = || {
        machine.run()?;
        for round in 1..=30 {
            let memory = Region::new("racing", PAGES).unwrap();
            (0..PAGES).for_each(|page| memory.host().store((page * PAGE_SIZE) as usize, round));
            let slot = version.change(|| {
                generation.store(round, Relaxed);
                machine.plug_in(0, base, memory)
            });
            if round % 4 == 0 {
                let goal = done.load(Relaxed) + 2;
                machine.until(|| done.load(Relaxed) >= goal)?;
            }
            if round == 6 {
                machine.sabotage(sabotage);
            }
            version.change(|| {
                machine.unplug(&slot);
                generation.store(0, Relaxed);
            });
            check(
                machine.mmu().stats().pages.iter().all(|pages| *pages == 0),
                || "a deleted slot is still mapped".to_owned(),
            )?;
        }
        machine.pause()
    };
    machine.with_vcpus(program, owner)
}

#[test]
fn what_is_mapped_in_advance_takes_no_fault() {
    for stage in stages() {
        accepts(oracle(stage, Level::SIZE_1G, None));
        accepts(oracle(stage, Level::SIZE_4K, None));
    }
}

#[test]
fn deletions_meanwhile_are_said() {
    for stage in stages() {
        accepts(racing(stage, None));
    }
}

#[test]
fn it_objects_to_a_page_that_was_left_out() {
    for stage in stages() {
        objects(
            oracle(stage, Level::SIZE_4K, Some(Sabotage::Own)),
            "1 faults on memory",
        );
    }
}

#[test]
fn it_objects_to_vcpus_that_do_not_flush() {
    for stage in stages() {
        objects(racing(stage, Some(Sabotage::Deaf)), "");
    }
}
