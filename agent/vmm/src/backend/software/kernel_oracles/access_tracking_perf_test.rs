//! `access_tracking_perf_test`: marking memory idle, and finding what was used since.
//!
//! Exactly the pages used since the last ageing are young, once the vCPU's TLB let go of them
//! (ageing owes no flush: idle is a hint). Where hardware keeps no Accessed bit, each first use
//! takes one fault, without the MMU lock. Ageing under running vCPUs loses no write.

use slat_mmu::{AdPolicy, Flush, Level};

use super::*;

const BASE: u64 = 1 << 19;
const PAGES: u64 = 2048;

fn one(page: u64) -> GfnRange {
    GfnRange::new(Gfn(BASE + page), 1)
}

fn oracle(stage: GuestStage, sabotage: Option<Sabotage>) -> Outcome {
    let config = MmuConfig::default().with_max_level(Level::SIZE_4K);
    let machine = OracleVm::new("access_tracking_perf_test", stage, 1, config);
    let slot = machine.plug(0, BASE, PAGES);
    let mmu = machine.mmu();
    machine.alone(|cpu| {
        for page in 0..PAGES {
            cpu.write(BASE + page, page)
                .map_err(|error| error.to_string())?;
        }
        for round in 0..4 {
            for page in 0..PAGES {
                check(mmu.space(0).test_age(one(page)) || round > 0, || {
                    format!("page {page} was written and is idle")
                })?;
            }
            check(mmu.space(0).age(slot.range()), || {
                "nothing was young".to_owned()
            })?;
            check(
                !mmu.space(0).test_age(slot.range()) && !mmu.space(0).age(slot.range()),
                || "pages are young right after they were aged".to_owned(),
            )?;
            if sabotage.is_none() {
                cpu.vcpu.tlb.flush(Flush::All);
            }
            let before = mmu.stats();
            let mut used = std::collections::BTreeSet::new();
            for _ in 0..PAGES / 10 {
                // Late pages, so that some are in the TLB.
                let page = PAGES - 1 - cpu.random.below(PAGES / 2);
                used.insert(page);
                let seen = cpu.read(BASE + page).map_err(|error| error.to_string())?;
                check(seen & 0xffff == page, || {
                    format!("page {page} holds {seen:#x}")
                })?;
                if cpu.random.below(2) == 0 {
                    cpu.write(BASE + page, (round + 1) << 16 | page)
                        .map_err(|error| error.to_string())?;
                }
            }
            for page in 0..PAGES {
                let young = mmu.space(0).test_age(one(page));
                check(young == used.contains(&page), || {
                    format!("page {page} is young: {young}, used: {}", !young)
                })?;
            }
            let stats = mmu.stats();
            let (faults, fast) = (
                stats.faults_taken - before.faults_taken,
                stats.faults_fast - before.faults_fast,
            );
            let wanted = match stage.info().ad_policy {
                AdPolicy::Hardware => 0..=0,
                _ => used.len() as u64..=2 * used.len() as u64,
            };
            check(wanted.contains(&faults), || {
                format!("{faults} faults for {} first uses", used.len())
            })?;
            check(fast == faults, || {
                format!("{fast} of {faults} faults took no lock")
            })?;
        }
        Ok(())
    })
}

#[test]
fn exactly_what_was_used_is_young() {
    for stage in stages() {
        accepts(oracle(stage, None));
    }
}

#[test]
fn it_objects_when_a_tlb_hides_uses() {
    for stage in stages() {
        objects(oracle(stage, Some(Sabotage::Own)), "is young: false");
    }
}

#[test]
fn a_huge_page_is_young_as_a_whole() {
    for stage in stages() {
        let machine = OracleVm::new("access_tracking_perf_test", stage, 1, MmuConfig::default());
        let slot = machine.plug(0, BASE, PAGES);
        machine.alone(|cpu| {
            cpu.write(BASE + 5, 1).unwrap();
            cpu.write(BASE + 600, 1).unwrap();
            assert!(machine.mmu().space(0).age(slot.range()));
            cpu.vcpu.tlb.flush(Flush::All);
            cpu.read(BASE + 700).unwrap();
        });
        assert!(
            machine.mmu().space(0).test_age(one(512)) && !machine.mmu().space(0).test_age(one(5)),
            "{stage}"
        );
    }
}

#[test]
fn ageing_under_running_vcpus_loses_nothing() {
    for stage in stages() {
        let machine = OracleVm::new(
            "access_tracking_perf_test, running",
            stage,
            2,
            MmuConfig::default(),
        );
        let slot = machine.plug(0, BASE, PAGES);
        let used = AtomicU64::new(0);
        let last: Vec<AtomicU64> = (0..PAGES).map(|_| AtomicU64::new(0)).collect();
        let program = |cpu: &mut Cpu<'_>| {
            let page = cpu.random.below(PAGES / 2) * 2 + cpu.number;
            let wanted = last[page as usize].load(Relaxed);
            let seen = cpu.read(BASE + page).map_err(|error| error.to_string())?;
            check(seen == wanted, || {
                format!("page {page} holds {seen}, not {wanted}")
            })?;
            cpu.write(BASE + page, wanted + 1)
                .map_err(|error| error.to_string())?;
            last[page as usize].store(wanted + 1, Relaxed);
            used.fetch_add(1, Relaxed);
            Ok(())
        };
        let owner = || {
            machine.run()?;
            let mut random = machine.random(99);
            for round in 0..60 {
                if round % 3 == 0 {
                    let goal = used.load(Relaxed) + 30;
                    machine.until(|| used.load(Relaxed) >= goal)?;
                }
                let piece = GfnRange::new(Gfn(BASE + random.below(PAGES)), 1 + random.below(PAGES));
                machine.mmu().space(0).age(piece);
                if round % 10 == 0 {
                    machine.log(&slot, round % 20 == 0);
                }
            }
            machine.pause()
        };
        accepts(machine.with_vcpus(program, owner));
    }
}
